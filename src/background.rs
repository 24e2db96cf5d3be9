//! Work that may block, in a thread of its own: a full terminal or a slow disk must not hold up
//! heartbeats.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow};

/// Until a full queue is looked at again, at the end.
const FULL_QUEUE_PAUSE: Duration = Duration::from_millis(1);

#[derive(Debug)]
enum Message<T> {
    Item(T),
    /// Answered when everything before it is done.
    Flush(SyncSender<()>),
}

/// A thread and its bounded queue. Dropping it leaves the thread to finish what is queued.
#[derive(Debug)]
pub(crate) struct Background<T> {
    queue: SyncSender<Message<T>>,
}

impl<T: Send + 'static> Background<T> {
    /// Starts a thread that gives each item to `work`. It takes no signals: those are the main
    /// thread's.
    ///
    /// # Errors
    /// The kernel refuses a thread.
    pub(crate) fn start(
        name: &str,
        capacity: usize,
        mut work: impl FnMut(T) + Send + 'static,
    ) -> io::Result<Background<T>> {
        let (queue, items): (_, Receiver<Message<T>>) = sync_channel(capacity);
        let body = move || {
            for message in items {
                match message {
                    Message::Item(item) => work(item),
                    // Whoever asked may have lost patience.
                    Message::Flush(done) => drop(done.try_send(())),
                }
            }
        };
        // A new thread inherits the mask.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        let started = thread::Builder::new().name(name.to_owned()).spawn(body);
        before.thread_set_mask()?;
        started?;
        Ok(Background { queue })
    }

    /// Never blocks. False if the queue is full, and the item is lost.
    pub(crate) fn offer(&self, item: T) -> bool {
        self.queue.try_send(Message::Item(item)).is_ok()
    }

    /// Waits until everything that was offered is done, but not for ever. To be called at the
    /// end, not in a loop that somebody waits for.
    pub(crate) fn flush(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let (done, wait) = sync_channel(1);
        let mut message = Message::Flush(done);
        while let Err(TrySendError::Full(again)) = self.queue.try_send(message) {
            if Instant::now() >= deadline {
                return;
            }
            message = again;
            thread::sleep(FULL_QUEUE_PAUSE);
        }
        // Late or dead, there is nothing more to be done for it.
        let _ = wait.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn items_come_in_order_and_flush_waits_for_them() {
        let (seen, log) = channel();
        let work = move |item: u32| seen.send(item).unwrap();
        let background = Background::start("test", 8, work).unwrap();
        assert!((0..8).all(|item| background.offer(item)));
        background.flush(Duration::from_secs(60));
        assert_eq!(
            log.try_iter().collect::<Vec<_>>(),
            (0..8).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_full_queue_loses_items_and_blocks_nobody() {
        let (open, gate) = channel::<()>();
        let (began, has_begun) = channel();
        let work = move |_| {
            began.send(()).unwrap();
            let _ = gate.recv();
        };
        let background = Background::start("test", 2, work).unwrap();
        assert!(background.offer(0));
        has_begun.recv().unwrap();
        assert!(background.offer(1) && background.offer(2));
        assert!(!background.offer(3));
        drop(open);
        background.flush(Duration::from_secs(60));
        assert!(background.offer(4));
    }
}
