//! Filling a chunk.

use zerocopy::FromBytes;

use super::layout::{
    ChunkHead, DATA_PAGES_MAX, ENTRIES_MAX, EntryKind, RawEntry, entry_range, page_range,
};
use super::packed::RECORD_BYTES_MAX;
use super::trailer::Trailer;
use super::walk::{Found, Piece, Walk};
use crate::limits::{CHUNK_BYTES, DEVICE_STATE_BYTES_MAX};
use crate::types::{BlockId, PAGE_BYTES, PageRun};
use crate::wire::header::ChunkFields;
use crate::wire::{HEADER_BYTES, Header, Kind, crc32c};

/// Fills one chunk in place. It works while the guest is paused: it allocates nothing, and the
/// caller copies pages straight to where they are pushed from.
///
/// [`ChunkBuilder::next_pages`] lends room, the caller copies guest pages into it and then
/// either commits the first few of them, as they lie there, or lets them be overwritten. The
/// same calls make the same bytes, whatever was in the memory before.
///
/// `M` is the chunk's memory, borrowed or owned.
#[derive(Debug)]
pub struct ChunkBuilder<M> {
    memory: M,
    head: ChunkHead,
    entries: usize,
    /// Pages after the first that are taken.
    pages: usize,
    /// Pages lent since the last commit; an entry slot is kept for them.
    lent: usize,
    /// Records that have no entry yet.
    packed: Option<Records>,
    data_pages: u32,
    zero_pages: u64,
    ended: bool,
}

/// A stretch of records that still grows.
#[derive(Clone, Copy, Debug)]
struct Records {
    first_page: usize,
    bytes: usize,
    count: u64,
}

/// What became of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Bytes to push, header included.
    pub used_bytes: usize,
    pub body_crc: u32,
    pub data_pages: u32,
    pub zero_pages: u64,
}

impl<M: AsMut<[u8]>> ChunkBuilder<M> {
    /// # Panics
    /// If `memory` isn't [`CHUNK_BYTES`] long.
    pub fn new(mut memory: M, head: ChunkHead) -> ChunkBuilder<M> {
        assert_eq!(memory.as_mut().len(), CHUNK_BYTES, "memory of a chunk");
        ChunkBuilder {
            memory,
            head,
            entries: 0,
            pages: 0,
            lent: 0,
            packed: None,
            data_pages: 0,
            zero_pages: 0,
            ended: false,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.entries == 0 && self.packed.is_none()
    }

    /// No further page of data fits; a zero run still may.
    pub fn is_full(&self) -> bool {
        self.page_room() == 0
    }

    /// Data pages so far, for the trailer.
    pub fn data_pages(&self) -> u32 {
        self.data_pages
    }

    /// Zero pages so far, for the trailer.
    pub fn zero_pages(&self) -> u64 {
        self.zero_pages
    }

    /// Where the next page of data may be written; `None` if the chunk is full.
    pub fn next_page(&mut self) -> Option<&mut [u8]> {
        self.next_pages(1)
    }

    /// Room for up to `want` pages of data; `None` if the chunk is full.
    pub fn next_pages(&mut self, want: usize) -> Option<&mut [u8]> {
        let count = want.min(self.page_room());
        if count == 0 {
            return None;
        }
        self.end_packed();
        self.lent = count;
        Some(&mut self.memory.as_mut()[page_range(self.pages, count)])
    }

    /// The page in [`ChunkBuilder::next_page`] is this one.
    pub fn commit_data(&mut self, block: BlockId, page: u64) {
        self.commit_data_run(block, page, 1);
    }

    /// The first `count` pages in [`ChunkBuilder::next_pages`] are these.
    ///
    /// # Panics
    /// If fewer were lent.
    pub fn commit_data_run(&mut self, block: BlockId, first: u64, count: usize) {
        assert!(
            (1..=self.lent).contains(&count),
            "{count} pages committed, {} lent",
            self.lent
        );
        let pages = count as u32; // at most DATA_PAGES_MAX
        self.lent = 0;
        if !self.extend(EntryKind::Data, block, first, pages) {
            self.add(EntryKind::Data, block, first, pages);
        }
        self.pages += count;
        self.data_pages += pages;
    }

    /// Adds a page's record, as [`super::Unpacked`] makes it, to the stretch of them that it
    /// follows or begins: anything else ends a stretch, and the next one takes a page of its own.
    /// `false`: there is no room, and nothing changed.
    pub fn push_packed(&mut self, record: &[u8]) -> bool {
        if self.packed.is_none() && self.page_room() == 0 {
            return false;
        }
        let mut records = self.packed.unwrap_or(Records {
            first_page: self.pages,
            bytes: 0,
            count: 0,
        });
        let start = page_range(records.first_page, 0).start + records.bytes;
        let Some(room) = self.memory.as_mut().get_mut(start..start + record.len()) else {
            return false;
        };
        room.copy_from_slice(record);
        records.bytes += record.len();
        records.count += 1;
        self.lent = 0;
        self.pages = records.first_page + records.bytes.div_ceil(PAGE_BYTES);
        self.packed = Some(records);
        self.data_pages += 1;
        true
    }

    /// Whether one more record fits, however long it is.
    pub fn has_room_for_record(&self) -> bool {
        match self.packed {
            None => self.page_room() > 0 && self.pages + 2 <= DATA_PAGES_MAX,
            Some(records) => {
                let used = records.first_page * PAGE_BYTES + records.bytes;
                used + RECORD_BYTES_MAX <= DATA_PAGES_MAX * PAGE_BYTES
            }
        }
    }

    /// What was put in so far.
    pub fn pieces(&mut self) -> impl Iterator<Item = Piece<'_>> {
        self.end_packed();
        let used = page_range(self.pages, 0).start;
        let walk = Walk::new(&self.memory.as_mut()[..used], self.entries);
        walk.filter_map(|found| match found.expect("we have written it").1 {
            Found::Piece(piece) => Some(piece),
            Found::Trailer(_) => None,
        })
    }

    /// Lends every run of data pages, to be filled anew.
    ///
    /// # Panics
    /// If there is anything else in the chunk than data pages and zeros.
    pub fn for_each_data_run(&mut self, mut visit: impl FnMut(PageRun, &mut [u8])) {
        let mut page = 0;
        for index in 0..self.entries {
            let entry = *self.entry(index);
            if entry.kind == EntryKind::Zero as u8 {
                continue;
            }
            assert_eq!(entry.kind, EntryKind::Data as u8, "a chunk of dirty pages");
            let count = entry.count.get() as usize;
            let block = BlockId(entry.block.get());
            let run = PageRun {
                block,
                first: entry.at.get(),
                count: count as u64,
            };
            visit(run, &mut self.memory.as_mut()[page_range(page, count)]);
            page += count;
        }
    }

    /// Marks a run of pages as zeros. `false`: the chunk has no entry left, and nothing changed.
    ///
    /// Leaves the pages alone that are lent and not committed, and a slot for their entry.
    ///
    /// # Panics
    /// If the run is longer than [`crate::limits::BLOCK_PAGES_MAX`].
    pub fn push_zero(&mut self, run: PageRun) -> bool {
        let count = u32::try_from(run.count).expect("a run is no longer than BLOCK_PAGES_MAX");
        if count == 0 {
            return true;
        }
        if self.ended {
            return false;
        }
        // Entries are applied in their order.
        self.end_packed();
        if !self.extend(EntryKind::Zero, run.block, run.first, count) {
            if self.entry_room() <= usize::from(self.lent > 0) {
                return false;
            }
            self.add(EntryKind::Zero, run.block, run.first, count);
        }
        self.zero_pages += run.count;
        true
    }

    /// Bytes that [`ChunkBuilder::push_device`] takes.
    pub fn device_room(&self) -> usize {
        self.page_room() * PAGE_BYTES
    }

    /// Adds a piece of the device state that begins at byte `offset` of it.
    ///
    /// # Panics
    /// If there is no room for it, or it ends past [`DEVICE_STATE_BYTES_MAX`].
    pub fn push_device(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset.saturating_add(bytes.len() as u64);
        assert!(
            end <= DEVICE_STATE_BYTES_MAX as u64,
            "device state ends at {end}"
        );
        self.push_bytes(EntryKind::Device, offset, bytes);
    }

    /// Adds all of a device state of `unpacked` bytes, packed by [`super::pack_state`].
    ///
    /// # Panics
    /// If there is no room for it.
    pub fn push_packed_device(&mut self, unpacked: usize, bytes: &[u8]) {
        self.push_bytes(EntryKind::PackedDevice, unpacked as u64, bytes);
    }

    fn push_bytes(&mut self, kind: EntryKind, at: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        assert!(
            bytes.len() <= self.device_room(),
            "no room for device state"
        );
        self.end_packed();
        let pages = bytes.len().div_ceil(PAGE_BYTES);
        let (filled, padding) =
            self.memory.as_mut()[page_range(self.pages, pages)].split_at_mut(bytes.len());
        filled.copy_from_slice(bytes);
        padding.fill(0);
        self.lent = 0;
        self.pages += pages;
        self.add(kind, BlockId(0), at, bytes.len() as u32); // less than a chunk
    }

    /// Ends the epoch. `false`: there is no room, seal this chunk and put it into another.
    pub fn push_trailer(&mut self, trailer: &Trailer) -> bool {
        if self.page_room() == 0 {
            return false;
        }
        self.end_packed();
        trailer.encode(&mut self.memory.as_mut()[page_range(self.pages, 1)]);
        self.lent = 0;
        self.pages += 1;
        self.add(EntryKind::Trailer, BlockId(0), 0, 1);
        self.ended = true;
        true
    }

    /// Writes the header. The chunk may be pushed.
    ///
    /// # Panics
    /// If `last` doesn't agree with there being a trailer.
    pub fn seal(self, last: bool) -> Sealed {
        self.finish(last).0
    }

    /// As [`ChunkBuilder::seal`], and gives the memory back.
    ///
    /// # Panics
    /// As there.
    pub fn finish(mut self, last: bool) -> (Sealed, M) {
        assert_eq!(
            last, self.ended,
            "the last chunk has the trailer, and no other"
        );
        self.end_packed();
        let used_bytes = PAGE_BYTES * (1 + self.pages);
        let memory = self.memory.as_mut();
        memory[entry_range(self.entries).start..PAGE_BYTES].fill(0);
        let body_crc = crc32c(&memory[HEADER_BYTES..used_bytes]);
        let header = Header {
            kind: Kind::Chunk,
            frame: self.head.frame,
            body_bytes: (used_bytes - HEADER_BYTES) as u32, // at most CHUNK_BYTES
            body_crc,
            chunk: Some(ChunkFields {
                index: self.head.index,
                last,
                kind: self.head.kind,
                entries: self.entries as u16, // at most ENTRIES_MAX
            }),
        };
        memory[..HEADER_BYTES].copy_from_slice(&header.encode());
        let sealed = Sealed {
            used_bytes,
            body_crc,
            data_pages: self.data_pages,
            zero_pages: self.zero_pages,
        };
        (sealed, self.memory)
    }

    fn entry_room(&self) -> usize {
        if self.ended {
            0
        } else {
            // Growing records have a slot kept for them.
            ENTRIES_MAX - self.entries - usize::from(self.packed.is_some())
        }
    }

    /// Gives the records their entry.
    fn end_packed(&mut self) {
        let Some(records) = self.packed.take() else {
            return;
        };
        let end = page_range(records.first_page, 0).start + records.bytes;
        let padding = end..page_range(self.pages, 0).start;
        self.memory.as_mut()[padding].fill(0);
        // A chunk's bytes fit in 32 bits.
        self.add(
            EntryKind::Packed,
            BlockId(0),
            records.count,
            records.bytes as u32,
        );
    }

    fn page_room(&self) -> usize {
        if self.entry_room() == 0 {
            0
        } else {
            DATA_PAGES_MAX - self.pages
        }
    }

    fn add(&mut self, kind: EntryKind, block: BlockId, at: u64, count: u32) {
        let entry = RawEntry {
            block: block.0.into(),
            kind: kind as u8,
            reserved: 0,
            count: count.into(),
            at: at.into(),
        };
        *self.entry(self.entries) = entry;
        self.entries += 1;
    }

    /// Makes the last entry longer, if `at` is where it ends.
    fn extend(&mut self, kind: EntryKind, block: BlockId, at: u64, count: u32) -> bool {
        let Some(index) = self.entries.checked_sub(1) else {
            return false;
        };
        let last = self.entry(index);
        let old_count = last.count.get();
        let follows = last.kind == kind as u8
            && last.block.get() == block.0
            && last.at.get() + u64::from(old_count) == at;
        match old_count.checked_add(count) {
            Some(sum) if follows => {
                last.count = sum.into();
                true
            }
            _ => false,
        }
    }

    fn entry(&mut self, index: usize) -> &mut RawEntry {
        RawEntry::mut_from_bytes(&mut self.memory.as_mut()[entry_range(index)])
            .expect("its own size")
    }
}
