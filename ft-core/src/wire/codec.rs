//! Control messages as bytes.

use super::cursor::{Reader, Writer};
use super::header::{HEADER_BYTES, Header, Kind};
use super::message::{Farewell, Frame, GrantBatch, Hello, Message, RefusalCode, Role};
use super::{WireError, at_most, crc32c, epoch_kind, one_of, run_state};
use crate::limits::{
    BLOCK_PAGES_MAX, BLOCKS_MAX, GRANTS_PER_MESSAGE_MAX, MESSAGE_BYTES_MAX, SHAPE_PROPERTIES_MAX,
    STRING_BYTES_MAX, VM_ID_BYTES_MAX,
};
use crate::shape::{BlockShape, VmShape};
use crate::types::{Epoch, GrantToken, PAGE_BYTES};

const ROLES: [Role; 2] = [Role::Primary, Role::Backup];
const REFUSAL_CODES: [RefusalCode; 9] = [
    RefusalCode::Version,
    RefusalCode::Features,
    RefusalCode::OtherVm,
    RefusalCode::Shape,
    RefusalCode::Busy,
    RefusalCode::Role,
    RefusalCode::Replay,
    RefusalCode::Malformed,
    RefusalCode::Other,
];
const FAREWELLS: [Farewell; 3] = [Farewell::Detach, Farewell::PoweredOff, Farewell::StandDown];

/// The whole message, header included.
///
/// # Panics
/// If one of our own messages breaks a limit of [`crate::limits`]; a hello is held against them
/// with [`Hello::check`] when it is made. Texts for people are cut instead.
pub fn encode(frame: Frame, message: &Message) -> Vec<u8> {
    let mut writer = Writer {
        bytes: vec![0; HEADER_BYTES],
    };
    write_body(&mut writer, message);
    let mut bytes = writer.bytes;
    assert!(
        bytes.len() <= MESSAGE_BYTES_MAX,
        "{:?} message of {} bytes",
        kind_of(message),
        bytes.len()
    );
    let body = &bytes[HEADER_BYTES..];
    let header = Header {
        kind: kind_of(message),
        frame,
        body_bytes: body.len() as u32, // below MESSAGE_BYTES_MAX
        body_crc: crc32c(body),
        chunk: None,
    };
    bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
    bytes
}

/// Reads one whole message.
///
/// # Errors
/// If anything about it can't be believed.
pub fn decode(bytes: &[u8]) -> Result<(Frame, Message), WireError> {
    let header = Header::decode(bytes)?;
    let body = &bytes[HEADER_BYTES..];
    let declared = HEADER_BYTES + header.body_bytes as usize;
    if bytes.len() != declared {
        return Err(WireError::Length {
            declared,
            found: bytes.len(),
        });
    }
    if crc32c(body) != header.body_crc {
        return Err(WireError::BodyChecksum);
    }
    let mut reader = Reader::new(body);
    let message = read_body(header.kind, &mut reader)?;
    reader.finish()?;
    Ok((header.frame, message))
}

impl Hello {
    /// Whether the hello can be sent: a VM may have more devices than a message has room for.
    ///
    /// # Errors
    /// Names the limit of [`crate::limits`] that is broken, or the list that isn't sorted.
    pub fn check(&self) -> Result<(), WireError> {
        let string = |what, text: &str, max: usize| at_most(what, text.len() as u64, max as u64);
        string(VM_ID, &self.vm_id, VM_ID_BYTES_MAX)?;
        let (properties, blocks) = (&self.shape.properties, &self.shape.blocks);
        at_most(
            PROPERTIES,
            properties.len() as u64,
            SHAPE_PROPERTIES_MAX as u64,
        )?;
        at_most(BLOCKS, blocks.len() as u64, BLOCKS_MAX as u64)?;
        for (name, value) in properties {
            string(PROPERTY, name, STRING_BYTES_MAX)?;
            string(PROPERTY, value, STRING_BYTES_MAX)?;
        }
        for block in blocks {
            string(BLOCK_NAME, &block.name, STRING_BYTES_MAX)?;
        }
        check_shape(&self.shape)?;
        let mut writer = Writer { bytes: Vec::new() };
        write_hello(&mut writer, self);
        let max = MESSAGE_BYTES_MAX - HEADER_BYTES;
        at_most("bytes of a hello", writer.bytes.len() as u64, max as u64)
    }
}

const VM_ID: &str = "bytes of the VM's id";
const PROPERTIES: &str = "properties of the VM's shape";
const PROPERTY: &str = "bytes of a property";
const BLOCKS: &str = "RAM blocks";
const BLOCK_NAME: &str = "bytes of a RAM block's name";
const TEXT: &str = "bytes of a text";

/// What both ends of a hello rely on: a block's number is its place in the sorted list.
fn check_shape(shape: &VmShape) -> Result<(), WireError> {
    if !shape.properties.is_sorted_by(|a, b| a.0 < b.0) {
        return Err(WireError::Unsorted { what: PROPERTIES });
    }
    if !shape.blocks.is_sorted_by(|a, b| a.name < b.name) {
        return Err(WireError::Unsorted { what: BLOCKS });
    }
    let max = BLOCK_PAGES_MAX * PAGE_BYTES as u64;
    let mut blocks = shape.blocks.iter();
    blocks.try_for_each(|b| at_most("bytes of a RAM block", b.bytes, max))
}

fn kind_of(message: &Message) -> Kind {
    match message {
        Message::Hello(_) => Kind::Hello,
        Message::Refused { .. } => Kind::Refused,
        Message::Grant(_) => Kind::Grant,
        Message::Ack => Kind::Ack,
        Message::Heartbeat { .. } => Kind::Heartbeat,
        Message::HeartbeatReply { .. } => Kind::HeartbeatReply,
        Message::AuditResult { .. } => Kind::AuditResult,
        Message::Resync { .. } => Kind::Resync,
        Message::QemuDied { .. } => Kind::QemuDied,
        Message::Switchover => Kind::Switchover,
        Message::Activated => Kind::Activated,
        Message::Farewell { .. } => Kind::Farewell,
        Message::FarewellAck => Kind::FarewellAck,
        Message::Rehearse => Kind::Rehearse,
        Message::Rehearsed { .. } => Kind::Rehearsed,
    }
}

fn write_body(w: &mut Writer, message: &Message) {
    match message {
        Message::Hello(hello) => write_hello(w, hello),
        Message::Refused { code, text } => {
            w.u8(*code as u8);
            w.text(text);
        }
        Message::Grant(GrantBatch { grants }) => {
            assert!(
                grants.len() <= GRANTS_PER_MESSAGE_MAX,
                "{} grants",
                grants.len()
            );
            w.count(grants.len());
            grants.iter().for_each(|grant| w.put(&grant.0));
        }
        Message::Heartbeat { sent_us } | Message::HeartbeatReply { sent_us } => w.u64(*sent_us),
        Message::AuditResult { mismatched_blocks } => {
            let count = mismatched_blocks.len();
            assert!(count <= BLOCKS_MAX, "{count} blocks");
            w.count(count);
            mismatched_blocks.iter().for_each(|&block| w.u16(block));
        }
        Message::Resync { kind, text } => {
            w.u8(*kind as u8);
            w.text(text);
        }
        Message::QemuDied { text } => w.text(text),
        Message::Farewell { why, run_state } => {
            w.u8(*why as u8);
            w.u8(*run_state as u8);
        }
        Message::Rehearsed { ok, text } => {
            w.u8((*ok).into());
            w.text(text);
        }
        Message::Ack
        | Message::Switchover
        | Message::Activated
        | Message::FarewellAck
        | Message::Rehearse => {}
    }
}

fn write_hello(w: &mut Writer, hello: &Hello) {
    w.u8(hello.role as u8);
    w.u16(hello.versions.0);
    w.u16(hello.versions.1);
    w.u64(hello.features);
    w.string(&hello.vm_id);
    w.u32(hello.attempt);
    w.u64(hello.last_epoch.0);
    w.u8(hello.activated.into());
    w.u64(hello.heartbeat_us);
    w.u64(hello.lease_us);
    w.count(hello.shape.properties.len());
    for (name, value) in &hello.shape.properties {
        w.string(name);
        w.string(value);
    }
    w.count(hello.shape.blocks.len());
    for block in &hello.shape.blocks {
        w.string(&block.name);
        w.u64(block.bytes);
        w.u8(block.read_only.into());
    }
}

fn read_body(kind: Kind, r: &mut Reader<'_>) -> Result<Message, WireError> {
    Ok(match kind {
        Kind::Hello => Message::Hello(read_hello(r)?),
        Kind::Refused => Message::Refused {
            code: one_of(
                "refusal code",
                &REFUSAL_CODES,
                |c| c as u8,
                r.u8("refusal code")?,
            )?,
            text: r.string(TEXT, STRING_BYTES_MAX)?,
        },
        Kind::Grant => Message::Grant(GrantBatch {
            grants: r.list("grants", GRANTS_PER_MESSAGE_MAX, |r| {
                r.array("grants").map(GrantToken)
            })?,
        }),
        Kind::Ack => Message::Ack,
        Kind::Heartbeat => Message::Heartbeat {
            sent_us: r.u64("time of sending")?,
        },
        Kind::HeartbeatReply => Message::HeartbeatReply {
            sent_us: r.u64("time of sending")?,
        },
        Kind::AuditResult => Message::AuditResult {
            mismatched_blocks: r.list("mismatched blocks", BLOCKS_MAX, |r| {
                r.u16("mismatched blocks")
            })?,
        },
        Kind::Resync => Message::Resync {
            kind: epoch_kind(r.u8("kind of an epoch")?)?,
            text: r.string(TEXT, STRING_BYTES_MAX)?,
        },
        Kind::QemuDied => Message::QemuDied {
            text: r.string(TEXT, STRING_BYTES_MAX)?,
        },
        Kind::Switchover => Message::Switchover,
        Kind::Activated => Message::Activated,
        Kind::Farewell => Message::Farewell {
            why: one_of("farewell", &FAREWELLS, |f| f as u8, r.u8("farewell")?)?,
            run_state: run_state(r.u8("run state")?)?,
        },
        Kind::FarewellAck => Message::FarewellAck,
        Kind::Rehearse => Message::Rehearse,
        Kind::Rehearsed => Message::Rehearsed {
            ok: r.flag("outcome of a rehearsal")?,
            text: r.string(TEXT, STRING_BYTES_MAX)?,
        },
        Kind::Chunk => {
            return Err(WireError::WrongKind {
                found: kind,
                wanted: "message",
            });
        }
    })
}

fn read_hello(r: &mut Reader<'_>) -> Result<Hello, WireError> {
    let hello = Hello {
        role: one_of("role", &ROLES, |role| role as u8, r.u8("role")?)?,
        versions: (r.u16("oldest version")?, r.u16("newest version")?),
        features: r.u64("features")?,
        vm_id: r.string(VM_ID, VM_ID_BYTES_MAX)?,
        attempt: r.u32("attempt")?,
        last_epoch: Epoch(r.u64("last epoch")?),
        activated: r.flag("activated")?,
        heartbeat_us: r.u64("heartbeat")?,
        lease_us: r.u64("lease")?,
        shape: VmShape {
            properties: r.list(PROPERTIES, SHAPE_PROPERTIES_MAX, |r| {
                let name = r.string(PROPERTY, STRING_BYTES_MAX)?;
                Ok((name, r.string(PROPERTY, STRING_BYTES_MAX)?))
            })?,
            blocks: r.list(BLOCKS, BLOCKS_MAX, |r| {
                Ok(BlockShape {
                    name: r.string(BLOCK_NAME, STRING_BYTES_MAX)?,
                    bytes: r.u64("bytes of a RAM block")?,
                    read_only: r.flag("access of a RAM block")?,
                })
            })?,
        },
    };
    check_shape(&hello.shape)?;
    Ok(hello)
}
