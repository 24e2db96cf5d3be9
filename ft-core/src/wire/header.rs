//! The 64 bytes at the front of every control message and of every chunk.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::message::Frame;
use super::{PROTOCOL_VERSION, WireError, at_most, crc32c, epoch_kind};
use crate::limits::{CHUNK_BYTES, EPOCH_CHUNKS_MAX, MESSAGE_BYTES_MAX};
use crate::types::{Epoch, EpochKind, PAGE_BYTES, Session, Term, VmTag};

pub const HEADER_BYTES: usize = 64;
/// Entries in one chunk: they fill the rest of its first page.
pub const ENTRIES_MAX: usize = (PAGE_BYTES - HEADER_BYTES) / ENTRY_BYTES;
pub(crate) const ENTRY_BYTES: usize = 16;

/// "curl", read as bytes.
const MAGIC: u32 = u32::from_le_bytes(*b"curl");
/// The flag of the chunk that ends its epoch.
const FLAG_LAST: u8 = 1;

/// What a frame is. The numbers are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    Hello = 1,
    Refused = 2,
    Grant = 3,
    Ack = 4,
    Heartbeat = 5,
    HeartbeatReply = 6,
    AuditResult = 7,
    Resync = 8,
    QemuDied = 9,
    Switchover = 10,
    Activated = 11,
    Farewell = 12,
    FarewellAck = 13,
    Rehearse = 14,
    Rehearsed = 15,
    Chunk = 0x100,
}

impl Kind {
    pub const ALL: [Kind; 16] = [
        Kind::Hello,
        Kind::Refused,
        Kind::Grant,
        Kind::Ack,
        Kind::Heartbeat,
        Kind::HeartbeatReply,
        Kind::AuditResult,
        Kind::Resync,
        Kind::QemuDied,
        Kind::Switchover,
        Kind::Activated,
        Kind::Farewell,
        Kind::FarewellAck,
        Kind::Rehearse,
        Kind::Rehearsed,
        Kind::Chunk,
    ];
}

/// A header whose checksum held and whose fields are within their bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub frame: Frame,
    /// Bytes that follow the header.
    pub body_bytes: u32,
    pub body_crc: u32,
    /// For [`Kind::Chunk`], and only for it.
    pub chunk: Option<ChunkFields>,
}

/// What only a chunk's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkFields {
    pub index: u32,
    /// It ends the epoch and has the trailer.
    pub last: bool,
    pub kind: EpochKind,
    /// At most [`ENTRIES_MAX`].
    pub entries: u16,
}

impl Header {
    /// Reads the header that `bytes` begin with.
    ///
    /// # Errors
    /// If a single field can't be believed. [`WireError::Version`] comes before everything that
    /// another version may have changed.
    pub fn decode(bytes: &[u8]) -> Result<Header, WireError> {
        let (raw, _) = RawHeader::ref_from_prefix(bytes)
            .map_err(|_| WireError::NoHeader { bytes: bytes.len() })?;
        if raw.magic.get() != MAGIC {
            return Err(WireError::Magic {
                found: raw.magic.get(),
            });
        }
        if raw.header_crc.get() != raw.checksum() {
            return Err(WireError::HeaderChecksum);
        }
        if raw.version.get() != PROTOCOL_VERSION {
            return Err(WireError::Version {
                found: raw.version.get(),
                ours: PROTOCOL_VERSION,
            });
        }
        if raw.reserved != [0; 4] {
            return Err(WireError::Reserved { what: "header" });
        }
        let found = raw.kind.get();
        let kind = Kind::ALL.into_iter().find(|&k| k as u16 == found);
        let kind = kind.ok_or(WireError::UnknownKind { found })?;
        let chunk = match kind {
            Kind::Chunk => Some(raw.chunk_fields()?),
            _ => {
                raw.check_message()?;
                None
            }
        };
        Ok(Header {
            kind,
            frame: raw.frame(),
            body_bytes: raw.body_bytes.get(),
            body_crc: raw.body_crc.get(),
            chunk,
        })
    }

    /// # Panics
    /// If a chunk has no chunk fields or a message has some.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        assert_eq!(self.kind == Kind::Chunk, self.chunk.is_some(), "{self:?}");
        let chunk = self.chunk;
        let mut raw = RawHeader {
            magic: MAGIC.into(),
            version: PROTOCOL_VERSION.into(),
            kind: (self.kind as u16).into(),
            vm: self.frame.vm.0.into(),
            session: self.frame.session.0.into(),
            term: self.frame.term.0.into(),
            epoch: self.frame.epoch.0.into(),
            index: chunk.map_or(0, |c| c.index).into(),
            body_bytes: self.body_bytes.into(),
            body_crc: self.body_crc.into(),
            flags: chunk.map_or(0, |c| if c.last { FLAG_LAST } else { 0 }),
            epoch_kind: chunk.map_or(0, |c| c.kind as u8),
            entries: chunk.map_or(0, |c| c.entries).into(),
            reserved: [0; 4],
            header_crc: 0.into(),
        };
        raw.header_crc = raw.checksum().into();
        zerocopy::transmute!(raw)
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U16,
    kind: U16,
    vm: U64,
    session: U64,
    term: U64,
    epoch: U64,
    index: U32,
    body_bytes: U32,
    body_crc: U32,
    flags: u8,
    epoch_kind: u8,
    entries: U16,
    reserved: [u8; 4],
    header_crc: U32,
}

const _: () = {
    assert!(size_of::<RawHeader>() == HEADER_BYTES);
    assert!(offset_of!(RawHeader, version) == 4);
    assert!(offset_of!(RawHeader, kind) == 6);
    assert!(offset_of!(RawHeader, vm) == 8);
    assert!(offset_of!(RawHeader, session) == 16);
    assert!(offset_of!(RawHeader, term) == 24);
    assert!(offset_of!(RawHeader, epoch) == 32);
    assert!(offset_of!(RawHeader, index) == 40);
    assert!(offset_of!(RawHeader, body_bytes) == 44);
    assert!(offset_of!(RawHeader, body_crc) == 48);
    assert!(offset_of!(RawHeader, flags) == 52);
    assert!(offset_of!(RawHeader, epoch_kind) == 53);
    assert!(offset_of!(RawHeader, entries) == 54);
    assert!(offset_of!(RawHeader, reserved) == 56);
    assert!(offset_of!(RawHeader, header_crc) == 60);
};

impl RawHeader {
    fn checksum(&self) -> u32 {
        crc32c(&self.as_bytes()[..offset_of!(RawHeader, header_crc)])
    }

    fn frame(&self) -> Frame {
        Frame {
            vm: VmTag(self.vm.get()),
            session: Session(self.session.get()),
            term: Term(self.term.get()),
            epoch: Epoch(self.epoch.get()),
        }
    }

    fn check_message(&self) -> Result<(), WireError> {
        let max = MESSAGE_BYTES_MAX - HEADER_BYTES;
        at_most(
            "bytes of a message's body",
            self.body_bytes.get().into(),
            max as u64,
        )?;
        let chunk_fields = (
            self.index.get(),
            self.flags,
            self.epoch_kind,
            self.entries.get(),
        );
        if chunk_fields != (0, 0, 0, 0) {
            return Err(WireError::Reserved {
                what: "message's header",
            });
        }
        Ok(())
    }

    fn chunk_fields(&self) -> Result<ChunkFields, WireError> {
        let body_bytes = u64::from(self.body_bytes.get());
        let max = CHUNK_BYTES - HEADER_BYTES;
        at_most("bytes of a chunk's body", body_bytes, max as u64)?;
        let used_bytes = body_bytes + HEADER_BYTES as u64;
        if used_bytes < PAGE_BYTES as u64 || !used_bytes.is_multiple_of(PAGE_BYTES as u64) {
            return Err(WireError::Value {
                what: "bytes of a chunk's body",
                found: body_bytes,
            });
        }
        let index = self.index.get();
        at_most(
            "index of a chunk",
            index.into(),
            u64::from(EPOCH_CHUNKS_MAX - 1),
        )?;
        let entries = self.entries.get();
        at_most("entries of a chunk", entries.into(), ENTRIES_MAX as u64)?;
        if self.flags & !FLAG_LAST != 0 {
            return Err(WireError::Reserved { what: "flags" });
        }
        Ok(ChunkFields {
            index,
            last: self.flags & FLAG_LAST != 0,
            kind: epoch_kind(self.epoch_kind)?,
            entries,
        })
    }
}
