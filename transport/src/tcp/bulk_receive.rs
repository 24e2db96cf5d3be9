//! The receiving half of the bulk lane: each frame's header, then its body straight into the
//! granted chunk.
//!
//! The receive of a body is linked with that of the next header, so that a frame that is there
//! already costs one submission. A body that ends short cancels the header behind it.

use std::os::fd::RawFd;

use io_uring::{opcode, squeue, types};
use memmap2::MmapMut;

use crate::arena::{Chunk, ChunkMut};
use crate::grants::{Claim, GrantIndex, Granted, Grants};
use crate::link::LossKind;
use crate::tcp::frame::{FRAME_HEADER_BYTES, FrameHeader};
use crate::tcp::operation::{Outcome, Token, outcome};
use crate::tcp::ring::Ring;

/// Bytes of a dropped frame that one operation reads.
const DROP_BYTES: usize = 64 << 10;

pub(super) struct BulkReceive {
    pub(super) grants: Grants,
    state: State,
    /// Where headers go, and dropped bytes.
    scratch: MmapMut,
    /// An operation that receives a header: at once, or behind the body before it.
    header_in_flight: bool,
    /// An operation that receives a body or dropped bytes.
    body_in_flight: bool,
}

enum State {
    /// `filled` bytes of the next header are in `scratch`.
    Header { filled: usize },
    /// `received` bytes of the frame are in the chunk.
    Body {
        granted: Granted,
        frame: FrameHeader,
        received: usize,
        /// The slot was revoked: the chunk goes back as soon as the kernel lets go of it.
        revoked: bool,
    },
    /// The frame's grant was revoked: `left` bytes are still to come, for nobody.
    Drop { left: usize },
}

/// A chunk that the link is done with.
#[derive(Debug)]
pub(super) enum Finished {
    Arrived { chunk: Chunk, tag: u32 },
    Revoked(ChunkMut),
}

impl BulkReceive {
    pub(super) fn new() -> std::io::Result<BulkReceive> {
        Ok(BulkReceive {
            grants: Grants::default(),
            state: State::Header { filled: 0 },
            scratch: MmapMut::map_anon(DROP_BYTES)?,
            header_in_flight: false,
            body_in_flight: false,
        })
    }

    /// Starts receiving what comes next, unless it is being done.
    pub(super) fn start(&mut self, ring: &mut Ring, fd: RawFd) -> std::io::Result<()> {
        let (to, bytes, is_body) = match &mut self.state {
            State::Header { filled } if !self.header_in_flight => {
                let filled = *filled;
                return self.start_header(ring, fd, filled);
            }
            State::Header { .. } => return Ok(()),
            _ if self.body_in_flight => return Ok(()),
            State::Body {
                granted,
                frame,
                received,
                ..
            } => {
                let bytes = frame.length as usize - *received;
                // SAFETY: `received` is less than the frame's length, which was checked to be at
                // most the chunk's.
                let to = unsafe { granted.chunk.as_mut_ptr().add(*received) };
                (to, bytes, true)
            }
            State::Drop { left } => (self.scratch.as_mut_ptr(), (*left).min(DROP_BYTES), false),
        };
        // A chain that is cut in two by a submission is no chain.
        ring.make_room(2)?;
        // The header of an earlier chain may still have to be reported as cancelled.
        let chain = is_body && !self.header_in_flight;
        let (wait, link) = if chain {
            (libc::MSG_WAITALL, squeue::Flags::IO_LINK)
        } else {
            (0, squeue::Flags::empty())
        };
        let entry = opcode::Recv::new(types::Fd(fd), to, bytes as u32)
            .flags(wait)
            .build()
            .flags(link)
            .user_data(Token::BulkReceive as u64);
        // SAFETY: `to` has room for `bytes` in `scratch` or in the chunk, which both stay in this
        // struct, unread and unwritten, while `body_in_flight` is set; the link leaks it if it
        // can't wait for the kernel.
        unsafe { ring.push(&entry) }?;
        self.body_in_flight = true;
        if chain {
            self.start_header(ring, fd, 0)?;
        }
        Ok(())
    }

    fn start_header(&mut self, ring: &mut Ring, fd: RawFd, filled: usize) -> std::io::Result<()> {
        let free = &mut self.scratch[filled..FRAME_HEADER_BYTES];
        let entry = opcode::Recv::new(types::Fd(fd), free.as_mut_ptr(), free.len() as u32)
            .build()
            .user_data(Token::BulkReceiveHeader as u64);
        // SAFETY: `scratch` stays in this struct, and nobody uses it in `State::Header` or
        // `State::Body` while `header_in_flight` is set; the link leaks it if it can't wait for
        // the kernel.
        unsafe { ring.push(&entry) }?;
        self.header_in_flight = true;
        Ok(())
    }

    /// Takes the result of receiving a header.
    pub(super) fn header_received(&mut self, result: i32) -> Result<(), LossKind> {
        self.header_in_flight = false;
        let State::Header { filled } = &mut self.state else {
            // Cancelled by the body before it, whose own result says what there is to say.
            return Ok(());
        };
        *filled += judge(result, false)?;
        if *filled == FRAME_HEADER_BYTES {
            self.begin_frame()?;
        }
        Ok(())
    }

    /// Takes the result of receiving a body, and hands the chunk that it finishes to `finished`.
    pub(super) fn received(
        &mut self,
        result: i32,
        finished: impl FnOnce(Finished),
    ) -> Result<(), LossKind> {
        self.body_in_flight = false;
        match &mut self.state {
            State::Header { .. } => unreachable!("no body is being received"),
            State::Body {
                received, revoked, ..
            } => {
                let bytes = judge(result, *revoked);
                *received += bytes.as_ref().unwrap_or(&0);
                // A chunk that was revoked is free, whatever became of the lane.
                self.finish_body().map(finished);
                bytes.map(drop)
            }
            State::Drop { left } => {
                *left -= judge(result, false)?;
                if *left == 0 {
                    self.state = State::Header { filled: 0 };
                }
                Ok(())
            }
        }
    }

    /// Takes back the chunk that is being filled, if it is of `slot`: at once if the kernel isn't
    /// writing it. Returns whether the operation in flight must be cancelled for it.
    pub(super) fn revoke_current(&mut self, slot: u8, back: impl FnOnce(ChunkMut)) -> bool {
        let State::Body {
            granted, revoked, ..
        } = &mut self.state
        else {
            return false;
        };
        if granted.slot != slot || *revoked {
            return false;
        }
        *revoked = true;
        if self.body_in_flight {
            return true;
        }
        if let Some(Finished::Revoked(chunk)) = self.finish_body() {
            back(chunk);
        }
        false
    }

    fn begin_frame(&mut self) -> Result<(), LossKind> {
        let header = self.scratch[..FRAME_HEADER_BYTES]
            .try_into()
            .expect("the scratch area holds a header");
        let protocol = |text: String| LossKind::Protocol(text);
        let frame = FrameHeader::decode(header).map_err(|error| protocol(error.to_string()))?;
        let GrantIndex { index, generation } = frame.grant;
        self.state = match self.grants.claim(frame.grant) {
            Claim::Granted(granted) => State::Body {
                granted,
                frame,
                received: 0,
                revoked: false,
            },
            Claim::Revoked => State::Drop {
                left: frame.length as usize,
            },
            Claim::Filled => {
                return Err(protocol(format!(
                    "grant {index}.{generation} was used a second time"
                )));
            }
            Claim::Unknown => {
                return Err(protocol(format!(
                    "grant {index}.{generation} was never given"
                )));
            }
        };
        Ok(())
    }

    /// Ends the frame's body if it is complete or revoked.
    fn finish_body(&mut self) -> Option<Finished> {
        let State::Body {
            frame,
            received,
            revoked,
            ..
        } = &self.state
        else {
            return None;
        };
        let left = frame.length as usize - received;
        if left > 0 && !revoked {
            return None;
        }
        let next = if left > 0 {
            State::Drop { left }
        } else {
            State::Header { filled: 0 }
        };
        let State::Body {
            granted,
            frame,
            revoked,
            ..
        } = std::mem::replace(&mut self.state, next)
        else {
            unreachable!("it was a body");
        };
        Some(if revoked {
            Finished::Revoked(granted.chunk)
        } else {
            Finished::Arrived {
                chunk: granted.chunk.freeze(frame.length as usize),
                tag: frame.tag,
            }
        })
    }
}

/// The number of bytes that arrived; 0 means that the operation ended without any, and is to be
/// started again.
fn judge(result: i32, may_be_cancelled: bool) -> Result<usize, LossKind> {
    if result == -libc::ECANCELED && may_be_cancelled {
        return Ok(0);
    }
    match outcome(result)? {
        Outcome::Bytes(0) => Err(LossKind::Fin),
        Outcome::Bytes(bytes) => Ok(bytes),
        Outcome::Again => Ok(0),
    }
}
