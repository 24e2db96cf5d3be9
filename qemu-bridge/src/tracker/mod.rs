//! Which pages the guest has written since they were last armed.

pub mod compare;
mod inject;
mod pagemap;
mod selftest;
pub mod soft_dirty;
mod trust;
pub mod uffd;

use std::io;

use ft_core::image::Piece;
use ft_core::{BlockId, DirtySet, PageRun};

use crate::guest_ram::{GuestRam, RamError};
pub use compare::CompareTracker;
pub use selftest::self_test;
pub use soft_dirty::SoftDirtyTracker;
pub use uffd::UffdTracker;

/// Reports written pages. The order is always: armed first, copied afterwards; a write in
/// between is then in the copy *and* reported the next time.
pub trait Tracker: Send + std::fmt::Debug {
    /// `uffd`, `soft-dirty` or `compare`.
    fn name(&self) -> &'static str;

    /// Forgets all dirt: what is written from now on is reported.
    ///
    /// # Errors
    /// The kernel refuses, or QEMU is gone.
    fn arm_all(&mut self, ram: &GuestRam) -> Result<(), TrackerError>;

    /// Adds what was written since it was armed to `into`, and arms exactly that again. The guest
    /// must be paused.
    ///
    /// # Errors
    /// The kernel refuses, or QEMU is gone. Pages may have been armed that are not in `into`:
    /// the caller must take all of RAM for dirty.
    fn collect(&mut self, ram: &GuestRam, into: &mut DirtySet) -> Result<Collected, TrackerError>;

    /// As [`Tracker::collect`], of a guest that may run. It need not arm: then the same pages are
    /// reported again.
    ///
    /// While the guest runs, that is not the last word on a page. The kernel counts a transfer
    /// past the page cache (a disk with `cache=none`) as a write when it pins the page, not when
    /// the data comes: a page that is armed and copied in between has old bytes in the copy and
    /// isn't reported again (seen on Linux 6.18 with O_DIRECT reads). QEMU's `stop` waits for such
    /// transfers. So every page that was collected from a running guest has to be copied once
    /// more after it was stopped.
    ///
    /// # Errors
    /// As [`Tracker::collect`].
    fn collect_live(
        &mut self,
        ram: &GuestRam,
        into: &mut DirtySet,
    ) -> Result<Collected, TrackerError> {
        self.collect(ram, into)
    }

    /// Whether [`Tracker::collect_live`] arms what it reports, so that a copy that is made afterwards is
    /// good until the page is reported again (unless a disk's data comes past the page cache).
    fn arms_live(&self) -> bool {
        false
    }

    /// Told of every piece that was copied while the guest runs, after it was collected, or armed: a
    /// tracker that finds writes by what they change has to know what the copy has.
    fn copied(&mut self, _piece: &Piece<'_>) {}

    /// The pages that a write to this one may report.
    fn reported_with(&self, block: BlockId, page: u64) -> PageRun {
        PageRun {
            block,
            first: page,
            count: 1,
        }
    }

    /// Makes a write that the guest could have made and that leaves RAM as it is, for the
    /// self-test. The guest must be paused.
    ///
    /// # Errors
    /// QEMU's memory can't be written.
    fn touch(&mut self, ram: &GuestRam, block: BlockId, page: u64) -> Result<(), TrackerError>;
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
    #[error(
        "the uffd tracker needs Linux 6.7 or newer, this is {release}: use --tracker soft-dirty or \
         compare"
    )]
    KernelTooOld { release: String },
    #[error(
        "this kernel ({release}) was built without soft-dirty bits (CONFIG_MEM_SOFT_DIRTY): use \
         --tracker uffd, from Linux 6.7 on, or compare"
    )]
    NoSoftDirty { release: String },
    #[error(
        "the soft-dirty bits of QEMU's process {pid} are used by another daemon: end that, or use \
         --tracker compare"
    )]
    SoftDirtyInUse { pid: i32 },
    #[error(
        "the soft-dirty tracker can't be trusted here: {what}; {cure}, or use --tracker compare"
    )]
    Untrusted { what: String, cure: &'static str },
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
    Process {
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
    SoftDirty,
    Compare,
}

/// Makes a tracker for a QEMU, and says in one sentence which and why. It is not armed yet.
///
/// # Errors
/// The wanted one can't be had; with [`TrackerChoice::Auto`] only if none can.
pub fn choose(
    choice: TrackerChoice,
    ram: &GuestRam,
) -> Result<(Box<dyn Tracker>, String), TrackerError> {
    let (tracker, said): (Box<dyn Tracker>, String) = match choice {
        TrackerChoice::Uffd => (
            Box::new(UffdTracker::attach(ram)?),
            "tracker uffd: the kernel reports writes".into(),
        ),
        TrackerChoice::SoftDirty => (
            Box::new(SoftDirtyTracker::attach(ram)?),
            "tracker soft-dirty: the kernel remembers writes".into(),
        ),
        TrackerChoice::Compare => (
            Box::new(CompareTracker::new(ram)?),
            "tracker compare: all of RAM is compared at each epoch".into(),
        ),
        TrackerChoice::Auto => return choose_best(ram),
    };
    Ok((tracker, said))
}

fn choose_best(ram: &GuestRam) -> Result<(Box<dyn Tracker>, String), TrackerError> {
    let no_uffd = match choose(TrackerChoice::Uffd, ram) {
        Ok(chosen) => return Ok(chosen),
        Err(error) => error,
    };
    match choose(TrackerChoice::SoftDirty, ram) {
        Ok((tracker, said)) => Ok((tracker, format!("{said}; not uffd, because: {no_uffd}"))),
        Err(no_soft_dirty) => {
            let (tracker, _) = choose(TrackerChoice::Compare, ram)?;
            let said = format!(
                "tracker compare, which costs more, because: {no_uffd}; and {no_soft_dirty}"
            );
            Ok((tracker, said))
        }
    }
}
