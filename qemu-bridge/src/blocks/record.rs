//! Where a QEMU that doesn't print it has its RAM blocks.
//!
//! QEMU keeps a record of each block on its heap (`struct RAMBlock` in `include/exec/ramblock.h`, the same
//! from 5.0 to 8.2): the host address, a pointer, then offset, used and maximum length as
//! `info ramblock` prints them, a function pointer, flags and the name. So a place in the heap that
//! has all three numbers *and* the name in their places is that record. What it says about the
//! address is believed only if a mapping with the marks of a RAM block and exactly the block's size begins there.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::listing::ListedBlock;
use super::maps::{Mapping, Mappings};
use super::{BlocksError, PAGE};

/// Bytes of heap that are searched at most: QEMU's own is 10 to 30 MB.
const HEAP_BYTES_MAX: u64 = 1 << 30;
/// Bytes that are searched at a time.
const WINDOW_BYTES: usize = 4 << 20;

/// Places in the record, relative to the field `offset`.
const HOST_BEFORE: usize = 16;
const NAME_AFTER: usize = 3 * 8 + 8 + 4;
/// Bytes of `idstr`, its final NUL included.
const NAME_BYTES: usize = 256;
const RECORD_BYTES: usize = HOST_BEFORE + NAME_AFTER + NAME_BYTES;

/// The host address of each block of `listed`, in the same order.
pub(super) fn find_addresses(
    pid: i32,
    listed: &[ListedBlock],
    mappings: &Mappings,
) -> Result<Vec<u64>, BlocksError> {
    let mut found: Vec<Vec<u64>> = vec![Vec::new(); listed.len()];
    let failed = |source| BlocksError::Process {
        what: "the memory".to_owned(),
        pid,
        source,
    };
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(failed)?;
    let mut budget = HEAP_BYTES_MAX;
    for mapping in mappings.0.iter().filter(|m| may_hold_records(m)) {
        budget = match budget.checked_sub(mapping.bytes()) {
            Some(rest) => rest,
            None => continue,
        };
        search_mapping(&memory, mapping, listed, mappings, &mut found);
    }
    let one_each = listed
        .iter()
        .zip(&found)
        .map(|(block, places)| one_address(block, places));
    let addresses = one_each.collect::<Result<Vec<u64>, BlocksError>>()?;
    for (at, address) in addresses.iter().enumerate() {
        if let Some(other) = addresses[..at].iter().position(|a| a == address) {
            return Err(BlocksError::AddressUnknown {
                name: listed[at].name.clone(),
                why: format!("{} seems to be at the same address", listed[other].name),
            });
        }
    }
    Ok(addresses)
}

/// QEMU's heap and the arenas of its threads, not guest RAM, files, stacks of code.
fn may_hold_records(mapping: &Mapping) -> bool {
    mapping.writable
        && !mapping.executable
        && !mapping.shared
        && !mapping.is_file()
        && !mapping.dont_fork
}

fn one_address(block: &ListedBlock, places: &[u64]) -> Result<u64, BlocksError> {
    match places {
        [address] => Ok(*address),
        [] => Err(BlocksError::AddressUnknown {
            name: block.name.clone(),
            why: "QEMU's record of it was not found".to_owned(),
        }),
        several => Err(BlocksError::AddressUnknown {
            name: block.name.clone(),
            why: format!("there are {} records of it", several.len()),
        }),
    }
}

fn search_mapping(
    memory: &File,
    mapping: &Mapping,
    listed: &[ListedBlock],
    mappings: &Mappings,
    found: &mut [Vec<u64>],
) {
    let mut window = vec![0u8; WINDOW_BYTES];
    let mut at = mapping.start;
    while at < mapping.end {
        let length = WINDOW_BYTES.min(usize::try_from(mapping.end - at).unwrap_or(WINDOW_BYTES));
        // A heap that shrinks while it is read ends early: what is left of it counts.
        let readable = read_up_to(memory, &mut window[..length], at);
        let window = &window[..readable];
        for (block, places) in listed.iter().zip(found.iter_mut()) {
            for address in records_of(block, window) {
                let mapped = mappings.is_ram_block(address, block.max_bytes.next_multiple_of(PAGE));
                if mapped && !places.contains(&address) {
                    places.push(address);
                }
            }
        }
        // Overlapping, so that a record on the border is whole in one of the two windows.
        at += match length == WINDOW_BYTES {
            true => (WINDOW_BYTES - RECORD_BYTES.next_multiple_of(8)) as u64,
            false => length as u64,
        };
    }
}

/// Reads until the window is full or nothing more can be read; how much it was.
fn read_up_to(memory: &File, window: &mut [u8], at: u64) -> usize {
    let mut done = 0;
    while let Ok(count @ 1..) = memory.read_at(&mut window[done..], at + done as u64) {
        done += count;
    }
    done
}

/// The host addresses in all records of `block` in `window`, which begins at a multiple of 8.
fn records_of<'a>(block: &'a ListedBlock, window: &'a [u8]) -> impl Iterator<Item = u64> + 'a {
    let numbers = [block.ram_offset, block.used_bytes, block.max_bytes]
        .map(u64::to_le_bytes)
        .concat();
    let last = window.len().saturating_sub(NAME_AFTER + NAME_BYTES);
    (HOST_BEFORE..last)
        .step_by(8)
        .filter(move |at| {
            window[*at + 8..].starts_with(&numbers[8..]) && window[*at..].starts_with(&numbers)
        })
        .filter(move |at| {
            let name = &window[at + NAME_AFTER..][..NAME_BYTES];
            name.starts_with(block.name.as_bytes()) && name.get(block.name.len()) == Some(&0)
        })
        .map(move |at| {
            let host = &window[at - HOST_BEFORE..][..8];
            u64::from_le_bytes(host.try_into().expect("eight bytes"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> ListedBlock {
        ListedBlock {
            name: "pc.bios".to_owned(),
            ram_offset: 0x400_0000,
            used_bytes: 0x4_0000,
            max_bytes: 0x4_0000,
            host_address: None,
            read_only: None,
        }
    }

    fn record(block: &ListedBlock, host: u64, name: &str) -> Vec<u8> {
        let mut bytes = [
            host,
            0,
            block.ram_offset,
            block.used_bytes,
            block.max_bytes,
            0xdead_beef,
        ]
        .map(u64::to_le_bytes)
        .concat();
        bytes.extend([0; 4]);
        bytes.extend(name.as_bytes());
        bytes.resize(RECORD_BYTES + 8, 0);
        bytes
    }

    #[test]
    fn record_needs_all_numbers_and_the_whole_name() {
        let window = [
            vec![1; 64],
            record(&block(), 0x7000, "pc.bios"),
            vec![2; 64],
        ]
        .concat();
        assert_eq!(records_of(&block(), &window).collect::<Vec<_>>(), [0x7000]);
        let longer_name = [record(&block(), 0x7000, "pc.bios2"), vec![0; 64]].concat();
        assert_eq!(records_of(&block(), &longer_name).count(), 0);
        let mut other = block();
        other.max_bytes += 0x1000;
        assert_eq!(records_of(&other, &window).count(), 0);
    }

    #[test]
    fn cut_off_record_is_no_record() {
        let whole = record(&block(), 0x7000, "pc.bios");
        for length in 0..NAME_AFTER + HOST_BEFORE {
            assert_eq!(records_of(&block(), &whole[..length]).count(), 0);
        }
    }
}
