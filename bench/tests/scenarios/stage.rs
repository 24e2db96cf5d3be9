//! What every scenario needs.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::cache;
use bench::daemon::Daemon;
use bench::guest::{Guest, Work};
use bench::pair::{Pair, Setup, Watch};
use bench::process::{Process, Workplace};
use bench::qmp::Qmp;
use serde_json::{Value, json};

/// The machine has few processors, and emulated guests want them all.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// For anything that takes milliseconds on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A QEMU and a machine.
#[derive(Clone, Debug)]
pub(crate) struct Kind {
    qemu: PathBuf,
    pub(crate) machine: &'static str,
    vcpus: u32,
}

impl Kind {
    pub(crate) fn stable() -> Kind {
        Kind {
            qemu: "qemu-system-x86_64".into(),
            machine: "pc",
            vcpus: 1,
        }
    }

    pub(crate) fn newer() -> Result<Kind> {
        Ok(Kind {
            qemu: cache::qemu_10()?,
            machine: "q35",
            vcpus: 2,
        })
    }
}

/// A folder and a kind of QEMU for one scenario.
#[derive(Debug)]
pub(crate) struct Stage {
    place: Workplace,
    pub(crate) kind: Kind,
}

/// Runs a scenario, and shows all logs if it fails.
pub(crate) fn run(name: &str, kind: Kind, scenario: fn(&Stage) -> Result<()>) -> Result<()> {
    let _one = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let stage = Stage {
        place: Workplace::new(name)?,
        kind,
    };
    let result = scenario(&stage);
    if result.is_err() {
        show_logs(stage.dir());
    }
    result
}

impl Stage {
    pub(crate) fn dir(&self) -> &Path {
        self.place.path()
    }

    /// A boot sector that counts and writes 16 pages per loop, in 64 MiB; every boundary is copied.
    pub(crate) fn boot_sector(&self) -> Result<Setup> {
        let guest = Guest {
            machine: self.kind.machine.to_owned(),
            vcpus: self.kind.vcpus,
            ram_mib: 64,
            work: Work::BootSector,
            ..Guest::tick(&self.kind.qemu)?
        };
        // Proof of death doesn't wait for it, and a machine that is busy with other tests may keep
        // a daemon off its processors for longer than the default.
        let options = ["--failover-after-ms", "8000"].map(str::to_owned).to_vec();
        Ok(Setup {
            guest,
            watch: Watch::AllRam,
            floors: None,
            options,
        })
    }

    /// Linux; only its counter is watched.
    pub(crate) fn linux(&self) -> Result<Setup> {
        let mut setup = self.boot_sector()?;
        setup.guest.work = Work::Tick;
        setup.guest.ram_mib = 256;
        setup.watch = Watch::Tick;
        Ok(setup)
    }

    pub(crate) fn pair(&self, setup: &Setup) -> Result<Pair> {
        Pair::start(self.dir(), setup)
    }

    /// A QMP connection of the test's own.
    pub(crate) fn qmp(&self, role: &str) -> Result<Qmp> {
        Qmp::connect(&self.dir().join(format!("{role}.test")))
    }

    /// Types a letter at a Linux guest's console, which passes whole lines on.
    pub(crate) fn type_at(&self, role: &str, letter: u8) -> Result<()> {
        let path = self.dir().join(format!("{role}.serial"));
        let mut serial = UnixStream::connect(path).context("connecting to the console")?;
        serial.write_all(&[letter, b'\n'])?;
        // QEMU takes what is typed when the guest has room for it.
        std::thread::sleep(Duration::from_secs(2));
        Ok(())
    }

    /// Waits until a Linux guest has booted `times` times on a console.
    pub(crate) fn wait_boots(&self, role: &str, times: usize) -> Result<()> {
        let console = self.dir().join(format!("{role}.console"));
        wait_until("the guest boots", bench::pair::BOOT_PATIENCE, || {
            let said = std::fs::read(&console).unwrap_or_default();
            let said = String::from_utf8_lossy(&said);
            Ok(said.matches("TICKPAGE").count() >= times)
        })
    }

    /// Starts another standby with a daemon of its own where the first one listened.
    pub(crate) fn new_backup(&self, name: &str, setup: &Setup, peer: &str) -> Result<Backup> {
        let dir = self.dir().join(name);
        std::fs::create_dir(&dir)?;
        let standby = setup.guest.start(&dir, "standby", true)?;
        Qmp::connect(&dir.join("standby.test"))?;
        let qmp = dir.join("standby.qmp").display().to_string();
        let options = ["--listen".into(), peer.to_owned(), "--qmp".into(), qmp];
        let daemon = Daemon::start(&dir, "backup", &options)?;
        Ok(Backup {
            daemon,
            standby,
            dir,
        })
    }

    /// Starts another primary's daemon for the QEMU of this QMP socket.
    pub(crate) fn new_primary(
        &self,
        name: &str,
        setup: &Setup,
        peer: &str,
        qmp: &Path,
    ) -> Result<Daemon> {
        let dir = self.dir().join(name);
        std::fs::create_dir(&dir)?;
        let qmp = qmp.display().to_string();
        let mut options = vec![
            "--peer".to_owned(),
            peer.to_owned(),
            "--qmp".to_owned(),
            qmp,
        ];
        options.extend(setup.options.iter().cloned());
        Daemon::start(&dir, "primary", &options)
    }
}

/// A standby and its daemon, with nothing in between.
#[derive(Debug)]
pub(crate) struct Backup {
    pub(crate) daemon: Daemon,
    pub(crate) standby: Process,
    pub(crate) dir: PathBuf,
}

/// Waits for the failover, and compares what the standby has loaded with the copy of the boundary
/// that it names.
pub(crate) fn check_survivor(pair: &mut Pair) -> Result<Value> {
    let failover = pair.backup.wait_event("failover", PATIENCE)?;
    let epoch = failover["epoch"]
        .as_u64()
        .context("the failover names no epoch")?;
    pair.taken(|taken| {
        let numbers: Vec<u64> = taken.boundaries.iter().map(|b| b.number).collect();
        let boundary = taken.boundaries.iter().find(|b| b.number == epoch);
        let boundary = boundary.with_context(|| format!("epoch {epoch} is not in {numbers:?}"))?;
        let Some(copy) = &boundary.copy else {
            let first = taken
                .standby_tick
                .context("the standby's counter was not read")?;
            let last = boundary.tick;
            ensure!(
                first == last || first == last + 1,
                "resumed at {first} instead of {last}"
            );
            return Ok(());
        };
        let standby = taken
            .standby
            .as_ref()
            .context("the standby was not copied")?;
        match copy.difference(standby) {
            Some(difference) => bail!("epoch {epoch} is torn: {difference}"),
            None => Ok(()),
        }
    })?;
    pair.wait_ticking(10, PATIENCE)?;
    Ok(failover)
}

/// Waits for `more` epochs after those that were.
pub(crate) fn wait_epochs(primary: &mut Daemon, more: usize) -> Result<()> {
    let wanted = primary.numbers("epoch", "epoch").len() + more;
    wait_until("epochs go on", PATIENCE, || {
        ensure!(
            primary.process.wait(Duration::ZERO)?.is_none(),
            "the daemon has ended"
        );
        Ok(primary.numbers("epoch", "epoch").len() >= wanted)
    })
}

/// The exit code of a daemon that is expected to end.
pub(crate) fn exit_code(daemon: &mut Daemon) -> Result<i32> {
    let status = daemon.process.wait(PATIENCE)?;
    let status = status.with_context(|| format!("{} does not end", daemon.process.name))?;
    status
        .code()
        .with_context(|| format!("{} ended by {status}", daemon.process.name))
}

/// Says something to a daemon, as an operator.
pub(crate) fn operate(daemon: &Daemon, what: &str) -> Result<Output> {
    daemon.operate(what)
}

pub(crate) fn run_state(qmp: &mut Qmp) -> Result<String> {
    let status = qmp.call("query-status", json!({}))?;
    Ok(status["status"].as_str().unwrap_or_default().to_owned())
}

pub(crate) fn wait_until(
    what: &str,
    patience: Duration,
    mut is_so: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + patience;
    while !is_so()? {
        ensure!(
            Instant::now() < deadline,
            "waited {patience:?} in vain: {what}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Says that something can't be tried here, past the harness, which shows nothing of a test that passes:
/// scripts/test counts these lines.
pub(crate) fn not_run(what: &str, why: &str) -> Result<()> {
    let line = format!("\n--- {what}: NOT RUN: {why}\n");
    Ok(std::io::stderr().write_all(line.as_bytes())?)
}

/// The file of a QEMU's main RAM, by way of its descriptor.
pub(crate) fn ram_file(qemu: &Process) -> Result<PathBuf> {
    for entry in std::fs::read_dir(format!("/proc/{}/fd", qemu.pid()))? {
        let path = entry?.path();
        let target = std::fs::read_link(&path).unwrap_or_default();
        if target
            .to_string_lossy()
            .starts_with("/memfd:memory-backend-memfd")
        {
            return Ok(path);
        }
    }
    bail!("QEMU {} has no RAM file", qemu.pid())
}

fn show_logs(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        if path.is_dir() {
            show_logs(&path);
        } else if path.extension().is_some_and(|e| e == "log") {
            let said = std::fs::read_to_string(&path).unwrap_or_default();
            eprintln!("--- {}\n{said}", path.display());
        }
    }
}
