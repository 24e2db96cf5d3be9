//! The sending half of the bulk lane: queued chunks, several in one operation.

use std::collections::VecDeque;
use std::os::fd::RawFd;

use io_uring::{opcode, types};

use crate::arena::Chunk;
use crate::link::LossKind;
use crate::tcp::frame::{FRAME_HEADER_BYTES, FrameHeader, GrantIndex};
use crate::tcp::link::{Outcome, Token, outcome};
use crate::tcp::ring::Ring;

/// Frames that one operation sends at most.
const BATCH_FRAMES: usize = 16;
/// An operation takes no further frame when it has this many bytes.
const BATCH_BYTES: usize = 2 << 20;
/// Room for frames that the queue begins with.
const QUEUE_FRAMES: usize = 1024;

pub(super) struct BulkSend {
    queue: VecDeque<Frame>,
    /// Bytes of the front frame, header included, that are sent.
    front_sent: usize,
    batch: Box<Batch>,
    in_flight: bool,
}

struct Frame {
    header: FrameHeader,
    chunk: Chunk,
}

/// What the kernel reads to learn what to send: at a fixed address while an operation is in
/// flight.
struct Batch {
    headers: [[u8; FRAME_HEADER_BYTES]; BATCH_FRAMES],
    pieces: [libc::iovec; 2 * BATCH_FRAMES],
    message: libc::msghdr,
}

impl BulkSend {
    pub(super) fn new() -> BulkSend {
        BulkSend {
            queue: VecDeque::with_capacity(QUEUE_FRAMES),
            front_sent: 0,
            batch: Box::new(Batch::new()),
            in_flight: false,
        }
    }

    pub(super) fn queue(&mut self, chunk: Chunk, grant: GrantIndex, tag: u32) {
        let header = FrameHeader {
            grant,
            length: chunk.bytes().len() as u32,
            tag,
        };
        self.queue.push_back(Frame { header, chunk });
    }

    /// Starts sending what is queued, unless it is being done.
    pub(super) fn start(&mut self, ring: &mut Ring, fd: RawFd) -> std::io::Result<()> {
        if self.in_flight || self.queue.is_empty() {
            return Ok(());
        }
        let message = self.batch.fill(&self.queue, self.front_sent);
        let entry = opcode::SendMsg::new(types::Fd(fd), message)
            .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
            .build()
            .user_data(Token::BulkSend as u64);
        // SAFETY: `batch` is boxed and not filled again, and the chunks stay in `queue`, which
        // only gives shared access to their bytes, while `in_flight` is set; the link leaks this
        // struct if it can't wait for the kernel.
        unsafe { ring.push(&entry) }?;
        self.in_flight = true;
        Ok(())
    }

    /// Takes the operation's result and hands chunks that are sent to `done`.
    pub(super) fn sent(
        &mut self,
        result: i32,
        mut done: impl FnMut(Chunk),
    ) -> Result<(), LossKind> {
        self.in_flight = false;
        let mut bytes = match outcome(result)? {
            Outcome::Bytes(bytes) => bytes,
            Outcome::Again => return Ok(()),
        };
        while bytes > 0 {
            let front = self.queue.front().expect("no more is sent than is queued");
            let left = front.bytes() - self.front_sent;
            if bytes < left {
                self.front_sent += bytes;
                break;
            }
            bytes -= left;
            self.front_sent = 0;
            done(self.queue.pop_front().expect("it has a front").chunk);
        }
        Ok(())
    }

    /// Gives up: hands every chunk to `done` that the kernel isn't reading.
    pub(super) fn abandon(&mut self, mut done: impl FnMut(Chunk)) {
        if !self.in_flight {
            for frame in self.queue.drain(..) {
                done(frame.chunk);
            }
        }
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

    /// Describes the first frames of `queue`, less the `skip` bytes of the front one that are
    /// sent.
    fn fill(&mut self, queue: &VecDeque<Frame>, skip: usize) -> *const libc::msghdr {
        let mut pieces = 0;
        let mut bytes = 0;
        let mut skip = skip;
        for (frame, header) in queue.iter().zip(&mut self.headers) {
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
