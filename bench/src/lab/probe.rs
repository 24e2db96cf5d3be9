//! Whether a host's kernel has what the trackers need, by using it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use memmap2::{MmapOptions, MmapRaw};

const PAGE: usize = 4096;
const PAGES: usize = 8;
/// The one that is written.
const WRITTEN: usize = 5;
/// `PAGE_IS_SOFT_DIRTY` of linux/fs.h.
const SOFT_DIRTY: u64 = 1 << 7;

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Debug, Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, Scan);

/// Clears the soft-dirty bits of this process, writes one page, and has `PAGEMAP_SCAN` find it.
///
/// # Errors
/// The kernel has no `PAGEMAP_SCAN` (before 6.7) or no soft-dirty (`CONFIG_MEM_SOFT_DIRTY`), or
/// they say something else.
pub fn soft_dirty_by_pagemap_scan() -> Result<String> {
    let pages = MmapRaw::from(MmapOptions::new().len(PAGES * PAGE).map_anon()?);
    for page in 0..PAGES {
        write(&pages, page);
    }
    OpenOptions::new()
        .write(true)
        .open("/proc/self/clear_refs")
        .and_then(|mut file| file.write_all(b"4"))
        .context("clearing the soft-dirty bits")?;
    write(&pages, WRITTEN);
    let start = pages.as_ptr() as u64;
    let mut found = [Region::default(); PAGES];
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        start,
        end: start + (PAGES * PAGE) as u64,
        vec: found.as_mut_ptr() as u64,
        vec_len: PAGES as u64,
        category_mask: SOFT_DIRTY,
        return_mask: SOFT_DIRTY,
        ..Scan::default()
    };
    let pagemap = File::open("/proc/self/pagemap")?;
    // SAFETY: `scan` is laid out as the kernel's struct and says its own size; `vec` points at
    // `vec_len` regions that live beyond the call and are not otherwise used during it.
    let count = unsafe { pagemap_scan(pagemap.as_raw_fd(), &mut scan) }.context("PAGEMAP_SCAN")?;
    let expected = start + (WRITTEN * PAGE) as u64;
    let [first, ..] = found;
    ensure!(
        count == 1 && (first.start, first.end) == (expected, expected + PAGE as u64),
        "PAGEMAP_SCAN found {count} soft-dirty runs, the first {first:x?}; written: {expected:#x}"
    );
    Ok(format!(
        "PAGEMAP_SCAN found the one page of {PAGES} that is soft-dirty"
    ))
}

fn write(pages: &MmapRaw, page: usize) {
    assert!(page < PAGES);
    // SAFETY: the mapping is writable, PAGES pages long, lives as long as `pages`, and nobody has a
    // reference into it.
    unsafe { pages.as_mut_ptr().add(page * PAGE).write_volatile(1) }
}
