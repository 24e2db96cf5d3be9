//! What travels: the control messages, and the header that they share with the chunks.
//!
//! Every frame begins with a [`Header`] of 64 bytes that has a checksum of its own, so that its
//! lengths can be believed before the body is looked at. Everything is little-endian. Whatever
//! is reserved is zero, and checked. No decoder panics or holds more than a limit of
//! [`crate::limits`], whatever the bytes.

mod codec;
mod cursor;
pub mod header;
pub mod message;
pub mod tag;

pub use codec::{decode, encode};
pub use header::{HEADER_BYTES, Header, Kind};
pub use message::*;
pub use tag::ChunkTag;

use crc_fast::{CrcAlgorithm, Digest};

use crate::types::{EpochKind, RunState};

/// What this program speaks. The header's magic, version and checksum stay where they are in
/// every version, so that a hello can always be refused with both versions named.
pub const PROTOCOL_VERSION: u16 = 1;

/// CRC-32C, the one that iSCSI and the processor's `crc32` instruction use.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// CRC-32C of what `crc` is the checksum of, followed by `bytes`.
pub(crate) fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    let state = u64::from(!crc);
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, state);
    digest.update(bytes);
    digest.finalize() as u32 // of a 32-bit algorithm
}

/// A frame that can't be believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("frame has {bytes} bytes, fewer than its header's {HEADER_BYTES}")]
    NoHeader { bytes: usize },
    #[error("frame begins with {found:#010x}: the peer is not a curling-rdma")]
    Magic { found: u32 },
    #[error("header checksum is wrong")]
    HeaderChecksum,
    #[error("peer speaks protocol version {found}, this side {ours}: install the same release")]
    Version { found: u16, ours: u16 },
    #[error("reserved bytes of the {what} are not zero")]
    Reserved { what: &'static str },
    #[error("frame kind {found:#x} is unknown")]
    UnknownKind { found: u16 },
    #[error("a {found:?} frame where a {wanted} belongs")]
    WrongKind { found: Kind, wanted: &'static str },
    #[error("frame has {found} bytes, its header says {declared}")]
    Length { declared: usize, found: usize },
    #[error("body checksum is wrong")]
    BodyChecksum,
    #[error("{what} can't be {found}")]
    Value { what: &'static str, found: u64 },
    #[error("{what}: {found} is more than {max}")]
    TooLong {
        what: &'static str,
        found: u64,
        max: u64,
    },
    #[error("message ends inside its {what}")]
    Truncated { what: &'static str },
    #[error("{bytes} bytes follow the end of the message")]
    Trailing { bytes: usize },
    #[error("{what} is not UTF-8")]
    NotUtf8 { what: &'static str },
    #[error("{what} are not in ascending order of their names, each once")]
    Unsorted { what: &'static str },
}

impl WireError {
    /// What to tell the peer whose hello this was.
    pub fn refusal_code(&self) -> RefusalCode {
        match self {
            WireError::Version { .. } => RefusalCode::Version,
            _ => RefusalCode::Malformed,
        }
    }
}

pub(crate) fn epoch_kind(number: u8) -> Result<EpochKind, WireError> {
    let all = [EpochKind::SyncRound, EpochKind::Delta, EpochKind::Full];
    one_of("kind of an epoch", &all, |kind| kind as u8, number)
}

pub(crate) fn run_state(number: u8) -> Result<RunState, WireError> {
    let all = [RunState::Running, RunState::Stopped];
    one_of("run state", &all, |state| state as u8, number)
}

/// The member of `all` that has this number on the wire.
fn one_of<T: Copy>(
    what: &'static str,
    all: &[T],
    number_of: impl Fn(T) -> u8,
    number: u8,
) -> Result<T, WireError> {
    let member = all.iter().find(|&&member| number_of(member) == number);
    member.copied().ok_or(WireError::Value {
        what,
        found: number.into(),
    })
}

/// # Errors
/// If `found` is more than `max`.
pub(crate) fn at_most(what: &'static str, found: u64, max: u64) -> Result<(), WireError> {
    if found > max {
        return Err(WireError::TooLong { what, found, max });
    }
    Ok(())
}
