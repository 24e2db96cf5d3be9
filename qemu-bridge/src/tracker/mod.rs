//! Which pages the guest has written since they were last armed.

pub mod compare;
mod inject;
mod pagemap;
mod selftest;
pub mod uffd;

use std::io;

use ft_core::DirtySet;

use crate::guest_ram::{GuestRam, RamError};
pub use compare::CompareTracker;
pub use selftest::self_test;
pub use uffd::UffdTracker;

/// Reports written pages. The order is always: armed first, copied afterwards; a write in
/// between is then in the copy *and* reported the next time.
pub trait Tracker: Send + std::fmt::Debug {
    /// `uffd` or `compare`.
    fn name(&self) -> &'static str;

    /// Forgets all dirt: what is written from now on is reported.
    ///
    /// # Errors
    /// The kernel refuses, or QEMU is gone.
    fn arm_all(&mut self, ram: &GuestRam) -> Result<(), TrackerError>;

    /// Adds what was written since it was armed to `into`, and arms exactly that again.
    ///
    /// While the guest runs, that is not the last word on a page. The kernel counts a transfer
    /// past the page cache (a disk with `cache=none`) as a write when it pins the page, not when
    /// the data comes: a page that is armed and copied in between has old bytes in the copy and
    /// isn't reported again (seen on Linux 6.18 with O_DIRECT reads). QEMU's `stop` waits for such
    /// transfers. So every page that was collected from a running guest has to be copied once
    /// more after it was stopped.
    ///
    /// # Errors
    /// The kernel refuses, or QEMU is gone. Pages may have been armed that are not in `into`:
    /// the caller must take all of RAM for dirty.
    fn collect(&mut self, ram: &GuestRam, into: &mut DirtySet) -> Result<Collected, TrackerError>;

    /// Makes a write that the guest could have made and that leaves RAM as it is, for the
    /// self-test. The guest must be paused.
    ///
    /// # Errors
    /// QEMU's memory can't be written.
    fn touch(
        &mut self,
        ram: &GuestRam,
        block: ft_core::BlockId,
        page: u64,
    ) -> Result<(), TrackerError>;
}

/// What a collection found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Stretches of written pages.
    pub regions: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error("the uffd tracker needs Linux 6.7 or newer, this is {release}: use --tracker compare")]
    KernelTooOld { release: String },
    #[error(
        "{operation} QEMU's process {pid} is not permitted: run as root, or give CAP_SYS_PTRACE \
         and check kernel.yama.ptrace_scope; or use --tracker compare"
    )]
    NotPermitted {
        operation: &'static str,
        pid: i32,
        source: io::Error,
    },
    #[error(
        "QEMU's process {pid} is traced by process {tracer}, a debugger perhaps: end that, or use \
         --tracker compare"
    )]
    Traced { pid: i32, tracer: i32 },
    #[error("{operation} QEMU's process {pid} failed")]
    Inject {
        operation: &'static str,
        pid: i32,
        source: io::Error,
    },
    #[error(
        "RAM at {address:#x} is watched by another userfaultfd (QEMU's own postcopy, or another \
         tracker): end that, or use --tracker compare"
    )]
    Busy { address: u64 },
    #[error("{operation} for {bytes} bytes at {address:#x} of QEMU failed")]
    Kernel {
        operation: &'static str,
        address: u64,
        bytes: u64,
        source: io::Error,
    },
    #[error("the {tracker} tracker does not see writes: {what}; use the other --tracker")]
    Blind { tracker: &'static str, what: String },
}

/// Which tracker the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrackerChoice {
    Auto,
    Uffd,
    Compare,
}

/// Makes a tracker for a QEMU, and says in one sentence which and why. It is not armed yet.
///
/// # Errors
/// The wanted one can't be had; with [`TrackerChoice::Auto`] only if neither can.
pub fn choose(
    choice: TrackerChoice,
    ram: &GuestRam,
) -> Result<(Box<dyn Tracker>, String), TrackerError> {
    if choice == TrackerChoice::Compare {
        let said = "tracker compare: all of RAM is compared at each epoch".to_owned();
        return Ok((Box::new(CompareTracker::new(ram)?), said));
    }
    match UffdTracker::attach(ram) {
        Ok(tracker) => Ok((
            Box::new(tracker),
            "tracker uffd: the kernel reports writes".into(),
        )),
        Err(error) if choice == TrackerChoice::Auto => {
            let said = format!("tracker compare, which costs more, because: {error}");
            Ok((Box::new(CompareTracker::new(ram)?), said))
        }
        Err(error) => Err(error),
    }
}
