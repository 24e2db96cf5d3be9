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
use super::pagemap::{Mode, PageRegion, is_alive, scan};
use super::{Collected, Tracker, TrackerError};
use crate::guest_ram::GuestRam;

/// Written stretches that one scan can report; more take another call.
const REGIONS: usize = 8192;
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
    pid: i32,
    pagemap: File,
    /// Arming invalidates the range that it is given for KVM, written or not, and the guest pays
    /// with a fault per page. So written stretches are armed one by one; else all at once.
    kvm: bool,
    ranges: Vec<(u64, u64)>,
    written: Vec<PageRegion>,
    armed: Vec<PageRegion>,
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
        Ok(UffdTracker {
            _uffd: uffd,
            pid,
            pagemap,
            kvm: uses_kvm(pid),
            ranges,
            written: vec![PageRegion::default(); REGIONS],
            armed: vec![PageRegion::default(); REGIONS],
        })
    }
}

impl UffdTracker {
    /// After a walk: what it has found is QEMU's.
    fn check_alive(&self) -> Result<(), TrackerError> {
        let source = match is_alive(&self.pagemap) {
            Ok(true) => return Ok(()),
            Ok(false) => Errno::ESRCH.into(),
            Err(error) => error,
        };
        Err(TrackerError::Process {
            operation: "scanning the memory of",
            pid: self.pid,
            source,
        })
    }
}

impl Tracker for UffdTracker {
    fn name(&self) -> &'static str {
        "uffd"
    }

    fn arm_all(&mut self, _ram: &GuestRam) -> Result<(), TrackerError> {
        for &(start, len) in &self.ranges {
            walk(
                &self.pagemap,
                Mode::Arm,
                start,
                start + len,
                &mut self.armed,
                |_| {},
            )?;
        }
        self.check_alive()
    }

    fn collect(&mut self, _ram: &GuestRam, into: &mut DirtySet) -> Result<Collected, TrackerError> {
        let mut collected = Collected::default();
        let UffdTracker {
            pagemap,
            kvm,
            ranges,
            written,
            armed,
            ..
        } = self;
        for (index, &(start, len)) in ranges.iter().enumerate() {
            let block = BlockId(u16::try_from(index).expect("at most BLOCKS_MAX blocks"));
            let mut note = |region: &PageRegion| into.set(run_of(block, start, region));
            let mode = if *kvm { Mode::Look } else { Mode::Arm };
            walk(pagemap, mode, start, start + len, written, |regions| {
                collected.regions += regions.len() as u64;
                for region in regions {
                    note(region);
                }
                match mode {
                    Mode::Arm => Ok(()),
                    // What a running guest writes between the look and the arming is reported by
                    // the arming, which is atomic: so both answers count.
                    Mode::Look => arm(pagemap, regions, armed, &mut note),
                }
            })?;
        }
        self.check_alive()?;
        Ok(collected)
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
