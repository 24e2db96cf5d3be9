//! What must survive a restart of the daemon or the host: the term, and who was active.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use ft_core::Term;
use ft_core::wire::crc32c;
use nix::fcntl::{Flock, FlockArg};

/// Two records take turns, so that a torn write leaves the one before it.
const RECORD_BYTES: usize = 32;
const MAGIC: u32 = 0x5473_4343; // "CCsT"

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) term: Term,
    /// The backup may hold a complete epoch of the guest that runs here.
    pub(crate) protected: bool,
    /// The guest was activated here, in this term.
    pub(crate) activated: bool,
}

/// A small file of fixed size, written in place: a full disk can't fail it.
#[derive(Debug)]
pub(crate) struct StateStore {
    file: Flock<File>,
    path: PathBuf,
    state: State,
    serial: u64,
}

impl StateStore {
    /// Opens or makes `DIR/VM-ID-MODE.state`, and keeps other daemons away from it.
    ///
    /// # Errors
    /// Another daemon has it, it is damaged, or the directory can't be written.
    pub(crate) fn open(dir: &Path, vm_id: &str, mode: &str) -> anyhow::Result<StateStore> {
        fs::create_dir_all(dir)
            .with_context(|| format!("making the state directory {} (see --state-dir)", dir.display()))?;
        let path = dir.join(format!("{vm_id}-{mode}.state"));
        let shown = path.display();
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).with_context(|| format!("opening {shown}"))?;
        let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => bail!(
                "another {mode} daemon of the VM {vm_id} is running (it holds {shown}): end that, \
                 or use another --vm-id or --state-dir"
            ),
            Err((_, error)) => return Err(error).with_context(|| format!("locking {shown}")),
        };
        let length = file.metadata().with_context(|| format!("reading {shown}"))?.len();
        let mut store = StateStore { file, path: path.clone(), state: State::default(), serial: 0 };
        if length == 0 {
            // Both records at once: from here on the file never grows.
            store.write(0).and_then(|()| store.write(1))?;
            return Ok(store);
        }
        let records = [0, 1].map(|slot| store.read(slot));
        let newest = records.into_iter().flatten().max_by_key(|(serial, _)| *serial);
        let Some((serial, state)) = newest else {
            bail!(
                "{shown} is damaged: it says which of the two hosts may run the guest. If you are \
                 sure that the guest runs nowhere else, remove the file"
            );
        };
        (store.serial, store.state) = (serial, state);
        Ok(store)
    }

    pub(crate) fn load(&self) -> State {
        self.state
    }

    /// # Errors
    /// The disk fails; the earlier state is still there.
    pub(crate) fn store(&mut self, state: State) -> anyhow::Result<()> {
        self.state = state;
        self.serial += 1;
        self.write(self.serial % 2)
    }

    fn write(&self, slot: u64) -> anyhow::Result<()> {
        let mut record = [0; RECORD_BYTES];
        record[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        record[4] = u8::from(self.state.protected);
        record[5] = u8::from(self.state.activated);
        record[8..16].copy_from_slice(&self.serial.to_le_bytes());
        record[16..24].copy_from_slice(&self.state.term.0.to_le_bytes());
        let checksum = crc32c(&record[..28]);
        record[28..].copy_from_slice(&checksum.to_le_bytes());
        self.file
            .write_all_at(&record, slot * RECORD_BYTES as u64)
            .and_then(|()| self.file.sync_data())
            .with_context(|| format!("writing {}", self.path.display()))
    }

    fn read(&self, slot: u64) -> Option<(u64, State)> {
        let mut record = [0; RECORD_BYTES];
        self.file.read_exact_at(&mut record, slot * RECORD_BYTES as u64).ok()?;
        let number = |range: std::ops::Range<usize>| -> Option<u64> {
            let mut bytes = [0; 8];
            bytes[..range.len()].copy_from_slice(record.get(range)?);
            Some(u64::from_le_bytes(bytes))
        };
        let sound = number(0..4)? == u64::from(MAGIC)
            && number(28..32)? == u64::from(crc32c(&record[..28]))
            && record[4] <= 1
            && record[5] <= 1;
        let state = State {
            term: Term(number(16..24)?),
            protected: record[4] == 1,
            activated: record[5] == 1,
        };
        sound.then_some((number(8..16)?, state))
    }
}
