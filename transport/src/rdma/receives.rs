//! The buffers into which the peer's messages come.

use std::io;
use std::rc::Rc;

use memmap2::MmapMut;

use super::RdmaError;
use super::connecting::{Connection, DEPTH};
use super::queue_pair::MESSAGE_BYTES;
use super::region::MemoryRegion;
use crate::tcp::frame::FRAME_HEADER_BYTES;

/// Bytes of the buffer of one message.
const RECEIVE_BYTES: usize = 32;
/// Set in the id of a receive; the rest is the buffer's number.
const RECEIVE: u64 = 1 << 63;

const _: () = assert!(FRAME_HEADER_BYTES == MESSAGE_BYTES && MESSAGE_BYTES <= RECEIVE_BYTES);

/// One buffer for each receive that the queue pair can hold. To be ended after the queue pair.
#[derive(Debug)]
pub(super) struct Receives {
    /// None when the link has ended.
    region: Option<Rc<MemoryRegion>>,
    memory: MmapMut,
}

impl Receives {
    /// Gives the queue pair all of them.
    pub(super) fn new(connection: &mut Connection) -> Result<Receives, RdmaError> {
        let io = |operation| move |source| RdmaError::Io { operation, source };
        let buffers = DEPTH.receives as usize;
        let mut memory =
            MmapMut::map_anon(buffers * RECEIVE_BYTES).map_err(io("mapping the link's buffers"))?;
        // SAFETY: the mapping is this link's own, and goes after the queue pair.
        let region =
            unsafe { MemoryRegion::register(&connection.pd, memory.as_mut_ptr(), memory.len()) }
                .map_err(io("ibv_reg_mr"))?;
        let receives = Receives {
            region: Some(region),
            memory,
        };
        for buffer in 0..buffers {
            receives
                .again(connection, buffer)
                .map_err(io("ibv_post_recv"))?;
        }
        Ok(receives)
    }

    /// The buffer that a completion with this id is about.
    pub(super) fn buffer(id: u64) -> usize {
        (id & !RECEIVE) as usize
    }

    /// What came into `buffer`, if it has a message's length.
    pub(super) fn message(&self, buffer: usize, bytes: usize) -> Option<&[u8; MESSAGE_BYTES]> {
        let buffer = &self.memory[buffer * RECEIVE_BYTES..][..RECEIVE_BYTES];
        buffer.get(..bytes)?.as_array()
    }

    /// Gives a buffer back to the queue pair once its message has been read.
    pub(super) fn again(&self, connection: &mut Connection, buffer: usize) -> io::Result<()> {
        let Some(region) = &self.region else {
            return Ok(());
        };
        let piece = region.piece(buffer * RECEIVE_BYTES, RECEIVE_BYTES);
        // SAFETY: each buffer is used by one receive, read only between its completion and this
        // call, and ended after the queue pair.
        unsafe { connection.pair.receive(RECEIVE | buffer as u64, piece) }
    }

    /// Lets go of the memory's registration. The queue pair is gone.
    pub(super) fn end(&mut self) {
        self.region = None;
    }
}
