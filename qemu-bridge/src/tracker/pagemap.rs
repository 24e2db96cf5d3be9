//! `ioctl(PAGEMAP_SCAN)` on another process's `/proc/PID/pagemap` (Linux 6.7,
//! `Documentation/admin-guide/mm/pagemap.rst` and `include/uapi/linux/fs.h`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// A stretch of pages with the same answer.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct PageRegion {
    pub(super) start: u64,
    pub(super) end: u64,
    categories: u64,
}

#[derive(Debug, Default)]
#[repr(C)]
struct ScanArgument {
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

const _: () = assert!(size_of::<ScanArgument>() == 96 && size_of::<PageRegion>() == 24);

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArgument);

/// Whether a scan also arms what it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Look,
    /// Pages that were written are write-protected again, atomically with being reported. The
    /// kernel then invalidates the whole range that was passed for KVM, so keep it short.
    Arm,
}

/// Whether the process still has its memory. Of one that has ended, some kernels' scans find nothing
/// written, and call that a success.
///
/// # Errors
/// The kernel can't say.
pub(super) fn is_alive(pagemap: &File) -> io::Result<bool> {
    // The end of the file comes first for a process without memory (fs/proc/task_mmu.c, pagemap_read).
    let mut entry = [0; 8];
    Ok(pagemap.read_at(&mut entry, 0)? > 0)
}

/// Finds written pages from `start` to `end`. Returns how many of `regions` are filled, and
/// where the walk has stopped because they were full.
///
/// # Errors
/// `EPERM`: the range isn't registered for asynchronous write protection. `ENOTTY` or `EINVAL`:
/// the kernel is older than 6.7.
pub(super) fn scan(
    pagemap: &File,
    mode: Mode,
    start: u64,
    end: u64,
    regions: &mut [PageRegion],
) -> nix::Result<(usize, u64)> {
    // An empty vector makes kernels before late 2025 panic.
    assert!(!regions.is_empty(), "a scan needs room for its answer");
    let arm = if mode == Mode::Arm {
        PM_SCAN_WP_MATCHING
    } else {
        0
    };
    let mut argument = ScanArgument {
        size: size_of::<ScanArgument>() as u64,
        flags: arm | PM_SCAN_CHECK_WPASYNC,
        start,
        end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_mask: PAGE_IS_WRITTEN,
        return_mask: PAGE_IS_WRITTEN,
        ..ScanArgument::default()
    };
    // SAFETY: the descriptor is open; `argument` has the layout and the size that its first
    // field names; `vec` points to `vec_len` regions that are borrowed for the whole call, and
    // the kernel writes no more than that and keeps no pointer.
    let filled = unsafe { pagemap_scan(pagemap.as_raw_fd(), &raw mut argument) }?;
    let filled = usize::try_from(filled).unwrap_or(0).min(regions.len());
    Ok((filled, argument.walk_end))
}
