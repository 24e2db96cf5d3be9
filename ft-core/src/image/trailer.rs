//! What seals an epoch.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::check::ImageError;
use crate::limits::{BLOCKS_MAX, DEVICE_STATE_BYTES_MAX, EPOCH_CHUNKS_MAX};
use crate::types::{Epoch, PAGE_BYTES, RunState};
use crate::wire::{WireError, at_most, crc32c_append, run_state};

/// The sums of an epoch, in its last chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// Chunks of the epoch, this one included.
    pub chunks: u32,
    /// Pages that travelled with their bytes; device state and trailer don't count.
    pub data_pages: u64,
    /// Pages that travelled as a mark.
    pub zero_pages: u64,
    pub device_bytes: u64,
    /// What the guest was doing at the boundary.
    pub run_state: RunState,
    /// The epoch that a delta follows.
    pub base: Epoch,
    /// [`EpochDigest`] of all chunks but the last, which has this trailer in it.
    pub digest: u32,
    pub audit: Option<AuditDigest>,
}

/// A hash of every RAM block at the boundary, in the order of the shape's blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditDigest(pub Vec<u64>);

/// CRC-32C over the chunks' body checksums in index order, little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EpochDigest {
    crc: u32,
}

impl EpochDigest {
    pub fn push(&mut self, body_crc: u32) {
        self.crc = crc32c_append(self.crc, &body_crc.to_le_bytes());
    }

    pub fn value(self) -> u32 {
        self.crc
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawTrailer {
    data_pages: U64,
    zero_pages: U64,
    device_bytes: U64,
    base: U64,
    chunks: U32,
    digest: U32,
    run_state: u8,
    /// 1 if an audit follows: a hash of eight bytes per block.
    audited: u8,
    audit_blocks: U16,
    reserved: [u8; 4],
}

const _: () = {
    assert!(size_of::<RawTrailer>() == 48);
    assert!(offset_of!(RawTrailer, base) == 24);
    assert!(offset_of!(RawTrailer, chunks) == 32);
    assert!(offset_of!(RawTrailer, digest) == 36);
    assert!(offset_of!(RawTrailer, run_state) == 40);
    assert!(offset_of!(RawTrailer, audited) == 41);
    assert!(offset_of!(RawTrailer, audit_blocks) == 42);
    assert!(size_of::<RawTrailer>() + BLOCKS_MAX * size_of::<u64>() <= PAGE_BYTES);
};

impl Trailer {
    /// Fills a whole page. Allocates nothing.
    ///
    /// # Panics
    /// If the audit names more than [`BLOCKS_MAX`] blocks.
    pub(super) fn encode(&self, page: &mut [u8]) {
        let hashes = self.audit.as_ref().map_or(&[][..], |audit| &audit.0);
        assert!(
            hashes.len() <= BLOCKS_MAX,
            "audit of {} blocks",
            hashes.len()
        );
        let raw = RawTrailer {
            data_pages: self.data_pages.into(),
            zero_pages: self.zero_pages.into(),
            device_bytes: self.device_bytes.into(),
            base: self.base.0.into(),
            chunks: self.chunks.into(),
            digest: self.digest.into(),
            run_state: self.run_state as u8,
            audited: self.audit.is_some().into(),
            audit_blocks: (hashes.len() as u16).into(), // at most BLOCKS_MAX
            reserved: [0; 4],
        };
        let (record, rest) = page.split_at_mut(size_of::<RawTrailer>());
        record.copy_from_slice(raw.as_bytes());
        let (slots, padding) = rest.split_at_mut(size_of_val(hashes));
        for (slot, hash) in slots.chunks_exact_mut(size_of::<u64>()).zip(hashes) {
            slot.copy_from_slice(&hash.to_le_bytes());
        }
        padding.fill(0);
    }

    /// Reads a whole page of a VM that has `blocks` RAM blocks.
    pub(super) fn decode(page: &[u8], blocks: usize) -> Result<Trailer, ImageError> {
        let truncated = WireError::Truncated { what: "trailer" };
        let (raw, rest) = RawTrailer::ref_from_prefix(page).map_err(|_| truncated.clone())?;
        let audit_blocks = usize::from(raw.audit_blocks.get());
        match (raw.audited, audit_blocks) {
            (0, 0) => {}
            (1, count) if count == blocks => {}
            (0 | 1, found) => return Err(ImageError::AuditBlocks { blocks, found }),
            (found, _) => {
                let (what, found) = ("audit mark", found.into());
                return Err(WireError::Value { what, found }.into());
            }
        }
        let hash_bytes = audit_blocks * size_of::<u64>();
        let (hashes, padding) = rest.split_at_checked(hash_bytes).ok_or(truncated)?;
        if raw.reserved != [0; 4] || padding.iter().any(|&b| b != 0) {
            return Err(WireError::Reserved { what: "trailer" }.into());
        }
        let device_bytes = raw.device_bytes.get();
        at_most(
            "chunks of an epoch",
            raw.chunks.get().into(),
            EPOCH_CHUNKS_MAX.into(),
        )?;
        at_most(
            "bytes of device state",
            device_bytes,
            DEVICE_STATE_BYTES_MAX as u64,
        )?;
        let hash = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
        Ok(Trailer {
            chunks: raw.chunks.get(),
            data_pages: raw.data_pages.get(),
            zero_pages: raw.zero_pages.get(),
            device_bytes,
            run_state: run_state(raw.run_state)?,
            base: Epoch(raw.base.get()),
            digest: raw.digest.get(),
            audit: (raw.audited == 1)
                .then(|| AuditDigest(hashes.as_chunks().0.iter().map(hash).collect())),
        })
    }
}
