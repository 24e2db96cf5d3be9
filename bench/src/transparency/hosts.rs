//! Two hosts with a guest that moves from one to the other as they die.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::GUEST;
use super::log::now_us;
use super::network::{Host, Network};
use crate::cache;
use crate::daemon::Daemon;
use crate::guest::words;
use crate::process::Process;

const RAM_MIB: u64 = 256;
pub(super) const NETDEV: &str = "n0";
const DAEMON_PORT: u16 = 7070;
/// Two databases start under emulation, and others may use the machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);
const PATIENCE: Duration = Duration::from_secs(60);

/// The hosts, and the guest on one of them.
#[derive(Debug)]
pub struct Hosts {
    dir: PathBuf,
    qemu: PathBuf,
    /// Where the guest runs.
    pub at: Host,
    guest: Running,
    protection: Option<Protection>,
    /// How often the guest was protected: each time has a folder of its own.
    protections: u32,
    /// The last to go.
    network: Network,
}

#[derive(Debug)]
struct Running {
    process: Process,
    qmp: PathBuf,
}

#[derive(Debug)]
struct Protection {
    primary: Daemon,
    backup: Daemon,
    standby: Running,
}

/// A host's death.
#[derive(Clone, Debug)]
pub struct Death {
    /// Just before the first kill(2), in microseconds of `CLOCK_MONOTONIC`.
    pub at_us: u64,
    /// The backup's `failover` event.
    pub failover: Value,
    pub dropped_packets: u64,
}

impl Hosts {
    /// Boots the guest on host A.
    ///
    /// # Errors
    /// Anything does not start.
    pub fn start(dir: &Path, qemu: &Path) -> Result<Hosts> {
        let network = Network::up()?;
        let folder = dir.join("boot");
        std::fs::create_dir(&folder)?;
        let guest = boot(&network, Host::A, &folder, qemu, false)?;
        let console = folder.join("console");
        let deadline = Instant::now() + BOOT_PATIENCE;
        while !std::fs::read_to_string(&console)
            .unwrap_or_default()
            .contains("guest: READY")
        {
            let said = || std::fs::read_to_string(&console).unwrap_or_default();
            ensure!(
                Instant::now() < deadline,
                "the guest does not boot: {}{}",
                guest.process.said(),
                said()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(Hosts {
            dir: dir.to_owned(),
            qemu: qemu.to_owned(),
            at: Host::A,
            guest,
            protection: None,
            protections: 0,
            network,
        })
    }

    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The QMP socket of the guest's QEMU, which takes one client at a time.
    pub fn qmp(&self) -> &Path {
        &self.guest.qmp
    }

    /// Starts a standby on the other host and protects the guest; `options` are the primary's.
    ///
    /// # Errors
    /// It does not get protected.
    pub fn protect(&mut self, options: &[&str]) -> Result<()> {
        self.protections += 1;
        let folder = self.dir.join(format!("protection-{}", self.protections));
        let other = self.at.other();
        let (here, there) = (folder.join(self.at.name()), folder.join(other.name()));
        std::fs::create_dir(&folder)?;
        std::fs::create_dir(&here)?;
        std::fs::create_dir(&there)?;
        let standby = boot(&self.network, other, &there, &self.qemu, true)?;
        wait_for_socket(&standby.qmp)?;

        let address = format!("{}:{DAEMON_PORT}", other.address());
        let line = |option: &str, qmp: &Path| {
            let qmp = qmp.display().to_string();
            let line = ["--allow-unauthenticated", option, &address, "--qmp", &qmp];
            line.map(str::to_owned).to_vec()
        };
        let backup = self.daemon(other, "backup", &there, line("--listen", &standby.qmp))?;
        let mut line = line("--peer", &self.guest.qmp);
        line.extend(options.iter().map(|option| (*option).to_owned()));
        let mut primary = self.daemon(self.at, "primary", &here, line)?;
        primary.wait_event("synced", PATIENCE)?;
        self.protection = Some(Protection {
            primary,
            backup,
            standby,
        });
        Ok(())
    }

    /// Ends the protection; the guest runs on.
    ///
    /// # Errors
    /// The daemon does not end as it should.
    pub fn unprotect(&mut self) -> Result<()> {
        let mut protection = self.protection.take().context("not protected")?;
        let primary = &mut protection.primary;
        primary.process.signal(Signal::SIGTERM)?;
        let status = primary
            .process
            .wait(PATIENCE)?
            .context("the primary does not end")?;
        ensure!(
            status.success(),
            "the primary ended with {status}: {}",
            primary.process.said()
        );
        Ok(())
    }

    /// The primary's daemon, while the guest is protected.
    ///
    /// # Errors
    /// It is not.
    pub fn primary(&mut self) -> Result<&mut Daemon> {
        Ok(&mut self.protection.as_mut().context("not protected")?.primary)
    }

    /// The host that runs the guest dies, daemon and QEMU at once, and the other one takes over.
    /// Nothing protects the guest then.
    ///
    /// # Errors
    /// The guest does not get to the other host.
    pub fn die(&mut self, daemon_first: bool) -> Result<Death> {
        let mut protection = self.protection.take().context("not protected")?;
        let status = protection.primary.status()?;
        ensure!(
            status["protected"] == true,
            "nothing protects the guest: {status}\n{}",
            protection.primary.process.said()
        );
        let at_us = now_us();
        let mut victims = [&protection.primary.process, &self.guest.process];
        if !daemon_first {
            victims.reverse();
        }
        for victim in victims {
            victim.signal(Signal::SIGKILL)?;
        }
        let failover = protection.backup.wait_event("failover", PATIENCE)?;
        self.guest = protection.standby;
        self.at = self.at.other();
        // An active backup's daemon protects nothing any more, and holds the QMP socket: it ends, and
        // the guest runs on.
        protection.backup.process.signal(Signal::SIGKILL)?;
        Ok(Death {
            at_us,
            failover,
            dropped_packets: status["dropped_packets"].as_u64().unwrap_or(0),
        })
    }

    fn daemon(&self, host: Host, mode: &str, dir: &Path, line: Vec<String>) -> Result<Daemon> {
        let state = self.dir.join(format!("{}.state", host.name()));
        Daemon::start_inside(&self.network.of(host), dir, mode, &state, &line)
    }
}

/// A QEMU with the guest, or one that waits for it.
fn boot(network: &Network, host: Host, dir: &Path, qemu: &Path, standby: bool) -> Result<Running> {
    let mut line = words(&format!(
        "-accel tcg,thread=multi -cpu max -m {RAM_MIB} -nodefaults -display none \
         -object memory-backend-memfd,id=ram,size={RAM_MIB}M,share=on \
         -netdev tap,id={NETDEV},ifname=tap0,script=no,downscript=no \
         -device virtio-net-pci,netdev={NETDEV},mac=52:54:00:12:34:56,romfile= \
         -device virtio-blk-pci,drive=disk"
    ));
    let (disk, folder) = (cache::database_guest("debian.squashfs")?, dir.display());
    let places = [
        (
            "-drive",
            format!(
                "if=none,id=disk,file={},format=raw,read-only=on",
                disk.display()
            ),
        ),
        ("-kernel", cache::kernel()?.display().to_string()),
        (
            "-initrd",
            cache::database_guest("debian.cpio.gz")?
                .display()
                .to_string(),
        ),
        ("-serial", format!("file:{folder}/console")),
        ("-qmp", format!("unix:{folder}/qmp,server=on,wait=off")),
    ];
    for (option, place) in places {
        line.extend([option.to_owned(), place]);
    }
    line.push("-append".into());
    line.push(format!(
        "console=ttyS0 quiet panic=-1 guest.address={GUEST}/24"
    ));
    line.push("-machine".into());
    if standby {
        line.push("pc,memory-backend=ram,suppress-vmdesc=on".into());
        line.extend(words(
            "-incoming defer -S -global migration.send-configuration=off",
        ));
    } else {
        line.push("pc,memory-backend=ram".into());
    }
    let process = Process::start_inside(&network.of(host), dir, "qemu", qemu, &line)?;
    let qmp = dir.join("qmp");
    Ok(Running { process, qmp })
}

fn wait_for_socket(path: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !path.exists() {
        ensure!(
            Instant::now() < deadline,
            "no socket {} appears",
            path.display()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
