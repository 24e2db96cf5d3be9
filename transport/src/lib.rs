//! Moves chunks and messages between two hosts, and knows nothing of what they mean.
//!
//! [`Link`] is the one interface; `tcp` runs it on io_uring, `mem` inside one process for tests.
//! Slot memory lives in [`arena`]: a chunk is either written by one owner ([`ChunkMut`]) or
//! written by nobody ([`Chunk`]).

pub mod arena;
pub mod choice;
mod grants;
pub mod link;
pub mod mem;
#[cfg(feature = "rdma")]
pub mod rdma;
pub mod spin;
pub mod tcp;

pub use arena::{Arena, Chunk, ChunkMut};
pub use choice::{TransportChoice, TransportConfig, TransportConnector, TransportListener};
pub use link::{Event, Grant, Lane, Link, LinkError, Loss, LossKind};
pub use spin::Spin;
