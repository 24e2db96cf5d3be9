//! The 32 bits that arrive with a chunk: RDMA's immediate value, a field of TCP's framing.

use crate::limits::EPOCH_CHUNKS_MAX;
use crate::types::Epoch;

const INDEX_BITS: u32 = 20;
const EPOCH_BITS: u32 = 11;
const INDEX_MASK: u32 = (1 << INDEX_BITS) - 1;
const EPOCH_MASK: u32 = (1 << EPOCH_BITS) - 1;

const _: () = assert!(INDEX_BITS + EPOCH_BITS + 1 == u32::BITS);
const _: () = assert!(EPOCH_CHUNKS_MAX - 1 == INDEX_MASK);

/// Which chunk has arrived, before its header is looked at.
///
/// A hint for sorting, not a proof: the header, which is checked, says it again in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkTag {
    /// The low 11 bits of the epoch.
    pub epoch_low: u16,
    /// 20 bits.
    pub index: u32,
    pub last: bool,
}

impl ChunkTag {
    /// # Panics
    /// If `index` is not below [`EPOCH_CHUNKS_MAX`].
    pub fn new(epoch: Epoch, index: u32, last: bool) -> ChunkTag {
        assert!(index < EPOCH_CHUNKS_MAX, "chunk {index} is past the limit");
        ChunkTag {
            epoch_low: low_bits(epoch),
            index,
            last,
        }
    }

    pub fn pack(self) -> u32 {
        let epoch = u32::from(self.epoch_low);
        assert!(self.index <= INDEX_MASK && epoch <= EPOCH_MASK, "{self:?}");
        u32::from(self.last) << 31 | epoch << INDEX_BITS | self.index
    }

    /// Every number is a tag.
    pub fn unpack(bits: u32) -> ChunkTag {
        ChunkTag {
            epoch_low: low_bits(Epoch(u64::from(bits >> INDEX_BITS))),
            index: bits & INDEX_MASK,
            last: bits >> 31 == 1,
        }
    }

    /// Whether the tag can be one of this epoch's.
    pub fn matches(self, epoch: Epoch) -> bool {
        self.epoch_low == low_bits(epoch)
    }
}

fn low_bits(epoch: Epoch) -> u16 {
    (epoch.0 & u64::from(EPOCH_MASK)) as u16
}
