//! Reading and writing the fields of a message's body.

use super::{WireError, at_most};
use crate::limits::STRING_BYTES_MAX;

/// Reads fields off the front of a body. Nothing is believed that isn't there.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(body: &'a [u8]) -> Reader<'a> {
        Reader { rest: body }
    }

    pub(super) fn array<const N: usize>(
        &mut self,
        what: &'static str,
    ) -> Result<[u8; N], WireError> {
        let (field, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(WireError::Truncated { what })?;
        self.rest = rest;
        Ok(*field)
    }

    pub(super) fn u8(&mut self, what: &'static str) -> Result<u8, WireError> {
        self.array(what).map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self, what: &'static str) -> Result<u16, WireError> {
        self.array(what).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, WireError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, WireError> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub(super) fn flag(&mut self, what: &'static str) -> Result<bool, WireError> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            found => Err(WireError::Value {
                what,
                found: found.into(),
            }),
        }
    }

    pub(super) fn string(
        &mut self,
        what: &'static str,
        max_bytes: usize,
    ) -> Result<String, WireError> {
        let bytes = usize::from(self.u16(what)?);
        at_most(what, bytes as u64, max_bytes as u64)?;
        let (field, rest) = self
            .rest
            .split_at_checked(bytes)
            .ok_or(WireError::Truncated { what })?;
        self.rest = rest;
        let text = std::str::from_utf8(field).map_err(|_| WireError::NotUtf8 { what })?;
        Ok(text.to_owned())
    }

    /// Reads a list whose items take at least a byte each, so that a count which the body can't
    /// hold ends in [`WireError::Truncated`]; room is made for no more than `max` items.
    pub(super) fn list<T>(
        &mut self,
        what: &'static str,
        max: usize,
        mut item: impl FnMut(&mut Reader<'a>) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = usize::from(self.u16(what)?);
        at_most(what, count as u64, max as u64)?;
        if count > self.rest.len() {
            return Err(WireError::Truncated { what });
        }
        (0..count).map(|_| item(self)).collect()
    }

    pub(super) fn finish(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            bytes => Err(WireError::Trailing { bytes }),
        }
    }
}

/// Appends fields to a frame.
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
}

impl Writer {
    pub(super) fn put(&mut self, field: &[u8]) {
        self.bytes.extend_from_slice(field);
    }

    pub(super) fn u8(&mut self, value: u8) {
        self.put(&value.to_le_bytes());
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    /// A string that means something to the peer, so that none of it may be missing.
    pub(super) fn string(&mut self, text: &str) {
        assert!(
            text.len() <= STRING_BYTES_MAX,
            "string of {} bytes",
            text.len()
        );
        self.count(text.len());
        self.put(text.as_bytes());
    }

    /// Text for people. It may quote QEMU, so it can have any length: what is too long is cut.
    pub(super) fn text(&mut self, text: &str) {
        self.string(&text[..text.floor_char_boundary(STRING_BYTES_MAX)]);
    }

    /// The length of what follows; the caller has held it against its limit.
    pub(super) fn count(&mut self, items: usize) {
        self.u16(u16::try_from(items).expect("every limit of a message fits in 16 bits"));
    }
}
