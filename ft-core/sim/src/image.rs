//! Epoch images in symbols: what a chunk of real memory holds, without the bytes.

use ft_core::image::{AuditDigest, CheckedChunk, Trailer};
use ft_core::wire::Frame;
use ft_core::{BlockId, EpochKind, RunState};

use crate::vm::{Device, Ram, Value};

/// Pages of a chunk: few, so that an ordinary epoch has several chunks.
pub const CHUNK_PAGES: usize = 8;
/// Bytes that a symbolic device state stands for.
pub const DEVICE_BYTES: u32 = 4000;

#[derive(Clone, Debug)]
pub struct Chunk {
    pub frame: Frame,
    pub kind: EpochKind,
    pub index: u32,
    pub pages: Vec<(BlockId, u64, Value)>,
    /// In the last chunk of an epoch.
    pub end: Option<(Device, Trailer)>,
    pub corrupt: bool,
}

impl Chunk {
    pub fn zero_pages(&self) -> u64 {
        self.pages
            .iter()
            .filter(|(_, _, value)| *value == 0)
            .count() as u64
    }

    pub fn data_pages(&self) -> u64 {
        self.pages.len() as u64 - self.zero_pages()
    }

    pub fn crc(&self) -> u32 {
        let fold = |crc: u64, (block, page, value): &(BlockId, u64, Value)| {
            mix(crc ^ mix(u64::from(block.0) << 32 ^ page) ^ *value)
        };
        self.pages.iter().fold(u64::from(self.index), fold) as u32
    }

    /// What `check_chunk` says of the bytes.
    pub fn check(&self, expected: Frame) -> Result<CheckedChunk, String> {
        if self.corrupt {
            return Err("body checksum is wrong".to_owned());
        }
        if self.frame != expected {
            return Err(format!("chunk is of {:?}, not {expected:?}", self.frame));
        }
        Ok(CheckedChunk {
            index: self.index,
            kind: self.kind,
            last: self.end.is_some(),
            body_crc: self.crc(),
            data_pages: self.data_pages() as u32,
            zero_pages: self.zero_pages(),
            device_offset: 0,
            device_bytes: if self.end.is_some() { DEVICE_BYTES } else { 0 },
            trailer: self.end.as_ref().map(|(_, trailer)| trailer.clone()),
        })
    }

    /// Writes its pages, the first `limit` of them.
    pub fn apply(&self, ram: &mut Ram, limit: usize) {
        for (block, page, value) in self.pages.iter().take(limit) {
            ram[usize::from(block.0)][*page as usize] = *value;
        }
    }

    pub fn run_state(&self) -> Option<RunState> {
        self.end.as_ref().map(|(_, trailer)| trailer.run_state)
    }
}

/// A hash of each block.
pub fn audit(ram: &Ram) -> AuditDigest {
    let hash = |block: &Vec<Value>| block.iter().fold(1, |hash, value| mix(hash ^ value));
    AuditDigest(ram.iter().map(hash).collect())
}

fn mix(value: u64) -> u64 {
    let z = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 27)
}
