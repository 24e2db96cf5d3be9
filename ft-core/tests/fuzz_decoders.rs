//! Every decoder against bytes that began as valid ones.
//!
//! Each target starts from valid encodings, changes them, and in half of the cases makes the
//! checksums right again, so that what lies behind them is reached. What is still accepted must
//! keep its promises. A target runs for `CURLING_FUZZ_SECONDS` (1) from a seed that it prints; a
//! failure prints the one line that repeats it.

#[path = "fuzz/change.rs"]
mod change;
mod common;
#[path = "common/dice.rs"]
mod dice;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant, SystemTime};

use common::allocations::measure;
use common::epochs::{BLOCKS, Script, Step, check, test_frame, write_epoch};
use common::{BODY_BYTES_AT, fix_checksums, fix_header_checksum, strategies};
use dice::Dice;
use ft_core::image::{
    AuditDigest, CheckedChunk, ChunkBuilder, ChunkHead, EpochDigest, Piece, Trailer, Unpacked,
    check_epoch, entries, packed::RECORD_BYTES_MAX,
};
use ft_core::limits::{CHUNK_BYTES, DEVICE_STATE_BYTES_MAX, MESSAGE_BYTES_MAX};
use ft_core::wire::{self, ChunkTag, HEADER_BYTES, Header, Message};
use ft_core::{BlockId, Epoch, EpochKind, PAGE_BYTES, PageRun, RunState};

/// Changed copies of one valid encoding.
const CHANGES: u64 = 64;
/// What a decoder may allocate for a message of 64 KiB, and for a chunk.
const MESSAGE_ALLOCATION_MAX: usize = 6 * MESSAGE_BYTES_MAX;
const CHUNK_ALLOCATION_MAX: usize = 4096;

#[test]
fn header() {
    fuzz("header", |dice| {
        let message = dice.draw(&strategies::message());
        let valid = match dice.chance(2) {
            true => wire::encode(dice.draw(&strategies::frame()), &message),
            false => a_chunk(dice),
        };
        (0..CHANGES)
            .filter(|_| {
                let mut bytes = valid[..HEADER_BYTES].to_vec();
                dice.change(&mut bytes, HEADER_BYTES);
                if dice.chance(2) && bytes.len() >= HEADER_BYTES {
                    fix_header_checksum(&mut bytes);
                }
                let accepted = Header::decode(&bytes);
                if let Ok(header) = &accepted {
                    assert_eq!(header.encode(), bytes[..HEADER_BYTES], "not canonical");
                }
                accepted.is_ok()
            })
            .count()
    });
}

#[test]
fn message() {
    fuzz("message", |dice| {
        let message = dice.draw(&strategies::message());
        let valid = wire::encode(dice.draw(&strategies::frame()), &message);
        (0..CHANGES)
            .filter(|_| {
                let mut bytes = valid.clone();
                dice.change(&mut bytes, valid.len());
                fix_some(dice, &mut bytes);
                accepts_message(&bytes)
            })
            .count()
    });
}

#[test]
fn chunk() {
    fuzz("chunk", |dice| {
        let valid = a_chunk(dice);
        (0..CHANGES)
            .filter(|_| {
                let mut bytes = valid.clone();
                // Most of a chunk is pages, where every byte is as good as any other.
                let reach = *dice.pick(&[HEADER_BYTES + 20 * 16, PAGE_BYTES, bytes.len()]);
                dice.change(&mut bytes, reach);
                fix_some(dice, &mut bytes);
                accepts_chunk(&bytes)
            })
            .count()
    });
}

#[test]
fn packed_pages() {
    fuzz("packed_pages", |dice| {
        let valid = a_packed_chunk(dice);
        (0..CHANGES)
            .filter(|_| {
                let mut bytes = valid.clone();
                let mut records = bytes.split_off(PAGE_BYTES);
                let reach = *dice.pick(&[64, 600, records.len()]);
                dice.change(&mut records, reach);
                records.resize(valid.len() - PAGE_BYTES, 0);
                bytes.extend(records);
                fix_checksums(&mut bytes);
                accepts_chunk(&bytes)
            })
            .count()
    });
}

#[test]
fn trailer() {
    fuzz("trailer", |dice| {
        let trailer = a_trailer(dice);
        let valid = trailer_chunk(&trailer);
        (0..CHANGES)
            .filter(|_| {
                let mut bytes = valid.clone();
                let mut record = bytes.split_off(PAGE_BYTES);
                let reach = *dice.pick(&[48, 48 + 8 * BLOCKS.len(), PAGE_BYTES]);
                dice.change(&mut record, reach);
                record.resize(PAGE_BYTES, 0);
                bytes.extend(record);
                fix_checksums(&mut bytes);
                let accepted = accepts_chunk(&bytes);
                if accepted {
                    let decoded = check(&bytes).expect("accepted").trailer;
                    let again = trailer_chunk(&decoded.expect("a last chunk has one"));
                    assert!(again == bytes, "not canonical");
                }
                accepted
            })
            .count()
    });
}

#[test]
fn epoch() {
    fuzz("epoch", |dice| {
        let valid = a_checked_epoch(dice);
        check_epoch(&valid).expect("it is valid");
        (0..CHANGES)
            .filter(|_| {
                let mut chunks = valid.clone();
                for _ in 0..=dice.below(2) {
                    change_epoch(dice, &mut chunks);
                }
                let accepted = check_epoch(&chunks).is_ok();
                assert!(!accepted || chunks == valid, "{chunks:?}");
                accepted
            })
            .count()
    });
}

#[test]
fn tag() {
    fuzz("tag", |dice| {
        for _ in 0..CHANGES {
            let bits = dice.next() as u32;
            let tag = ChunkTag::unpack(bits);
            assert_eq!(tag.pack(), bits);
            assert!(tag.matches(Epoch(u64::from(tag.epoch_low))));
        }
        CHANGES as usize
    });
}

#[test]
fn garbage() {
    fuzz("garbage", |dice| {
        (0..CHANGES)
            .filter(|_| {
                let mut bytes: Vec<u8> = (0..dice.below(9000)).map(|_| dice.next() as u8).collect();
                if dice.chance(2) && bytes.len() >= HEADER_BYTES {
                    let like = wire::encode(test_frame(), &Message::Ack);
                    let copied = usize::try_from(dice.below(HEADER_BYTES as u64)).expect("small");
                    bytes[..copied].copy_from_slice(&like[..copied]);
                    fix_some(dice, &mut bytes);
                }
                let message = accepts_message(&bytes);
                message | accepts_chunk(&bytes)
            })
            .count()
    });
}

/// Runs `one` with seed after seed; it returns how many of its changed inputs were accepted.
fn fuzz(target: &str, one: impl Fn(&mut Dice) -> usize) {
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let only: Option<u64> = variable("CURLING_FUZZ_SEED");
    let seconds = variable("CURLING_FUZZ_SECONDS").unwrap_or(1);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let first = only.unwrap_or(now.map_or(0, |since| since.as_nanos() as u64));
    let start = Instant::now();
    let (mut seed, mut accepted) = (first, 0);
    loop {
        match catch_unwind(AssertUnwindSafe(|| one(&mut Dice::new(seed)))) {
            Ok(count) => accepted += count,
            Err(panic) => {
                eprintln!(
                    "repeat with: CURLING_FUZZ_SEED={seed} \
                     cargo test -p ft-core --test fuzz_decoders -- --exact {target}"
                );
                resume_unwind(panic);
            }
        }
        seed = seed.wrapping_add(1);
        if only.is_some() || start.elapsed() >= Duration::from_secs(seconds) {
            break;
        }
    }
    let inputs = seed.wrapping_sub(first) * CHANGES;
    println!("fuzz {target}: {inputs} inputs from seed {first}, {accepted} accepted");
}

/// Half of the time all checksums, a quarter with a body length that is true.
fn fix_some(dice: &mut Dice, bytes: &mut [u8]) {
    if dice.chance(2) {
        return;
    }
    if let (true, Some(body_bytes)) = (dice.chance(2), bytes.len().checked_sub(HEADER_BYTES)) {
        let body_bytes = u32::try_from(body_bytes).expect("at most a chunk");
        bytes[BODY_BYTES_AT..][..4].copy_from_slice(&body_bytes.to_le_bytes());
    }
    fix_checksums(bytes);
}

fn accepts_message(bytes: &[u8]) -> bool {
    let (decoded, allocated) = measure(|| wire::decode(bytes));
    assert!(allocated <= MESSAGE_ALLOCATION_MAX, "{allocated} bytes");
    let Ok((frame, message)) = decoded else {
        return false;
    };
    if let Message::Hello(hello) = &message {
        assert_eq!(hello.check(), Ok(()), "what came could be sent");
    }
    assert!(wire::encode(frame, &message) == bytes, "not canonical");
    true
}

fn accepts_chunk(bytes: &[u8]) -> bool {
    let (checked, allocated) = measure(|| check(bytes));
    assert!(allocated <= CHUNK_ALLOCATION_MAX, "{allocated} bytes");
    let Ok(checked) = checked else {
        return false;
    };
    let (mut data_pages, mut zero_pages, mut device_end) = (0, 0, checked.device_offset);
    for piece in entries(bytes) {
        match piece {
            Piece::Data { run, bytes } => {
                assert_in_block(run);
                assert_eq!(bytes.len() as u64, run.count * PAGE_BYTES as u64);
                data_pages += run.count;
            }
            Piece::Zero { run } => {
                assert_in_block(run);
                zero_pages += run.count;
            }
            Piece::Packed { pages } => {
                for page in pages.iter() {
                    let (block, first) = (page.block, page.page);
                    assert_in_block(PageRun {
                        block,
                        first,
                        count: 1,
                    });
                    // Of this base or of another: it must not matter for safety.
                    let _ = page.unpack(&mut [0xa5; PAGE_BYTES]);
                    data_pages += 1;
                }
            }
            Piece::Device { offset, bytes } => {
                assert_eq!(offset, device_end);
                device_end += bytes.len() as u64;
            }
            Piece::PackedDevice { state } => {
                let mut made = Vec::new();
                state.unpack(&mut made);
                device_end += made.len() as u64;
            }
        }
    }
    assert_eq!(data_pages, u64::from(checked.data_pages));
    assert_eq!(zero_pages, checked.zero_pages);
    let device_bytes = device_end - checked.device_offset;
    assert_eq!(device_bytes, u64::from(checked.device_bytes));
    assert!(device_end <= DEVICE_STATE_BYTES_MAX as u64);
    assert_eq!(checked.last, checked.trailer.is_some());
    true
}

fn assert_in_block(run: PageRun) {
    let end = run.first.checked_add(run.count).expect("no overflow");
    assert!(run.count > 0 && end <= BLOCKS[usize::from(run.block.0)]);
}

fn a_chunk(dice: &mut Dice) -> Vec<u8> {
    let steps = (0..dice.below(12)).map(|_| a_step(dice)).collect();
    let device = vec![dice.next() as u8; dice.below(9000) as usize];
    let script = Script {
        kind: *dice.pick(&[EpochKind::SyncRound, EpochKind::Delta, EpochKind::Full]),
        steps,
        device,
        pack_device: dice.chance(2),
        run_state: *dice.pick(&[RunState::Running, RunState::Stopped]),
        audit: an_audit(dice),
    };
    write_epoch(test_frame(), &script, 0).remove(0)
}

/// A chunk of records of every form, deltas mostly.
fn a_packed_chunk(dice: &mut Dice) -> Vec<u8> {
    let mut memory = vec![0; CHUNK_BYTES];
    let head = ChunkHead {
        frame: test_frame(),
        kind: EpochKind::Delta,
        index: 0,
    };
    let mut builder = ChunkBuilder::new(&mut memory, head);
    for _ in 0..1 + dice.below(8) {
        let mut bytes = [0; PAGE_BYTES];
        bytes.fill_with(|| dice.next() as u8);
        let changed = std::array::from_fn(|_| dice.next() & dice.next() & dice.next());
        let block = BlockId(0);
        let page = Unpacked {
            block,
            page: dice.below(BLOCKS[0]),
            bytes: &bytes,
        };
        let mut record = [0; RECORD_BYTES_MAX];
        let used = match dice.below(4) {
            0 => page.raw(&mut record),
            _ => page
                .delta(&changed, &mut record)
                .unwrap_or_else(|| page.raw(&mut record)),
        };
        assert!(builder.push_packed(&record[..used]));
    }
    let used_bytes = builder.seal(false).used_bytes;
    memory.truncate(used_bytes);
    memory
}

fn a_step(dice: &mut Dice) -> Step {
    let block = dice.below(BLOCKS.len() as u64);
    let pages = BLOCKS[block as usize];
    let first = dice.below(pages);
    let count = 1 + dice.below((pages - first).min(3));
    let run = PageRun {
        block: BlockId(block as u16),
        first,
        count,
    };
    let fill = dice.next() as u8;
    match dice.below(4) {
        0 => Step::Zero { run },
        1 => Step::Data { run, fill },
        kind => Step::Packed {
            run,
            fill,
            lz4: kind == 2,
        },
    }
}

fn an_audit(dice: &mut Dice) -> Option<Vec<u64>> {
    let audited = dice.chance(2);
    audited.then(|| BLOCKS.iter().map(|_| dice.next()).collect())
}

fn a_trailer(dice: &mut Dice) -> Trailer {
    Trailer {
        chunks: 1 + dice.below(1 << 20) as u32,
        data_pages: dice.next(),
        zero_pages: dice.next(),
        device_bytes: dice.below(DEVICE_STATE_BYTES_MAX as u64 + 1),
        run_state: *dice.pick(&[RunState::Running, RunState::Stopped]),
        base: Epoch(dice.next()),
        digest: dice.next() as u32,
        audit: an_audit(dice).map(AuditDigest),
    }
}

fn trailer_chunk(trailer: &Trailer) -> Vec<u8> {
    let mut memory = vec![0; CHUNK_BYTES];
    let head = ChunkHead {
        frame: test_frame(),
        kind: EpochKind::Delta,
        index: 0,
    };
    let mut builder = ChunkBuilder::new(&mut memory, head);
    assert!(builder.push_trailer(trailer));
    let used_bytes = builder.seal(true).used_bytes;
    memory.truncate(used_bytes);
    memory
}

/// What the checks of an epoch's chunks have left over, without the chunks.
fn a_checked_epoch(dice: &mut Dice) -> Vec<CheckedChunk> {
    let kind = *dice.pick(&[EpochKind::Delta, EpochKind::Full]);
    let count = 1 + dice.below(6) as u32;
    let mut digest = EpochDigest::default();
    let mut trailer = Trailer {
        chunks: count,
        data_pages: 0,
        zero_pages: 0,
        device_bytes: 0,
        ..a_trailer(dice)
    };
    let mut chunks: Vec<CheckedChunk> = Vec::new();
    for index in 0..count {
        let device_bytes = if dice.chance(2) {
            dice.below(9000) as u32
        } else {
            0
        };
        let chunk = CheckedChunk {
            index,
            kind,
            last: index + 1 == count,
            body_crc: dice.next() as u32,
            data_pages: dice.below(256) as u32,
            zero_pages: dice.below(1 << 40),
            device_offset: if device_bytes > 0 {
                trailer.device_bytes
            } else {
                0
            },
            device_bytes,
            trailer: None,
        };
        trailer.data_pages += u64::from(chunk.data_pages);
        trailer.zero_pages += chunk.zero_pages;
        trailer.device_bytes += u64::from(device_bytes);
        trailer.digest = digest.value();
        digest.push(chunk.body_crc);
        chunks.push(chunk);
    }
    if let Some(last) = chunks.last_mut() {
        last.trailer = Some(trailer);
    }
    chunks
}

/// One change that a check must notice: whatever the last chunk's checksum is, and where a chunk
/// without device state says that it begins, is nobody's business.
fn change_epoch(dice: &mut Dice, chunks: &mut Vec<CheckedChunk>) {
    let Some(at) = chunks
        .len()
        .checked_sub(1)
        .map(|last| dice.below(last as u64 + 1) as usize)
    else {
        return;
    };
    let last = at + 1 == chunks.len();
    let change = 1 + dice.below(5) as u32;
    let chunk = &mut chunks[at];
    match dice.below(10) {
        0 => drop(chunks.remove(at)),
        1 => chunks.insert(at, chunks[at].clone()),
        2 => chunks.swap(0, at),
        3 => chunk.index ^= change,
        4 => chunk.last = !chunk.last,
        5 => chunk.data_pages += change,
        6 => chunk.zero_pages += u64::from(change),
        7 => chunk.device_bytes += change,
        8 if !last => chunk.body_crc ^= change,
        9 if chunk.device_bytes > 0 => chunk.device_offset += u64::from(change),
        _ => chunk.trailer = None,
    }
}
