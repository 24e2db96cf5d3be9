//! Pages in fewer bytes: what changed in them since the epoch before, or compressed.
//!
//! A packed entry owns a stretch of records, one for each page, back to back:
//!
//! ```text
//! ├block:2│form:1│0:1│page:4│bytes:2│0:2│crc:4┼ payload … ┼ next record …
//! ```
//! The CRC-32C is of the page that comes out. A delta needs the page as the base epoch left it; if
//! that is not what the sender thinks it is, the checksum tells, but only when the page is written:
//! later than the acknowledgement.
//!
//! A delta's payload is a list of spans, in ascending order and without overlap:
//! `├word:2│words:2┼ words × 8 bytes ┤`, counted in words of eight bytes.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::types::{BlockId, PAGE_BYTES};
use crate::wire::crc32c;

/// A page's bytes.
pub type Page = [u8; PAGE_BYTES];

/// Bytes before a record's payload.
pub const RECORD_HEADER_BYTES: usize = size_of::<RawRecord>();
/// Bytes of a record at most: a page that could not be packed.
pub const RECORD_BYTES_MAX: usize = RECORD_HEADER_BYTES + PAGE_BYTES;

/// A longer payload is hardly worth the work on the other side.
const PAYLOAD_MAX: usize = PAGE_BYTES * 3 / 4;
/// A delta is counted in these.
const WORD_BYTES: usize = 8;
const PAGE_WORDS: usize = PAGE_BYTES / WORD_BYTES;
const SPAN_BYTES: usize = 4;

/// One bit for each word of a page, the lowest bit of the first number for the first word: set if it
/// has changed.
pub type ChangedWords = [u64; PAGE_WORDS / 64];

/// How a page is packed. The numbers are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Form {
    /// As it is.
    Raw = 1,
    /// What differs from the page in the base epoch.
    Delta = 2,
    /// An LZ4 block.
    Lz4 = 3,
}

/// A stretch of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedPages<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) count: u64,
}

/// A page in a record that has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedPage<'a> {
    pub block: BlockId,
    pub page: u64,
    form: Form,
    crc: u32,
    payload: &'a [u8],
}

/// Records that are not what they must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackedError {
    #[error("record {record} is cut off")]
    Truncated { record: u64 },
    #[error("record {record}: form {form} is unknown")]
    Form { record: u64, form: u8 },
    #[error("record {record}: reserved bytes are not zero")]
    Reserved { record: u64 },
    #[error("record {record}: {bytes} bytes do not make a page")]
    Payload { record: u64, bytes: usize },
    #[error("{bytes} bytes follow the last record")]
    Left { bytes: usize },
}

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
struct RawRecord {
    block: U16,
    form: u8,
    reserved: u8,
    page: U32,
    bytes: U16,
    reserved_too: U16,
    crc: U32,
}

const _: () = {
    assert!(size_of::<RawRecord>() == 16);
    assert!(offset_of!(RawRecord, page) == 4);
    assert!(offset_of!(RawRecord, bytes) == 8);
    assert!(offset_of!(RawRecord, crc) == 12);
    assert!(PAGE_BYTES <= u16::MAX as usize);
};

/// A page that is about to be packed.
#[derive(Clone, Copy, Debug)]
pub struct Unpacked<'a> {
    pub block: BlockId,
    /// At most [`crate::limits::BLOCK_PAGES_MAX`].
    pub page: u64,
    pub bytes: &'a Page,
}

impl Unpacked<'_> {
    /// Writes the record of this page's `changed` words to `out`. Returns its bytes; `None` if they
    /// are too many to be worth it.
    pub fn delta(&self, changed: &ChangedWords, out: &mut [u8; RECORD_BYTES_MAX]) -> Option<usize> {
        let (header, payload) = out.split_at_mut(RECORD_HEADER_BYTES);
        let mut used = 0;
        for (word, words) in spans(changed) {
            let (from, bytes) = (word * WORD_BYTES, words * WORD_BYTES);
            if used + SPAN_BYTES + bytes > PAYLOAD_MAX {
                return None;
            }
            let (span, rest) = payload[used..].split_at_mut(SPAN_BYTES);
            // Both are at most PAGE_WORDS.
            span[..2].copy_from_slice(&(word as u16).to_le_bytes());
            span[2..].copy_from_slice(&(words as u16).to_le_bytes());
            rest[..bytes].copy_from_slice(&self.bytes[from..from + bytes]);
            used += SPAN_BYTES + bytes;
        }
        self.header(Form::Delta, used, header);
        Some(RECORD_HEADER_BYTES + used)
    }

    /// Writes the record of this page, compressed, to `out`. Returns its bytes; `None` if that saves
    /// less than a quarter.
    pub fn lz4(&self, out: &mut [u8; RECORD_BYTES_MAX]) -> Option<usize> {
        // It wants room for the worst case: lz4_flex::block::get_maximum_output_size.
        let mut packed = [0; PAGE_BYTES + PAGE_BYTES / 8];
        let used = lz4_flex::block::compress_into(self.bytes, &mut packed).ok()?;
        if used > PAYLOAD_MAX {
            return None;
        }
        let (header, payload) = out.split_at_mut(RECORD_HEADER_BYTES);
        payload[..used].copy_from_slice(&packed[..used]);
        self.header(Form::Lz4, used, header);
        Some(RECORD_HEADER_BYTES + used)
    }

    /// Writes the record of this page as it is to `out`. Returns its bytes.
    pub fn raw(&self, out: &mut [u8; RECORD_BYTES_MAX]) -> usize {
        let (header, payload) = out.split_at_mut(RECORD_HEADER_BYTES);
        payload.copy_from_slice(self.bytes);
        self.header(Form::Raw, PAGE_BYTES, header);
        RECORD_BYTES_MAX
    }

    fn header(&self, form: Form, payload_bytes: usize, out: &mut [u8]) {
        let raw = RawRecord {
            block: self.block.0.into(),
            form: form as u8,
            reserved: 0,
            page: (self.page as u32).into(), // at most BLOCK_PAGES_MAX
            bytes: (payload_bytes as u16).into(), // at most PAGE_BYTES
            reserved_too: 0.into(),
            crc: crc32c(self.bytes).into(),
        };
        out.copy_from_slice(raw.as_bytes());
    }
}

impl<'a> PackedPages<'a> {
    /// The pages of a chunk that was checked.
    ///
    /// # Panics
    /// If it wasn't.
    pub fn iter(&self) -> impl Iterator<Item = PackedPage<'a>> + use<'a> {
        self.records()
            .map(|page| page.expect("the chunk was checked"))
    }

    pub(super) fn records(&self) -> Records<'a> {
        Records {
            rest: self.bytes,
            next: 0,
            count: self.count,
        }
    }
}

impl PackedPage<'_> {
    /// Whether the page is made from what it was in the base epoch.
    pub fn needs_base(&self) -> bool {
        self.form == Form::Delta
    }

    /// Makes the page in `page`, which has the page as the base epoch left it. Whether it is the one
    /// that was sent.
    ///
    /// # Panics
    /// If the record wasn't checked.
    #[must_use]
    pub fn unpack(&self, page: &mut Page) -> bool {
        let made = unpack(self.form, self.payload, page);
        assert!(made, "the record was checked");
        crc32c(page) == self.crc
    }
}

/// Every record of a stretch, checked one by one.
pub(super) struct Records<'a> {
    rest: &'a [u8],
    next: u64,
    count: u64,
}

impl<'a> Records<'a> {
    fn read(&mut self, record: u64) -> Result<PackedPage<'a>, PackedError> {
        let truncated = PackedError::Truncated { record };
        let (raw, rest) = RawRecord::ref_from_prefix(self.rest).map_err(|_| truncated)?;
        let bytes = usize::from(raw.bytes.get());
        let (payload, rest) = rest.split_at_checked(bytes).ok_or(truncated)?;
        self.rest = rest;
        if raw.reserved != 0 || raw.reserved_too.get() != 0 {
            return Err(PackedError::Reserved { record });
        }
        let form = match raw.form {
            1 => Form::Raw,
            2 => Form::Delta,
            3 => Form::Lz4,
            form => return Err(PackedError::Form { record, form }),
        };
        if !makes_a_page(form, payload) {
            return Err(PackedError::Payload { record, bytes });
        }
        Ok(PackedPage {
            block: BlockId(raw.block.get()),
            page: raw.page.get().into(),
            form,
            crc: raw.crc.get(),
            payload,
        })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<PackedPage<'a>, PackedError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == self.count {
            let bytes = std::mem::take(&mut self.rest).len();
            return (bytes > 0).then_some(Err(PackedError::Left { bytes }));
        }
        let record = self.next;
        self.next += 1;
        let read = self.read(record);
        if read.is_err() {
            // What follows can't be found.
            (self.next, self.rest) = (self.count, &[]);
        }
        Some(read)
    }
}

/// Whether the payload makes a page.
fn makes_a_page(form: Form, payload: &[u8]) -> bool {
    match form {
        Form::Raw => payload.len() == PAGE_BYTES,
        // An LZ4 block tells only when it is undone.
        Form::Lz4 => unpack(form, payload, &mut [0; PAGE_BYTES]),
        Form::Delta => read_spans(payload, |_, _| ()),
    }
}

/// Whether the payload makes a page; `page` is half made otherwise.
fn unpack(form: Form, payload: &[u8], page: &mut Page) -> bool {
    match form {
        Form::Raw => <&Page>::try_from(payload).is_ok_and(|raw| {
            *page = *raw;
            true
        }),
        Form::Lz4 => lz4_flex::block::decompress_into(payload, page).is_ok_and(|n| n == PAGE_BYTES),
        Form::Delta => read_spans(payload, |from, new| {
            page[from..from + new.len()].copy_from_slice(new);
        }),
    }
}

/// Calls `span` with the place and the new bytes of each span. `false`: they are not in order, or
/// not inside of a page; then those before were told.
fn read_spans(mut payload: &[u8], mut span: impl FnMut(usize, &[u8])) -> bool {
    let mut free_from = 0;
    while let Some((&[w0, w1, n0, n1], rest)) = payload.split_first_chunk::<SPAN_BYTES>() {
        let word = usize::from(u16::from_le_bytes([w0, w1]));
        let words = usize::from(u16::from_le_bytes([n0, n1]));
        let Some((new, rest)) = rest.split_at_checked(words * WORD_BYTES) else {
            return false;
        };
        if words == 0 || word < free_from || word + words > PAGE_WORDS {
            return false;
        }
        span(word * WORD_BYTES, new);
        free_from = word + words;
        payload = rest;
    }
    payload.is_empty()
}

/// The first word and the number of words of each stretch that has changed.
fn spans(changed: &ChangedWords) -> impl Iterator<Item = (usize, usize)> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let first = next_bit(changed, from, 0)?;
        let end = next_bit(changed, first, u64::MAX).unwrap_or(PAGE_WORDS);
        from = end;
        Some((first, end - first))
    })
}

/// The first word from `from` on whose bit is set; with `flip`, whose bit is not.
fn next_bit(bits: &ChangedWords, from: usize, flip: u64) -> Option<usize> {
    let mut at = from;
    while at < PAGE_WORDS {
        let rest = (bits[at / 64] ^ flip) >> (at % 64);
        if rest != 0 {
            return Some(at + rest.trailing_zeros() as usize);
        }
        at = (at / 64 + 1) * 64;
    }
    None
}
