//! Chunks and epochs: what was written comes back, what was changed is refused.

use ft_core::image::{
    CheckedChunk, ChunkBuilder, ChunkHead, DATA_PAGES_MAX, ENTRIES_MAX, EpochDigest, ImageError,
    Piece, Trailer, check_epoch, entries,
};
use ft_core::limits::{CHUNK_BYTES, DEVICE_STATE_BYTES_MAX};
use ft_core::wire::{Frame, HEADER_BYTES, WireError};
use ft_core::{BlockId, Epoch, EpochKind, PAGE_BYTES, PageRun, RunState};
use proptest::prelude::*;

use crate::common::allocations::measure;
use crate::common::epochs::{BLOCKS, Script, Step, check, test_frame, write_epoch};
use crate::common::fix_checksums;
use crate::model::{Contents, script};

/// A trailer's hashes, and room for an error.
const CHECK_BYTES_MAX: usize = 4096;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn an_epoch_comes_back(script in script()) {
        let chunks = write_epoch(test_frame(), &script, 0xa5);
        prop_assert!(chunks == write_epoch(test_frame(), &script, 0x5a), "other garbage shows");

        let mut contents = Contents::default();
        let mut checked = Vec::new();
        for chunk in &chunks {
            let (result, allocated) = measure(|| check(chunk));
            prop_assert!(allocated <= CHECK_BYTES_MAX, "{} bytes", allocated);
            checked.push(result.unwrap());
            contents.apply(chunk);
        }
        prop_assert!(contents == Contents::of_script(&script));

        let trailer = check_epoch(&checked).unwrap();
        prop_assert_eq!(trailer.run_state, script.run_state);
        prop_assert_eq!(trailer.audit.map(|audit| audit.0), script.audit);
        prop_assert_eq!(trailer.base, Epoch(test_frame().epoch.0 - 1));
        prop_assert_eq!(trailer.device_bytes, script.device.len() as u64);
    }

    #[test]
    fn a_changed_byte_is_refused(
        script in script(),
        chunk in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        change in 1..=255u8,
    ) {
        let chunks = write_epoch(test_frame(), &script, 0);
        let mut bytes = chunk.get(&chunks).clone();
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        prop_assert!(check(&bytes).is_err());
        prop_assert!(check(&bytes[..at]).is_err());
    }

    #[test]
    fn a_chunk_lost_swapped_or_doubled_is_refused(
        script in script(),
        from in any::<prop::sample::Index>(),
        to in any::<prop::sample::Index>(),
    ) {
        let chunks = write_epoch(test_frame(), &script, 0);
        let checked: Vec<CheckedChunk> = chunks.iter().map(|c| check(c).unwrap()).collect();
        let (from, to) = (from.index(checked.len()), to.index(checked.len()));
        let with = |change: &dyn Fn(&mut Vec<CheckedChunk>)| {
            let mut changed = checked.clone();
            change(&mut changed);
            check_epoch(&changed)
        };
        prop_assert!(with(&|c| drop(c.remove(from))).is_err());
        prop_assert!(with(&|c| c.insert(to, c[from].clone())).is_err());
        prop_assert!(from == to || with(&|c| c.swap(from, to)).is_err());
    }
}

#[test]
fn a_hole_of_four_gigabytes_is_one_entry() {
    let mut memory = vec![0xa5; CHUNK_BYTES];
    let mut builder = ChunkBuilder::new(&mut memory, head(EpochKind::SyncRound));
    assert!(builder.push_zero(run(0, 0, 1 << 19)));
    assert!(builder.push_zero(run(0, 1 << 19, 1 << 19)));
    let sealed = builder.seal(false);
    assert_eq!(sealed.used_bytes, PAGE_BYTES);
    assert_eq!(sealed.zero_pages, 1 << 20);
    let pieces: Vec<_> = entries(&memory).collect();
    assert_eq!(
        pieces,
        [Piece::Zero {
            run: run(0, 0, 1 << 20)
        }]
    );
    assert_eq!(check(&memory).unwrap().zero_pages, 1 << 20);
}

#[test]
fn a_chunk_holds_255_pages_or_252_entries() {
    let mut memory = vec![0; CHUNK_BYTES];
    let mut builder = ChunkBuilder::new(&mut memory, head(EpochKind::Delta));
    let mut pages = 0;
    while builder.next_page().is_some() {
        builder.commit_data(BlockId(0), pages);
        pages += 1;
    }
    assert_eq!(pages, DATA_PAGES_MAX as u64);
    assert!(builder.is_full());
    assert_eq!(builder.device_room(), 0);
    assert!(builder.push_zero(run(0, pages, 1)), "an entry is left");
    assert_eq!(builder.seal(false).used_bytes, CHUNK_BYTES);

    let mut builder = ChunkBuilder::new(&mut memory, head(EpochKind::Delta));
    for i in 0..ENTRIES_MAX as u64 {
        assert!(!builder.is_full());
        assert!(builder.push_zero(run(0, 2 * i, 1)));
    }
    assert!(builder.is_full());
    assert!(builder.next_page().is_none());
    assert!(!builder.push_zero(run(0, 10_000, 1)));
    assert!(
        builder.push_zero(run(0, 2 * ENTRIES_MAX as u64 - 1, 5)),
        "it extends the last one"
    );
    assert!(!builder.push_trailer(&trailer()));
    builder.seal(false);
    check(&memory).unwrap();
}

#[test]
fn a_zero_run_leaves_lent_pages_and_their_entry_alone() {
    let mut memory = vec![0; CHUNK_BYTES];
    let mut builder = ChunkBuilder::new(&mut memory, head(EpochKind::Delta));
    for i in 0..ENTRIES_MAX as u64 - 1 {
        assert!(builder.push_zero(run(0, 2 * i, 1)));
    }
    builder.next_pages(3).unwrap().fill(7);
    assert!(
        !builder.push_zero(run(1, 0, 1)),
        "the last entry is the lent pages'"
    );
    assert!(builder.push_zero(run(0, 2 * ENTRIES_MAX as u64 - 3, 1)));
    builder.commit_data_run(BlockId(1), 4, 2);
    let sealed = builder.seal(false);
    assert_eq!(
        (sealed.data_pages, sealed.zero_pages),
        (2, ENTRIES_MAX as u64)
    );
    check(&memory).unwrap();
    let data = entries(&memory).last().unwrap();
    let expected = Piece::Data {
        run: run(1, 4, 2),
        bytes: &[7; 2 * PAGE_BYTES],
    };
    assert!(data == expected);
}

#[test]
fn data_pages_can_be_filled_anew() {
    let mut memory = vec![0; CHUNK_BYTES];
    let mut builder = ChunkBuilder::new(&mut memory, head(EpochKind::Delta));
    builder.next_pages(3).unwrap().fill(7);
    builder.commit_data_run(BlockId(1), 4, 3);
    assert!(builder.push_zero(run(0, 10, 2)));
    builder.next_pages(2).unwrap().fill(8);
    builder.commit_data_run(BlockId(0), 20, 2);
    let mut seen = Vec::new();
    builder.for_each_data_run(|run, bytes| {
        seen.push((run, bytes.len() / PAGE_BYTES, bytes[0]));
        bytes[PAGE_BYTES..2 * PAGE_BYTES].fill(9);
    });
    assert_eq!(seen, [(run(1, 4, 3), 3, 7), (run(0, 20, 2), 2, 8)]);
    builder.seal(false);
    check(&memory).unwrap();
    let mut firsts = Vec::new();
    for piece in entries(&memory) {
        if let Piece::Data { bytes, .. } = piece {
            firsts.extend(bytes.chunks(PAGE_BYTES).map(|page| page[0]));
        }
    }
    assert_eq!(firsts, [7, 9, 7, 8, 9]);
}

#[test]
fn the_builder_allocates_nothing() {
    let mut memory = vec![0; CHUNK_BYTES];
    let trailer = trailer();
    let ((), allocated) = measure(|| {
        let mut builder = ChunkBuilder::new(&mut memory, head(EpochKind::Delta));
        builder.next_pages(4).unwrap().fill(1);
        builder.commit_data_run(BlockId(0), 9, 3);
        assert!(builder.push_zero(run(1, 0, 600)));
        builder.push_device(0, &[3; 5000]);
        assert!(builder.push_trailer(&trailer));
        let mut digest = EpochDigest::default();
        digest.push(builder.seal(true).body_crc);
        assert_ne!(digest.value(), 0);
    });
    assert_eq!(allocated, 0);
    assert_eq!(check(&memory).unwrap().trailer, Some(trailer));
}

#[test]
#[should_panic(expected = "pages committed")]
fn committing_more_than_was_lent_is_a_bug() {
    let mut memory = vec![0; CHUNK_BYTES];
    let mut builder = ChunkBuilder::new(&mut memory, head(EpochKind::Delta));
    builder.next_pages(2);
    builder.commit_data_run(BlockId(0), 0, 3);
}

#[test]
fn a_chunk_of_another_frame_is_refused() {
    let ours = test_frame();
    let others = [
        (
            "VM",
            Frame {
                vm: ft_core::VmTag(1),
                ..ours
            },
        ),
        (
            "session",
            Frame {
                session: ft_core::Session(1),
                ..ours
            },
        ),
        (
            "term",
            Frame {
                term: ours.term.next(),
                ..ours
            },
        ),
        (
            "epoch",
            Frame {
                epoch: ours.epoch.next(),
                ..ours
            },
        ),
    ];
    for (name, frame) in others {
        let chunks = write_epoch(frame, &small_script(), 0);
        match check(&chunks[0]) {
            Err(ImageError::OtherFrame { field, .. }) => assert_eq!(field, name),
            other => panic!("{other:?}"),
        }
    }
}

/// Every way in which the parts of a chunk can contradict each other, with right checksums.
#[test]
fn every_contradiction_in_a_chunk_is_named() {
    use ImageError as E;
    let base = write_epoch(test_frame(), &small_script(), 0).remove(0);
    check(&base).unwrap();
    // Entry 0 is data, 1 zeros, 2 device state, 3 the trailer; an entry has its block at byte 0,
    // kind at 2, count at 4, place at 8. Pages: two of data, two of device state, the trailer.
    let entry = |index: usize, offset: usize| HEADER_BYTES + 16 * index + offset;
    let zeros_entry = &base[entry(1, 0)..entry(2, 0)];
    let trailer_at = 5 * PAGE_BYTES;
    let (flags_at, entries_at) = (52, 54);
    let max = DEVICE_STATE_BYTES_MAX as u64;
    let out_of_range = |entry, block, first, count, pages| E::OutOfRange {
        entry,
        block,
        first,
        count,
        pages,
    };
    let unknown_block = |entry, block| E::UnknownBlock {
        entry,
        block,
        blocks: BLOCKS.len(),
    };
    let reserved = |what| E::Wire(WireError::Reserved { what });
    let too_long = |end| E::DeviceTooLong { entry: 2, end };
    let run_state = WireError::Value {
        what: "run state",
        found: 3,
    };
    let two_devices = E::DeviceOffset {
        entry: 2,
        offset: 0,
        expected: 8192,
    };
    let other_audit = E::AuditBlocks {
        blocks: BLOCKS.len(),
        found: 3,
    };
    #[rustfmt::skip]
    let cases: [(usize, &[u8], ImageError); 27] = [
        (entry(0, 2), &[0], E::EntryKind { entry: 0, kind: 0 }),
        (entry(0, 2), &[7], E::EntryKind { entry: 0, kind: 7 }),
        (entry(1, 3), &[1], E::EntryReserved { entry: 1 }),
        (entry(0, 4), &[0], E::EntryEmpty { entry: 0 }),
        (entry(1, 4), &[0], E::EntryEmpty { entry: 1 }),
        (entry(0, 0), &[4], unknown_block(0, 4)),
        (entry(1, 0), &[3, 1], unknown_block(1, 259)),
        (entry(0, 8), &599u64.to_le_bytes(), out_of_range(0, 1, 599, 2, 600)),
        (entry(0, 8), &[0xff; 8], out_of_range(0, 1, u64::MAX, 2, 600)),
        (entry(1, 4), &[16], out_of_range(1, 3, 50, 16, 65)),
        (entry(1, 4), &[0xff; 4], out_of_range(1, 3, 50, u64::from(u32::MAX), 65)),
        (entry(0, 4), &[6], E::PagesMissing { entry: 0 }),
        (entry(0, 4), &[0xff; 4], E::PagesMissing { entry: 0 }),
        // The device state then begins a page early, and what follows it isn't zero.
        (entry(0, 4), &[1], E::EntryReserved { entry: 2 }),
        // Data as a second device state.
        (entry(0, 0), &[0, 0, 3, 0, 0, 32, 0, 0, 0], two_devices),
        (entry(2, 0), &[1], E::EntryReserved { entry: 2 }),
        (entry(2, 2), &[6], E::PackedDevice { entry: 2 }),
        (entry(2, 8), &max.to_le_bytes(), too_long(max + PAGE_BYTES as u64 + 100)),
        (entry(2, 8), &[0xff; 8], too_long(u64::MAX)),
        (entry(3, 4), &[2], E::EntryReserved { entry: 3 }),
        (entry(3, 8), &[1], E::EntryReserved { entry: 3 }),
        (entry(4, 0), zeros_entry, reserved("unused entries")),
        (entries_at, &[5], E::AfterTrailer { entry: 4 }), // with the entry before
        (flags_at, &[0], E::TrailerPlace { last: false }),
        (trailer_at + 40, &[3], E::Wire(run_state)),
        (trailer_at + 42, &[3], other_audit),
        (trailer_at + 4095, &[1], reserved("trailer")),
    ];
    for (at, value, expected) in cases {
        let mut bytes = base.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        if at == entries_at {
            bytes[entry(4, 0)..entry(5, 0)].copy_from_slice(zeros_entry);
        }
        assert!(check(&bytes).is_err(), "checksums wrong: {value:?} at {at}");
        fix_checksums(&mut bytes);
        assert_eq!(check(&bytes), Err(expected), "{value:?} at {at}");
    }

    let mut without_trailer = base.clone();
    without_trailer[entry(3, 0)..entry(4, 0)].fill(0);
    without_trailer[entries_at] = 3;
    fix_checksums(&mut without_trailer);
    assert_eq!(check(&without_trailer), Err(E::PagesLeft { pages: 1 }));
}

#[test]
fn every_contradiction_in_an_epoch_is_named() {
    use ImageError as E;
    let script = Script {
        device: vec![9; 2_100_000],
        pack_device: false,
        ..small_script()
    };
    let chunks = write_epoch(test_frame(), &script, 0);
    let checked: Vec<CheckedChunk> = chunks.iter().map(|c| check(c).unwrap()).collect();
    assert_eq!(checked.len(), 3);
    check_epoch(&checked).unwrap();
    assert_eq!(check_epoch(&[]), Err(E::NoChunks));
    let error = |change: &dyn Fn(&mut [CheckedChunk])| {
        let mut changed = checked.clone();
        change(&mut changed);
        check_epoch(&changed).unwrap_err()
    };
    fn seal(chunks: &mut [CheckedChunk]) -> &mut Trailer {
        chunks[2].trailer.as_mut().unwrap()
    }
    assert!(matches!(
        error(&|c| c[1].index = 2),
        E::ChunkOrder {
            expected: 1,
            found: 2
        }
    ));
    assert!(matches!(
        error(&|c| c[0].kind = EpochKind::Full),
        E::ChunkKind { index: 0, .. }
    ));
    assert!(matches!(
        error(&|c| c[2].kind = EpochKind::SyncRound),
        E::LiveRound
    ));
    assert!(matches!(
        error(&|c| c[1].last = true),
        E::TrailerPlace { last: true }
    ));
    assert!(matches!(
        error(&|c| c[2].last = false),
        E::TrailerPlace { last: false }
    ));
    assert!(matches!(
        error(&|c| c[2].trailer = None),
        E::TrailerPlace { .. }
    ));
    assert!(matches!(
        error(&|c| c[1].device_offset += 1),
        E::DeviceGap { index: 1, .. }
    ));
    assert!(matches!(
        error(&|c| c[0].device_offset = 1),
        E::DeviceGap { index: 0, .. }
    ));
    assert!(matches!(error(&|c| c[0].body_crc ^= 1), E::Digest));
    assert!(matches!(error(&|c| seal(c).digest ^= 1), E::Digest));
    type Change = fn(&mut [CheckedChunk]);
    let sums: [(&str, Change); 4] = [
        ("chunks", |c| seal(c).chunks = 2),
        ("data pages", |c| c[0].data_pages += 1),
        ("zero pages", |c| seal(c).zero_pages += 1),
        ("bytes of device state", |c| seal(c).device_bytes += 1),
    ];
    for (name, change) in sums {
        match error(&change) {
            E::Sum { what, .. } => assert_eq!(what, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

fn head(kind: EpochKind) -> ChunkHead {
    ChunkHead {
        frame: test_frame(),
        kind,
        index: 0,
    }
}

fn run(block: u16, first: u64, count: u64) -> PageRun {
    PageRun {
        block: BlockId(block),
        first,
        count,
    }
}

fn trailer() -> Trailer {
    Trailer {
        chunks: 1,
        data_pages: 3,
        zero_pages: 600,
        device_bytes: 5000,
        run_state: RunState::Stopped,
        base: Epoch(4710),
        digest: 0,
        audit: Some(ft_core::image::AuditDigest(vec![5; BLOCKS.len()])),
    }
}

/// Two data pages at the front of block 1, ten zero pages, a device state of a page and a bit.
pub(crate) fn small_script() -> Script {
    Script {
        kind: EpochKind::Delta,
        steps: vec![
            Step::Data {
                run: run(1, 8, 2),
                fill: 0xd1,
            },
            Step::Zero {
                run: run(3, 50, 10),
            },
        ],
        device: vec![0xde; PAGE_BYTES + 100],
        pack_device: false,
        run_state: RunState::Running,
        audit: Some(vec![1, 2, 3, u64::MAX]),
    }
}
