//! The thread that copies, hashes and scans, and the two bounded queues to it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use anyhow::Context;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Jobs or results that may wait. A machine has at most a window of chunks and a few jobs under
/// way, so a full queue is a bug of ours.
const QUEUE_MAX: usize = 4096;

/// The driver's end.
#[derive(Debug)]
pub(crate) struct Worker<J, R> {
    jobs: Option<SyncSender<J>>,
    results: Receiver<R>,
    ready: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// The worker's end.
#[derive(Debug)]
pub(crate) struct Desk<J, R> {
    jobs: Receiver<J>,
    results: SyncSender<R>,
    ready: Arc<EventFd>,
}

impl<J: Send + 'static, R: Send + 'static> Worker<J, R> {
    /// Starts the thread; it ends when the `Worker` is dropped, after the job it is at.
    pub(crate) fn start(
        name: &str,
        work: impl FnOnce(Desk<J, R>) + Send + 'static,
    ) -> anyhow::Result<Worker<J, R>> {
        let (jobs, their_jobs) = sync_channel(QUEUE_MAX);
        let (their_results, results) = sync_channel(QUEUE_MAX);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let ready = Arc::new(EventFd::from_flags(flags).context("making an eventfd")?);
        let desk = Desk {
            jobs: their_jobs,
            results: their_results,
            ready: Arc::clone(&ready),
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
        })
    }

    pub(crate) fn submit(&self, job: J) {
        match self.jobs.as_ref().map(|jobs| jobs.try_send(job)) {
            Some(Ok(())) => {}
            Some(Err(TrySendError::Full(_))) => panic!("{QUEUE_MAX} jobs wait for the worker"),
            Some(Err(TrySendError::Disconnected(_))) | None => panic!("the worker thread is gone"),
        }
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

    /// Waits for the next result: only when the loop is over.
    pub(crate) fn wait(&self) -> Option<R> {
        self.results.recv().ok()
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
        self.jobs.recv().ok()
    }

    pub(crate) fn report(&self, result: R) {
        if self.results.send(result).is_ok() {
            // Can't fail: the counter would have to reach 2^64.
            let _ = self.ready.write(1);
        }
    }
}
