//! The standby's RAM: where epochs are applied.
//!
//! Main RAM is a shared file that the standby's QEMU maps; it outlives that QEMU. Blocks that
//! only QEMU's process has (BIOS, option ROMs, VGA memory without `aux-ram-share`) are kept in an
//! image of our own as well, so that a fresh standby, or a rehearsal, can be given them.

use std::ffi::CString;
use std::io;

use ft_core::image::{Piece, entries};
use ft_core::types::PAGE_BYTES;
use ft_core::{BlockId, PageRun};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Pid, ftruncate};

use crate::blocks::{Backing, RamBlock};
use crate::gather::is_zero;
use crate::guest_ram::{RamError, SharedFile, read_remote, write_remote, zero_remote};

/// Bytes copied at a time from an image into a process.
const POKE_BYTES: usize = 256 << 10;

#[derive(Debug)]
pub struct StandbyRam {
    pid: Pid,
    regions: Vec<StandbyRegion>,
}

#[derive(Debug)]
struct StandbyRegion {
    bytes: u64,
    image: SharedFile,
    /// Where the standby's process has a copy of its own.
    private_at: Option<u64>,
}

impl StandbyRam {
    /// # Errors
    /// A block can't be mapped, or an image can't be made.
    pub fn open(pid: i32, blocks: &[RamBlock]) -> Result<StandbyRam, RamError> {
        let pid = Pid::from_raw(pid);
        let open = |block| StandbyRegion::open(pid, block);
        let regions = blocks.iter().map(open).collect::<Result<_, _>>()?;
        Ok(StandbyRam { pid, regions })
    }

    pub fn pages_per_block(&self) -> Vec<u64> {
        self.regions
            .iter()
            .map(|r| r.bytes / PAGE_BYTES as u64)
            .collect()
    }

    /// Writes a checked chunk into RAM. Pieces of the device state are appended to
    /// `device_state`, where the caller collects them in the order of the chunks.
    ///
    /// # Errors
    /// The kernel refuses: RAM is then half of one epoch and half of another.
    pub fn apply(&self, chunk: &[u8], device_state: &mut Vec<u8>) -> Result<(), RamError> {
        for piece in entries(chunk) {
            match piece {
                Piece::Data { run, bytes } => self.write(run, bytes)?,
                Piece::Zero { run } => self.zero(run)?,
                Piece::Device { bytes, .. } => device_state.extend_from_slice(bytes),
            }
        }
        Ok(())
    }

    fn write(&self, run: PageRun, bytes: &[u8]) -> Result<(), RamError> {
        let (region, offset) = self.locate(run);
        region.image.copy_in(offset, bytes);
        match region.private_at {
            Some(address) => write_remote(self.pid, address + offset, bytes),
            None => Ok(()),
        }
    }

    /// Gives zero pages back to the kernel. Only stretches that have data are touched, so that a
    /// hole of gigabytes costs one look.
    fn zero(&self, run: PageRun) -> Result<(), RamError> {
        let (region, _) = self.locate(run);
        let mut rest = run;
        while rest.count > 0
            && let Some(data) = region.image.next_data(rest)?
        {
            let offset = data.first * PAGE_BYTES as u64;
            let bytes = data.count * PAGE_BYTES as u64;
            region.image.punch(offset, bytes)?;
            if let Some(address) = region.private_at {
                zero_remote(self.pid, address + offset, bytes)?;
            }
            let end = data.first + data.count;
            rest = PageRun {
                first: end,
                count: run.first + run.count - end,
                ..run
            };
        }
        Ok(())
    }

    /// A fresh standby on the same shared RAM: its own blocks get the image's bytes.
    ///
    /// # Errors
    /// Its blocks are not those of the first one, or can't be written.
    pub fn adopt(&mut self, pid: i32, blocks: &[RamBlock]) -> Result<(), RamError> {
        self.pid = Pid::from_raw(pid);
        for (region, block) in self.regions.iter_mut().zip(blocks) {
            region.private_at = private_address(block);
        }
        self.poke(pid, blocks)
    }

    /// Writes the image's bytes into another QEMU, block by block where the standby itself has
    /// private ones; the others it maps from the same file.
    ///
    /// # Errors
    /// They can't be written.
    pub fn poke(&self, pid: i32, blocks: &[RamBlock]) -> Result<(), RamError> {
        let mut buffer = vec![0; POKE_BYTES];
        for (region, block) in self.regions.iter().zip(blocks) {
            let (Some(_), Some(address)) = (region.private_at, private_address(block)) else {
                continue;
            };
            let mut offset = 0;
            while offset < region.bytes {
                let step = (region.bytes - offset).min(POKE_BYTES as u64);
                let part = &mut buffer[..usize::try_from(step).expect("at most POKE_BYTES")];
                region.image.copy_out(offset, part);
                write_remote(Pid::from_raw(pid), address + offset, part)?;
                offset += step;
            }
        }
        Ok(())
    }

    /// Copies whole pages of the image out, for audits.
    pub fn copy_out(&self, block: BlockId, first: u64, out: &mut [u8]) {
        let (region, offset) = self.locate(PageRun {
            block,
            first,
            count: 0,
        });
        region.image.copy_out(offset, out);
    }

    /// See [`crate::guest_ram::GuestRam::next_data`].
    ///
    /// # Errors
    /// The file can't be asked.
    pub fn next_data(&self, run: PageRun) -> Result<Option<PageRun>, RamError> {
        self.locate(run).0.image.next_data(run)
    }

    fn locate(&self, run: PageRun) -> (&StandbyRegion, u64) {
        let region = &self.regions[usize::from(run.block.0)];
        let end = (run.first + run.count) * PAGE_BYTES as u64;
        assert!(end <= region.bytes, "{run:?} is outside of its block");
        (region, run.first * PAGE_BYTES as u64)
    }
}

impl StandbyRegion {
    fn open(pid: Pid, block: &RamBlock) -> Result<StandbyRegion, RamError> {
        let failed = |source: io::Error| RamError::Map {
            block: block.name.clone(),
            bytes: block.bytes,
            source,
        };
        let (file, offset) = match &block.backing {
            Backing::Shared { fd, offset, .. } => (fd.try_clone().map_err(failed)?, *offset),
            Backing::Private { .. } => {
                let name = CString::new("curling-image").expect("no NUL in it");
                let file = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC)
                    .map_err(|e| failed(e.into()))?;
                let length = i64::try_from(block.bytes).map_err(|e| failed(io::Error::other(e)))?;
                ftruncate(&file, length).map_err(|e| failed(e.into()))?;
                (file, 0)
            }
        };
        let image = SharedFile::map(&block.name, file, offset, block.bytes)?;
        let private_at = private_address(block);
        if let Some(address) = private_at {
            fill_image(pid, address, block.bytes, &image)?;
        }
        Ok(StandbyRegion {
            bytes: block.bytes,
            image,
            private_at,
        })
    }
}

/// The image must start as the block is: a zero page is only punched where there is data.
fn fill_image(pid: Pid, address: u64, bytes: u64, image: &SharedFile) -> Result<(), RamError> {
    let mut page = [0; PAGE_BYTES];
    for offset in (0..bytes).step_by(PAGE_BYTES) {
        read_remote(pid, address + offset, &mut page)?;
        if !is_zero(&page) {
            image.copy_in(offset, &page);
        }
    }
    Ok(())
}

fn private_address(block: &RamBlock) -> Option<u64> {
    match block.backing {
        Backing::Private { host_address } => Some(host_address),
        Backing::Shared { .. } => None,
    }
}
