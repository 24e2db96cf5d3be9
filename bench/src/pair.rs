//! A protected guest: two QEMUs, two daemons, and a proxy before each QEMU.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::daemon::Daemon;
use crate::floor::Floor;
use crate::guest::{Guest, Work};
use crate::memory::{Copy, Memory};
use crate::process::{Process, free_port};
use crate::proxy::{Hook, Proxy};
use crate::qmp::Qmp;
use crate::relay::{Relay, Watcher};

/// Copies that are kept: the acknowledged boundary, the one after it, and one for safety.
const KEPT: usize = 3;
/// Guests boot under emulation, and others may use the machine.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(90);

/// What is copied at each boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// The counter alone: cheap.
    Tick,
    /// Every byte of RAM: the guest stands still for longer.
    AllRam,
}

/// What a boundary looked like, taken while its `cont` was held.
#[derive(Debug)]
pub struct Boundary {
    /// The epoch: one more than the last acknowledged one if there is a relay to tell, else the
    /// number of saves so far, which is wrong after an aborted epoch.
    pub number: u64,
    /// When its `cont` was let through, in microseconds since 1970.
    pub at_us: u64,
    pub tick: u64,
    pub copy: Option<Copy>,
}

/// What the proxies have taken.
#[derive(Debug, Default)]
pub struct Taken {
    pub boundaries: VecDeque<Boundary>,
    /// The standby's RAM while its `migrate-incoming` was held.
    pub standby: Option<Copy>,
    /// For how long it was held to copy it.
    pub standby_held: Duration,
    /// The counter in the standby's RAM while its `cont` was held.
    pub standby_tick: Option<u64>,
}

/// Where the guest has its counter, once it has said so.
type TickPage = Arc<Mutex<Option<u64>>>;

#[derive(Debug)]
pub struct Pair {
    pub primary: Daemon,
    pub backup: Daemon,
    pub guest: Process,
    pub standby: Process,
    pub guest_proxy: Proxy,
    pub standby_proxy: Proxy,
    pub taken: Arc<Mutex<Taken>>,
    /// Between the daemons, if it was asked for.
    pub relay: Option<Relay>,
    /// Where the backup listens.
    pub peer: String,
    pub tick_page: u64,
    pub guest_memory: Memory,
    pub standby_memory: Memory,
}

/// How a pair is set up.
#[derive(Clone, Debug)]
pub struct Setup {
    pub guest: Guest,
    pub watch: Watch,
    /// Measure QEMU's own boundaries as well.
    pub floors: Option<Floor>,
    /// More options of the primary's daemon.
    pub options: Vec<String>,
}

impl Pair {
    /// Boots a guest, and protects it as soon as it has told where its counter is.
    ///
    /// # Errors
    /// Anything does not start.
    pub fn start(dir: &Path, setup: &Setup) -> Result<Pair> {
        Pair::start_between(dir, setup, false)
    }

    /// The same, with a relay between the daemons.
    ///
    /// # Errors
    /// Anything does not start.
    pub fn start_relayed(dir: &Path, setup: &Setup) -> Result<Pair> {
        Pair::start_between(dir, setup, true)
    }

    fn start_between(dir: &Path, setup: &Setup, relayed: bool) -> Result<Pair> {
        let guest = setup.guest.start(dir, "guest", false)?;
        let standby = setup.guest.start(dir, "standby", true)?;
        let guest_memory = open_memory(dir, "guest", &guest)?;
        let standby_memory = open_memory(dir, "standby", &standby)?;
        let tick_page = match setup.guest.work {
            Work::Tick => wait_tick_page(&dir.join("guest.console"))?,
            Work::BootSector | Work::Rounds => wait_boot_sector(&guest_memory)?,
        };
        let page: TickPage = Arc::new(Mutex::new(Some(tick_page)));
        let taken = Arc::new(Mutex::new(Taken::default()));
        let backup_port = free_port()?;
        let relay = relayed.then(|| Relay::start(backup_port)).transpose()?;
        let watcher = relay.as_ref().map(Relay::watch);
        let memory = open_memory(dir, "guest", &guest)?;
        let hook = guest_hook(memory, setup.watch, watcher, &taken, &page);
        let (proxy, qmp) = (dir.join("guest.proxy"), dir.join("guest.qmp"));
        let guest_proxy = Proxy::start(&proxy, &qmp, setup.floors, hook)?;
        let hook = standby_hook(
            open_memory(dir, "standby", &standby)?,
            setup.watch,
            &taken,
            &page,
        );
        let standby_socket = dir.join("standby.proxy");
        let standby_proxy = Proxy::start(&standby_socket, &dir.join("standby.qmp"), None, hook)?;

        let peer = format!("127.0.0.1:{backup_port}");
        let front = relay.as_ref().map_or(backup_port, |relay| relay.port);
        let front = format!("127.0.0.1:{front}");
        let text = |path: &Path| path.display().to_string();
        let backup = ["--listen", &peer, "--qmp", &text(&standby_socket)].map(str::to_owned);
        let backup = Daemon::start(dir, "backup", &backup)?;
        let mut options = ["--peer", &front, "--qmp", &text(&proxy)]
            .map(str::to_owned)
            .to_vec();
        options.extend(setup.options.iter().cloned());
        let mut primary = Daemon::start(dir, "primary", &options)?;
        primary.wait_event("synced", Duration::from_secs(60))?;
        Ok(Pair {
            primary,
            backup,
            guest,
            standby,
            guest_proxy,
            standby_proxy,
            taken,
            relay,
            peer,
            tick_page,
            guest_memory,
            standby_memory,
        })
    }

    /// Kills the primary's daemon and QEMU; microseconds since 1970 of the first kill(2).
    ///
    /// # Errors
    /// One of them was dead already.
    pub fn kill_host(&mut self) -> Result<u64> {
        let at = now_us();
        self.primary.process.signal(Signal::SIGKILL)?;
        self.guest.signal(Signal::SIGKILL)?;
        Ok(at)
    }

    /// Looks at what the proxies have taken.
    pub fn taken<T>(&self, look: impl FnOnce(&mut Taken) -> T) -> T {
        look(&mut self.taken.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until the survivor's counter has risen by `ticks`.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_ticking(&self, ticks: u64, patience: Duration) -> Result<()> {
        let first = self.standby_memory.read_u64(self.tick_page)?;
        let deadline = Instant::now() + patience;
        while self.standby_memory.read_u64(self.tick_page)? < first + ticks {
            ensure!(
                Instant::now() < deadline,
                "the survivor's counter stands still at {first}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

fn guest_hook(
    memory: Memory,
    watch: Watch,
    watcher: Option<Watcher>,
    taken: &Arc<Mutex<Taken>>,
    page: &TickPage,
) -> Hook {
    let (taken, page) = (Arc::clone(taken), Arc::clone(page));
    let mut number = 0;
    let mut saved = false;
    let mut room = Copy::default();
    Box::new(move |command| match command {
        "xen-save-devices-state" => {
            // The next boundary never comes before the last epoch's acknowledgement.
            number = watcher
                .as_ref()
                .map_or(number, |relay| relay.passed().acked_epoch)
                + 1;
            saved = true;
            if let Some(relay) = watcher.as_ref().filter(|_| watch == Watch::AllRam) {
                relay.hold_pushes(true);
            }
        }
        "cont" if saved => {
            saved = false;
            let tick = tick(&memory, &page).unwrap_or(0);
            let copy = (watch == Watch::AllRam)
                .then(|| kept(memory.copy_into(std::mem::take(&mut room))))
                .flatten();
            let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = if watch == Watch::AllRam {
                KEPT
            } else {
                1 << 16
            };
            if taken.boundaries.len() >= kept {
                let oldest = taken.boundaries.pop_front();
                room = oldest
                    .and_then(|boundary| boundary.copy)
                    .unwrap_or_default();
            }
            taken.boundaries.push_back(Boundary {
                number,
                at_us: now_us(),
                tick,
                copy,
            });
            watcher.iter().for_each(|relay| relay.hold_pushes(false));
        }
        _ => {}
    })
}

fn standby_hook(memory: Memory, watch: Watch, taken: &Arc<Mutex<Taken>>, page: &TickPage) -> Hook {
    let (taken, page) = (Arc::clone(taken), Arc::clone(page));
    Box::new(move |command| match command {
        "migrate-incoming" if watch == Watch::AllRam => {
            let began = Instant::now();
            let copy = kept(memory.copy());
            let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
            taken.standby = copy;
            taken.standby_held = began.elapsed();
        }
        "cont" => {
            let tick = tick(&memory, &page);
            taken
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .standby_tick = tick;
        }
        _ => {}
    })
}

/// The proxy goes on without a copy; whoever needs it says that it is missing.
fn kept(copy: Result<Copy>) -> Option<Copy> {
    copy.inspect_err(|error| eprintln!("copying RAM failed: {error:#}"))
        .ok()
}

fn tick(memory: &Memory, page: &TickPage) -> Option<u64> {
    let page = (*page.lock().unwrap_or_else(PoisonError::into_inner))?;
    memory.read_u64(page).ok()
}

/// The memory of the QEMU that [`Guest::start`] has started.
///
/// # Errors
/// It has ended, or its main RAM is not found.
pub fn open_memory(dir: &Path, role: &str, qemu: &Process) -> Result<Memory> {
    let mut qmp = Qmp::connect(&dir.join(format!("{role}.test")))
        .with_context(|| format!("the {role}'s QEMU said: {}", qemu.said()))?;
    Memory::open(qemu.pid(), &qmp.human("info ramblock")?)
}

/// Where a Linux guest says that its counter is, once it counts.
///
/// # Errors
/// It does not boot.
pub fn wait_tick_page(console: &Path) -> Result<u64> {
    let deadline = Instant::now() + BOOT_PATIENCE;
    loop {
        let said = std::fs::read_to_string(console).unwrap_or_default();
        if let Some((_, rest)) = said.split_once("TICKPAGE gpa=0x")
            && let Some((digits, _)) = rest.split_once(['\r', '\n'])
            && said.contains("tick ")
        {
            return u64::from_str_radix(digits, 16).context("the guest's address of its counter");
        }
        ensure!(Instant::now() < deadline, "the guest did not boot:\n{said}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until the boot sector counts; its counter has a fixed address, where the BIOS has had
/// things of its own before.
fn wait_boot_sector(memory: &Memory) -> Result<u64> {
    const COUNTER: u64 = 0x8000;
    let deadline = Instant::now() + BOOT_PATIENCE;
    let (mut last, mut risen) = (u64::MAX, 0);
    while risen < 5 {
        ensure!(Instant::now() < deadline, "the boot sector does not run");
        std::thread::sleep(Duration::from_millis(10));
        let now = memory.read_u64(COUNTER)?;
        risen = if now > last { risen + 1 } else { 0 };
        last = now;
    }
    Ok(COUNTER)
}

/// The time as QEMU stamps its events.
pub fn now_us() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}
