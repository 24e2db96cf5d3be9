//! Whether a tracker really sees a write, tried on the guest's own RAM before it is relied on.

use ft_core::{BlockId, DirtySet, PageRun};

use super::{Tracker, TrackerError};
use crate::guest_ram::GuestRam;

/// Arms everything, writes to the first and the last page of every block in a way that leaves
/// the guest's bytes as they are, and looks whether exactly those are reported. The guest must
/// be paused. Afterwards everything is armed.
///
/// # Errors
/// A write was not seen, or one was seen that nobody made.
pub fn self_test(tracker: &mut dyn Tracker, ram: &GuestRam) -> Result<(), TrackerError> {
    let pages = ram.pages_per_block();
    tracker.arm_all(ram)?;
    let mut dirty = DirtySet::new(&pages);
    tracker.collect(ram, &mut dirty)?;
    let blind = |tracker: &dyn Tracker, what: String| TrackerError::Blind {
        tracker: tracker.name(),
        what,
    };
    if let Some(run) = dirty.runs().next() {
        return Err(blind(
            tracker,
            format!("{run:?} was reported though nobody wrote"),
        ));
    }
    let probes = probes(&pages, ram)?;
    for &(block, page) in &probes {
        tracker.touch(ram, block, page)?;
    }
    tracker.collect(ram, &mut dirty)?;
    for &(block, page) in &probes {
        if !dirty.contains(block, page) {
            return Err(blind(
                tracker,
                format!("a write to page {page} of {block:?} was not seen"),
            ));
        }
    }
    let expected = probes.len() as u64;
    if dirty.count() != expected {
        let found = dirty.count();
        return Err(blind(
            tracker,
            format!("{expected} writes were made and {found} reported"),
        ));
    }
    Ok(())
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
