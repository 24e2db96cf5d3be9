//! One io_uring: set-up, submission, completions, and the eventfd that says when to look.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use io_uring::types::{CancelBuilder, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::tcp::TcpError;

/// Entries of the submission queue; the link has fewer operations in flight than this, except
/// for notifications of zero-copy sends, which only need room in the completion queue.
const SUBMISSION_ENTRIES: u32 = 64;
/// Entries of the completion queue. More completions than this are kept by the kernel
/// (IORING_FEAT_NODROP) until there is room.
const COMPLETION_ENTRIES: u32 = 512;

/// A ring of one thread, whose deferred work runs when that thread asks for it.
///
/// Deferred task work (IORING_SETUP_DEFER_TASKRUN) keeps the kernel from interrupting the driver
/// thread, and makes `poll` on the ring's own descriptor useless: it never wakes. A registered
/// eventfd does.
pub(super) struct Ring {
    ring: IoUring,
    event: EventFd,
    /// Operations that the kernel has, or that are queued for it, and whose last completion has
    /// not been taken.
    in_flight: usize,
    zero_copy: bool,
}

impl Ring {
    /// Makes the ring of the calling thread: no other thread can use it.
    pub(super) fn new() -> Result<Ring, TcpError> {
        let ring = IoUring::builder()
            .dontfork()
            .setup_cqsize(COMPLETION_ENTRIES)
            .setup_submit_all()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(SUBMISSION_ENTRIES)
            .map_err(set_up_error)?;
        let zero_copy = check_opcodes(&ring)?;
        let event =
            EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|errno| TcpError::io("eventfd", errno.into()))?;
        ring.submitter()
            .register_eventfd(event.as_raw_fd())
            .map_err(|source| TcpError::io("IORING_REGISTER_EVENTFD", source))?;
        Ok(Ring {
            ring,
            event,
            in_flight: 0,
            zero_copy,
        })
    }

    /// Written whenever there is something to do, and never read: to be watched for edges.
    pub(super) fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    pub(super) fn has_zero_copy(&self) -> bool {
        self.zero_copy
    }

    pub(super) fn submitter(&self) -> io_uring::Submitter<'_> {
        self.ring.submitter()
    }

    /// Queues an operation.
    ///
    /// # Safety
    /// The memory that `entry` names must stay valid until the operation's last completion has
    /// been taken, and until then nobody may write it, or, if the operation writes it, read it.
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the caller vouches for the entry's memory.
        if unsafe { self.ring.submission().push(entry) }.is_err() {
            self.submit()?;
            // SAFETY: as above; the first attempt left nothing in the queue.
            unsafe { self.ring.submission().push(entry) }
                .map_err(|_| io::Error::from_raw_os_error(libc::ENOBUFS))?;
        }
        self.in_flight += 1;
        Ok(())
    }

    /// Submits what is queued if the next `entries` would not fit in the queue otherwise.
    pub(super) fn make_room(&mut self, entries: usize) -> io::Result<()> {
        let queue = self.ring.submission();
        let free = queue.capacity() - queue.len();
        drop(queue);
        if free < entries {
            self.submit()?;
        }
        Ok(())
    }

    /// Gives what is queued to the kernel and runs the work that it deferred, if there is either.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        loop {
            let queue = self.ring.submission();
            if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
                return Ok(());
            }
            drop(queue);
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // The completion queue is full: taking completions makes room.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes the next completion.
    pub(super) fn next(&mut self) -> Option<cqueue::Entry> {
        let entry = self.ring.completion().next()?;
        if !cqueue::more(entry.flags()) {
            self.in_flight -= 1;
        }
        Some(entry)
    }

    /// Begins a stretch in which this thread looks at the completions by itself: the kernel stops
    /// writing the eventfd.
    pub(super) fn hush(&mut self) {
        self.ring.completion().disable_eventfd();
    }

    /// Ends the stretch: the eventfd is written if the caller says that `more` is to be done, or
    /// if the kernel has more by now.
    pub(super) fn unhush(&mut self, more: bool) -> io::Result<()> {
        self.ring.completion().enable_eventfd();
        // Work that arrived while hushed was not signalled. The kernel first sets its flag, then
        // looks whether to signal; this side first allows signals, then looks at the flag: with a
        // full barrier between, one of the two sees the other.
        fence(Ordering::SeqCst);
        let queue = self.ring.submission();
        let waiting = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        if more || waiting || !self.ring.completion().is_empty() {
            self.wake()?;
        }
        Ok(())
    }

    /// Writes the eventfd.
    pub(super) fn wake(&self) -> io::Result<()> {
        match self.event.write(1) {
            // A full counter wakes, too.
            Ok(_) | Err(nix::Error::EAGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Cancels everything and waits up to `patience` until the kernel has let go of all memory.
    /// Returns whether it has.
    pub(super) fn quiesce(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let cancel = opcode::AsyncCancel2::new(CancelBuilder::any()).build();
        // SAFETY: the operation names no memory.
        if self.in_flight > 0 && unsafe { self.push(&cancel) }.is_err() {
            return false;
        }
        loop {
            while self.next().is_some() {}
            if self.in_flight == 0 {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let left = Timespec::from(left);
            match self
                .submitter()
                .submit_with_args(1, &SubmitArgs::new().timespec(&left))
            {
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ETIME | libc::EINTR | libc::EBUSY)
                    ) => {}
                Err(_) => return false,
            }
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("in_flight", &self.in_flight)
            .field("zero_copy", &self.zero_copy)
            .finish()
    }
}

/// Puts the cure beside the error.
fn set_up_error(source: io::Error) -> TcpError {
    match source.raw_os_error() {
        // Unknown flags: DEFER_TASKRUN came with 6.1. There is no fall-back: 6.1 is the oldest
        // kernel of a distribution that this project supports.
        Some(libc::EINVAL) | Some(libc::ENOSYS) => TcpError::KernelTooOld {
            missing: "io_uring with IORING_SETUP_DEFER_TASKRUN",
        },
        Some(libc::EPERM) => TcpError::RingForbidden,
        Some(libc::ENOMEM) => TcpError::RingMemory,
        _ => TcpError::io("io_uring_setup", source),
    }
}

/// Checks that the kernel has what the link can't do without; returns whether it has zero-copy
/// sends, without which the link only copies.
fn check_opcodes(ring: &IoUring) -> Result<bool, TcpError> {
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|source| TcpError::io("IORING_REGISTER_PROBE", source))?;
    let needed = [
        (opcode::Send::CODE, "IORING_OP_SEND"),
        (opcode::SendMsg::CODE, "IORING_OP_SENDMSG"),
        (opcode::Recv::CODE, "IORING_OP_RECV"),
        (opcode::AsyncCancel2::CODE, "IORING_OP_ASYNC_CANCEL"),
    ];
    for (code, missing) in needed {
        if !probe.is_supported(code) {
            return Err(TcpError::KernelTooOld { missing });
        }
    }
    Ok(probe.is_supported(opcode::SendZc::CODE))
}
