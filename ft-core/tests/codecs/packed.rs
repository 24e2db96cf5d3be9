//! Packed pages: what went in comes out, on the right base.

use ft_core::image::packed::{RECORD_BYTES_MAX, RECORD_HEADER_BYTES};
use ft_core::image::{
    ChangedWords, ChunkBuilder, ChunkHead, ImageError, Page, Piece, Unpacked, entries,
    packed::PackedError,
};
use ft_core::limits::CHUNK_BYTES;
use ft_core::{BlockId, EpochKind, PAGE_BYTES};
use proptest::prelude::*;

use crate::common::allocations::measure;
use crate::common::epochs::{check, test_frame};
use crate::common::fix_checksums;

fn changed(old: &Page, new: &Page) -> ChangedWords {
    let mut words = ChangedWords::default();
    for (at, (old, new)) in old.chunks(8).zip(new.chunks(8)).enumerate() {
        words[at / 64] |= u64::from(old != new) << (at % 64);
    }
    words
}

fn page() -> impl Strategy<Value = Box<Page>> {
    any::<[u8; 32]>().prop_map(|seed| {
        let mut page = Box::new([0; PAGE_BYTES]);
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = seed[at % 32].wrapping_mul((at / 32) as u8 | 1);
        }
        page
    })
}

proptest! {
    #[test]
    fn a_delta_comes_back_on_its_base_and_not_on_another(
        old in page(),
        changes in prop::collection::vec((0..PAGE_BYTES, 1..=255u8), 0..200),
        other in 0..PAGE_BYTES,
    ) {
        let mut new = old.clone();
        for (at, change) in changes {
            new[at] = new[at].wrapping_add(change);
        }
        let words = changed(&old, &new);
        let mut record = [0; RECORD_BYTES_MAX];
        let packed = Unpacked { block: BlockId(0), page: 77, bytes: &new };
        let Some(used) = packed.delta(&words, &mut record) else {
            prop_assert!(words.iter().map(|w| w.count_ones()).sum::<u32>() > 100, "few words");
            return Ok(());
        };
        let chunk = chunk_of(&[&record[..used]]);
        check(&chunk).unwrap();
        let mut made = old.clone();
        let [page] = pages(&chunk)[..] else { panic!("one page") };
        prop_assert_eq!((page.block, page.page), (BlockId(0), 77));
        prop_assert!(page.unpack(&mut made));
        prop_assert!(made == new);

        let mut wrong = old.clone();
        wrong[other] ^= 1;
        let rewritten = words[other / 8 / 64] >> (other / 8 % 64) & 1 == 1;
        prop_assert_eq!(page.unpack(&mut wrong), rewritten, "another base shows");
    }

    #[test]
    fn other_forms_need_no_base(new in page()) {
        let packed = Unpacked { block: BlockId(1), page: 5, bytes: &new };
        let (mut raw, mut lz4) = ([0; RECORD_BYTES_MAX], [0; RECORD_BYTES_MAX]);
        let raw_bytes = packed.raw(&mut raw);
        let mut records = vec![&raw[..raw_bytes]];
        if let Some(used) = packed.lz4(&mut lz4) {
            prop_assert!(used <= RECORD_HEADER_BYTES + PAGE_BYTES * 3 / 4);
            records.push(&lz4[..used]);
        }
        let chunk = chunk_of(&records);
        prop_assert_eq!(check(&chunk).unwrap().data_pages as usize, records.len());
        for page in pages(&chunk) {
            let mut made = [0xa5; PAGE_BYTES];
            prop_assert!(page.unpack(&mut made));
            prop_assert!(made == *new);
        }
    }
}

#[test]
fn a_page_that_has_not_changed_is_a_delta_of_nothing() {
    let bytes = &[7; PAGE_BYTES];
    let mut record = [0; RECORD_BYTES_MAX];
    let page = Unpacked {
        block: BlockId(0),
        page: 0,
        bytes,
    };
    assert_eq!(page.delta(&[0; 8], &mut record), Some(RECORD_HEADER_BYTES));
    assert_eq!(page.delta(&[u64::MAX; 8], &mut record), None);
}

#[test]
fn packing_and_checking_allocate_little() {
    let bytes = &[7; PAGE_BYTES];
    let mut memory = vec![0; CHUNK_BYTES];
    let ((), allocated) = measure(|| {
        let mut record = [0; RECORD_BYTES_MAX];
        let page = Unpacked {
            block: BlockId(0),
            page: 0,
            bytes,
        };
        let used = page
            .delta(&[1, 0, 0, 0, 0, 0, 0, 1 << 63], &mut record)
            .unwrap();
        let mut builder = ChunkBuilder::new(&mut memory, head());
        assert!(builder.push_packed(&record[..used]));
        builder.seal(false);
    });
    assert_eq!(allocated, 0);
}

/// Every way in which a record can be wrong, with right checksums.
#[test]
fn every_contradiction_in_a_record_is_named() {
    use PackedError as E;
    let new: Page = std::array::from_fn(|at| at as u8);
    let mut record = [0; RECORD_BYTES_MAX];
    let page = Unpacked {
        block: BlockId(0),
        page: 9,
        bytes: &new,
    };
    // Two spans: words 0 and 1, and word 511.
    let used = page
        .delta(&[3, 0, 0, 0, 0, 0, 0, 1 << 63], &mut record)
        .unwrap();
    assert_eq!(used, 16 + 4 + 16 + 4 + 8);
    let valid = chunk_of(&[&record[..used]]);
    check(&valid).unwrap();
    let payload = E::Payload {
        record: 0,
        bytes: 32,
    };
    let span = 16;
    #[rustfmt::skip]
    let cases: [(usize, &[u8], E); 12] = [
        (2, &[0], E::Form { record: 0, form: 0 }),
        (2, &[4], E::Form { record: 0, form: 4 }),
        (2, &[1], payload), // a raw page of 32 bytes
        (2, &[3], payload),
        (3, &[1], E::Reserved { record: 0 }),
        (10, &[1], E::Reserved { record: 0 }),
        (8, &[33], E::Truncated { record: 0 }),
        (8, &[31], E::Payload { record: 0, bytes: 31 }),
        (span + 2, &[0], payload), // an empty span
        (span + 2, &[3], payload), // it takes from the next one
        (span + 20, &[1, 0], payload), // they overlap
        (span + 20, &[0, 2], payload), // outside of the page
    ];
    for (at, value, source) in cases {
        let mut chunk = valid.clone();
        chunk[PAGE_BYTES + at..][..value.len()].copy_from_slice(value);
        fix_checksums(&mut chunk);
        assert_eq!(
            check(&chunk),
            Err(ImageError::Packed { entry: 0, source }),
            "{at}: {value:?}"
        );
    }
    // One record more, or fewer, than the entry says.
    for (count, source) in [
        (2, E::Truncated { record: 1 }),
        (0, E::Left { bytes: used }),
    ] {
        let mut chunk = valid.clone();
        chunk[64 + 8] = count;
        fix_checksums(&mut chunk);
        assert_eq!(check(&chunk), Err(ImageError::Packed { entry: 0, source }));
    }
    // A page that the block doesn't have.
    let mut chunk = valid;
    chunk[PAGE_BYTES..][..2].copy_from_slice(&[2, 0]);
    fix_checksums(&mut chunk);
    assert!(matches!(
        check(&chunk),
        Err(ImageError::OutOfRange {
            block: 2,
            first: 9,
            ..
        })
    ));
}

fn head() -> ChunkHead {
    ChunkHead {
        frame: test_frame(),
        kind: EpochKind::Delta,
        index: 0,
    }
}

fn chunk_of(records: &[&[u8]]) -> Vec<u8> {
    let mut memory = vec![0x5a; CHUNK_BYTES];
    let mut builder = ChunkBuilder::new(&mut memory, head());
    for record in records {
        assert!(builder.push_packed(record));
    }
    let used_bytes = builder.seal(false).used_bytes;
    memory.truncate(used_bytes);
    memory
}

fn pages(chunk: &[u8]) -> Vec<ft_core::image::PackedPage<'_>> {
    let pages = entries(chunk).flat_map(|piece| match piece {
        Piece::Packed { pages } => pages.iter().collect(),
        _ => Vec::new(),
    });
    pages.collect()
}
