//! A hash of all of RAM, one number per block.
//!
//! A block's number is the wrapping sum over its non-zero pages of XXH3-64 of the page, seeded
//! with the page's index. So a hole and a page of zeros count the same, holes are never touched,
//! and the order in which pages are hashed does not matter.

use ft_core::types::PAGE_BYTES;
use ft_core::{BlockId, PageRun};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::gather::is_zero;
use crate::guest_ram::{GuestRam, RamError};
use crate::standby_ram::StandbyRam;

/// Pages copied at a time: small enough for the second-level cache.
const BATCH_PAGES: usize = 64;

/// RAM that can be hashed: the guest's, or the standby's.
pub trait Audited {
    fn pages_per_block(&self) -> Vec<u64>;
    /// # Errors
    /// See [`GuestRam::next_data`].
    fn next_data(&self, run: PageRun) -> Result<Option<PageRun>, RamError>;
    /// # Errors
    /// See [`GuestRam::copy_out`].
    fn copy_out(&self, block: BlockId, first: u64, out: &mut [u8]) -> Result<(), RamError>;
}

/// Hashes RAM. To be kept: its memory is not for a pause to allocate.
#[derive(Debug)]
pub struct Auditor {
    buffer: Vec<u8>,
}

impl Default for Auditor {
    fn default() -> Auditor {
        Auditor {
            buffer: vec![0; BATCH_PAGES * PAGE_BYTES],
        }
    }
}

impl Auditor {
    /// Hashes every block. The guest must be paused, the standby must not be written to.
    ///
    /// # Errors
    /// RAM can't be read.
    pub fn hash_blocks(&mut self, ram: &impl Audited) -> Result<Vec<u64>, RamError> {
        let pages = ram.pages_per_block();
        let hash = |(index, count): (usize, &u64)| {
            let block = BlockId(u16::try_from(index).expect("at most BLOCKS_MAX blocks"));
            hash_block(
                ram,
                PageRun {
                    block,
                    first: 0,
                    count: *count,
                },
                &mut self.buffer,
            )
        };
        pages.iter().enumerate().map(hash).collect()
    }
}

/// [`Auditor::hash_blocks`], for once.
///
/// # Errors
/// RAM can't be read.
pub fn hash_blocks(ram: &impl Audited) -> Result<Vec<u64>, RamError> {
    Auditor::default().hash_blocks(ram)
}

fn hash_block(ram: &impl Audited, all: PageRun, buffer: &mut [u8]) -> Result<u64, RamError> {
    let mut sum = 0_u64;
    let mut rest = all;
    while rest.count > 0
        && let Some(data) = ram.next_data(rest)?
    {
        let end = data.first + data.count;
        let mut first = data.first;
        while first < end {
            let count = usize::try_from(end - first)
                .unwrap_or(usize::MAX)
                .min(BATCH_PAGES);
            let bytes = &mut buffer[..count * PAGE_BYTES];
            ram.copy_out(all.block, first, bytes)?;
            for (page, index) in bytes.chunks_exact(PAGE_BYTES).zip(first..) {
                if !is_zero(page) {
                    sum = sum.wrapping_add(xxh3_64_with_seed(page, index));
                }
            }
            first += count as u64;
        }
        rest = PageRun {
            block: all.block,
            first: end,
            count: all.count - end,
        };
    }
    Ok(sum)
}

impl Audited for GuestRam {
    fn pages_per_block(&self) -> Vec<u64> {
        GuestRam::pages_per_block(self)
    }

    fn next_data(&self, run: PageRun) -> Result<Option<PageRun>, RamError> {
        GuestRam::next_data(self, run)
    }

    fn copy_out(&self, block: BlockId, first: u64, out: &mut [u8]) -> Result<(), RamError> {
        GuestRam::copy_out(self, block, first, out)
    }
}

impl Audited for StandbyRam {
    fn pages_per_block(&self) -> Vec<u64> {
        StandbyRam::pages_per_block(self)
    }

    fn next_data(&self, run: PageRun) -> Result<Option<PageRun>, RamError> {
        StandbyRam::next_data(self, run)
    }

    fn copy_out(&self, block: BlockId, first: u64, out: &mut [u8]) -> Result<(), RamError> {
        StandbyRam::copy_out(self, block, first, out);
        Ok(())
    }
}
