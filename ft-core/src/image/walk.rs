//! Taking a chunk apart.

use zerocopy::FromBytes;

use super::check::ImageError;
use super::layout::{EntryKind, RawEntry, entry_range};
use super::packed::PackedPages;
use super::packed_state::PackedState;
use crate::types::{BlockId, PAGE_BYTES, PageRun};
use crate::wire::header::ChunkFields;
use crate::wire::{Header, Kind, WireError};

/// One entry of a chunk that has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// `bytes` is `run.count` pages long.
    Data { run: PageRun, bytes: &'a [u8] },
    /// All of the run's bytes are zero.
    Zero { run: PageRun },
    /// Pages whose bytes have to be made.
    Packed { pages: PackedPages<'a> },
    /// A piece of the device state.
    Device { offset: u64, bytes: &'a [u8] },
    /// All of the device state, to be made.
    PackedDevice { state: PackedState<'a> },
}

/// The contents of a chunk that [`super::check_chunk`] has accepted, without the trailer.
///
/// # Panics
/// If the memory isn't that of a chunk that was accepted: the caller sees to it that nobody can
/// write it between the check and this.
pub fn entries(memory: &[u8]) -> impl Iterator<Item = Piece<'_>> {
    let (header, chunk) = chunk_header(memory).expect("the chunk was checked");
    let used = used_bytes(&header);
    Walk::new(&memory[..used], chunk.entries.into()).filter_map(|found| {
        match found.expect("the chunk was checked").1 {
            Found::Piece(piece) => Some(piece),
            Found::Trailer(_) => None,
        }
    })
}

pub(super) fn chunk_header(memory: &[u8]) -> Result<(Header, ChunkFields), WireError> {
    let header = Header::decode(memory)?;
    match header.chunk {
        Some(chunk) if header.kind == Kind::Chunk => Ok((header, chunk)),
        _ => Err(WireError::WrongKind {
            found: header.kind,
            wanted: "chunk",
        }),
    }
}

/// Bytes of a chunk, header included: whole pages, one at least.
pub(super) fn used_bytes(header: &Header) -> usize {
    crate::wire::HEADER_BYTES + header.body_bytes as usize
}

/// What an entry stands for.
pub(super) enum Found<'a> {
    Piece(Piece<'a>),
    Trailer(&'a [u8]),
}

/// The entries in order, each with its number and the pages that it owns.
pub(super) struct Walk<'a> {
    entries: &'a [RawEntry],
    next: usize,
    pages: &'a [u8],
}

impl<'a> Walk<'a> {
    /// `used` is the chunk from its header on, whole pages.
    pub(super) fn new(used: &'a [u8], entries: usize) -> Walk<'a> {
        let (first_page, pages) = used.split_at(PAGE_BYTES);
        let table = &first_page[entry_range(0).start..entry_range(entries).start];
        Walk {
            entries: <[RawEntry]>::ref_from_bytes(table).expect("whole entries"),
            next: 0,
            pages,
        }
    }

    /// Pages that no entry has owned so far.
    pub(super) fn pages_left(&self) -> usize {
        self.pages.len() / PAGE_BYTES
    }

    fn read(&mut self, entry: usize, raw: &RawEntry) -> Result<Found<'a>, ImageError> {
        let kind = EntryKind::ALL.into_iter().find(|&k| k as u8 == raw.kind);
        let kind = kind.ok_or(ImageError::EntryKind {
            entry,
            kind: raw.kind,
        })?;
        let (at, count) = (raw.at.get(), raw.count.get());
        let for_memory = matches!(kind, EntryKind::Data | EntryKind::Zero);
        if raw.reserved != 0 || (!for_memory && raw.block.get() != 0) {
            return Err(ImageError::EntryReserved { entry });
        }
        if count == 0 {
            return Err(ImageError::EntryEmpty { entry });
        }
        let run = PageRun {
            block: BlockId(raw.block.get()),
            first: at,
            count: count.into(),
        };
        Ok(match kind {
            EntryKind::Data => Found::Piece(Piece::Data {
                run,
                bytes: self.take_pages(entry, count as usize)?,
            }),
            EntryKind::Zero => Found::Piece(Piece::Zero { run }),
            EntryKind::Packed => {
                let bytes = self.take_bytes(entry, count)?;
                Found::Piece(Piece::Packed {
                    pages: PackedPages { bytes, count: at },
                })
            }
            EntryKind::PackedDevice => {
                let bytes = self.take_bytes(entry, count)?;
                Found::Piece(Piece::PackedDevice {
                    state: PackedState {
                        records: bytes,
                        bytes: at,
                    },
                })
            }
            EntryKind::Device => Found::Piece(Piece::Device {
                offset: at,
                bytes: self.take_bytes(entry, count)?,
            }),
            EntryKind::Trailer if (at, count) == (0, 1) => {
                Found::Trailer(self.take_pages(entry, 1)?)
            }
            EntryKind::Trailer => return Err(ImageError::EntryReserved { entry }),
        })
    }

    /// The first `count` bytes of as many pages as they take.
    fn take_bytes(&mut self, entry: usize, count: u32) -> Result<&'a [u8], ImageError> {
        let count = count as usize;
        let pages = self.take_pages(entry, count.div_ceil(PAGE_BYTES))?;
        let (bytes, padding) = pages.split_at(count);
        if padding.iter().any(|&b| b != 0) {
            return Err(ImageError::EntryReserved { entry });
        }
        Ok(bytes)
    }

    fn take_pages(&mut self, entry: usize, count: usize) -> Result<&'a [u8], ImageError> {
        // A count is 32 bits, so the product can't overflow.
        let (taken, rest) = self
            .pages
            .split_at_checked(count * PAGE_BYTES)
            .ok_or(ImageError::PagesMissing { entry })?;
        self.pages = rest;
        Ok(taken)
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = Result<(usize, Found<'a>), ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = self.next;
        let raw = self.entries.get(entry)?;
        self.next += 1;
        Some(self.read(entry, raw).map(|found| (entry, found)))
    }
}
