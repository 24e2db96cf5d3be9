//! Whether a tracker really sees a write, tried on the guest's own RAM before it is relied on.

use ft_core::{BlockId, DirtySet, PageRun};

use super::{Tracker, TrackerError};
use crate::guest_ram::GuestRam;

/// Arms everything, writes to the first and the last page of every block in a way that leaves
/// the guest's bytes as they are, and looks whether exactly those are reported; twice, because
/// the second time it is `collect` that must have armed them. The guest must be paused.
/// Afterwards everything is armed.
///
/// They are written once before it counts, so that their page tables are there: with the first
/// write to a table's range PAGEMAP_SCAN also reports every page of it that was never touched
/// (`pagemap_scan_pmd_entry` in fs/proc/task_mmu.c; once, and such pages are holes to a harvest).
///
/// # Errors
/// A write was not seen, or one was seen that nobody made.
pub fn self_test(tracker: &mut dyn Tracker, ram: &GuestRam) -> Result<(), TrackerError> {
    let pages = ram.pages_per_block();
    let probes = probes(&pages, ram)?;
    let mut dirty = DirtySet::new(&pages);
    touch(tracker, ram, &probes)?;
    tracker.arm_all(ram)?;
    expect(tracker, ram, &[], &mut dirty)?;
    for _ in 0..2 {
        touch(tracker, ram, &probes)?;
        expect(tracker, ram, &probes, &mut dirty)?;
    }
    expect(tracker, ram, &[], &mut dirty)
}

fn touch(
    tracker: &mut dyn Tracker,
    ram: &GuestRam,
    probes: &[(BlockId, u64)],
) -> Result<(), TrackerError> {
    probes
        .iter()
        .try_for_each(|&(block, page)| tracker.touch(ram, block, page))
}

/// Collects, and compares with the pages that were written.
fn expect(
    tracker: &mut dyn Tracker,
    ram: &GuestRam,
    written: &[(BlockId, u64)],
    dirty: &mut DirtySet,
) -> Result<(), TrackerError> {
    dirty.clear();
    tracker.collect(ram, dirty)?;
    let missed = written
        .iter()
        .find(|(block, page)| !dirty.contains(*block, *page));
    let may_be = |run: &PageRun| {
        let runs = written.iter().map(|&(b, p)| tracker.reported_with(b, p));
        let mut pages = run.first..run.first + run.count;
        pages.all(|page| runs.clone().any(|r| contains(&r, run.block, page)))
    };
    let what = match missed {
        Some((block, page)) => format!("a write to page {page} of {block:?} was not reported"),
        None => match dirty.runs().find(|run| !may_be(run)) {
            Some(PageRun {
                block,
                first,
                count,
            }) => format!(
                "{count} pages from {first} on of {block:?} were reported and not all of them written"
            ),
            None => return Ok(()),
        },
    };
    let tracker = tracker.name();
    Err(TrackerError::Blind { tracker, what })
}

fn contains(run: &PageRun, block: BlockId, page: u64) -> bool {
    run.block == block && (run.first..run.first + run.count).contains(&page)
}

/// The first and the last page of every block that have data: a hole must stay one.
fn probes(pages: &[u64], ram: &GuestRam) -> Result<Vec<(BlockId, u64)>, TrackerError> {
    let mut probes = Vec::new();
    for (index, &count) in pages.iter().enumerate() {
        let block = BlockId(u16::try_from(index).expect("at most BLOCKS_MAX blocks"));
        if let Some(data) = ram.next_data(PageRun {
            block,
            first: 0,
            count,
        })? {
            probes.push((block, data.first));
            let last = data.first + data.count - 1;
            if last != data.first {
                probes.push((block, last));
            }
        }
    }
    Ok(probes)
}
