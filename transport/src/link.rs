//! The one interface between the driver and a network.

use std::os::fd::BorrowedFd;

use crate::arena::{Chunk, ChunkMut};

/// Bytes of a chunk of slot memory.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Bytes of the longest control message.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// The peer's permission to fill one chunk once. Opaque to everybody but the link that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grant(pub [u8; 24]);

/// The three connections of a pairing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Lane {
    /// Messages and heartbeats.
    Control = 1,
    /// Chunks, so that they never delay a heartbeat.
    Bulk = 2,
    /// Carries nothing. Each side's QEMU holds a copy of its end, so that the kernel's FIN on it
    /// proves that daemon *and* QEMU are gone.
    Proof = 3,
}

/// How a lane ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LossKind {
    /// The peer's kernel closed it in good order. On [`Lane::Proof`] this is proof of death.
    Fin,
    /// Reset, time-out or another error of this host's kernel: proves nothing.
    Error(String),
    /// The peer broke the framing; the text says how.
    Protocol(String),
}

/// A lane is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    pub lane: Lane,
    pub kind: LossKind,
}

/// What [`Link::progress`] has to report.
#[derive(Debug)]
pub enum Event<'a> {
    /// The peer sent this message. Its bytes are untrusted and gone after the call.
    Message(&'a [u8]),
    /// The link is done with a chunk that was pushed: the bytes may be overwritten.
    Pushed(Chunk),
    /// The peer filled a granted chunk. `tag` is what it gave to [`Link::push`]: untrusted.
    Arrived { chunk: Chunk, tag: u32 },
    /// A granted chunk that nobody filled comes back after [`Link::revoke`].
    Revoked(ChunkMut),
    /// A lane ended. Reported once per lane.
    Lost(Loss),
}

/// The caller did something that the link can't do; the peer's faults are [`Event::Lost`].
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("message of {bytes} bytes is longer than {MESSAGE_BYTES_MAX}")]
    MessageTooLong { bytes: usize },
    #[error("control lane has {queued} bytes queued: the peer does not read")]
    ControlQueueFull { queued: usize },
    #[error("grant does not belong to this link")]
    BadGrant,
    #[error("{operation} failed")]
    Io {
        operation: &'static str,
        source: std::io::Error,
    },
}

/// Three lanes to one peer.
///
/// One thread drives it. Nothing here blocks: `send`, `grant` and `push` queue, `flush` starts
/// what is queued, [`Link::ready_fd`] is readable when [`Link::progress`] has something to do.
pub trait Link {
    /// Readable when [`Link::progress`] should be called.
    fn ready_fd(&self) -> BorrowedFd<'_>;
    /// This host's end of [`Lane::Proof`], for QEMU to hold a copy of.
    fn proof_fd(&self) -> Option<BorrowedFd<'_>>;
    /// Queues a message on the control lane.
    fn send(&mut self, message: &[u8]) -> Result<(), LinkError>;
    /// Receiver: lets the peer fill `chunk` once. `slot` names the group for [`Link::revoke`].
    fn grant(&mut self, chunk: ChunkMut, slot: u8) -> Result<Grant, LinkError>;
    /// Receiver: takes back every grant of `slot` that has not arrived. A write that comes later
    /// is refused or dropped, never stored. Chunks come back as [`Event::Revoked`].
    fn revoke(&mut self, slot: u8) -> Result<(), LinkError>;
    /// Sender: fills the peer's chunk `to` with the used bytes of `chunk`. `tag` arrives with it.
    fn push(&mut self, chunk: Chunk, to: Grant, tag: u32) -> Result<(), LinkError>;
    /// Starts everything that is queued, with one submission.
    fn flush(&mut self) -> Result<(), LinkError>;
    /// Reports what has happened since the last call. Never blocks.
    fn progress(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<(), LinkError>;
}
