//! How an epoch is laid out in chunks, and whether what has arrived is one.
//!
//! A chunk is complete in itself and the same bytes on every link: a header, entries that fill
//! the rest of the first page, then whole pages in the order of the entries that own them. So
//! pages can be copied straight into place while the entries still grow, and a chunk can be
//! pushed and checked while the next one is filled. The last chunk of an epoch ends with the
//! device state and a [`Trailer`], which seals them all. Where bytes are dear, pages travel
//! [`packed`] instead, and so does the device state.
//!
//! ```text
//! 0      64                          4096          8192
//! ├header┼ entry 0 │ entry 1 │ … 0 0 ┼ page        ┼ page … (255 at most)
//! ```
//! [`layout`] has the entry, [`ChunkBuilder`] fills a chunk, [`check_chunk`] and
//! [`check_epoch`] judge what a peer has filled, [`entries`] takes it apart.

pub mod builder;
pub mod check;
pub mod layout;
pub mod packed;
mod packed_state;
pub mod trailer;
mod walk;

pub use builder::{ChunkBuilder, Sealed};
pub use check::{CheckedChunk, Expect, ImageError, check_chunk, check_epoch};
pub use layout::{ChunkHead, DATA_PAGES_MAX, ENTRIES_MAX};
pub use packed::{ChangedWords, PackedPage, Page, Unpacked};
pub use packed_state::{PackedState, pack_state};
pub use trailer::{AuditDigest, EpochDigest, Trailer};
pub use walk::{Piece, entries};
