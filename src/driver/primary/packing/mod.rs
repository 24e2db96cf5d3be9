//! Fewer bytes for the link: pages travel as what changed in them, or compressed.
//!
//! It happens when the guest runs again, between the harvest and the seal: what was harvested is
//! taken out of its chunks and packed into others.

mod choice;
mod shadow;

use std::time::Instant;

use ft_core::image::packed::RECORD_BYTES_MAX;
use ft_core::image::{ChunkBuilder, Page, Piece, Unpacked};
use ft_core::types::PAGE_BYTES;
use ft_core::{BlockId, DirtySet};
use qemu_bridge::page_diff::changed_words;
use transport::ChunkMut;

use self::choice::Choice;
use self::shadow::Shadow;

/// Of pages that did not compress, one in so many is tried.
const HOPELESS: u32 = 16;

/// When to pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deltas {
    /// Where it makes epochs arrive sooner.
    Auto,
    On,
    Off,
}

/// Where packed pages go: chunk after chunk.
pub(super) trait Sink {
    /// The chunk that is open.
    fn chunk(&mut self) -> &mut ChunkBuilder<ChunkMut>;

    /// Ends it, and opens another.
    ///
    /// # Errors
    /// There is no memory for it.
    fn next_chunk(&mut self) -> Result<(), String>;
}

#[derive(Debug)]
pub(super) struct Packer {
    deltas: Deltas,
    choice: Choice,
    shadow: Shadow,
    record: Box<[u8; RECORD_BYTES_MAX]>,
    /// LZ4 was in vain for so many pages in a row.
    in_vain: u32,
    /// The epoch under way: since when its guest runs, and its pages.
    under_way: Option<(Instant, u64)>,
}

impl Packer {
    pub(super) fn new(deltas: Deltas, pages_per_block: Vec<u64>, cache_bytes: usize) -> Packer {
        Packer {
            deltas,
            choice: Choice::default(),
            shadow: Shadow::new(pages_per_block, cache_bytes),
            record: Box::new([0; RECORD_BYTES_MAX]),
            in_vain: 0,
            under_way: None,
        }
    }

    /// Whether the next delta epoch is to be packed, on a link for which that is `worth` trying.
    pub(super) fn packs(&self, worth: bool) -> bool {
        self.packs_state(worth) && (self.deltas == Deltas::On || self.choice.packs())
    }

    /// Whether the device state of an epoch is to be packed, on a link for which that is `worth`
    /// trying: it is little work for a lot.
    pub(super) fn packs_state(&self, worth: bool) -> bool {
        match self.deltas {
            Deltas::Off => false,
            Deltas::On => true,
            Deltas::Auto => worth,
        }
    }

    /// The guest runs, and the epoch's `pages` are about to be packed, or sent as they are.
    pub(super) fn begin(&mut self, pages: u64, packed: bool) {
        // What was not decided by its cost says nothing about it.
        let as_chosen = packed == self.choice.packs();
        self.under_way = as_chosen.then(|| (Instant::now(), pages));
        if !packed {
            // The backup will have other bytes.
            self.shadow.clear();
        }
    }

    /// Packs what is in `chunk`.
    ///
    /// # Errors
    /// There is no memory for another chunk.
    pub(super) fn pack(
        &mut self,
        mut chunk: ChunkBuilder<ChunkMut>,
        sink: &mut impl Sink,
    ) -> Result<(), String> {
        // Zeros first: a run of them ends a stretch of records.
        for piece in chunk.pieces() {
            if let Piece::Zero { run } = piece {
                while !sink.chunk().push_zero(run) {
                    sink.next_chunk()?;
                }
                self.shadow.forget(run);
            }
        }
        for piece in chunk.pieces() {
            let Piece::Data { run, bytes } = piece else {
                continue;
            };
            for (page, bytes) in (run.first..).zip(bytes.as_chunks::<PAGE_BYTES>().0) {
                self.pack_page(run.block, page, bytes, sink)?;
            }
        }
        Ok(())
    }

    fn pack_page(
        &mut self,
        block: BlockId,
        page: u64,
        bytes: &Page,
        sink: &mut impl Sink,
    ) -> Result<(), String> {
        let unpacked = Unpacked { block, page, bytes };
        let changed = self
            .shadow
            .get(block, page)
            .map(|old| changed_words(old, bytes));
        if changed == Some([0; 8]) {
            return Ok(()); // the backup has it
        }
        let delta = changed.and_then(|changed| unpacked.delta(&changed, &mut self.record));
        let used = match delta {
            Some(used) => used,
            None => self
                .lz4(&unpacked)
                .unwrap_or_else(|| unpacked.raw(&mut self.record)),
        };
        while !sink.chunk().push_packed(&self.record[..used]) {
            sink.next_chunk()?;
        }
        self.shadow.put(block, page, bytes);
        Ok(())
    }

    fn lz4(&mut self, page: &Unpacked<'_>) -> Option<usize> {
        if self.in_vain >= HOPELESS && !self.in_vain.is_multiple_of(HOPELESS) {
            self.in_vain += 1;
            return None;
        }
        let used = page.lz4(&mut self.record);
        self.in_vain = if used.is_some() {
            0
        } else {
            self.in_vain.saturating_add(1)
        };
        used
    }

    /// The backup has the epoch.
    pub(super) fn acknowledged(&mut self) {
        if let Some((since, pages)) = self.under_way.take()
            && self.deltas == Deltas::Auto
        {
            self.choice.acknowledged(pages, since.elapsed());
        }
    }

    /// The backup may have the epoch of these pages or not.
    pub(super) fn given_up(&mut self, dirty: &DirtySet) {
        self.under_way = None;
        self.shadow.forget_all_of(dirty);
    }

    /// Nothing is known about what the backup has.
    pub(super) fn forget(&mut self) {
        self.under_way = None;
        self.shadow.clear();
    }
}
