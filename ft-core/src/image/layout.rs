//! Where things are in a chunk.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::limits::{BLOCK_PAGES_MAX, BLOCKS_MAX, CHUNK_BYTES, DEVICE_STATE_BYTES_MAX};
use crate::types::{EpochKind, PAGE_BYTES};
use crate::wire::{Frame, HEADER_BYTES};

pub use crate::wire::header::ENTRIES_MAX;

/// Pages of data, device state and trailer in one chunk: all but the first.
pub const DATA_PAGES_MAX: usize = CHUNK_BYTES / PAGE_BYTES - 1;

/// What a chunk belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHead {
    pub frame: Frame,
    pub kind: EpochKind,
    pub index: u32,
}

/// What an entry is. The numbers are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum EntryKind {
    /// `count` pages from page `at` on; as many pages of the chunk.
    Data = 1,
    /// `count` pages of zeros from page `at` on; takes no room.
    Zero = 2,
    /// `count` bytes of device state from byte `at` on; whole pages of the chunk.
    Device = 3,
    /// The trailer; one page of the chunk.
    Trailer = 4,
    /// `count` bytes of records of `at` pages; whole pages of the chunk.
    Packed = 5,
    /// `count` bytes of records that make all of the device state, `at` bytes; whole pages of the
    /// chunk.
    PackedDevice = 6,
}

impl EntryKind {
    pub(super) const ALL: [EntryKind; 6] = [
        EntryKind::Data,
        EntryKind::Zero,
        EntryKind::Device,
        EntryKind::Trailer,
        EntryKind::Packed,
        EntryKind::PackedDevice,
    ];
}

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub(super) struct RawEntry {
    /// Zero for all but data and zeros.
    pub(super) block: U16,
    pub(super) kind: u8,
    pub(super) reserved: u8,
    pub(super) count: U32,
    pub(super) at: U64,
}

const _: () = {
    assert!(size_of::<RawEntry>() == 16);
    assert!(offset_of!(RawEntry, kind) == 2);
    assert!(offset_of!(RawEntry, reserved) == 3);
    assert!(offset_of!(RawEntry, count) == 4);
    assert!(offset_of!(RawEntry, at) == 8);
    assert!(HEADER_BYTES + ENTRIES_MAX * size_of::<RawEntry>() == PAGE_BYTES);
    assert!(ENTRIES_MAX == 252 && DATA_PAGES_MAX == 255);
    assert!(CHUNK_BYTES.is_multiple_of(PAGE_BYTES));
    // Counts and block numbers fit in their fields.
    assert!(BLOCK_PAGES_MAX <= u32::MAX as u64 && DEVICE_STATE_BYTES_MAX <= u32::MAX as usize);
    assert!(BLOCKS_MAX <= u16::MAX as usize);
};

/// Where entry `index` is in a chunk.
pub(super) fn entry_range(index: usize) -> std::ops::Range<usize> {
    let start = HEADER_BYTES + index * size_of::<RawEntry>();
    start..start + size_of::<RawEntry>()
}

/// Where `count` pages from page `first` after the entries on are in a chunk.
pub(super) fn page_range(first: usize, count: usize) -> std::ops::Range<usize> {
    let start = PAGE_BYTES + first * PAGE_BYTES;
    start..start + count * PAGE_BYTES
}
