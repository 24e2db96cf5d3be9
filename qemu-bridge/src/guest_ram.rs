//! The bytes of a guest's RAM blocks, reached from outside of its QEMU.
//!
//! Nothing here makes a Rust reference to guest memory: the guest writes it at any time. Bytes
//! are copied out and in through raw pointers, or by the kernel.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use ft_core::types::PAGE_BYTES;
use ft_core::{BlockId, PageRun};
use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::sys::stat::fstat;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::{Pid, Whence, lseek64};

use crate::blocks::{Backing, RamBlock};

/// Bytes of zeros that are written at a time where a hole can't be punched.
static ZEROS: [u8; 16 * PAGE_BYTES] = [0; 16 * PAGE_BYTES];

#[derive(Debug, thiserror::Error)]
pub enum RamError {
    #[error("mapping RAM block {block} ({bytes} bytes) failed")]
    Map {
        block: String,
        bytes: u64,
        source: io::Error,
    },
    #[error("{operation} {bytes} bytes at {address:#x} of QEMU's process {pid} failed")]
    Remote {
        operation: &'static str,
        pid: i32,
        address: u64,
        bytes: usize,
        source: io::Error,
    },
    #[error("{operation} in the file of a RAM block failed")]
    File {
        operation: &'static str,
        source: io::Error,
    },
    #[error(
        "page {page} of RAM block {block} is not what its delta was made for: something else has \
         written the standby's RAM"
    )]
    OtherBase { block: String, page: u64 },
    #[error("the new QEMU's RAM is not that of the one before: {what}")]
    OtherBlocks { what: String },
}

/// All RAM blocks of one QEMU, in the order of its shape.
#[derive(Debug)]
pub struct GuestRam {
    pid: Pid,
    regions: Vec<Region>,
}

#[derive(Debug)]
struct Region {
    bytes: u64,
    /// Where QEMU has it.
    host_address: u64,
    /// Our own mapping of the same pages; without it the kernel copies for us.
    mapped: Option<SharedFile>,
}

/// A file of guest RAM, mapped shared.
#[derive(Debug)]
pub(crate) struct SharedFile {
    map: MmapRaw,
    file: OwnedFd,
    offset: u64,
}

impl GuestRam {
    /// Maps what can be mapped.
    ///
    /// # Errors
    /// A mapping fails: the message names the block.
    pub fn open(pid: i32, blocks: &[RamBlock]) -> Result<GuestRam, RamError> {
        let regions = blocks.iter().map(Region::open).collect::<Result<_, _>>()?;
        Ok(GuestRam {
            pid: Pid::from_raw(pid),
            regions,
        })
    }

    pub fn pages_per_block(&self) -> Vec<u64> {
        self.regions
            .iter()
            .map(|r| r.bytes / PAGE_BYTES as u64)
            .collect()
    }

    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|r| r.bytes).sum()
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Where QEMU has each block: address and length, in block order.
    pub fn host_ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.regions.iter().map(|r| (r.host_address, r.bytes))
    }

    /// Copies whole pages from `first` on. The guest may be writing them.
    ///
    /// # Errors
    /// QEMU's process is gone, or we may not read it. A block that is mapped can't fail.
    pub fn copy_out(&self, block: BlockId, first: u64, out: &mut [u8]) -> Result<(), RamError> {
        let region = self.region(block, first, out.len());
        let offset = first * PAGE_BYTES as u64;
        match &region.mapped {
            Some(shared) => {
                shared.copy_out(offset, out);
                Ok(())
            }
            None => read_remote(self.pid, region.host_address + offset, out),
        }
    }

    /// Writes a page's first byte as it is, through QEMU's own page tables, as a vCPU or a device
    /// writes. The guest must be paused.
    ///
    /// # Errors
    /// QEMU's process is gone, or we may not write it.
    pub fn rewrite(&self, block: BlockId, page: u64) -> Result<(), RamError> {
        let address = self.region(block, page, PAGE_BYTES).host_address + page * PAGE_BYTES as u64;
        let mut byte = [0];
        read_remote(self.pid, address, &mut byte)?;
        write_remote(self.pid, address, &byte)
    }

    /// The first stretch of pages in `run` that the RAM's file has data for; what is before it
    /// are holes, which read as zeros and must not be touched. A block without a file has none.
    ///
    /// # Errors
    /// The file can't be asked.
    pub fn next_data(&self, run: PageRun) -> Result<Option<PageRun>, RamError> {
        match &self.region(run.block, run.first, 0).mapped {
            Some(shared) => shared.next_data(run),
            None => Ok(Some(run)),
        }
    }

    fn region(&self, block: BlockId, first: u64, bytes: usize) -> &Region {
        let region = &self.regions[usize::from(block.0)];
        let end = first * PAGE_BYTES as u64 + bytes as u64;
        assert!(
            end <= region.bytes,
            "page {first} and {bytes} bytes are outside of {block:?}"
        );
        region
    }
}

impl Region {
    fn open(block: &RamBlock) -> Result<Region, RamError> {
        let mapped = match &block.backing {
            Backing::Private { .. } => None,
            Backing::Shared { fd, offset, .. } => {
                let file = fd.try_clone().map_err(|source| RamError::Map {
                    block: block.name.clone(),
                    bytes: block.bytes,
                    source,
                })?;
                Some(SharedFile::map(&block.name, file, *offset, block.bytes)?)
            }
        };
        Ok(Region {
            bytes: block.bytes,
            host_address: block.backing.host_address(),
            mapped,
        })
    }
}

impl SharedFile {
    pub(crate) fn map(
        name: &str,
        file: OwnedFd,
        offset: u64,
        bytes: u64,
    ) -> Result<SharedFile, RamError> {
        let failed = |source| RamError::Map {
            block: name.to_owned(),
            bytes,
            source,
        };
        let length = usize::try_from(bytes).map_err(|e| failed(io::Error::other(e)))?;
        let map = MmapOptions::new()
            .offset(offset)
            .len(length)
            .map_raw(&file)
            .map_err(failed)?;
        Ok(SharedFile { map, file, offset })
    }

    /// Whether this is a mapping of that place in that file.
    pub(crate) fn is_of(&self, file: &OwnedFd, offset: u64) -> Result<bool, RamError> {
        let identity = |file: &OwnedFd| match fstat(file) {
            Ok(stat) => Ok((stat.st_dev, stat.st_ino)),
            Err(error) => Err(RamError::File {
                operation: "fstat",
                source: error.into(),
            }),
        };
        Ok(self.offset == offset && identity(&self.file)? == identity(file)?)
    }

    pub(crate) fn copy_out(&self, offset: u64, out: &mut [u8]) {
        let source = self.at(offset, out.len());
        // SAFETY: `at` has checked that the source range lies inside the mapping, which lives as
        // long as `self`; `out` is ours alone and can't overlap it, because no reference into
        // the mapping exists. The guest may write the source meanwhile: that is a race between
        // processes, it makes stale or torn bytes, which the tracker reports as dirty again.
        unsafe { ptr::copy_nonoverlapping(source.cast_const(), out.as_mut_ptr(), out.len()) };
    }

    pub(crate) fn copy_in(&self, offset: u64, bytes: &[u8]) {
        let target = self.at(offset, bytes.len());
        // SAFETY: `at` has checked that the target range lies inside the mapping, which is
        // writable (MmapRaw maps read-write) and lives as long as `self`; `bytes` is ordinary
        // memory and can't overlap it. The standby does not run while we write.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    }

    fn at(&self, offset: u64, bytes: usize) -> *mut u8 {
        let start = usize::try_from(offset).expect("an offset in a mapping fits a usize");
        let end = start.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.map.len()),
            "outside of the RAM block"
        );
        // SAFETY: start + bytes <= len was just checked, so the result is inside the mapping or
        // one past its end.
        unsafe { self.map.as_mut_ptr().add(start) }
    }

    /// See [`GuestRam::next_data`].
    pub(crate) fn next_data(&self, run: PageRun) -> Result<Option<PageRun>, RamError> {
        let page = PAGE_BYTES as u64;
        let start = self.offset + run.first * page;
        let end = start + run.count * page;
        let Some(data) = self.seek(start, Whence::SeekData)?.filter(|at| *at < end) else {
            return Ok(None);
        };
        let hole = self.seek(data, Whence::SeekHole)?.unwrap_or(end).min(end);
        // tmpfs answers in whole pages, but a file's end may lie inside of one.
        let first = (data - self.offset) / page;
        let count = (hole - self.offset).div_ceil(page) - first;
        Ok(Some(PageRun {
            block: run.block,
            first,
            count,
        }))
    }

    fn seek(&self, from: u64, whence: Whence) -> Result<Option<u64>, RamError> {
        let from = i64::try_from(from).expect("RAM files end below 2^63");
        match lseek64(&self.file, from, whence) {
            Ok(at) => Ok(u64::try_from(at).ok()),
            Err(Errno::ENXIO) => Ok(None), // nothing but holes up to the end
            Err(error) => Err(RamError::File {
                operation: "lseek",
                source: error.into(),
            }),
        }
    }

    /// Gives pages back to the kernel: they read as zeros from now on.
    pub(crate) fn punch(&self, offset: u64, bytes: u64) -> Result<(), RamError> {
        let convert = |n: u64| libc::off_t::try_from(n).expect("RAM files end below 2^63");
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (at, length) = (convert(self.offset + offset), convert(bytes));
        // SAFETY: the descriptor is open as long as `self`, and fallocate takes no pointers.
        let result = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at, length) };
        Errno::result(result)
            .map(drop)
            .map_err(|error| RamError::File {
                operation: "punching a hole",
                source: error.into(),
            })
    }
}

pub(crate) fn read_remote(pid: Pid, address: u64, out: &mut [u8]) -> Result<(), RamError> {
    let bytes = out.len();
    let remote = [remote_range(address, bytes)];
    let result = process_vm_readv(pid, &mut [io::IoSliceMut::new(out)], &remote);
    complete("reading", pid, address, bytes, result)
}

pub(crate) fn write_remote(pid: Pid, address: u64, bytes: &[u8]) -> Result<(), RamError> {
    let remote = [remote_range(address, bytes.len())];
    let result = process_vm_writev(pid, &[io::IoSlice::new(bytes)], &remote);
    complete("writing", pid, address, bytes.len(), result)
}

pub(crate) fn zero_remote(pid: Pid, address: u64, bytes: u64) -> Result<(), RamError> {
    let mut done = 0;
    while done < bytes {
        let step = (bytes - done).min(ZEROS.len() as u64);
        let length = usize::try_from(step).expect("bounded by the length of ZEROS");
        write_remote(pid, address + done, &ZEROS[..length])?;
        done += step;
    }
    Ok(())
}

fn remote_range(address: u64, len: usize) -> RemoteIoVec {
    RemoteIoVec {
        base: usize::try_from(address).expect("x86-64 addresses fit"),
        len,
    }
}

fn complete(
    operation: &'static str,
    pid: Pid,
    address: u64,
    bytes: usize,
    result: nix::Result<usize>,
) -> Result<(), RamError> {
    let source = match result {
        Ok(done) if done == bytes => return Ok(()),
        Ok(done) => io::Error::other(format!("only {done} bytes")),
        Err(error) => error.into(),
    };
    Err(RamError::Remote {
        operation,
        pid: pid.as_raw(),
        address,
        bytes,
        source,
    })
}
