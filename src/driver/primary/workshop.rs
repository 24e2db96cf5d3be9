//! Where the primary's jobs are done: short ones on the driver's thread, long ones on their own.
//!
//! Handing a job over and its result back wakes two sleeping processors. On a virtual machine each
//! of that takes longer than an ordinary harvest, and the guest would stand still for it.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ft_core::EpochKind;

use super::work::{Done, Job, PrimaryWorker};
use crate::driver::worker::Worker;

/// Chunks that the driver fills at most, a few milliseconds of work: heartbeats wait meanwhile.
const SHORT_CHUNKS: usize = 8;
/// Pages that the driver packs at most: what else comes waits meanwhile.
const SHORT_PACKED_PAGES: u64 = 64;
/// That may wait for the driver: a harvest ends with many at once.
const RESULTS: usize = 4096;
/// A scan that takes longer is not the driver's.
const SHORT_SCAN: Duration = Duration::from_millis(3);

/// `None` when the tracker has left QEMU.
type Shared = Arc<Mutex<Option<PrimaryWorker>>>;

pub(crate) struct Workshop {
    worker: Shared,
    thread: Worker<Job, Done>,
    scans_fast: bool,
}

impl Workshop {
    /// `scan` is what it takes to find the dirty pages of this RAM.
    ///
    /// # Errors
    /// The thread can't be started.
    pub(crate) fn start(worker: PrimaryWorker, scan: Duration) -> anyhow::Result<Workshop> {
        let worker = Arc::new(Mutex::new(Some(worker)));
        let theirs = Arc::clone(&worker);
        let thread = Worker::start("harvest", RESULTS, move |desk| {
            while let Some(job) = desk.next() {
                if let Some(worker) = lock(&theirs).as_mut() {
                    let rest = worker.handle(job, usize::MAX, &mut |done| desk.report(done));
                    assert!(rest.is_none(), "the budget has no end");
                }
            }
        })?;
        Ok(Workshop {
            worker,
            thread,
            scans_fast: scan <= SHORT_SCAN,
        })
    }

    /// Does a short job at once, with its results in `done`; puts others in the thread's queue.
    /// Jobs are done in their order.
    pub(crate) fn submit(&self, job: Job, done: &mut Vec<Done>) {
        let rest = if self.thread.is_idle() && self.is_short(&job) {
            match lock(&self.worker).as_mut() {
                Some(worker) => worker.handle(job, SHORT_CHUNKS, &mut |result| done.push(result)),
                None => None,
            }
        } else {
            Some(job)
        };
        if let Some(rest) = rest {
            self.thread.submit(rest);
        }
    }

    fn is_short(&self, job: &Job) -> bool {
        match job {
            Job::Harvest { kind, audit, .. } => {
                self.scans_fast && *kind == EpochKind::Delta && !audit
            }
            Job::Seal { .. } => lock(&self.worker)
                .as_ref()
                .is_some_and(|worker| worker.pages_to_pack() <= SHORT_PACKED_PAGES),
            _ => false,
        }
    }

    /// Readable when the thread has results.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.thread.fd()
    }

    /// The thread's next result, if there is one.
    pub(crate) fn take(&self) -> Option<Done> {
        self.thread.take()
    }

    /// Takes the tracker out of QEMU, after what is queued is done.
    pub(crate) fn leave(self) {
        let Workshop { worker, thread, .. } = self;
        drop(thread);
        drop(lock(&worker).take());
    }
}

fn lock(worker: &Shared) -> MutexGuard<'_, Option<PrimaryWorker>> {
    // A job that panicked leaves nothing to go on with; the driver ends as well.
    worker.lock().unwrap_or_else(PoisonError::into_inner)
}
