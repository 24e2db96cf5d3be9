//! Two hosts with kernels of their own on one machine, with soft-RoCE between them: real enough to
//! be powered off, and to have their cable cut.
//!
//! ```text
//!  host A (QEMU, TCG)                    host B (QEMU, TCG)
//!   agent   eth0, rxe0 ── switch (ours) ── rxe0, eth0   agent
//!     └ eth1 ───────────► lab, 127.0.0.1 ◄─────────── eth1 ┘
//! ```
//!
//! Both see the machine's files (read-only, under an overlay that is lost with the host), so that
//! whatever is installed or built there can be run. See docs/lab.md.

pub mod agent;
pub mod check;
mod machine;
pub mod probe;
mod prompt;
mod reception;
mod running;
pub mod supervisor;
mod switch;
pub mod test;
mod wire;

use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

pub use machine::MachineStatus;
pub use running::{Event, Input, Output, Running};
pub use switch::{Cable, Traffic};
pub use wire::{Command, Ended};

use crate::cache;
use crate::process::Workplace;
use machine::{Machine, Wiring};
use reception::Reception;
use switch::Switch;
use wire::Order;

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Host {
    A,
    B,
}

/// How a lab is made.
#[derive(Clone, Debug)]
pub struct Settings {
    pub qemu: PathBuf,
    pub ram_mib: u32,
    pub vcpus: u32,
    /// A host that takes longer to boot, or to answer, is thrown away.
    pub patience: Duration,
    /// Folders of the machine whose files may change while the hosts run: this repository and
    /// `CARGO_TARGET_DIR`, if not told otherwise.
    pub fresh: Vec<PathBuf>,
    /// What both hosts have, writable, as `/lab`; a folder that goes with the lab if none is given.
    pub shared: Option<PathBuf>,
    /// The program that has [`agent::serve`] under its `agent` command.
    pub agent: PathBuf,
}

/// Two hosts. They end with it, and with the process that has it.
#[derive(Debug)]
pub struct Lab {
    settings: Settings,
    switch: Switch,
    reception: Reception,
    shared: PathBuf,
    // After what uses it: fields are dropped in this order.
    folder: Folder,
}

/// What `lab status` tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub hosts: [MachineStatus; 2],
    /// From A, then from B.
    pub cable: [(Cable, Traffic); 2],
}

impl Settings {
    /// Half of the machine's processors: hosts that spin for the same ones are slow for each other.
    pub fn vcpus_here() -> u32 {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        u32::try_from(all / 2).unwrap_or(1).clamp(1, 4)
    }

    /// # Errors
    /// `scripts/setup lab` has not run, or the `lab` program was not built.
    pub fn new() -> Result<Settings> {
        let mut fresh = vec![cache::repo()];
        if let Some(target) = std::env::var_os("CARGO_TARGET_DIR")
            && let Ok(target) = Path::new(&target).canonicalize()
            && !target.starts_with(&fresh[0])
        {
            fresh.push(target);
        }
        Ok(Settings {
            qemu: cache::qemu_10()?,
            ram_mib: 1024,
            vcpus: Settings::vcpus_here(),
            patience: Duration::from_secs(120),
            fresh,
            shared: None,
            agent: cache::built("lab")?,
        })
    }
}

impl Lab {
    /// Makes the cable, with no host on. What the lab writes is in a folder of its own that goes
    /// with it, or in the one given.
    ///
    /// # Errors
    /// Something it needs is missing.
    pub fn new(settings: Settings, folder: Option<&Path>) -> Result<Lab> {
        let folder = match folder {
            Some(path) => Folder::Given(path.to_owned()),
            None => Folder::Own(Workplace::new("lab")?),
        };
        let shared = settings.shared.clone();
        let shared = shared.unwrap_or_else(|| folder.path().join("shared"));
        std::fs::create_dir_all(&shared).with_context(|| format!("making {}", shared.display()))?;
        for path in settings.fresh.iter().chain([&shared, &settings.agent]) {
            let text = path.to_string_lossy();
            ensure!(path.exists(), "{text} is not there");
            // They go through a kernel's command line, and through QEMU's.
            ensure!(
                path.is_absolute() && !text.contains([',', ':', ' ', '\n', '\t', '"']),
                "{text}: the lab can't take a relative path, or one with blanks, commas or colons"
            );
        }
        let machines = Host::BOTH.map(|host| Machine::new(host, folder.path(), settings.patience));
        Ok(Lab {
            reception: Reception::open(machines)?,
            switch: Switch::start()?,
            settings,
            shared,
            folder,
        })
    }

    /// A lab with both hosts on.
    ///
    /// # Errors
    /// A host does not boot; the message has the end of its console.
    pub fn up(settings: Settings) -> Result<Lab> {
        let lab = Lab::new(settings, None)?;
        lab.boot(&Host::BOTH)?;
        Ok(lab)
    }

    /// Switches hosts on, together, and waits until they take commands.
    ///
    /// # Errors
    /// One is on already, or does not boot.
    pub fn boot(&self, hosts: &[Host]) -> Result<()> {
        for &host in hosts {
            let machine = self.machine(host);
            machine.refuse_if_on()?;
            let wiring = Wiring {
                cable: self.switch.plug(host)?.into(),
                port: self.reception.port,
                shared: &self.shared,
            };
            machine.start(&self.settings, wiring)?;
        }
        hosts.iter().try_for_each(|&host| self.machine(host).wait())
    }

    /// Kills a host without warning. Its peer hears nothing more from it.
    pub fn kill(&self, host: Host) {
        self.machine(host).kill("it was killed");
    }

    /// Starts a command. Any number can run at a time.
    ///
    /// # Errors
    /// The host is off, or its agent does not call.
    pub fn spawn(&self, host: Host, command: &Command) -> Result<Running> {
        let (id, call) = self.reception.expect_call();
        let order = Order::Run {
            id,
            command: command.clone(),
        };
        let machine = self.machine(host);
        let deadline = Instant::now() + self.settings.patience;
        let connection = machine.order(&order).and_then(|()| {
            loop {
                match call.recv_timeout(Duration::from_secs(1)) {
                    Ok(connection) => return Ok(connection),
                    Err(_) if machine.status().pid.is_none() => bail!("host {host} has died"),
                    Err(_) if Instant::now() > deadline => bail!("host {host} does not answer"),
                    Err(_) => {}
                }
            }
        });
        self.reception.forget_call(id);
        Running::new(connection?)
    }

    /// Runs a command without input to its end.
    ///
    /// # Errors
    /// As [`Lab::spawn`]. That the command fails, or the host dies, is no error: see [`Ended`].
    pub fn run(&self, host: Host, command: &Command) -> Result<Output> {
        let running = self.spawn(host, command)?;
        // A command that is over already needs no input.
        let _ = running.input().end();
        running.wait()
    }

    /// Cuts the cable in the direction from a host. What is under way is lost.
    pub fn cut(&self, from: Host) {
        self.switch.change(from, |cable| cable.cut = true);
    }

    /// Makes the cable whole again in the direction from a host: no cut, delay, or loss.
    pub fn mend(&self, from: Host) {
        self.set_cable(from, Cable::default());
    }

    pub fn set_cable(&self, from: Host, cable: Cable) {
        self.switch.change(from, |now| *now = cable);
    }

    pub fn status(&self) -> Status {
        Status {
            hosts: Host::BOTH.map(|host| self.machine(host).status()),
            cable: Host::BOTH.map(|host| self.switch.look(host)),
        }
    }

    /// The folder that both hosts have, writable, as `/lab`.
    pub fn shared(&self) -> &Path {
        &self.shared
    }

    /// Where the hosts' consoles and their QEMUs' messages are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn machine(&self, host: Host) -> &Machine {
        self.reception.machine(host)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for host in Host::BOTH {
            self.machine(host).kill("the lab has ended");
        }
    }
}

impl Host {
    pub const BOTH: [Host; 2] = [Host::A, Host::B];

    pub fn peer(self) -> Host {
        match self {
            Host::A => Host::B,
            Host::B => Host::A,
        }
    }

    /// Its address on the link.
    pub fn address(self) -> Ipv4Addr {
        match self {
            Host::A => Ipv4Addr::new(10, 77, 0, 1),
            Host::B => Ipv4Addr::new(10, 77, 0, 2),
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl FromStr for Host {
    type Err = String;

    fn from_str(name: &str) -> Result<Host, String> {
        match name {
            "A" | "a" => Ok(Host::A),
            "B" | "b" => Ok(Host::B),
            _ => Err("the hosts are A and B".into()),
        }
    }
}

#[derive(Debug)]
enum Folder {
    Given(PathBuf),
    Own(Workplace),
}

impl Folder {
    fn path(&self) -> &Path {
        match self {
            Folder::Given(path) => path,
            Folder::Own(workplace) => workplace.path(),
        }
    }
}
