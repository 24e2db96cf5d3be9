//! Known bytes. If one of these fails, the wire has changed: raise `PROTOCOL_VERSION`.

use ft_core::wire::{ChunkTag, Message, PROTOCOL_VERSION, crc32c, decode, encode};
use ft_core::{Epoch, PAGE_BYTES};

use crate::common::epochs::{check, test_frame, write_epoch};
use crate::image::small_script;
use crate::wire::small_hello;

// Made once by hand with Python's `struct` and a bitwise CRC, not by this program.
const HELLO: &str = "
    6375726c010001008877665544332211
    00ffeeddccbbaa990300000000000000
    67120000000000000000000077000000
    beaab6f500000000000000003a29a38e
    01010001000000000000000000040076
    6d2d3102000000671200000000000000
    102700000000000050c3000000000000
    020004006370757301003207006d6163
    68696e650a0070632d7133352d372e32
    020008006d61696e2d72616d00000010
    0000000000070070632e62696f730000
    04000000000001
";

/// Header and entries. The body's checksum in it stands for all the rest.
const CHUNK: &str = "
    6375726c010000018877665544332211
    00ffeeddccbbaa990300000000000000
    671200000000000000000000c05f0000
    441bf82d01020400000000004407f847
    01000100020000000800000000000000
    030002000a0000003200000000000000
    00000300641000000000000000000000
    00000400010000000000000000000000
";

const TRAILER: &str = "
    02000000000000000a00000000000000
    64100000000000006612000000000000
    01000000000000000101040000000000
    01000000000000000200000000000000
    0300000000000000ffffffffffffffff
";

#[test]
fn checksum_is_crc32c() {
    // The check value of CRC-32/ISCSI in the catalogue of parametrised CRC algorithms.
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn hello() {
    assert_eq!(PROTOCOL_VERSION, 1);
    let hello = Message::Hello(small_hello());
    let bytes = encode(test_frame(), &hello);
    assert_eq!(hex(&bytes), words(HELLO));
    assert_eq!(decode(&bytes), Ok((test_frame(), hello)));
}

#[test]
fn chunk() {
    let chunks = write_epoch(test_frame(), &small_script(), 0xa5);
    assert_eq!(chunks.len(), 1);
    let (first_page, pages) = chunks[0].split_at(PAGE_BYTES);
    assert_eq!(hex(&first_page[..64 + 4 * 16]), words(CHUNK));
    let trailer = &pages[4 * PAGE_BYTES..];
    assert_eq!(hex(&trailer[..48 + 4 * 8]), words(TRAILER));
    check(&chunks[0]).unwrap();
}

#[test]
fn tag() {
    let tag = ChunkTag::new(Epoch(0x1234), 0x54321, true);
    assert_eq!(tag.pack(), 0xa345_4321);
}

/// Sixteen bytes a word.
fn hex(bytes: &[u8]) -> Vec<String> {
    let word = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect();
    bytes.chunks(16).map(word).collect()
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}
