//! The gate outside of QEMU, for any tap, with vhost or several queues: the queueing discipline
//! `plug` (net/sched/sch_plug.c).
//!
//! ```text
//!   guest ─► tap ─ clsact, redirect ─► ifb with plug ─► back into the tap, and on to the bridge
//! ```
//!
//! What the guest sends comes *in* at the tap, and a plug is for what goes *out*: so it is sent
//! through a device that has such a queue (drivers/net/ifb.c), which gives it back to the tap. A
//! plug counts the packets since its last `BUFFER` and of the epoch before; `RELEASE_ONE` lets the
//! latter go. A second `BUFFER` before that would forget how many they were, so there is none: see
//! [`Stage::Moved`].
//!
//! All of this is the kernel's. When the daemon ends, packets stay held; a plug or a device that
//! somebody removes takes what it holds along, and the redirection into nothing drops the rest.

mod ear;
mod message;
mod netlink;
mod tap;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread::sleep;
use std::time::Duration;

use super::{Gate, GateError, Operation};
use crate::qmp::Command;
use crate::shape::Nic;
use ear::Ear;
use netlink::{Netlink, Plug, QueueStatistics};
use tap::find_taps;

/// Bytes that a plug holds for one NIC, of both epochs; it drops what is over. An epoch of 20 ms
/// at 25 Gbit/s.
const HELD_BYTES: u32 = 64 << 20;
/// A queue that was opened drains within microseconds. How often, and how far apart, to look.
const DRAIN_LOOKS: u32 = 100;
const DRAIN_PAUSE: Duration = Duration::from_micros(50);

/// The gate of all NICs of one QEMU.
#[derive(Debug)]
pub struct PlugGate {
    netlink: Netlink,
    nics: Vec<PluggedNic>,
    stage: Stage,
    /// For output that begins to wait.
    ear: Ear,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Open,
    /// The next boundary moves what was sent since the last one.
    Closed,
    /// Moved, and not released. The boundary may have been aborted: the next one then moves
    /// nothing, and what was sent between the two leaves with the release after the next.
    Moved,
}

#[derive(Debug)]
struct PluggedNic {
    netdev: String,
    tap: String,
    tap_device: u32,
    ifb_device: u32,
    dropped: u32,
}

/// Why there can be no plug for a NIC.
struct Unfit {
    why: String,
    /// What the kernel said: whether a privilege is missing, for one.
    source: Option<io::Error>,
}

impl PlugGate {
    /// Puts an open plug behind the tap of each NIC of the QEMU with process id `pid`. What an
    /// earlier daemon has left is removed, and what that held is dropped.
    ///
    /// # Errors
    /// A NIC isn't on a tap, or the kernel refuses. Nothing is left behind.
    pub fn install(nics: &[Nic], pid: i32) -> Result<PlugGate, GateError> {
        let mut gate = PlugGate {
            netlink: Netlink::open().map_err(|e| failed("opening netlink", e))?,
            nics: Vec::new(),
            stage: Stage::Open,
            ear: Ear::new().map_err(|e| failed("epoll_create1", e))?,
        };
        for found in find_taps(nics, pid)? {
            let nic = PluggedNic::install(&mut gate.netlink, &found.netdev, &found.tap);
            let heard = nic.and_then(|nic| {
                let heard = gate.ear.add(nic.tap_device);
                gate.nics.push(nic);
                let what = || format!("listening to {} (needs CAP_NET_RAW)", found.tap);
                heard.map_err(|error| Unfit::because(what(), error))
            });
            if let Err(unfit) = heard {
                gate.disconnect();
                gate.take_down();
                return Err(unfit.error(&found.netdev));
            }
        }
        Ok(gate)
    }

    fn tell(&mut self, plug: Plug) -> Result<(), GateError> {
        for nic in &mut self.nics {
            let told = self.netlink.plug(nic.ifb_device, plug);
            let QueueStatistics { drops, .. } = told.map_err(|e| failed("moving the plug", e))?;
            nic.dropped = drops;
        }
        Ok(())
    }

    /// Lets everything pass, and waits until nothing is on its way through an open plug any more:
    /// a plug does not count that for an epoch, and would hold later packets back in its stead.
    fn open_and_drain(&mut self) -> Result<(), GateError> {
        for _ in 0..DRAIN_LOOKS {
            let mut waiting = 0;
            for nic in &self.nics {
                let told = self.netlink.plug(nic.ifb_device, Plug::ReleaseIndefinite);
                waiting += told.map_err(|e| failed("opening the plug", e))?.packets;
            }
            if waiting == 0 {
                return Ok(());
            }
            sleep(DRAIN_PAUSE);
        }
        Err(failed(
            "emptying the plug",
            io::Error::from(io::ErrorKind::TimedOut),
        ))
    }

    fn listen(&mut self, how: fn(&mut Ear) -> io::Result<()>) -> Result<(), GateError> {
        how(&mut self.ear).map_err(|e| failed("listening for output", e))
    }

    /// Nothing is redirected any more; what is held stays.
    fn disconnect(&mut self) {
        for nic in &self.nics {
            nic.disconnect(&mut self.netlink);
        }
    }

    fn take_down(&mut self) {
        for nic in self.nics.drain(..) {
            let removed = self.netlink.remove_device(nic.ifb_device);
            if let Err(error) = removed {
                tracing::warn!("removing the plug of {}: {error}", nic.tap);
            }
        }
    }
}

impl Unfit {
    fn because(what: String, source: io::Error) -> Unfit {
        Unfit {
            why: what,
            source: Some(source),
        }
    }

    fn error(self, netdev: &str) -> GateError {
        GateError::NoPlug {
            netdev: netdev.to_owned(),
            why: self.why,
            source: self.source,
        }
    }
}

impl From<String> for Unfit {
    fn from(why: String) -> Unfit {
        Unfit { why, source: None }
    }
}

impl Gate for PlugGate {
    fn name(&self) -> String {
        let taps = self
            .nics
            .iter()
            .map(|n| format!("{} ({})", n.netdev, n.tap));
        format!("plug on {}", taps.collect::<Vec<_>>().join(", "))
    }

    fn acts_at_once(&self) -> bool {
        true
    }

    fn perform(&mut self, operation: Operation) -> Result<Vec<Command>, GateError> {
        match (operation, self.stage) {
            (Operation::Close | Operation::Advance, Stage::Open) => {
                self.open_and_drain()?;
                self.tell(Plug::Buffer)?;
                self.stage = Stage::Closed;
                self.listen(Ear::forget)?;
            }
            (Operation::Advance, Stage::Closed) => {
                self.tell(Plug::Buffer)?;
                self.stage = Stage::Moved;
                self.listen(Ear::forget)?;
            }
            (Operation::Advance, Stage::Moved) => {
                // What was sent since is output that waits for another boundary.
                self.listen(Ear::again)?;
            }
            (Operation::Release, Stage::Moved) => {
                self.tell(Plug::ReleaseOne)?;
                self.stage = Stage::Closed;
            }
            (Operation::Open, _) => {
                self.tell(Plug::ReleaseIndefinite)?;
                self.stage = Stage::Open;
            }
            // The epoch that closed the gate has nothing to release.
            (Operation::Release, Stage::Closed | Stage::Open)
            | (Operation::Close, Stage::Closed | Stage::Moved) => {}
        }
        Ok(Vec::new())
    }

    fn waiting_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ear.as_fd())
    }

    fn drain(&mut self) -> bool {
        self.ear.has_heard()
    }

    fn dropped_packets(&self) -> u64 {
        self.nics.iter().map(|nic| u64::from(nic.dropped)).sum()
    }

    fn remove(&mut self) -> Vec<Command> {
        // First what is held, and then what came to it until the redirection ended.
        let opened = self.open_and_drain();
        self.disconnect();
        if let Err(error) = opened.and_then(|()| self.open_and_drain()) {
            tracing::warn!("some held packets may be lost: {error}");
        }
        self.take_down();
        Vec::new()
    }

    fn discard(&mut self) {
        self.disconnect();
        self.take_down();
    }
}

impl PluggedNic {
    /// # Errors
    /// What the kernel refused. Nothing is left behind.
    fn install(netlink: &mut Netlink, netdev: &str, tap: &str) -> Result<PluggedNic, Unfit> {
        let tap_device = index_of(tap).ok_or_else(|| {
            format!("{tap} is not in this network namespace: run the daemon where the tap is")
        })?;
        // A tap is told by its number: it may have been renamed.
        let ifb = format!("ftplug{tap_device}");
        if let Some(left) = index_of(&ifb) {
            // It was made together with the tap's clsact.
            let _ = netlink.remove_clsact(tap_device);
            let what = || format!("removing {ifb}, which another daemon has left");
            let removed = netlink.remove_device(left);
            removed.map_err(|error| Unfit::because(what(), error))?;
        }
        let what =
            || format!("making the ifb device {ifb} (needs CAP_NET_ADMIN, and the module ifb)");
        let made = netlink.add_ifb(&ifb);
        made.map_err(|error| Unfit::because(what(), error))?;
        let mut nic = PluggedNic {
            netdev: netdev.to_owned(),
            tap: tap.to_owned(),
            tap_device,
            ifb_device: 0,
            dropped: 0,
        };
        let Some(ifb_device) = index_of(&ifb) else {
            return Err(format!("{ifb} was made and is not there").into());
        };
        nic.ifb_device = ifb_device;
        match nic.connect(netlink) {
            Ok(()) => Ok(nic),
            Err((clsact_is_ours, unfit)) => {
                if clsact_is_ours {
                    let _ = netlink.remove_clsact(tap_device);
                }
                let _ = netlink.remove_device(ifb_device);
                Err(unfit)
            }
        }
    }

    /// The plug first, open: no packet is lost or held.
    ///
    /// # Errors
    /// Why, and whether the tap's clsact was added.
    fn connect(&self, netlink: &mut Netlink) -> Result<(), (bool, Unfit)> {
        let (tap, ifb) = (&self.tap, self.ifb_device);
        let before = |what: &str| {
            let what = what.to_owned();
            move |error: io::Error| (false, Unfit::because(what, error))
        };
        netlink.add_plug(ifb, HELD_BYTES).map_err(before(
            "adding the queueing discipline plug (module sch_plug)",
        ))?;
        netlink
            .plug(ifb, Plug::ReleaseIndefinite)
            .map_err(before("opening the plug"))?;
        netlink
            .switch_on(ifb)
            .map_err(before("switching the ifb on"))?;
        netlink.add_clsact(self.tap_device).map_err(|error| {
            let unfit = match error.kind() {
                io::ErrorKind::AlreadyExists => format!(
                    "{tap} has an ingress queueing discipline already, a rate limit perhaps: remove it \
                     (tc qdisc del dev {tap} ingress)"
                )
                .into(),
                _ => Unfit::because(format!("adding clsact to {tap} (module sch_ingress)"), error),
            };
            (false, unfit)
        })?;
        netlink.redirect(self.tap_device, ifb).map_err(|error| {
            let what = format!("redirecting {tap} (modules cls_matchall and act_mirred)");
            (true, Unfit::because(what, error))
        })
    }

    fn disconnect(&self, netlink: &mut Netlink) {
        // A tap that was QEMU's goes with it, and takes its clsact along.
        if index_of(&self.tap) != Some(self.tap_device) {
            return;
        }
        match netlink.remove_clsact(self.tap_device) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                tracing::warn!("removing the redirection from {}: {error}", self.tap);
            }
            _ => {}
        }
    }
}

fn index_of(device: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(device).ok()
}

fn failed(operation: &'static str, source: io::Error) -> GateError {
    GateError::System { operation, source }
}
