//! The sending half of the bulk lane.
//!
//! Plainly, several queued frames go out in one operation, and a chunk is done when its bytes are
//! in the socket's buffer. With zero copy, one frame goes out in two linked operations, and its
//! chunk is done when the peer's kernel has acknowledged the bytes, so the next frames are sent
//! while it is waited for.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;

use io_uring::{cqueue, opcode, squeue, types};

use crate::arena::Chunk;
use crate::grants::GrantIndex;
use crate::link::LossKind;
use crate::tcp::frame::{FRAME_HEADER_BYTES, FrameHeader};
use crate::tcp::operation::{Outcome, Token, outcome};
use crate::tcp::ring::Ring;
use crate::tcp::zero_copy::{ZeroCopy, ZeroCopyState};

/// Frames that one operation sends at most.
const BATCH_FRAMES: usize = 16;
/// An operation takes no further frame when it has this many bytes: submitting it copies as many
/// as fit in the socket's buffer, in the driver's thread.
const BATCH_BYTES: usize = 1 << 20;
/// Room for frames that the queue begins with.
const QUEUE_FRAMES: usize = 1024;
/// From this many bytes on a frame is sent without copying. Below, pinning and notifying costs
/// more than a copy (the kernel's documentation of MSG_ZEROCOPY says about 10 KiB).
const ZERO_COPY_BYTES_MIN: usize = 32 << 10;
/// Set in a notification's result if the kernel copied after all (IORING_NOTIF_USAGE_ZC_COPIED).
const NOTIFICATION_COPIED: u32 = 1 << 31;
/// Asks for that (IORING_SEND_ZC_REPORT_USAGE).
const SEND_REPORT_USAGE: u16 = 1 << 3;

pub(super) struct BulkSend {
    queue: VecDeque<Frame>,
    /// Bytes of the front frame, header included, that are sent.
    front_sent: usize,
    batch: Box<Batch>,
    /// Operations whose result is not known. They cover frames at the front of the queue.
    in_flight: usize,
    zero_copy: ZeroCopyState,
    /// Sent without copying, and not acknowledged by the peer's kernel.
    unacknowledged: Vec<Frame>,
    next_serial: u64,
}

struct Frame {
    header: FrameHeader,
    chunk: Chunk,
    /// Names the frame in notifications.
    serial: u64,
    /// Notifications to come; until the last one the kernel reads the chunk.
    notifications: usize,
}

/// What the kernel reads to learn what to send: at a fixed address while an operation is in
/// flight.
struct Batch {
    headers: [[u8; FRAME_HEADER_BYTES]; BATCH_FRAMES],
    pieces: [libc::iovec; 2 * BATCH_FRAMES],
    message: libc::msghdr,
}

impl BulkSend {
    pub(super) fn new(zero_copy: ZeroCopy, ring: &Ring) -> BulkSend {
        BulkSend {
            queue: VecDeque::with_capacity(QUEUE_FRAMES),
            front_sent: 0,
            batch: Box::new(Batch::new()),
            in_flight: 0,
            zero_copy: ZeroCopyState::new(zero_copy, ring),
            unacknowledged: Vec::new(),
            next_serial: 0,
        }
    }

    pub(super) fn queue(&mut self, chunk: Chunk, grant: GrantIndex, tag: u32) {
        let header = FrameHeader {
            grant,
            length: chunk.bytes().len() as u32,
            tag,
        };
        self.queue.push_back(Frame {
            header,
            chunk,
            serial: self.next_serial,
            notifications: 0,
        });
        self.next_serial += 1;
    }

    /// Whether there are chunks that are not sent.
    pub(super) fn has_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Starts sending what is queued, unless it is being done.
    pub(super) fn start(&mut self, ring: &mut Ring, fd: RawFd) -> io::Result<()> {
        if self.in_flight > 0 {
            return Ok(());
        }
        let Some(front) = self.queue.front() else {
            return Ok(());
        };
        if self.zero_copy.is_active() && front.chunk.bytes().len() >= ZERO_COPY_BYTES_MIN {
            match self.zero_copy.register(ring, &front.chunk) {
                Ok(index) => return self.start_zero_copy(ring, fd, index),
                Err(error) => self.zero_copy.failed(&error),
            }
        }
        let frames = if self.zero_copy.is_active() {
            1
        } else {
            BATCH_FRAMES
        };
        let message = self.batch.fill(&self.queue, frames, self.front_sent);
        let entry = opcode::SendMsg::new(types::Fd(fd), message)
            .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
            .build()
            .user_data(Token::BulkSend as u64);
        // SAFETY: `batch` is boxed and not filled again, and the chunks stay in `queue`, which
        // only gives shared access to their bytes, while `in_flight` isn't 0; the link leaks this
        // struct if it can't wait for the kernel.
        unsafe { ring.push(&entry) }?;
        self.in_flight = 1;
        Ok(())
    }

    /// Sends the rest of the front frame: the header by copying, linked with the body.
    fn start_zero_copy(
        &mut self,
        ring: &mut Ring,
        fd: RawFd,
        index: Option<u16>,
    ) -> io::Result<()> {
        // A chain that is cut in two by a submission is no chain.
        ring.make_room(2)?;
        let front = self.queue.front().expect("the caller looked at it");
        let header = &mut self.batch.headers[0];
        *header = front.header.encode();
        if let Some(rest @ [_, ..]) = header.get(self.front_sent..) {
            let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL | libc::MSG_MORE;
            let entry = opcode::Send::new(types::Fd(fd), rest.as_ptr(), rest.len() as u32)
                .flags(flags)
                .build()
                .flags(squeue::Flags::IO_LINK)
                .user_data(Token::BulkHeader as u64);
            // SAFETY: as in `start`: `batch` isn't filled while `in_flight` isn't 0.
            unsafe { ring.push(&entry) }?;
            self.in_flight += 1;
        }
        let body = &front.chunk.bytes()[self.front_sent.saturating_sub(FRAME_HEADER_BYTES)..];
        let entry = opcode::SendZc::new(types::Fd(fd), body.as_ptr(), body.len() as u32)
            .buf_index(index)
            .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
            .zc_flags(SEND_REPORT_USAGE)
            .build()
            .user_data(Token::BulkBody.with_serial(front.serial));
        // SAFETY: the chunk stays in `queue`, and then in `unacknowledged`, which only give shared
        // access to its bytes, until its last notification; the link leaks this struct if it can't
        // wait for the kernel.
        unsafe { ring.push(&entry) }?;
        self.in_flight += 1;
        Ok(())
    }

    /// Takes the result of a plain send or of a header and hands chunks that are done to `done`.
    pub(super) fn sent(&mut self, result: i32, done: impl FnMut(Chunk)) -> Result<(), LossKind> {
        self.in_flight -= 1;
        if let Outcome::Bytes(bytes) = outcome(result)? {
            self.advance(bytes, done);
        }
        Ok(())
    }

    /// Takes a completion of a body that is sent without copying: its result, or the notification
    /// that the kernel doesn't read it any more.
    pub(super) fn body_sent(
        &mut self,
        completion: &cqueue::Entry,
        mut done: impl FnMut(Chunk),
    ) -> Result<(), LossKind> {
        let result = completion.result();
        if cqueue::notif(completion.flags()) {
            if result as u32 & NOTIFICATION_COPIED != 0 {
                self.zero_copy.copied();
            }
            self.acknowledged(Token::serial(completion.user_data()), done);
            return Ok(());
        }
        self.in_flight -= 1;
        let front = self.queue.front_mut().expect("its body is being sent");
        if cqueue::more(completion.flags()) {
            front.notifications += 1;
        }
        match -result {
            // The header was sent in part only: the rest of both is to be sent.
            libc::ECANCELED => Ok(()),
            libc::ENOMEM | libc::ENOBUFS | libc::EINVAL | libc::EOPNOTSUPP | libc::EFAULT => {
                self.zero_copy
                    .failed(&io::Error::from_raw_os_error(-result));
                Ok(())
            }
            _ => {
                if let Outcome::Bytes(bytes) = outcome(result)? {
                    self.advance(bytes, &mut done);
                }
                Ok(())
            }
        }
    }

    /// Gives up: hands every chunk to `done` that the kernel isn't reading.
    pub(super) fn abandon(&mut self, mut done: impl FnMut(Chunk)) {
        if self.in_flight == 0 {
            for frame in self.queue.drain(..) {
                match frame.notifications {
                    0 => done(frame.chunk),
                    _ => self.unacknowledged.push(frame),
                }
            }
        }
    }

    /// Counts `bytes` more as sent.
    fn advance(&mut self, mut bytes: usize, mut done: impl FnMut(Chunk)) {
        while bytes > 0 {
            let front = self.queue.front().expect("no more is sent than is queued");
            let left = front.bytes() - self.front_sent;
            if bytes < left {
                self.front_sent += bytes;
                return;
            }
            bytes -= left;
            self.front_sent = 0;
            let frame = self.queue.pop_front().expect("it has a front");
            match frame.notifications {
                0 => done(frame.chunk),
                _ => self.unacknowledged.push(frame),
            }
        }
    }

    fn acknowledged(&mut self, serial: u64, mut done: impl FnMut(Chunk)) {
        let complete = self
            .unacknowledged
            .iter()
            .position(|it| it.serial == serial);
        if let Some(index) = complete {
            let frame = &mut self.unacknowledged[index];
            frame.notifications -= 1;
            if frame.notifications == 0 {
                done(self.unacknowledged.remove(index).chunk);
            }
            return;
        }
        let front = self.queue.front_mut().filter(|it| it.serial == serial);
        front
            .expect("a frame is kept until its last notification")
            .notifications -= 1;
    }
}

impl Frame {
    fn bytes(&self) -> usize {
        FRAME_HEADER_BYTES + self.chunk.bytes().len()
    }
}

impl Batch {
    fn new() -> Batch {
        Batch {
            headers: [[0; _]; _],
            pieces: [libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            }; _],
            // SAFETY: all-zero is a valid msghdr: null pointers and zero lengths.
            message: unsafe { std::mem::zeroed() },
        }
    }

    /// Describes the first of `queue`, at most `frames`, less the `skip` bytes of the front one that
    /// are sent.
    fn fill(&mut self, queue: &VecDeque<Frame>, frames: usize, skip: usize) -> *const libc::msghdr {
        let mut pieces = 0;
        let mut bytes = 0;
        let mut skip = skip;
        for (frame, header) in queue.iter().take(frames).zip(&mut self.headers) {
            *header = frame.header.encode();
            for part in [&header[..], frame.chunk.bytes()] {
                let rest = &part[skip.min(part.len())..];
                skip -= part.len() - rest.len();
                if !rest.is_empty() {
                    self.pieces[pieces] = libc::iovec {
                        iov_base: rest.as_ptr() as *mut libc::c_void,
                        iov_len: rest.len(),
                    };
                    pieces += 1;
                    bytes += rest.len();
                }
            }
            if bytes >= BATCH_BYTES {
                break;
            }
        }
        self.message.msg_iov = self.pieces.as_mut_ptr();
        self.message.msg_iovlen = pieces;
        &raw const self.message
    }
}
