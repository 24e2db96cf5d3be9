//! The kernel reports writes: userfaultfd in asynchronous write-protect mode, and PAGEMAP_SCAN.
//!
//! A userfaultfd belongs to the address space that made it, so one is made *inside* QEMU (see
//! [`super::inject`]), taken over with `pidfd_getfd`, and closed in QEMU in the same stop.
//! Everything else, registering included, is done from here. So QEMU keeps nothing of it, and
//! when this process ends, however it ends, the kernel unregisters the ranges by itself.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use ft_core::types::PAGE_BYTES;
use ft_core::{BlockId, DirtySet, PageRun};
use nix::errno::Errno;

use super::inject;
use super::pagemap::{Mode, PageRegion, scan};
use super::{Collected, Tracker, TrackerError};
use crate::guest_ram::GuestRam;

/// Written stretches that one scan can report; more take another call.
const REGIONS: usize = 8192;
/// RAM that a thread scans in less time than it takes to start one more.
const THREAD_BYTES: u64 = 2 << 30;
const THREADS_MAX: u64 = 4;
/// Parts of RAM that two threads scan don't meet within a page table.
const PART_ALIGN: u64 = 2 << 20;
/// Stretches that are no further apart are armed by one call.
const ARM_GAP_BYTES: u64 = 64 * PAGE_BYTES as u64;

const UFFD_API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;

/// `struct uffdio_api` of `include/uapi/linux/userfaultfd.h`.
#[derive(Debug)]
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[derive(Debug)]
#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24 && size_of::<UffdioRegister>() == 32);

nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, UffdioApi);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, UffdioRegister);

/// Tracks all RAM blocks, mapped or private: both are ranges of QEMU's address space.
#[derive(Debug)]
pub struct UffdTracker {
    /// Open as long as writes shall be reported.
    _uffd: OwnedFd,
    pagemap: File,
    /// Arming invalidates the range that it is given for KVM, written or not, and the guest pays
    /// with a fault per page. So written stretches are armed one by one; else all at once.
    kvm: bool,
    ranges: Vec<(u64, u64)>,
    /// One for each thread that scans.
    scanners: Vec<Scanner>,
}

/// What one thread scans, and room for what it finds.
#[derive(Debug)]
struct Scanner {
    parts: Vec<Part>,
    written: Vec<PageRegion>,
    armed: Vec<PageRegion>,
    /// What a thread has found, for the one that waits for it.
    found: Vec<PageRun>,
}

/// A stretch of one RAM block's addresses in QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    block: BlockId,
    /// Where the block begins.
    base: u64,
    start: u64,
    end: u64,
}

impl UffdTracker {
    /// Registers every RAM block. QEMU's main thread stands still for about 0.2 ms.
    ///
    /// # Errors
    /// The kernel is too old, a privilege is missing, or somebody else watches the RAM.
    pub fn attach(ram: &GuestRam) -> Result<UffdTracker, TrackerError> {
        let pid = ram.pid();
        let uffd = inject::make_userfaultfd(pid)?;
        enable(&uffd)?;
        let ranges: Vec<_> = ram.host_ranges().collect();
        for (start, len) in &ranges {
            register(&uffd, *start, *len)?;
        }
        let path = format!("/proc/{pid}/pagemap");
        let pagemap = File::open(path).map_err(|source| TrackerError::Process {
            operation: "opening the pagemap of",
            pid,
            source,
        })?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        let bytes: u64 = ranges.iter().map(|(_, len)| len).sum();
        // QEMU saves its devices at the same time, and other guests want to run.
        let threads = (processors / 2).min(bytes / THREAD_BYTES).min(THREADS_MAX);
        let mut tracker = UffdTracker {
            _uffd: uffd,
            pagemap,
            kvm: uses_kvm(pid),
            ranges,
            scanners: Vec::new(),
        };
        tracker.scan_with(usize::try_from(threads).unwrap_or(1));
        Ok(tracker)
    }

    /// Lets so many threads scan, each as much RAM as the others. By itself it is one for every 2 GiB,
    /// up to four, and half of the processors.
    pub fn scan_with(&mut self, threads: usize) {
        let parts = split(&self.ranges, threads.max(1));
        self.scanners = parts.into_iter().map(Scanner::new).collect();
    }
}

impl Scanner {
    fn new(parts: Vec<Part>) -> Scanner {
        Scanner {
            parts,
            written: vec![PageRegion::default(); REGIONS],
            armed: vec![PageRegion::default(); REGIONS],
            found: Vec::with_capacity(REGIONS),
        }
    }

    /// Finds what was written and arms it; the number of stretches.
    fn scan(
        &mut self,
        pagemap: &File,
        kvm: bool,
        mut note: impl FnMut(&mut Vec<PageRun>, PageRun),
    ) -> Result<u64, TrackerError> {
        let Scanner {
            parts,
            written,
            armed,
            found,
        } = self;
        let mut count = 0;
        let mode = if kvm { Mode::Look } else { Mode::Arm };
        for part in parts {
            let mut note = |region: &PageRegion| note(found, run_of(part.block, part.base, region));
            walk(pagemap, mode, part.start, part.end, written, |regions| {
                count += regions.len() as u64;
                regions.iter().for_each(&mut note);
                match mode {
                    Mode::Arm => Ok(()),
                    // What a running guest writes between the look and the arming is reported by
                    // the arming, which is atomic: so both answers count.
                    Mode::Look => arm(pagemap, regions, armed, &mut note),
                }
            })?;
        }
        Ok(count)
    }
}

/// Blocks of these addresses and lengths in `parts` of the same size.
fn split(ranges: &[(u64, u64)], parts: usize) -> Vec<Vec<Part>> {
    let bytes: u64 = ranges.iter().map(|(_, len)| len).sum();
    let share = bytes.div_ceil(parts as u64).next_multiple_of(PART_ALIGN);
    let mut all = vec![Vec::new(); parts];
    let mut taken = 0;
    for (index, &(base, len)) in ranges.iter().enumerate() {
        let block = BlockId(u16::try_from(index).expect("at most BLOCKS_MAX blocks"));
        let (mut start, end) = (base, base + len);
        while start < end {
            let part = usize::try_from(taken / share).unwrap_or(parts);
            // The last one takes what the others' alignment has left.
            let room = match part + 1 < parts {
                true => share - taken % share,
                false => u64::MAX,
            };
            let cut = start.saturating_add(room) / PART_ALIGN * PART_ALIGN;
            let stop = if cut > start { cut.min(end) } else { end };
            taken += stop - start;
            let to = part.min(parts - 1);
            all[to].push(Part {
                block,
                base,
                start,
                end: stop,
            });
            start = stop;
        }
    }
    all.retain(|parts| !parts.is_empty());
    all
}

impl Tracker for UffdTracker {
    fn name(&self) -> &'static str {
        "uffd"
    }

    fn arm_all(&mut self, _ram: &GuestRam) -> Result<(), TrackerError> {
        for &(start, len) in &self.ranges {
            let room = &mut self.scanners[0].armed;
            walk(&self.pagemap, Mode::Arm, start, start + len, room, |_| {})?;
        }
        Ok(())
    }

    fn collect(&mut self, _ram: &GuestRam, into: &mut DirtySet) -> Result<Collected, TrackerError> {
        let UffdTracker {
            pagemap,
            kvm,
            scanners,
            ..
        } = self;
        let (pagemap, kvm) = (&*pagemap, *kvm);
        let Some((first, others)) = scanners.split_first_mut() else {
            return Ok(Collected::default());
        };
        let regions = std::thread::scope(|scope| {
            let started: Vec<_> = others
                .iter_mut()
                .map(|scanner| {
                    scope.spawn(move || {
                        scanner.found.clear();
                        let regions = scanner.scan(pagemap, kvm, |found, run| found.push(run));
                        regions.map(|regions| (regions, &scanner.found))
                    })
                })
                .collect();
            let mut regions = first.scan(pagemap, kvm, |_, run| into.set(run));
            for thread in started {
                let result = thread.join().expect("a scan doesn't panic");
                regions = regions.and_then(|before| {
                    let (more, found) = result?;
                    found.iter().for_each(|run| into.set(*run));
                    Ok(before + more)
                });
            }
            regions
        })?;
        Ok(Collected { regions })
    }

    fn arms_live(&self) -> bool {
        true
    }

    fn touch(&mut self, ram: &GuestRam, block: BlockId, page: u64) -> Result<(), TrackerError> {
        Ok(ram.rewrite(block, page)?)
    }
}

/// Walks a range in as many calls as it takes.
fn walk<R: WalkResult>(
    pagemap: &File,
    mode: Mode,
    start: u64,
    end: u64,
    regions: &mut [PageRegion],
    mut found: impl FnMut(&[PageRegion]) -> R,
) -> Result<(), TrackerError> {
    let mut at = start;
    while at < end {
        let (filled, walked) =
            scan(pagemap, mode, at, end, regions).map_err(|error| TrackerError::Kernel {
                operation: "PAGEMAP_SCAN",
                address: at,
                bytes: end - at,
                source: error.into(),
            })?;
        found(&regions[..filled]).into_result()?;
        assert!(walked > at, "PAGEMAP_SCAN has to get on");
        at = walked;
    }
    Ok(())
}

/// Lets [`walk`] take closures that can fail and closures that can't.
trait WalkResult {
    fn into_result(self) -> Result<(), TrackerError>;
}

impl WalkResult for () {
    fn into_result(self) -> Result<(), TrackerError> {
        Ok(())
    }
}

impl WalkResult for Result<(), TrackerError> {
    fn into_result(self) -> Result<(), TrackerError> {
        self
    }
}

/// Arms written stretches, neighbours in one call.
fn arm(
    pagemap: &File,
    written: &[PageRegion],
    armed: &mut [PageRegion],
    note: &mut impl FnMut(&PageRegion),
) -> Result<(), TrackerError> {
    let mut rest = written;
    while let Some(first) = rest.first() {
        let mut end = first.end;
        let mut taken = 1;
        while let Some(next) = rest
            .get(taken)
            .filter(|next| next.start - end <= ARM_GAP_BYTES)
        {
            end = next.end;
            taken += 1;
        }
        walk(pagemap, Mode::Arm, first.start, end, armed, |regions| {
            regions.iter().for_each(&mut *note)
        })?;
        rest = &rest[taken..];
    }
    Ok(())
}

/// Whether KVM runs this QEMU's guest. If it can't be told, it is taken to.
fn uses_kvm(pid: i32) -> bool {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return true;
    };
    descriptors.flatten().any(|descriptor| {
        std::fs::read_link(descriptor.path())
            .is_ok_and(|target| target.as_os_str() == "anon_inode:kvm-vm")
    })
}

fn run_of(block: BlockId, start: u64, region: &PageRegion) -> PageRun {
    let page = PAGE_BYTES as u64;
    let count = (region.end - region.start) / page;
    PageRun {
        block,
        first: (region.start - start) / page,
        count,
    }
}

fn enable(uffd: &OwnedFd) -> Result<(), TrackerError> {
    let mut api = UffdioApi {
        api: UFFD_API,
        features: FEATURE_PAGEFAULT_FLAG_WP
            | FEATURE_WP_HUGETLBFS_SHMEM
            | FEATURE_WP_UNPOPULATED
            | FEATURE_WP_ASYNC,
        ioctls: 0,
    };
    // SAFETY: the descriptor is open and a userfaultfd; `api` has the kernel's layout, lives
    // through the call, and the kernel keeps no pointer to it.
    let result = unsafe { uffdio_api(uffd.as_raw_fd(), &raw mut api) };
    match result {
        Ok(_) => Ok(()),
        Err(Errno::EINVAL) => Err(TrackerError::KernelTooOld {
            release: kernel_release(),
        }),
        Err(error) => Err(kernel_error("UFFDIO_API", 0, 0, error)),
    }
}

fn register(uffd: &OwnedFd, start: u64, len: u64) -> Result<(), TrackerError> {
    let mut argument = UffdioRegister {
        start,
        len,
        mode: REGISTER_MODE_WP,
        ioctls: 0,
    };
    // SAFETY: as for UFFDIO_API. The range is QEMU's, not ours: registering it changes no memory
    // of this process.
    let result = unsafe { uffdio_register(uffd.as_raw_fd(), &raw mut argument) };
    match result {
        Ok(_) => Ok(()),
        Err(Errno::EBUSY) => Err(TrackerError::Busy { address: start }),
        Err(error) => Err(kernel_error("UFFDIO_REGISTER", start, len, error)),
    }
}

fn kernel_error(operation: &'static str, address: u64, bytes: u64, error: Errno) -> TrackerError {
    TrackerError::Kernel {
        operation,
        address,
        bytes,
        source: io::Error::from(error),
    }
}

pub(super) fn kernel_release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn every_byte_is_scanned_by_one_thread() {
        let ranges = [
            (7 * MIB, 129 * MIB),
            (1 << 40, 4096),
            (2 << 40, 3 * MIB + 4096),
            (3 << 40, 1024 * MIB),
        ];
        for threads in 1..=9 {
            let split = split(&ranges, threads);
            assert!((1..=threads).contains(&split.len()), "{threads}");
            let mut rest: Vec<_> = split.into_iter().flatten().collect();
            for (index, (base, len)) in ranges.into_iter().enumerate() {
                let mut at = base;
                while at < base + len {
                    let next = rest.remove(0);
                    assert_eq!((next.block.0, next.base), (index as u16, base));
                    assert_eq!(next.start, at, "{threads} threads");
                    assert!(next.end > at);
                    at = next.end;
                }
                assert_eq!(at, base + len);
            }
            assert!(rest.is_empty());
        }
    }
}
