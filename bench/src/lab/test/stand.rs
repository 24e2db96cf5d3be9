//! One side of a protected guest on a host of the lab: a QEMU, a daemon, and somebody between the
//! two who writes down what the guest's RAM was.
//!
//! What is to outlive the host is written to a folder of `/lab`:
//! - `ROLE.events`: the daemon's own;
//! - `ROLE.said`: a JSON object a line, with `stand` as its name (`up`, `taken`, `missed`,
//!   `boundary`, `loading`, `resumed`, `killed`, `failed`);
//! - `N.boundary`: the RAM at the Nth boundary. It is there before QEMU is asked for the device
//!   state, without which no epoch is complete: so it is there for each epoch that a backup can have;
//! - `standby.loading`: the RAM that the standby was about to load a state for.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::guest_ram::{COUNTER, Digest, FIRST, whole};
use crate::cache;
use crate::guest::{Guest, Work};
use crate::memory::{Copy, Memory};
use crate::pair::{BOOT_PATIENCE, open_memory};
use crate::process::{Process, Workplace};
use crate::proxy::{Hook, Proxy};
use crate::qmp::Qmp;

/// Of the guest. It uses four, the BIOS a little more.
const RAM_MIB: u64 = 32;
/// For what takes milliseconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which side of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Primary,
    Backup,
}

/// What is written down, line by line.
#[derive(Clone, Debug)]
struct Notes(Arc<Mutex<File>>);

/// Serves until its input ends. `options` are the daemon's, beside its mode and its places.
///
/// # Errors
/// Anything does not start.
pub fn serve(role: Role, to: &Path, options: &[String]) -> Result<()> {
    let notes = Notes::new(&to.join(format!("{role}.said")))?;
    let served = Stand::start(role, to, options, &notes).and_then(|mut stand| stand.serve(&notes));
    if let Err(error) = &served {
        notes.say(&json!({"stand": "failed", "text": format!("{error:#}")}));
    }
    served
}

struct Stand {
    // Dropped in this order: a daemon whose QEMU goes first would call that a death.
    daemon: Process,
    qemu: Process,
    _proxy: Proxy,
    /// Counts boundaries.
    boundaries: Arc<Mutex<u64>>,
    memory: Arc<Memory>,
    _place: Workplace,
}

impl Stand {
    fn start(role: Role, to: &Path, options: &[String], notes: &Notes) -> Result<Stand> {
        let place = Workplace::new("stand")?;
        let dir = place.path();
        let mut guest = Guest::tick(Path::new("qemu-system-x86_64"))?;
        guest.ram_mib = RAM_MIB;
        guest.work = Work::Rounds;
        let qemu = guest.start(dir, "qemu", role == Role::Backup)?;
        let memory = Arc::new(open_memory(dir, "qemu", &qemu)?);
        if role == Role::Primary {
            wait_rounds(&memory)?;
        }
        let missing = &memory.missing;
        ensure!(
            missing.is_empty(),
            "RAM blocks that can't be found: {missing:?}"
        );
        let boundaries = Arc::new(Mutex::new(0));
        let hook = match role {
            Role::Primary => primary_hook(&memory, dir, to, notes, &boundaries)?,
            Role::Backup => backup_hook(&memory, to, notes),
        };
        let (socket, behind) = (dir.join("proxy"), dir.join("qemu.qmp"));
        let proxy = Proxy::start(&socket, &behind, None, hook)?;
        let text = |path: PathBuf| path.display().to_string();
        let mut line = [
            "--mode",
            role.name(),
            "--vm-id",
            "lab",
            "--allow-unauthenticated",
        ]
        .map(str::to_owned)
        .to_vec();
        for (option, place) in [
            ("--control", dir.join("control")),
            ("--state-dir", dir.join("state")),
            ("--events", to.join(format!("{role}.events"))),
            ("--qmp", socket),
        ] {
            line.extend([option.to_owned(), text(place)]);
        }
        line.extend_from_slice(options);
        let daemon = Process::start(to, &format!("{role}.daemon"), cache::program()?, &line)?;
        notes.say(&json!({"stand": "up", "daemon": daemon.pid().as_raw(),
            "qemu": qemu.pid().as_raw(), "control": text(dir.join("control"))}));
        Ok(Stand {
            daemon,
            qemu,
            _proxy: proxy,
            boundaries,
            memory,
            _place: place,
        })
    }

    /// Does what its input says: `kill MICROSECONDS` kills both processes so long after the next
    /// boundary, `count` says what the guest counts, `garbage ADDRESS N` connects N times with noise.
    fn serve(&mut self, notes: &Notes) -> Result<()> {
        for line in std::io::stdin().lock().lines() {
            let line = line?;
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["kill", after_us] => self.kill(Duration::from_micros(after_us.parse()?), notes)?,
                ["garbage", at, count] => {
                    throw_garbage(at, count.parse()?)?;
                    notes.say(&json!({"stand": "thrown"}));
                }
                ["count"] => {
                    let count = self.memory.read_u64(COUNTER).ok();
                    notes.say(&json!({"stand": "count", "count": count}));
                }
                _ => notes.say(&json!({"stand": "failed", "text": format!("{line}: what?")})),
            }
        }
        Ok(())
    }

    fn kill(&mut self, after: Duration, notes: &Notes) -> Result<()> {
        let seen = || {
            *self
                .boundaries
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        let before = seen();
        let deadline = Instant::now() + PATIENCE;
        while seen() == before {
            ensure!(Instant::now() < deadline, "no boundary comes any more");
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(after);
        self.daemon.signal(Signal::SIGKILL)?;
        self.qemu.signal(Signal::SIGKILL)?;
        notes.say(&json!({"stand": "killed", "boundary": seen()}));
        Ok(())
    }
}

/// Waits until the guest has begun. Where it counts, and writes, the BIOS has had things of its own.
fn wait_rounds(memory: &Memory) -> Result<()> {
    let deadline = Instant::now() + BOOT_PATIENCE;
    let mut seen = Vec::new();
    while seen.len() < 3 {
        ensure!(Instant::now() < deadline, "the guest does not boot");
        std::thread::sleep(Duration::from_millis(10));
        let count = memory.read_u64(COUNTER)?;
        // The first page is never more than a round, and what passed between the two looks, ahead.
        let ahead = (memory.read_u64(FIRST)? as u32).wrapping_sub(count as u32);
        if count == 0 || ahead > 1000 {
            seen.clear();
        } else if seen.last() != Some(&count) {
            seen.push(count);
        }
    }
    Ok(())
}

/// Connects and says what no primary says.
fn throw_garbage(at: &str, count: usize) -> Result<()> {
    let mut random = File::open("/dev/urandom").context("opening /dev/urandom")?;
    for number in 0..count {
        let mut bytes = vec![0; 1 + number % 512];
        random.read_exact(&mut bytes)?;
        let mut stream = TcpStream::connect(at).context("connecting with garbage")?;
        // The other side may have closed already.
        let _ = stream.write_all(&bytes);
    }
    Ok(())
}

/// Takes the RAM at each boundary before the device state is saved.
fn primary_hook(
    memory: &Arc<Memory>,
    dir: &Path,
    to: &Path,
    notes: &Notes,
    boundaries: &Arc<Mutex<u64>>,
) -> Result<Hook> {
    let (memory, to, notes) = (Arc::clone(memory), to.to_owned(), notes.clone());
    let boundaries = Arc::clone(boundaries);
    let mut qmp = Qmp::connect(&dir.join("qemu.test"))?;
    let mut room = Copy::default();
    let mut number = 0;
    Ok(Box::new(move |command| match command {
        "xen-save-devices-state" => {
            number += 1;
            let took = stopped(&mut qmp)
                .and_then(|()| memory.copy_into(std::mem::take(&mut room)))
                .and_then(|copy| {
                    Digest::of(&copy).write(&to.join(format!("{number}.boundary")))?;
                    let count = whole(&copy);
                    room = copy;
                    count
                });
            match took {
                Ok(count) => {
                    notes.say(&json!({"stand": "taken", "number": number, "count": count}))
                }
                Err(error) => {
                    // QEMU was killed meanwhile. If not, its RAM is missed when it is to be compared.
                    let text = format!("{error:#}");
                    notes.say(&json!({"stand": "missed", "number": number, "text": text}));
                }
            }
        }
        "cont" if *boundaries.lock().unwrap_or_else(PoisonError::into_inner) < number => {
            *boundaries.lock().unwrap_or_else(PoisonError::into_inner) = number;
            notes.say(&json!({"stand": "boundary", "number": number}));
        }
        _ => {}
    }))
}

/// Waits until the `stop` that is under way is done. QEMU carries out one command after the other,
/// whichever monitor they come from.
fn stopped(qmp: &mut Qmp) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while qmp.call("query-status", json!({}))?["status"] != "paused" {
        ensure!(
            Instant::now() < deadline,
            "the guest does not stop for a boundary"
        );
    }
    Ok(())
}

/// Takes the RAM that a failover starts from.
fn backup_hook(memory: &Arc<Memory>, to: &Path, notes: &Notes) -> Hook {
    let (memory, to, notes) = (Arc::clone(memory), to.to_owned(), notes.clone());
    Box::new(move |command| match command {
        "migrate-incoming" => {
            let taken = memory.copy().and_then(|copy| {
                Digest::of(&copy).write(&to.join("standby.loading"))?;
                whole(&copy)
            });
            let (count, torn) = match &taken {
                Ok(count) => (Some(*count), None),
                Err(error) => (None, Some(format!("{error:#}"))),
            };
            notes.say(&json!({"stand": "loading", "count": count, "torn": torn}));
        }
        "cont" => notes.say(&json!({"stand": "resumed"})),
        _ => {}
    })
}

impl Notes {
    fn new(path: &Path) -> Result<Notes> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("opening {}", path.display()))?;
        Ok(Notes(Arc::new(Mutex::new(file))))
    }

    /// In one write, so that a reader sees whole lines.
    fn say(&self, line: &Value) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = file.write_all(format!("{line}\n").as_bytes()) {
            eprintln!("stand: {error}: {line}");
        }
    }
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Role::Primary => "primary",
            Role::Backup => "backup",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Role {
    type Err = String;

    fn from_str(name: &str) -> Result<Role, String> {
        match name {
            "primary" => Ok(Role::Primary),
            "backup" => Ok(Role::Backup),
            _ => Err("the sides are primary and backup".into()),
        }
    }
}
