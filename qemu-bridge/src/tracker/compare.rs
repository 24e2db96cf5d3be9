//! All of RAM is compared with a shadow copy: works on every kernel, needs no privilege for RAM
//! that is mapped, and costs as much time as reading RAM twice and as much memory as RAM.
//!
//! The shadow has what the last copy has. `collect` takes the bytes that it has seen, which are those of
//! a copy made while the guest stands still. In a live round the copy is made later, and may be newer:
//! then the shadow takes the copy's. Otherwise a byte that is written, copied and written back would
//! look as if nothing had happened, and the copy would keep what was there for a moment.

use ft_core::image::Piece;
use ft_core::types::PAGE_BYTES;
use ft_core::{BlockId, DirtySet, PageRun};
use memmap2::MmapMut;

use super::{Collected, Tracker, TrackerError};
use crate::gather::is_zero;
use crate::guest_ram::{GuestRam, RamError};

/// Pages compared at a time: small enough for the second-level cache.
const BATCH_PAGES: usize = 64;

#[derive(Debug)]
pub struct CompareTracker {
    /// One anonymous mapping per block: pages that were never written take no memory.
    shadows: Vec<MmapMut>,
    buffer: Vec<u8>,
}

impl CompareTracker {
    /// # Errors
    /// There is no room for a second copy of RAM.
    pub fn new(ram: &GuestRam) -> Result<CompareTracker, TrackerError> {
        let shadow = |(_, bytes): (u64, u64)| {
            let length = usize::try_from(bytes).expect("a mapped block fits the address space");
            MmapMut::map_anon(length).map_err(|source| RamError::Map {
                block: "shadow".to_owned(),
                bytes,
                source,
            })
        };
        let shadows = ram.host_ranges().map(shadow).collect::<Result<_, _>>()?;
        Ok(CompareTracker {
            shadows,
            buffer: vec![0; BATCH_PAGES * PAGE_BYTES],
        })
    }

    /// Calls `differs` for each page that isn't as in the shadow, and makes it so.
    fn update(
        &mut self,
        ram: &GuestRam,
        mut differs: impl FnMut(PageRun),
    ) -> Result<(), TrackerError> {
        for (index, shadow) in self.shadows.iter_mut().enumerate() {
            let block = BlockId(u16::try_from(index).expect("at most BLOCKS_MAX blocks"));
            let pages = (shadow.len() / PAGE_BYTES) as u64;
            let mut rest = PageRun {
                block,
                first: 0,
                count: pages,
            };
            // A hole can't have been written: writing would have filled it.
            while rest.count > 0
                && let Some(data) = ram.next_data(rest)?
            {
                let first = usize::try_from(data.first).expect("a page of a mapped block");
                let count = usize::try_from(data.count).expect("a page of a mapped block");
                let shadow = &mut shadow[first * PAGE_BYTES..(first + count) * PAGE_BYTES];
                compare(ram, data, shadow, &mut self.buffer, &mut differs)?;
                let end = data.first + data.count;
                rest = PageRun {
                    block,
                    first: end,
                    count: pages - end,
                };
            }
        }
        Ok(())
    }
}

impl CompareTracker {
    fn shadow_of(&mut self, run: PageRun) -> &mut [u8] {
        let first = usize::try_from(run.first).expect("a page of a mapped block");
        let count = usize::try_from(run.count).expect("a page of a mapped block");
        &mut self.shadows[usize::from(run.block.0)][first * PAGE_BYTES..][..count * PAGE_BYTES]
    }
}

impl Tracker for CompareTracker {
    fn name(&self) -> &'static str {
        "compare"
    }

    fn arm_all(&mut self, ram: &GuestRam) -> Result<(), TrackerError> {
        self.update(ram, |_| {})
    }

    fn collect(&mut self, ram: &GuestRam, into: &mut DirtySet) -> Result<Collected, TrackerError> {
        let mut collected = Collected::default();
        self.update(ram, |run| {
            collected.regions += 1;
            into.set(run);
        })?;
        Ok(collected)
    }

    fn copied(&mut self, piece: &Piece<'_>) {
        match piece {
            Piece::Data { run, bytes } => self.shadow_of(*run).copy_from_slice(bytes),
            // Writing zeros would take memory for pages that were never written.
            Piece::Zero { run } => {
                let pages = self.shadow_of(*run).chunks_exact_mut(PAGE_BYTES);
                for page in pages.filter(|page| !is_zero(page)) {
                    page.fill(0);
                }
            }
            Piece::Packed { .. } | Piece::Device { .. } | Piece::PackedDevice { .. } => {
                unreachable!("a live round has only pages as they are")
            }
        }
    }

    /// Comparing can't see a write that changes nothing, so the shadow is changed instead.
    fn touch(&mut self, ram: &GuestRam, block: BlockId, page: u64) -> Result<(), TrackerError> {
        let shadow = &mut self.shadows[usize::from(block.0)];
        let at = usize::try_from(page).expect("a page of a mapped block") * PAGE_BYTES;
        let mut now = [0; PAGE_BYTES];
        ram.copy_out(block, page, &mut now)?;
        shadow[at] = !now[0];
        Ok(())
    }
}

fn compare(
    ram: &GuestRam,
    data: PageRun,
    shadow: &mut [u8],
    buffer: &mut [u8],
    differs: &mut impl FnMut(PageRun),
) -> Result<(), TrackerError> {
    let mut first = data.first;
    for part in shadow.chunks_mut(BATCH_PAGES * PAGE_BYTES) {
        let now = &mut buffer[..part.len()];
        ram.copy_out(data.block, first, now)?;
        let pages = part
            .chunks_exact_mut(PAGE_BYTES)
            .zip(now.chunks_exact(PAGE_BYTES));
        for (old, new) in pages {
            if old != new {
                old.copy_from_slice(new);
                differs(PageRun {
                    block: data.block,
                    first,
                    count: 1,
                });
            }
            first += 1;
        }
    }
    Ok(())
}
