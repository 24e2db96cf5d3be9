//! A processor for each end of a link, as two hosts have.
//!
//! Left to the scheduler, both ends share one or not from one second to the next, and an answer takes
//! 12 µs or 120 on the same machine: two runs would compare its choices, not two links.

use std::sync::OnceLock;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// What the first thread could use that was pinned.
static ALL: OnceLock<CpuSet> = OnceLock::new();

/// The calling thread stays on one processor until this is dropped.
pub(crate) struct Pinned {
    before: CpuSet,
}

impl Pinned {
    /// To the first processor that it may use, or the second; to the only one if there is no second.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn to(which: usize) -> Result<Pinned> {
        let this = Pid::from_raw(0);
        let before = sched_getaffinity(this).context("sched_getaffinity")?;
        // A thread begins with what the one has that starts it, which may be pinned by then.
        let all = ALL.get_or_init(|| before);
        let usable = (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu) == Ok(true));
        let usable: Vec<_> = usable.take(which + 1).collect();
        let mut one = CpuSet::new();
        one.set(*usable.last().context("a thread without a processor")?)?;
        sched_setaffinity(this, &one).context("sched_setaffinity")?;
        Ok(Pinned { before })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // What runs afterwards inherits it.
        if let Err(error) = sched_setaffinity(Pid::from_raw(0), &self.before) {
            eprintln!("report: sched_setaffinity: {error}");
        }
    }
}
