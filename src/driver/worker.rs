//! The thread that copies, hashes and scans, and the two bounded queues to it.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use anyhow::Context;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Jobs and results of a machine that may wait, beside those that chunks make.
pub(crate) const JOBS: usize = 64;

/// The driver's end.
#[derive(Debug)]
pub(crate) struct Worker<J, R> {
    jobs: Option<SyncSender<J>>,
    results: Receiver<R>,
    ready: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    submitted: Cell<u64>,
    finished: Arc<AtomicU64>,
}

/// The worker's end.
#[derive(Debug)]
pub(crate) struct Desk<J, R> {
    jobs: Receiver<J>,
    results: SyncSender<R>,
    ready: Arc<EventFd>,
    at_work: Cell<bool>,
    finished: Arc<AtomicU64>,
}

impl<J: Send + 'static, R: Send + 'static> Worker<J, R> {
    /// Starts the thread; it ends when the `Worker` is dropped, after the job it is at. That more
    /// than `jobs` of them, or of their results, wait is a bug of ours.
    pub(crate) fn start(
        name: &str,
        jobs: usize,
        work: impl FnOnce(Desk<J, R>) + Send + 'static,
    ) -> anyhow::Result<Worker<J, R>> {
        let (their_results, results) = sync_channel(jobs);
        let (jobs, their_jobs) = sync_channel(jobs);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let ready = Arc::new(EventFd::from_flags(flags).context("making an eventfd")?);
        let finished = Arc::new(AtomicU64::new(0));
        let desk = Desk {
            jobs: their_jobs,
            results: their_results,
            ready: Arc::clone(&ready),
            at_work: Cell::new(false),
            finished: Arc::clone(&finished),
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(desk))
            .context("starting the worker thread")?;
        Ok(Worker {
            jobs: Some(jobs),
            results,
            ready,
            thread: Some(thread),
            submitted: Cell::new(0),
            finished,
        })
    }

    pub(crate) fn submit(&self, job: J) {
        self.submitted.set(self.submitted.get() + 1);
        match self.jobs.as_ref().map(|jobs| jobs.try_send(job)) {
            Some(Ok(())) => {}
            Some(Err(TrySendError::Full(_))) => panic!("too many jobs wait for the worker"),
            Some(Err(TrySendError::Disconnected(_))) | None => panic!("the worker thread is gone"),
        }
    }

    /// Whether all jobs are finished, and the worker waits for the next.
    pub(crate) fn is_idle(&self) -> bool {
        self.finished.load(Ordering::Acquire) == self.submitted.get()
    }

    /// Readable when there are results.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    /// The next result, if there is one.
    pub(crate) fn take(&self) -> Option<R> {
        let result = self.results.try_recv().ok();
        if result.is_none() {
            // Emptied: clear the eventfd, then look again, or a result that came in between
            // would wait for the next one.
            let _ = self.ready.read();
            return self.results.try_recv().ok();
        }
        result
    }
}

impl<J, R> Drop for Worker<J, R> {
    fn drop(&mut self) {
        self.jobs = None;
        // Results that nobody reads any more must not block it.
        while self.results.recv().is_ok() {}
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl<J, R> Desk<J, R> {
    /// The next job; `None` when the driver has gone.
    pub(crate) fn next(&self) -> Option<J> {
        if self.at_work.replace(true) {
            self.finished.fetch_add(1, Ordering::Release);
        }
        self.jobs.recv().ok()
    }

    pub(crate) fn report(&self, result: R) {
        if self.results.send(result).is_ok() {
            // Can't fail: the counter would have to reach 2^64.
            let _ = self.ready.write(1);
        }
    }
}
