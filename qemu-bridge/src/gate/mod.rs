//! The output gate: what the guest sends in an epoch leaves the host when the backup has that epoch.
//!
//! Two stages, which keep apart what was sent before and after a boundary: the acknowledgement lets
//! exactly the first of it out. A gate holds one epoch that is not acknowledged: the next boundary comes
//! after the release of the last one has returned.
//!
//! It fails closed. What is held when daemon or QEMU end stays held.

mod filter;
mod frames;
mod outputs;
mod plug;

use std::fmt;
use std::os::fd::BorrowedFd;

use crate::qmp::{Command, QmpError};
pub use filter::FilterGate;
pub use outputs::{Output, outputs};
pub use plug::PlugGate;

/// What the epoch engine wants of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Hold from now on: at the first boundary.
    Close,
    /// At a boundary: what is held belongs to the epoch that ends, what comes to the next one.
    Advance,
    /// What came before the last [`Operation::Advance`] may leave.
    Release,
    /// Let everything pass, also what is held.
    Open,
}

/// A way to hold a guest's output.
pub trait Gate: Send + fmt::Debug {
    /// For people: which gate, on what.
    fn name(&self) -> String;

    /// Whether [`Gate::perform`] carries out an operation itself. Then the caller has to wait until
    /// the guest is paused to close or advance it. By commands that is done before the guest is paused:
    /// what is sent in between waits with the next epoch's.
    fn acts_at_once(&self) -> bool {
        false
    }

    /// Whether what is released goes through QEMU's own queues: those stand still with the guest, and
    /// what is in them leaves at `cont` (`qemu_can_send_packet` in net/net.c).
    fn releases_by_qemu(&self) -> bool {
        false
    }

    /// Carries out an operation: at once, or by the commands that it returns. Those go to QEMU in
    /// one write, after what was sent before; one that fails means that the gate can't be relied on.
    ///
    /// # Errors
    /// It can't be carried out.
    fn perform(&mut self, operation: Operation) -> Result<Vec<Command>, GateError>;

    /// Readable when output begins to wait; then [`Gate::drain`].
    fn waiting_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Takes notice of what waits. Returns whether there was anything new.
    fn drain(&mut self) -> bool;

    /// Packets that were lost because more came in an epoch than a stage holds.
    fn dropped_packets(&self) -> u64;

    /// Takes the gate away, itself or by the commands that it returns; held packets leave.
    fn remove(&mut self) -> Vec<Command>;

    /// QEMU has ended: what is still held on the host is thrown away.
    fn discard(&mut self) {}
}

#[derive(Debug, thiserror::Error)]
pub enum GateError {
    #[error(
        "netdev {netdev} can't be gated by filter-buffer ({why}): use a netdev without vhost and with \
         one queue, --gate plug for a tap, or --gate off (then clients may see what a failover undoes)"
    )]
    Unsupported { netdev: String, why: String },
    #[error(
        "netdev {netdev} can't be gated by plug ({why}): use a tap and a kernel with sch_plug and ifb, \
         --gate filter for a netdev without vhost and with one queue, or --gate off (then clients may \
         see what a failover undoes)"
    )]
    NoPlug {
        netdev: String,
        why: String,
        /// What the kernel said, if it was asked.
        source: Option<std::io::Error>,
    },
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("{operation} for the output gate failed")]
    System {
        operation: &'static str,
        source: std::io::Error,
    },
}

/// For a VM whose output nobody holds, because it has none or because the operator said so.
#[derive(Debug)]
pub struct NoGate;

impl Gate for NoGate {
    fn name(&self) -> String {
        "none".to_owned()
    }

    fn perform(&mut self, _operation: Operation) -> Result<Vec<Command>, GateError> {
        Ok(Vec::new())
    }

    fn waiting_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn drain(&mut self) -> bool {
        false
    }

    fn dropped_packets(&self) -> u64 {
        0
    }

    fn remove(&mut self) -> Vec<Command> {
        Vec::new()
    }
}
