//! Whether chunks that a peer has filled are what they claim, and together an epoch.
//!
//! Two runs of one epoch may overlap: they are applied in the order of chunks and entries, so
//! the later one counts, and a peer that may write a page once may as well write it twice.

use super::layout::entry_range;
use super::packed::{PackedError, PackedPages};
use super::trailer::{EpochDigest, Trailer};
use super::walk::{Found, Piece, Walk, chunk_header, used_bytes};
use crate::limits::DEVICE_STATE_BYTES_MAX;
use crate::types::{EpochKind, PAGE_BYTES, PageRun};
use crate::wire::{Frame, HEADER_BYTES, WireError, crc32c};

/// What a chunk is held against.
#[derive(Clone, Copy, Debug)]
pub struct Expect<'a> {
    pub frame: Frame,
    /// Pages of each RAM block.
    pub blocks: &'a [u64],
}

/// A chunk that is complete and consistent in itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedChunk {
    pub index: u32,
    pub kind: EpochKind,
    pub last: bool,
    pub body_crc: u32,
    pub data_pages: u32,
    pub zero_pages: u64,
    /// Where the chunk's piece of the device state begins; 0 if it has none.
    pub device_offset: u64,
    pub device_bytes: u32,
    /// In the last chunk, and only there.
    pub trailer: Option<Trailer>,
}

/// A chunk or an epoch that is not to be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("chunk is of {field} {found:#x}, not {expected:#x}")]
    OtherFrame {
        field: &'static str,
        expected: u64,
        found: u64,
    },
    #[error("chunk says that it has {declared} bytes, {found} have arrived")]
    Truncated { declared: usize, found: usize },
    #[error("entry {entry}: kind {kind} is unknown")]
    EntryKind { entry: usize, kind: u8 },
    #[error("entry {entry}: reserved bytes are not zero")]
    EntryReserved { entry: usize },
    #[error("entry {entry} is empty")]
    EntryEmpty { entry: usize },
    #[error("entry {entry}: there is no RAM block {block}, there are {blocks}")]
    UnknownBlock {
        entry: usize,
        block: u16,
        blocks: usize,
    },
    #[error("entry {entry}: {count} pages from page {first} leave RAM block {block} of {pages}")]
    OutOfRange {
        entry: usize,
        block: u16,
        first: u64,
        count: u64,
        pages: u64,
    },
    #[error("entry {entry} owns more pages than the chunk has")]
    PagesMissing { entry: usize },
    #[error("chunk has {pages} pages that no entry owns")]
    PagesLeft { pages: usize },
    #[error("entry {entry}: device state begins at byte {offset}, not {expected}")]
    DeviceOffset {
        entry: usize,
        offset: u64,
        expected: u64,
    },
    #[error(
        "entry {entry}: device state ends at byte {end}, past the {DEVICE_STATE_BYTES_MAX} allowed"
    )]
    DeviceTooLong { entry: usize, end: u64 },
    #[error("entry {entry} does not make the device state that it says")]
    PackedDevice { entry: usize },
    #[error("entry {entry}: {source}")]
    Packed { entry: usize, source: PackedError },
    #[error("entry {entry} follows the trailer")]
    AfterTrailer { entry: usize },
    #[error("the last chunk must have a trailer and no other may: last is {last}")]
    TrailerPlace { last: bool },
    #[error("audit is of {found} RAM blocks, there are {blocks}")]
    AuditBlocks { blocks: usize, found: usize },
    #[error("epoch has no chunk")]
    NoChunks,
    #[error("chunk {found} where chunk {expected} belongs")]
    ChunkOrder { expected: usize, found: u32 },
    #[error("chunk {index} is of a {found:?}, the epoch of a {expected:?}")]
    ChunkKind {
        index: u32,
        expected: EpochKind,
        found: EpochKind,
    },
    #[error("a live round is no epoch")]
    LiveRound,
    #[error("device state of chunk {index} begins at byte {offset}, not {expected}")]
    DeviceGap {
        index: u32,
        offset: u64,
        expected: u64,
    },
    #[error("epoch has {found} {what}, its trailer says {declared}")]
    Sum {
        what: &'static str,
        declared: u64,
        found: u64,
    },
    #[error("the trailer's digest of the chunk checksums is wrong")]
    Digest,
}

/// Judges a chunk that has arrived. `memory` may be longer than the chunk.
///
/// # Errors
/// If anything about it is not as it must be; nothing of it may be used then.
pub fn check_chunk(memory: &[u8], expect: &Expect<'_>) -> Result<CheckedChunk, ImageError> {
    let (header, chunk) = chunk_header(memory)?;
    check_frame(header.frame, expect.frame)?;
    let declared = used_bytes(&header);
    let used = memory.get(..declared).ok_or(ImageError::Truncated {
        declared,
        found: memory.len(),
    })?;
    if crc32c(&used[HEADER_BYTES..]) != header.body_crc {
        return Err(WireError::BodyChecksum.into());
    }
    let unused_entries = &used[entry_range(chunk.entries.into()).start..PAGE_BYTES];
    if unused_entries.iter().any(|&b| b != 0) {
        return Err(WireError::Reserved {
            what: "unused entries",
        }
        .into());
    }

    let mut checked = CheckedChunk {
        index: chunk.index,
        kind: chunk.kind,
        last: chunk.last,
        body_crc: header.body_crc,
        data_pages: 0,
        zero_pages: 0,
        device_offset: 0,
        device_bytes: 0,
        trailer: None,
    };
    let mut walk = Walk::new(used, chunk.entries.into());
    for found in walk.by_ref() {
        let (entry, found) = found?;
        if checked.trailer.is_some() {
            return Err(ImageError::AfterTrailer { entry });
        }
        checked.add(entry, found, expect.blocks)?;
    }
    match walk.pages_left() {
        0 => {}
        pages => return Err(ImageError::PagesLeft { pages }),
    }
    if checked.last != checked.trailer.is_some() {
        return Err(ImageError::TrailerPlace { last: checked.last });
    }
    Ok(checked)
}

/// Judges the chunks of an epoch, by index, each of which has been checked.
///
/// # Errors
/// If one is missing, is there twice or is not of this epoch: the trailer's sums, its digest and
/// the device state must fit the chunks exactly.
pub fn check_epoch(chunks: &[CheckedChunk]) -> Result<Trailer, ImageError> {
    let (last, others) = chunks.split_last().ok_or(ImageError::NoChunks)?;
    if last.kind == EpochKind::SyncRound {
        return Err(ImageError::LiveRound);
    }
    let mut device_bytes = 0;
    for (expected, chunk) in chunks.iter().enumerate() {
        check_place(chunk, expected, last.kind)?;
        if chunk.device_bytes > 0 && chunk.device_offset != device_bytes {
            return Err(ImageError::DeviceGap {
                index: chunk.index,
                offset: chunk.device_offset,
                expected: device_bytes,
            });
        }
        device_bytes += u64::from(chunk.device_bytes);
    }
    let mut digest = EpochDigest::default();
    for chunk in others {
        digest.push(chunk.body_crc);
        if chunk.last {
            return Err(ImageError::TrailerPlace { last: true });
        }
    }
    let trailer = last.trailer.as_ref().filter(|_| last.last);
    let trailer = trailer.ok_or(ImageError::TrailerPlace { last: false })?;

    let data_pages = chunks.iter().map(|c| u64::from(c.data_pages)).sum();
    // A chunk's zero pages are bounded by its entries' 32-bit counts: 2^20 chunks can't overflow.
    let zero_pages = chunks.iter().map(|c| c.zero_pages).sum();
    check_sum("chunks", trailer.chunks.into(), chunks.len() as u64)?;
    check_sum("data pages", trailer.data_pages, data_pages)?;
    check_sum("zero pages", trailer.zero_pages, zero_pages)?;
    check_sum("bytes of device state", trailer.device_bytes, device_bytes)?;
    if trailer.digest != digest.value() {
        return Err(ImageError::Digest);
    }
    Ok(trailer.clone())
}

impl CheckedChunk {
    fn add(&mut self, entry: usize, found: Found<'_>, blocks: &[u64]) -> Result<(), ImageError> {
        match found {
            Found::Piece(Piece::Data { run, .. }) => {
                check_run(entry, run, blocks)?;
                self.data_pages += run.count as u32; // the chunk has these pages
            }
            Found::Piece(Piece::Zero { run }) => {
                check_run(entry, run, blocks)?;
                self.zero_pages += run.count; // 252 counts of 32 bits
            }
            Found::Piece(Piece::Packed { pages }) => self.add_packed(entry, pages, blocks)?,
            Found::Piece(Piece::Device { offset, bytes }) => {
                self.add_device(entry, offset, bytes.len() as u64)?
            }
            Found::Piece(Piece::PackedDevice { state }) => {
                if !state.is_whole() {
                    return Err(ImageError::PackedDevice { entry });
                }
                self.add_device(entry, 0, state.bytes)?;
            }
            Found::Trailer(page) => self.trailer = Some(Trailer::decode(page, blocks.len())?),
        }
        Ok(())
    }

    fn add_packed(
        &mut self,
        entry: usize,
        pages: PackedPages<'_>,
        blocks: &[u64],
    ) -> Result<(), ImageError> {
        for page in pages.records() {
            let page = page.map_err(|source| ImageError::Packed { entry, source })?;
            let run = PageRun {
                block: page.block,
                first: page.page,
                count: 1,
            };
            check_run(entry, run, blocks)?;
            self.data_pages += 1; // fewer than the chunk has bytes
        }
        Ok(())
    }

    fn add_device(&mut self, entry: usize, offset: u64, bytes: u64) -> Result<(), ImageError> {
        if self.device_bytes == 0 {
            self.device_offset = offset;
        }
        let end = offset.saturating_add(bytes);
        if end > DEVICE_STATE_BYTES_MAX as u64 {
            return Err(ImageError::DeviceTooLong { entry, end });
        }
        let expected = self.device_offset + u64::from(self.device_bytes);
        if offset != expected {
            return Err(ImageError::DeviceOffset {
                entry,
                offset,
                expected,
            });
        }
        self.device_bytes += bytes as u32; // ends at the maximum at most
        Ok(())
    }
}

fn check_frame(found: Frame, expected: Frame) -> Result<(), ImageError> {
    let fields = [
        ("VM", expected.vm.0, found.vm.0),
        ("session", expected.session.0, found.session.0),
        ("term", expected.term.0, found.term.0),
        ("epoch", expected.epoch.0, found.epoch.0),
    ];
    match fields.into_iter().find(|(_, e, f)| e != f) {
        Some((field, expected, found)) => Err(ImageError::OtherFrame {
            field,
            expected,
            found,
        }),
        None => Ok(()),
    }
}

fn check_run(entry: usize, run: PageRun, blocks: &[u64]) -> Result<(), ImageError> {
    let block = run.block.0;
    let Some(&pages) = blocks.get(usize::from(block)) else {
        return Err(ImageError::UnknownBlock {
            entry,
            block,
            blocks: blocks.len(),
        });
    };
    match run.first.checked_add(run.count) {
        Some(end) if end <= pages => Ok(()),
        _ => Err(ImageError::OutOfRange {
            entry,
            block,
            first: run.first,
            count: run.count,
            pages,
        }),
    }
}

fn check_place(chunk: &CheckedChunk, place: usize, kind: EpochKind) -> Result<(), ImageError> {
    if chunk.index as usize != place {
        return Err(ImageError::ChunkOrder {
            expected: place,
            found: chunk.index,
        });
    }
    if chunk.kind != kind {
        return Err(ImageError::ChunkKind {
            index: chunk.index,
            expected: kind,
            found: chunk.kind,
        });
    }
    Ok(())
}

fn check_sum(what: &'static str, declared: u64, found: u64) -> Result<(), ImageError> {
    if declared != found {
        return Err(ImageError::Sum {
            what,
            declared,
            found,
        });
    }
    Ok(())
}
