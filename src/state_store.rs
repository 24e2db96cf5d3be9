//! What must survive a restart of the daemon or of the host: the term, and who was active.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, bail};
use ft_core::Term;
use ft_core::wire::crc32c;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Two records take turns, so that a torn write leaves the one before it.
const RECORDS: u64 = 2;
/// Each has a sector and a page of its own: what tears one leaves the other alone.
const RECORD_STRIDE: u64 = 4096;
const RECORD_BYTES: usize = 32;
const MAGIC: [u8; 4] = *b"CRs1";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) term: Term,
    /// The backup may hold a complete epoch of the guest that runs here.
    pub(crate) protected: bool,
    /// The guest was activated here, in this term.
    pub(crate) activated: bool,
}

/// A small file of fixed size, written in place: a full disk can't fail it. While it is open, no
/// other daemon can open it.
#[derive(Debug)]
pub(crate) struct StateStore {
    file: Flock<File>,
    path: PathBuf,
    latest: Record,
}

impl StateStore {
    /// Opens or makes `DIR/VM-ID-MODE.state`.
    ///
    /// # Errors
    /// Another daemon has it, it is damaged, or the directory can't be written.
    pub(crate) fn open(dir: &Path, vm_id: &str, mode: &str) -> anyhow::Result<StateStore> {
        let make = || {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
        };
        make().with_context(|| {
            format!(
                "making the state directory {} (see --state-dir)",
                dir.display()
            )
        })?;
        let path = dir.join(format!("{vm_id}-{mode}.state"));
        let shown = path.display();
        if !path.exists() {
            create(dir, &path)
                .with_context(|| format!("making the state file {shown} (see --state-dir)"))?;
        }
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("opening the state file {shown}"))?;
        let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((_, Errno::EWOULDBLOCK)) => bail!(
                "another {mode} daemon of the VM {vm_id} runs on this host (it holds {shown}): end \
                 that one, or give this one another --vm-id or --state-dir"
            ),
            Err((_, error)) => return Err(error).with_context(|| format!("locking {shown}")),
        };
        let records = [read(&file, 0), read(&file, 1)];
        if records.iter().flatten().count() == 1 {
            tracing::warn!("{shown}: one of two records is damaged, the other one counts");
        }
        let Some(latest) = records
            .into_iter()
            .flatten()
            .max_by_key(|record| record.serial)
        else {
            bail!(
                "{shown} is damaged, and it says which host may run the guest: make sure that the \
                 guest runs nowhere, then remove the file"
            );
        };
        Ok(StateStore { file, path, latest })
    }

    /// Where it is, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What was stored last.
    pub(crate) fn load(&self) -> State {
        self.latest.state
    }

    /// Returns when it is on the disk.
    ///
    /// # Errors
    /// The disk fails; what was stored before is still there.
    pub(crate) fn store(&mut self, state: State) -> anyhow::Result<()> {
        // After a failure the same record is written again: the other one is the good one.
        let record = Record {
            serial: self.latest.serial + 1,
            state,
        };
        self.file
            .write_all_at(&record.encode(), record.offset())
            .and_then(|()| self.file.sync_data())
            .with_context(|| format!("writing the state file {}", self.path.display()))?;
        self.latest = record;
        Ok(())
    }
}

/// Makes a file that has both records from the moment on that it has its name.
fn create(dir: &Path, path: &Path) -> std::io::Result<()> {
    let draft = path.with_extension(format!("new-{}", process::id()));
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)?;
    let written = (0..RECORDS).try_for_each(|serial| {
        let record = Record {
            serial,
            state: State::default(),
        };
        let mut page = vec![0; RECORD_STRIDE as usize];
        page[..RECORD_BYTES].copy_from_slice(&record.encode());
        file.write_all_at(&page, record.offset())
    });
    let named = written.and_then(|()| file.sync_all()).and_then(|()| {
        match fs::hard_link(&draft, path) {
            // Another daemon was quicker; the lock decides.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    });
    let removed = fs::remove_file(&draft);
    named.and(removed)?;
    File::open(dir)?.sync_all()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    /// The higher one counts.
    serial: u64,
    state: State,
}

impl Record {
    fn offset(self) -> u64 {
        self.serial % RECORDS * RECORD_STRIDE
    }

    /// Little-endian: magic, two flags, two zeros, serial, term, four zeros, checksum.
    fn encode(self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4] = u8::from(self.state.protected);
        bytes[5] = u8::from(self.state.activated);
        bytes[8..16].copy_from_slice(&self.serial.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.state.term.0.to_le_bytes());
        let checksum = crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; RECORD_BYTES]) -> Option<Record> {
        let number = |at: usize| {
            let (eight, _) = bytes[at..]
                .split_first_chunk()
                .expect("records have 32 bytes");
            u64::from_le_bytes(*eight)
        };
        let record = Record {
            serial: number(8),
            state: State {
                term: Term(number(16)),
                protected: bytes[4] == 1,
                activated: bytes[5] == 1,
            },
        };
        // Magic, flags, zeros and checksum in one.
        (record.encode() == *bytes).then_some(record)
    }
}

/// The record in `slot`, if it is sound and belongs there.
fn read(file: &File, slot: u64) -> Option<Record> {
    let offset = slot * RECORD_STRIDE;
    let mut bytes = [0; RECORD_BYTES];
    file.read_exact_at(&mut bytes, offset).ok()?;
    Record::decode(&bytes).filter(|record| record.offset() == offset)
}

#[cfg(test)]
mod tests;
