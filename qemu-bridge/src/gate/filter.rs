//! The gate that every QEMU has: two `filter-buffer` objects on each netdev (net/filter-buffer.c).
//!
//! A filter-buffer with `status=on` holds packets; turned off, it lets go of what it holds.
//! `queue=rx` is the direction from the guest, in which the object that was added last is met
//! first. So the second stage is added first, and last of all a mirror: it copies what the guest
//! sends to a socket of ours, which is how waiting output is noticed without asking QEMU.
//!
//! Packets wait in the second stage. The first one holds only from a boundary until the release of its
//! epoch, so that a boundary takes one command: QEMU reads commands byte by byte, and the guest waits.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use serde_json::{Value, json};

use super::frames::FrameCounter;
use super::{Gate, GateError, Operation};
use crate::qmp::{Command, Qmp, QmpError};

/// Microseconds of the guest's time after which QEMU would let packets go by itself: the most that
/// fits, 71 minutes. A release begins it anew in the stage where packets wait.
const INTERVAL_US: u32 = 4_000_000_000;
/// Packets that a stage holds (net/queue.c, `maxlen`); it drops what is over without a word.
const STAGE_PACKETS: u64 = 10_000;
/// Bytes that one call drains of a mirror.
const DRAIN_BYTES: usize = 64 << 10;

/// The gate of all netdevs of one QEMU.
#[derive(Debug)]
pub struct FilterGate {
    netdevs: Vec<Netdev>,
    /// There was a boundary since the last release: what the first stage holds came after it.
    apart: bool,
    mirrors: Epoll,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Netdev {
    id: String,
    /// Ids of the objects; short, because QEMU reads commands byte by byte.
    second: String,
    first: String,
    mirror: String,
    /// Of another name than the mirror: a partial path must not fit both.
    outlet: String,
    copies: OwnedFd,
    frames: FrameCounter,
    /// Packets since the last boundary.
    staged: u64,
    dropped: u64,
}

impl FilterGate {
    /// Adds the objects, open, to each of `netdevs`. Blocks. What an earlier daemon has left is
    /// replaced, and what that holds leaves.
    ///
    /// # Errors
    /// QEMU refuses a netdev: it uses vhost, or has several queues. Nothing is left behind.
    pub fn install(
        qmp: &mut Qmp,
        netdevs: &[String],
        timeout: Duration,
    ) -> Result<FilterGate, GateError> {
        let mirrors =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|e| failed("epoll_create", e))?;
        let mut gate = FilterGate {
            netdevs: Vec::new(),
            apart: false,
            mirrors,
            buffer: vec![0; DRAIN_BYTES],
        };
        for (index, id) in netdevs.iter().enumerate() {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let pair = socketpair(AddressFamily::Unix, SockType::Stream, None, flags);
            let (copies, theirs) = pair.map_err(|e| failed("socketpair", e))?;
            let event = EpollEvent::new(EpollFlags::EPOLLIN, index as u64);
            gate.mirrors
                .add(&copies, event)
                .map_err(|e| failed("epoll_ctl", e))?;
            gate.netdevs.push(Netdev {
                id: id.clone(),
                second: format!("ftc{index}"),
                first: format!("ftb{index}"),
                mirror: format!("ftm{index}"),
                outlet: format!("ftmo{index}"),
                copies,
                frames: FrameCounter::default(),
                staged: 0,
                dropped: 0,
            });
            for left in gate.netdevs[index].removal() {
                ignore_refusal(qmp.call(left, timeout))?;
            }
            if let Err(error) = gate.netdevs[index].install(qmp, theirs.as_fd(), timeout) {
                for command in gate.remove() {
                    ignore_refusal(qmp.call(command, timeout))?;
                }
                return Err(error);
            }
        }
        Ok(gate)
    }
}

impl Gate for FilterGate {
    fn name(&self) -> String {
        let ids: Vec<_> = self.netdevs.iter().map(|n| n.id.as_str()).collect();
        format!("filter-buffer on {}", ids.join(", "))
    }

    fn releases_by_qemu(&self) -> bool {
        true
    }

    fn perform(&mut self, operation: Operation) -> Result<Vec<Command>, GateError> {
        if matches!(operation, Operation::Close | Operation::Advance) {
            // What is on its way through the mirror is counted for the epoch that begins now.
            self.netdevs.iter_mut().for_each(|netdev| netdev.staged = 0);
        }
        let steps = |n: &Netdev| match (operation, self.apart) {
            (Operation::Close, _) => vec![n.second("on"), n.first("on"), n.mirror("on")],
            (Operation::Advance, false) => vec![n.first("on")],
            // The last boundary's epoch was given up: this one's output is also what came since.
            (Operation::Advance, true) => vec![n.first("off"), n.first("on")],
            (Operation::Release, true) => vec![n.second("off"), n.second("on"), n.first("off")],
            (Operation::Release, false) => Vec::new(),
            (Operation::Open, _) => vec![n.mirror("off"), n.first("off"), n.second("off")],
        };
        let commands = self.netdevs.iter().flat_map(steps).collect();
        self.apart = matches!(operation, Operation::Close | Operation::Advance);
        Ok(commands)
    }

    fn waiting_fd(&self) -> Option<BorrowedFd<'_>> {
        (!self.netdevs.is_empty()).then(|| self.mirrors.0.as_fd())
    }

    /// A mirror that nobody reads would block QEMU: everything is read, and thrown away.
    fn drain(&mut self) -> bool {
        let mut any = false;
        for netdev in &mut self.netdevs {
            let copies = netdev.copies.as_raw_fd();
            loop {
                match recv(copies, &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                    Ok(count) if count > 0 => {
                        any = true;
                        netdev.count(&self.buffer[..count]);
                    }
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => break,
                    // Its end says no more than that QEMU is gone, or somebody took it out; epochs
                    // are then as long as they are without output.
                    Ok(_) | Err(_) => {
                        let _ = self.mirrors.delete(&netdev.copies);
                        break;
                    }
                }
            }
        }
        any
    }

    fn dropped_packets(&self) -> u64 {
        self.netdevs.iter().map(|netdev| netdev.dropped).sum()
    }

    fn remove(&mut self) -> Vec<Command> {
        self.netdevs.iter().flat_map(Netdev::removal).collect()
    }
}

impl Netdev {
    fn install(
        &self,
        qmp: &mut Qmp,
        mirrored: BorrowedFd<'_>,
        timeout: Duration,
    ) -> Result<(), GateError> {
        for id in [&self.second, &self.first] {
            let buffer = self
                .object("filter-buffer", id)
                .arg("interval", INTERVAL_US);
            self.refused(qmp.call(buffer, timeout))?;
        }
        let getfd = Command::new("getfd").arg("fdname", self.outlet.as_str());
        qmp.call_with_fd(&getfd, mirrored, timeout)?;
        let address = json!({ "type": "fd", "data": { "str": self.outlet } });
        let socket = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        let chardev = Command::new("chardev-add")
            .arg("id", self.outlet.as_str())
            .arg("backend", socket);
        self.refused(qmp.call(chardev, timeout))?;
        let mirror = self
            .object("filter-mirror", &self.mirror)
            .arg("outdev", self.outlet.as_str());
        self.refused(qmp.call(mirror, timeout))
    }

    fn count(&mut self, copies: &[u8]) {
        let before = self.staged.max(STAGE_PACKETS);
        self.staged += self.frames.feed(copies);
        self.dropped += self.staged.saturating_sub(before);
    }

    fn object(&self, kind: &str, id: &str) -> Command {
        Command::new("object-add")
            .arg("qom-type", kind)
            .arg("id", id)
            .arg("netdev", self.id.as_str())
            .arg("queue", "rx")
            .arg("status", "off")
    }

    fn refused(&self, result: Result<Value, QmpError>) -> Result<(), GateError> {
        match result {
            Ok(_) => Ok(()),
            Err(QmpError::Refused { source, .. }) => Err(GateError::Unsupported {
                netdev: self.id.clone(),
                why: source.desc,
            }),
            Err(error) => Err(error.into()),
        }
    }

    fn first(&self, status: &str) -> Command {
        set_status(&self.first, status)
    }

    fn second(&self, status: &str) -> Command {
        set_status(&self.second, status)
    }

    fn mirror(&self, status: &str) -> Command {
        set_status(&self.mirror, status)
    }

    fn removal(&self) -> Vec<Command> {
        let object = |id: &String| Command::new("object-del").arg("id", id.as_str());
        let chardev = Command::new("chardev-remove").arg("id", self.outlet.as_str());
        vec![
            object(&self.mirror),
            chardev,
            object(&self.first),
            object(&self.second),
        ]
    }
}

/// A path may be partial (qom/object.c, `object_resolve_path`).
fn set_status(id: &str, status: &str) -> Command {
    Command::new("qom-set")
        .arg("path", id)
        .arg("property", "status")
        .arg("value", status)
}

/// Of a command that has nothing to do if it is refused.
fn ignore_refusal(result: Result<Value, QmpError>) -> Result<(), QmpError> {
    match result {
        Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn failed(operation: &'static str, error: Errno) -> GateError {
    GateError::System {
        operation,
        source: error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_an_epoch_that_was_given_up_joins_that_of_the_next() {
        let (copies, _theirs) = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::empty(),
        )
        .unwrap();
        let mut gate = FilterGate {
            netdevs: vec![Netdev {
                id: "n0".into(),
                second: "second".into(),
                first: "first".into(),
                mirror: "mirror".into(),
                outlet: "outlet".into(),
                copies,
                frames: FrameCounter::default(),
                staged: 0,
                dropped: 0,
            }],
            apart: false,
            mirrors: Epoll::new(EpollCreateFlags::empty()).unwrap(),
            buffer: Vec::new(),
        };
        let mut expect = |operation, commands: &[Command]| {
            assert_eq!(
                gate.perform(operation).unwrap(),
                commands,
                "to {operation:?}"
            );
        };
        let set = set_status;
        let closing = [set("second", "on"), set("first", "on"), set("mirror", "on")];
        let release = [
            set("second", "off"),
            set("second", "on"),
            set("first", "off"),
        ];
        expect(Operation::Close, &closing);
        expect(Operation::Release, &release);
        expect(Operation::Advance, &[set("first", "on")]);
        // Never what came after the boundary, and nothing twice.
        expect(Operation::Release, &release);
        expect(Operation::Release, &[]);
        expect(Operation::Advance, &[set("first", "on")]);
        expect(
            Operation::Advance,
            &[set("first", "off"), set("first", "on")],
        );
        expect(Operation::Release, &release);
    }
}
