//! The control lane: length-prefixed messages through two bounded buffers.

use std::os::fd::RawFd;

use io_uring::{opcode, types};
use memmap2::MmapMut;

use crate::link::{LinkError, LossKind, MESSAGE_BYTES_MAX};
use crate::tcp::frame::{MESSAGE_PREFIX_BYTES, decode_message_length};
use crate::tcp::link::{Outcome, Token, outcome};
use crate::tcp::ring::Ring;

/// Bytes of messages that can wait to be sent, prefixes included.
pub(super) const CONTROL_QUEUE_BYTES: usize = 4 * (MESSAGE_PREFIX_BYTES + MESSAGE_BYTES_MAX);
/// Bytes of the receive buffer: the longest message fits whatever stands before it.
const RECEIVE_BYTES: usize = 2 * (MESSAGE_PREFIX_BYTES + MESSAGE_BYTES_MAX);

pub(super) struct Control {
    /// Messages that no operation covers yet. Never grows beyond its first capacity.
    queued: Vec<u8>,
    /// What the operation in flight sends; it has no other user till then.
    sending: Vec<u8>,
    sent: usize,
    send_in_flight: bool,
    /// The kernel writes behind `filled` while a receive is in flight.
    buffer: MmapMut,
    filled: usize,
    receive_in_flight: bool,
}

impl Control {
    pub(super) fn new() -> std::io::Result<Control> {
        Ok(Control {
            queued: Vec::with_capacity(CONTROL_QUEUE_BYTES),
            sending: Vec::with_capacity(CONTROL_QUEUE_BYTES),
            sent: 0,
            send_in_flight: false,
            buffer: MmapMut::map_anon(RECEIVE_BYTES)?,
            filled: 0,
            receive_in_flight: false,
        })
    }

    pub(super) fn queue(&mut self, message: &[u8]) -> Result<(), LinkError> {
        if message.len() > MESSAGE_BYTES_MAX {
            return Err(LinkError::MessageTooLong {
                bytes: message.len(),
            });
        }
        let queued = self.queued.len() + self.sending.len() - self.sent;
        if queued + MESSAGE_PREFIX_BYTES + message.len() > CONTROL_QUEUE_BYTES {
            return Err(LinkError::ControlQueueFull { queued });
        }
        self.queued
            .extend_from_slice(&(message.len() as u32).to_le_bytes());
        self.queued.extend_from_slice(message);
        Ok(())
    }

    /// Starts sending what is queued, unless it is being done.
    pub(super) fn start_send(&mut self, ring: &mut Ring, fd: RawFd) -> std::io::Result<()> {
        if self.send_in_flight {
            return Ok(());
        }
        if self.sent == self.sending.len() {
            self.sending.clear();
            self.sent = 0;
            std::mem::swap(&mut self.queued, &mut self.sending);
        }
        let rest = &self.sending[self.sent..];
        if rest.is_empty() {
            return Ok(());
        }
        let entry = opcode::Send::new(types::Fd(fd), rest.as_ptr(), rest.len() as u32)
            .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
            .build()
            .user_data(Token::ControlSend as u64);
        // SAFETY: `sending` is neither changed nor freed while `send_in_flight` is set: `queue`
        // only touches `queued`, and the link leaks this struct if it can't wait for the kernel.
        unsafe { ring.push(&entry) }?;
        self.send_in_flight = true;
        Ok(())
    }

    /// Starts receiving into the free part of the buffer, unless it is being done.
    pub(super) fn start_receive(&mut self, ring: &mut Ring, fd: RawFd) -> std::io::Result<()> {
        if self.receive_in_flight {
            return Ok(());
        }
        let free = &mut self.buffer[self.filled..];
        assert!(
            !free.is_empty(),
            "a whole message was left in the control buffer"
        );
        let entry = opcode::Recv::new(types::Fd(fd), free.as_mut_ptr(), free.len() as u32)
            .build()
            .user_data(Token::ControlReceive as u64);
        // SAFETY: the part behind `filled` is neither read nor written while `receive_in_flight`
        // is set, and the mapping lives until then: the link leaks this struct if it can't wait
        // for the kernel.
        unsafe { ring.push(&entry) }?;
        self.receive_in_flight = true;
        Ok(())
    }

    pub(super) fn sent(&mut self, result: i32) -> Result<(), LossKind> {
        self.send_in_flight = false;
        match outcome(result)? {
            Outcome::Bytes(bytes) => self.sent += bytes,
            Outcome::Again => {}
        }
        Ok(())
    }

    /// Takes what has arrived and hands whole messages to `sink`.
    pub(super) fn received(
        &mut self,
        result: i32,
        mut sink: impl FnMut(&[u8]),
    ) -> Result<(), LossKind> {
        self.receive_in_flight = false;
        match outcome(result)? {
            Outcome::Bytes(0) => return Err(LossKind::Fin),
            Outcome::Bytes(bytes) => self.filled += bytes,
            Outcome::Again => return Ok(()),
        }
        let mut rest = &self.buffer[..self.filled];
        while let Some((prefix, body)) = rest.split_first_chunk() {
            let length = decode_message_length(*prefix)
                .map_err(|error| LossKind::Protocol(error.to_string()))?;
            let Some((message, behind)) = body.split_at_checked(length) else {
                break;
            };
            sink(message);
            rest = behind;
        }
        let left = rest.len();
        self.buffer.copy_within(self.filled - left..self.filled, 0);
        self.filled = left;
        Ok(())
    }
}
