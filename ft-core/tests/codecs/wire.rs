//! Messages, headers and tags.

use ft_core::limits::{EPOCH_CHUNKS_MAX, MESSAGE_BYTES_MAX, STRING_BYTES_MAX};
use ft_core::shape::{BlockShape, VmShape};
use ft_core::wire::header::ChunkFields;
use ft_core::wire::{
    ChunkTag, Frame, HEADER_BYTES, Header, Hello, Kind, Message, PROTOCOL_VERSION, RefusalCode,
    Role, WireError, decode, encode,
};
use ft_core::{Epoch, EpochKind};
use proptest::prelude::*;

use crate::common::allocations::measure;
use crate::common::epochs::test_frame;
use crate::common::{BODY_BYTES_AT, fix_checksums, fix_header_checksum, strategies};

const VERSION_AT: usize = 4;

/// A message is 64 KiB at most; its lists and strings can't take more than a few times that.
const DECODE_BYTES_MAX: usize = 6 * MESSAGE_BYTES_MAX;

proptest! {
    #[test]
    fn a_message_comes_back(frame in strategies::frame(), message in strategies::message()) {
        let bytes = encode(frame, &message);
        prop_assert!(bytes.len() <= MESSAGE_BYTES_MAX);
        let (decoded, allocated) = measure(|| decode(&bytes));
        prop_assert_eq!(decoded, Ok((frame, message)));
        prop_assert!(allocated <= DECODE_BYTES_MAX, "{} bytes", allocated);
    }

    #[test]
    fn a_changed_byte_is_refused(
        frame in strategies::frame(),
        message in strategies::message(),
        at in any::<prop::sample::Index>(),
        change in 1..=255u8,
    ) {
        let mut bytes = encode(frame, &message);
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn a_shorter_or_longer_message_is_refused(
        message in strategies::message(),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = encode(test_frame(), &message);
        prop_assert!(decode(&bytes[..cut.index(bytes.len())]).is_err());
        bytes.push(0);
        let declared = bytes.len() - 1;
        let found = bytes.len();
        prop_assert_eq!(decode(&bytes), Err(WireError::Length { declared, found }));
        // Even if header and checksums agree that the byte is there.
        let body_bytes = u32::try_from(bytes.len() - HEADER_BYTES).unwrap();
        bytes[BODY_BYTES_AT..][..4].copy_from_slice(&body_bytes.to_le_bytes());
        fix_checksums(&mut bytes);
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn every_number_is_a_tag(bits in any::<u32>()) {
        prop_assert_eq!(ChunkTag::unpack(bits).pack(), bits);
    }

    #[test]
    fn a_tag_matches_its_epoch(
        epoch in 0..u64::MAX - 1, index in 0..EPOCH_CHUNKS_MAX, last in any::<bool>(),
    ) {
        let tag = ChunkTag::unpack(ChunkTag::new(Epoch(epoch), index, last).pack());
        prop_assert_eq!((tag.index, tag.last), (index, last));
        prop_assert!(tag.matches(Epoch(epoch)));
        prop_assert!(!tag.matches(Epoch(epoch + 1)));
    }
}

#[test]
fn another_version_is_named_whatever_its_body_is() {
    let mut bytes = encode(test_frame(), &Message::Hello(small_hello()));
    bytes[VERSION_AT..][..2].copy_from_slice(&7u16.to_le_bytes());
    bytes[56] = 1; // reserved, in our version
    bytes[HEADER_BYTES..].fill(0xff);
    fix_header_checksum(&mut bytes);
    let error = decode(&bytes).unwrap_err();
    let expected = WireError::Version {
        found: 7,
        ours: PROTOCOL_VERSION,
    };
    assert_eq!(error, expected);
    assert_eq!(error.refusal_code(), RefusalCode::Version);
    assert!(error.to_string().contains("version 7, this side 1"));
}

/// Each field of the header set to something that can't be, with its checksum made right again.
#[test]
fn every_header_field_is_checked() {
    let message = encode(test_frame(), &Message::Heartbeat { sent_us: 5 });
    let chunk = chunk_header().encode();
    let fields: [(usize, &[u8], &[u8]); 15] = [
        (0, b"curm", &message),
        (4, &[2, 0], &message),
        (6, &[99, 0], &message),
        (6, &[0, 1], &message), // a chunk, with a message's body
        (40, &[1], &message),
        (44, &[1, 0, 1, 0], &message),
        (52, &[1], &message),
        (53, &[1], &message),
        (54, &[1], &message),
        (56, &[1], &message),
        (59, &[1], &message),
        (42, &[0x10], &chunk),  // index 2^20
        (44, &[0, 16], &chunk), // 64 bytes more than a page
        (52, &[2], &chunk),
        (53, &[4], &chunk),
    ];
    for (at, value, base) in fields {
        let mut bytes = base[..HEADER_BYTES].to_vec();
        Header::decode(&bytes).expect("the base is right");
        bytes[at..at + value.len()].copy_from_slice(value);
        assert_eq!(
            Header::decode(&bytes).map(|_| at),
            Err(match at {
                0 => WireError::Magic {
                    found: u32::from_le_bytes(*b"curm")
                },
                _ => WireError::HeaderChecksum,
            })
        );
        fix_header_checksum(&mut bytes);
        assert!(
            Header::decode(&bytes).is_err(),
            "field at {at} set to {value:?}"
        );
    }
    for (at, value) in [(44, 0), (44, 63), (53, 0), (54, 253)] {
        let mut bytes = chunk;
        bytes[at..at + 2].copy_from_slice(&[value, 0]);
        if at == 53 {
            bytes[54] = chunk[54];
        }
        fix_header_checksum(&mut bytes);
        assert!(
            Header::decode(&bytes).is_err(),
            "field at {at} set to {value}"
        );
    }
}

#[test]
fn headers_come_back() {
    let mut header = chunk_header();
    assert_eq!(Header::decode(&header.encode()), Ok(header));
    for kind in Kind::ALL {
        header.kind = kind;
        header.chunk = (kind == Kind::Chunk).then_some(chunk_header().chunk.unwrap());
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }
}

#[test]
fn a_chunk_is_no_message() {
    let mut bytes = chunk_header().encode().to_vec();
    bytes.resize(4096, 0);
    fix_checksums(&mut bytes);
    let expected = WireError::WrongKind {
        found: Kind::Chunk,
        wanted: "message",
    };
    assert_eq!(decode(&bytes), Err(expected));
}

#[test]
fn a_long_text_is_cut_between_letters() {
    let text = "ü".repeat(STRING_BYTES_MAX);
    let bytes = encode(
        Frame::default(),
        &Message::QemuDied {
            text: format!("x{text}"),
        },
    );
    let Ok((_, Message::QemuDied { text })) = decode(&bytes) else {
        panic!("not what was sent");
    };
    assert_eq!(text.len(), STRING_BYTES_MAX - 1);
}

#[test]
fn a_hello_that_does_not_fit_is_found_out_before_it_is_sent() {
    let hello = small_hello();
    assert_eq!(hello.check(), Ok(()));
    let with = |change: &dyn Fn(&mut Hello)| {
        let mut changed = hello.clone();
        change(&mut changed);
        changed.check().unwrap_err()
    };
    let property = |i: usize, bytes: usize| (format!("{i:04}"), "x".repeat(bytes));
    let too_long = |error| matches!(error, WireError::TooLong { .. });
    assert!(too_long(with(&|h| h.vm_id = "x".repeat(129))));
    assert!(too_long(with(
        &|h| h.shape.properties = vec![property(0, 4097)]
    )));
    assert!(too_long(with(&|h| {
        h.shape.properties = (0..513).map(|i| property(i, 1)).collect();
    })));
    assert!(too_long(with(&|h| {
        h.shape.properties = (0..20).map(|i| property(i, 4096)).collect();
    })));
    assert!(too_long(with(&|h| h.shape.blocks[0].bytes = 1 << 50)));
    let unsorted = |error| matches!(error, WireError::Unsorted { .. });
    assert!(unsorted(with(&|h| h.shape.properties.swap(0, 1))));
    assert!(unsorted(with(&|h| {
        let block = h.shape.blocks[0].clone();
        h.shape.blocks.push(block);
    })));
}

#[test]
fn an_unsorted_shape_is_refused_because_block_numbers_would_differ() {
    let mut hello = small_hello();
    hello.shape.blocks.reverse();
    let bytes = encode(test_frame(), &Message::Hello(hello));
    let expected = WireError::Unsorted { what: "RAM blocks" };
    assert_eq!(decode(&bytes), Err(expected));
}

fn chunk_header() -> Header {
    Header {
        kind: Kind::Chunk,
        frame: test_frame(),
        body_bytes: 4096 - 64,
        body_crc: 9,
        chunk: Some(ChunkFields {
            index: 17,
            last: false,
            kind: EpochKind::Delta,
            entries: 3,
        }),
    }
}

pub(crate) fn small_hello() -> Hello {
    let block = |name: &str, bytes, read_only| BlockShape {
        name: name.to_owned(),
        bytes,
        read_only,
    };
    Hello {
        role: Role::Primary,
        versions: (1, 1),
        features: 0,
        vm_id: "vm-1".to_owned(),
        attempt: 2,
        last_epoch: Epoch(4711),
        activated: false,
        heartbeat_us: 10_000,
        lease_us: 50_000,
        shape: VmShape {
            properties: vec![
                ("cpus".to_owned(), "2".to_owned()),
                ("machine".to_owned(), "pc-q35-7.2".to_owned()),
            ],
            blocks: vec![
                block("main-ram", 256 << 20, false),
                block("pc.bios", 256 << 10, true),
            ],
        },
    }
}
