//! Control messages that must not overtake the binding of the windows that they may speak of.

use std::collections::VecDeque;

use crate::link::{Link, LinkError, MESSAGE_BYTES_MAX};
use crate::tcp::TcpLink;

/// Bytes of messages that may wait for a binding, which takes microseconds.
const HELD_BYTES_MAX: usize = 4 * MESSAGE_BYTES_MAX;

/// Messages in order, each with the number of bindings that must be done before it may go.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    held: VecDeque<(u64, Vec<u8>)>,
    bytes: usize,
}

impl Outbox {
    /// Sends a message after `binds` bindings: at once if `done` are enough.
    pub(super) fn send(
        &mut self,
        tcp: &mut TcpLink,
        message: &[u8],
        binds: u64,
        done: u64,
    ) -> Result<(), LinkError> {
        if self.held.is_empty() && done >= binds {
            return tcp.send(message);
        }
        let bytes = message.len();
        if bytes > MESSAGE_BYTES_MAX {
            return Err(LinkError::MessageTooLong { bytes });
        }
        if self.bytes + bytes > HELD_BYTES_MAX {
            return Err(LinkError::ControlQueueFull { queued: self.bytes });
        }
        self.bytes += bytes;
        self.held.push_back((binds, message.to_vec()));
        Ok(())
    }

    /// Passes on what may go now, and starts it.
    pub(super) fn release(&mut self, tcp: &mut TcpLink, done: u64) -> Result<(), LinkError> {
        let mut released = false;
        while let Some((binds, message)) = self.held.front() {
            if *binds > done {
                break;
            }
            match tcp.send(message) {
                Ok(()) => {}
                // The peer doesn't read: the rest waits for the next call.
                Err(LinkError::ControlQueueFull { .. }) => break,
                Err(error) => return Err(error),
            }
            self.bytes -= message.len();
            self.held.pop_front();
            released = true;
        }
        if released { tcp.flush() } else { Ok(()) }
    }
}
