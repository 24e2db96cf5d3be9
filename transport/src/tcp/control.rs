//! The control lane: length-prefixed messages through bounded buffers.
//!
//! One multishot receive stays armed, so that a message costs no submission on this side.

use std::os::fd::RawFd;

use io_uring::{cqueue, opcode, types};

use crate::link::{LinkError, LossKind, MESSAGE_BYTES_MAX};
use crate::tcp::TcpError;
use crate::tcp::frame::{MESSAGE_PREFIX_BYTES, decode_message_length};
use crate::tcp::operation::{Outcome, Token, outcome};
use crate::tcp::provided::{BUFFER_BYTES, GROUP, Provided};
use crate::tcp::ring::Ring;

/// Bytes of messages that can wait to be sent, prefixes included.
pub(super) const CONTROL_QUEUE_BYTES: usize = 4 * (MESSAGE_PREFIX_BYTES + MESSAGE_BYTES_MAX);
/// Bytes that can be received before they are handed on: a message that is almost complete, and
/// a buffer behind it.
const RECEIVED_BYTES: usize = MESSAGE_PREFIX_BYTES + MESSAGE_BYTES_MAX + BUFFER_BYTES;

pub(super) struct Control {
    /// Messages that no operation covers yet. Never grows beyond its first capacity.
    queued: Vec<u8>,
    /// What the operation in flight sends; it has no other user till then.
    sending: Vec<u8>,
    sent: usize,
    send_in_flight: bool,
    provided: Provided,
    /// The beginning of a message that isn't complete. Never grows beyond its first capacity.
    partial: Vec<u8>,
    receive_in_flight: bool,
}

impl Control {
    pub(super) fn new(ring: &Ring) -> Result<Control, TcpError> {
        Ok(Control {
            queued: Vec::with_capacity(CONTROL_QUEUE_BYTES),
            sending: Vec::with_capacity(CONTROL_QUEUE_BYTES),
            sent: 0,
            send_in_flight: false,
            provided: Provided::new(ring)?,
            partial: Vec::with_capacity(RECEIVED_BYTES),
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

    /// Starts receiving, unless it is being done.
    pub(super) fn start_receive(&mut self, ring: &mut Ring, fd: RawFd) -> std::io::Result<()> {
        if self.receive_in_flight {
            return Ok(());
        }
        let entry = opcode::RecvMulti::new(types::Fd(fd), GROUP)
            .build()
            .user_data(Token::ControlReceive as u64);
        // SAFETY: the operation names no memory but that of `provided`, of which nobody uses what
        // is with the kernel, and which the link leaks if it can't wait for the kernel.
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
        completion: &cqueue::Entry,
        sink: impl FnMut(&[u8]),
    ) -> Result<(), LossKind> {
        self.receive_in_flight = cqueue::more(completion.flags());
        let buffer = cqueue::buffer_select(completion.flags());
        let done = match completion.result() {
            // Every buffer was full at once; all of them are given back by now.
            error if error == -libc::ENOBUFS => Ok(()),
            result => match (outcome(result)?, buffer) {
                (Outcome::Bytes(bytes @ 1..), Some(buffer)) => self.take(buffer, bytes, sink),
                (Outcome::Bytes(_), _) => Err(LossKind::Fin),
                (Outcome::Again, _) => Ok(()),
            },
        };
        if let Some(buffer) = buffer {
            self.provided.give_back(buffer);
        }
        done
    }

    fn take(
        &mut self,
        buffer: u16,
        bytes: usize,
        mut sink: impl FnMut(&[u8]),
    ) -> Result<(), LossKind> {
        let arrived = self.provided.bytes(buffer, bytes);
        if self.partial.is_empty() {
            let rest = split_messages(arrived, &mut sink)?;
            self.partial.extend_from_slice(rest);
        } else {
            self.partial.extend_from_slice(arrived);
            let left = split_messages(&self.partial, &mut sink)?.len();
            self.partial.drain(..self.partial.len() - left);
        }
        Ok(())
    }
}

/// Hands the whole messages at the beginning of `bytes` to `sink` and returns what is behind them:
/// less than a message.
fn split_messages<'a>(bytes: &'a [u8], sink: &mut impl FnMut(&[u8])) -> Result<&'a [u8], LossKind> {
    let mut rest = bytes;
    while let Some((prefix, body)) = rest.split_first_chunk::<MESSAGE_PREFIX_BYTES>() {
        let length = decode_message_length(*prefix)
            .map_err(|error| LossKind::Protocol(error.to_string()))?;
        let Some((message, behind)) = body.split_at_checked(length) else {
            break;
        };
        sink(message);
        rest = behind;
    }
    Ok(rest)
}
