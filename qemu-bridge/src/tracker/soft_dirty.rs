//! The kernel remembers writes: the soft-dirty bits of the page tables, for kernels before 6.7
//! that have CONFIG_MEM_SOFT_DIRTY, as Debian's have.
//!
//! Writing `4` to `/proc/PID/clear_refs` clears the bit of every page of the process, bit 55 of
//! an entry of `/proc/PID/pagemap` tells what was written since
//! (`Documentation/admin-guide/mm/soft-dirty.rst`). Reading and clearing are two steps: what is
//! written between them is lost. So a paused guest is read and cleared, a running one only read,
//! and then everything since the last clearing is reported again.
//!
//! - **What is seen**: every write that goes through QEMU's page tables: vCPUs, devices, vhost,
//!   `process_vm_writev`. Under KVM too: clearing calls the MMU notifier for the whole address
//!   space (`clear_refs_write` in fs/proc/task_mmu.c), so KVM drops what it has mapped
//!   (`kvm_mmu_notifier_invalidate_range_start` in virt/kvm/kvm_main.c), and the guest's next write
//!   faults through QEMU's page table, which is read-only then. The guest pays with a fault for
//!   each page that it touches after a boundary, written or not.
//! - **What is not**: see [`super::trust`].
//! - **Transparent huge pages** of private RAM have one bit for 2 MiB, so all of it is reported.
//! - **It is the process's only set of bits**: a checkpoint tool (CRIU) that clears them as well
//!   would take dirt away. Another daemon of ours is kept out by a lock.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use ft_core::types::PAGE_BYTES;
use ft_core::{BlockId, DirtySet, PageRun};
use memmap2::MmapMut;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::trust::Trust;
use super::uffd::kernel_release;
use super::{Collected, Tracker, TrackerError};
use crate::guest_ram::GuestRam;

/// Written since the bits were cleared (`Documentation/admin-guide/mm/pagemap.rst`).
const SOFT_DIRTY: u64 = 1 << 55;
const ENTRY_BYTES: usize = 8;
/// Page table entries that one read asks for: 128 MiB of RAM.
const ENTRIES: usize = 32 << 10;
/// Pages of a transparent huge page.
const HUGE_PAGES: u64 = 512;

#[derive(Debug)]
pub struct SoftDirtyTracker {
    pid: i32,
    pagemap: File,
    /// Locked as long as we rely on the bits.
    clear_refs: Flock<File>,
    ranges: Vec<(u64, u64)>,
    trust: Trust,
    entries: Vec<u8>,
}

impl SoftDirtyTracker {
    /// Changes nothing in QEMU.
    ///
    /// # Errors
    /// The kernel has no soft-dirty bits, a privilege is missing, they are in use, or they can't
    /// be trusted for some of this RAM.
    pub fn attach(ram: &GuestRam) -> Result<SoftDirtyTracker, TrackerError> {
        let pid = ram.pid();
        if !kernel_has_them()? {
            return Err(TrackerError::NoSoftDirty {
                release: kernel_release(),
            });
        }
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))
            .map_err(|source| failed("opening the pagemap of", pid, source))?;
        let clear_refs = OpenOptions::new()
            .write(true)
            .open(format!("/proc/{pid}/clear_refs"))
            .map_err(|source| failed("opening clear_refs of", pid, source))?;
        let clear_refs = match Flock::lock(clear_refs, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => locked,
            Err((_, Errno::EWOULDBLOCK)) => return Err(TrackerError::SoftDirtyInUse { pid }),
            Err((_, error)) => return Err(failed("locking clear_refs of", pid, error.into())),
        };
        Ok(SoftDirtyTracker {
            pid,
            pagemap,
            clear_refs,
            ranges: ram.host_ranges().collect(),
            trust: Trust::of(ram)?,
            entries: vec![0; ENTRIES * ENTRY_BYTES],
        })
    }

    fn clear(&self) -> Result<(), TrackerError> {
        let written = self.clear_refs.write_at(b"4", 0);
        written.map_err(|source| failed("clearing the soft-dirty bits of", self.pid, source))?;
        Ok(())
    }
}

impl Tracker for SoftDirtyTracker {
    fn name(&self) -> &'static str {
        "soft-dirty"
    }

    fn arm_all(&mut self, _ram: &GuestRam) -> Result<(), TrackerError> {
        self.trust.check()?;
        self.clear()
    }

    fn collect(&mut self, ram: &GuestRam, into: &mut DirtySet) -> Result<Collected, TrackerError> {
        let collected = self.collect_live(ram, into)?;
        self.clear()?;
        Ok(collected)
    }

    fn collect_live(
        &mut self,
        _ram: &GuestRam,
        into: &mut DirtySet,
    ) -> Result<Collected, TrackerError> {
        let mut collected = Collected::default();
        for (index, &(start, bytes)) in self.ranges.iter().enumerate() {
            let block = BlockId(u16::try_from(index).expect("at most BLOCKS_MAX blocks"));
            let pages = bytes / PAGE_BYTES as u64;
            let mut run = None;
            let mut at = 0;
            while at < pages {
                let first = start / PAGE_BYTES as u64 + at;
                let count = (pages - at).min(ENTRIES as u64);
                let entries = read(&self.pagemap, self.pid, first, count, &mut self.entries)?;
                for dirty in entries.map(|entry| entry & SOFT_DIRTY != 0) {
                    if dirty {
                        let run = run.get_or_insert(PageRun {
                            block,
                            first: at,
                            count: 0,
                        });
                        run.count += 1;
                    } else if let Some(run) = run.take() {
                        collected.regions += 1;
                        into.set(run);
                    }
                    at += 1;
                }
            }
            if let Some(run) = run {
                collected.regions += 1;
                into.set(run);
            }
        }
        // After the reading: what has happened before it is then noticed.
        self.trust.check()?;
        Ok(collected)
    }

    fn reported_with(&self, block: BlockId, page: u64) -> PageRun {
        let (start, bytes) = self.ranges[usize::from(block.0)];
        let start = start / PAGE_BYTES as u64;
        let end = start + bytes / PAGE_BYTES as u64;
        let huge = (start + page) / HUGE_PAGES * HUGE_PAGES;
        let first = huge.max(start);
        PageRun {
            block,
            first: first - start,
            count: (huge + HUGE_PAGES).min(end) - first,
        }
    }

    fn touch(&mut self, ram: &GuestRam, block: BlockId, page: u64) -> Result<(), TrackerError> {
        Ok(ram.rewrite(block, page)?)
    }
}

/// Reads `count` page table entries from page number `first` of the address space on.
fn read<'a>(
    pagemap: &File,
    pid: i32,
    first: u64,
    count: u64,
    buffer: &'a mut [u8],
) -> Result<impl Iterator<Item = u64> + use<'a>, TrackerError> {
    let bytes = usize::try_from(count).expect("bounded by ENTRIES") * ENTRY_BYTES;
    let buffer = &mut buffer[..bytes];
    // An address space that is gone reads as an empty file.
    pagemap
        .read_exact_at(buffer, first * ENTRY_BYTES as u64)
        .map_err(|source| failed("reading the pagemap of", pid, source))?;
    let (entries, _) = buffer.as_chunks::<ENTRY_BYTES>();
    Ok(entries.iter().map(|entry| u64::from_ne_bytes(*entry)))
}

/// A new mapping counts as written (VM_SOFTDIRTY, `mmap_region` in mm/mmap.c), where the kernel
/// has the bits at all: one of our own tells.
fn kernel_has_them() -> Result<bool, TrackerError> {
    let pid = nix::unistd::getpid().as_raw();
    let mut page =
        MmapMut::map_anon(PAGE_BYTES).map_err(|source| failed("mapping a page in", pid, source))?;
    page[0] = 1;
    let pagemap = File::open("/proc/self/pagemap")
        .map_err(|source| failed("opening the pagemap of", pid, source))?;
    let number = page.as_ptr() as u64 / PAGE_BYTES as u64;
    let mut buffer = [0; ENTRY_BYTES];
    let mut entries = read(&pagemap, pid, number, 1, &mut buffer)?;
    Ok(entries.any(|entry| entry & SOFT_DIRTY != 0))
}

fn failed(operation: &'static str, pid: i32, source: io::Error) -> TrackerError {
    match source.kind() {
        io::ErrorKind::PermissionDenied => TrackerError::NotPermitted {
            operation,
            pid,
            source,
        },
        _ => TrackerError::Process {
            operation,
            pid,
            source,
        },
    }
}
