//! The standby's RAM: where epochs are applied.
//!
//! Main RAM is a shared file that the standby's QEMU maps; it outlives that QEMU. Blocks that
//! only QEMU's process has (BIOS, option ROMs, VGA memory without `aux-ram-share`) are kept in an
//! image of our own as well, so that a fresh standby, or a rehearsal, can be given them.

use std::ffi::CString;
use std::io;
use std::ops::Range;

use ft_core::image::{PackedPage, Piece, entries};
use ft_core::types::PAGE_BYTES;
use ft_core::{BlockId, PageRun};
use nix::errno::Errno;
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
    name: String,
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
    /// The kernel refuses, or a page is not the one that was sent: RAM is then half of one epoch and
    /// half of another.
    pub fn apply(&self, chunk: &[u8], device_state: &mut Vec<u8>) -> Result<(), RamError> {
        for piece in entries(chunk) {
            match piece {
                Piece::Data { run, bytes } => self.write(run, bytes)?,
                Piece::Zero { run } => self.zero(run)?,
                Piece::Packed { pages } => pages.iter().try_for_each(|page| self.unpack(&page))?,
                Piece::Device { bytes, .. } => device_state.extend_from_slice(bytes),
                Piece::PackedDevice { state } => state.unpack(device_state),
            }
        }
        Ok(())
    }

    fn unpack(&self, packed: &PackedPage<'_>) -> Result<(), RamError> {
        let (block, first) = (packed.block, packed.page);
        let run = PageRun {
            block,
            first,
            count: 1,
        };
        let mut page = [0; PAGE_BYTES];
        // Reading a hole would fill it.
        if packed.needs_base() {
            self.copy_out(block, first, &mut page);
        }
        if !packed.unpack(&mut page) {
            let block = self.locate(run).0.name.clone();
            return Err(RamError::OtherBase { block, page: first });
        }
        self.write(run, &page)
    }

    fn write(&self, run: PageRun, bytes: &[u8]) -> Result<(), RamError> {
        let (region, offset) = self.locate(run);
        region.image.copy_in(offset, bytes);
        match region.private_at {
            Some(address) => unless_gone(write_remote(self.pid, address + offset, bytes)),
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
                unless_gone(zero_remote(self.pid, address + offset, bytes))?;
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

    /// A fresh standby on the same main RAM: its other blocks get the image's bytes, and from now
    /// on every epoch.
    ///
    /// # Errors
    /// Its blocks are not those of the first one, or can't be written.
    pub fn adopt(&mut self, pid: i32, blocks: &[RamBlock]) -> Result<(), RamError> {
        self.check_same(blocks)?;
        self.pid = Pid::from_raw(pid);
        for (region, block) in self.regions.iter_mut().zip(blocks) {
            region.fill_other(self.pid, block)?;
            region.private_at = private_address(block);
            if let Some(file) = region.other_file(block)? {
                region.image = file;
            }
        }
        Ok(())
    }

    /// Writes the image's bytes into another QEMU, a rehearsal, wherever it doesn't map the
    /// image's file itself.
    ///
    /// # Errors
    /// Its blocks are not those of the first one, or can't be written.
    pub fn poke(&self, pid: i32, blocks: &[RamBlock]) -> Result<(), RamError> {
        self.check_same(blocks)?;
        for (region, block) in self.regions.iter().zip(blocks) {
            // Shared in the standby, private here: a private mapping of the image's file.
            let copy_of_image = region.private_at.is_none() && private_address(block).is_some();
            if !copy_of_image {
                region.fill_other(Pid::from_raw(pid), block)?;
            }
        }
        Ok(())
    }

    fn check_same(&self, blocks: &[RamBlock]) -> Result<(), RamError> {
        let other = |what| Err(RamError::OtherBlocks { what });
        if blocks.len() != self.regions.len() {
            let (was, is) = (self.regions.len(), blocks.len());
            return other(format!("there were {was} blocks and now {is}"));
        }
        let mut pairs = self.regions.iter().zip(blocks);
        match pairs
            .find(|(region, block)| (&region.name, region.bytes) != (&block.name, block.bytes))
        {
            Some((region, block)) => other(format!(
                "{} of {} bytes was {} of {}",
                block.name, block.bytes, region.name, region.bytes
            )),
            None => Ok(()),
        }
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
            name: block.name.clone(),
            bytes: block.bytes,
            image,
            private_at,
        })
    }

    /// Writes the image's bytes into the block of another QEMU, if that isn't the image itself.
    fn fill_other(&self, pid: Pid, block: &RamBlock) -> Result<(), RamError> {
        if let Backing::Shared { fd, offset, .. } = &block.backing
            && self.image.is_of(fd, *offset)?
        {
            return Ok(());
        }
        let address = block.backing.host_address();
        let mut buffer = vec![0; POKE_BYTES];
        let mut offset = 0;
        while offset < self.bytes {
            // Reading a hole through the mapping would fill it.
            let data = self.next_data_bytes(offset)?;
            zero_remote(pid, address + offset, data.start - offset)?;
            offset = data.start;
            while offset < data.end {
                let step = (data.end - offset).min(POKE_BYTES as u64);
                let part = &mut buffer[..usize::try_from(step).expect("at most POKE_BYTES")];
                self.image.copy_out(offset, part);
                write_remote(pid, address + offset, part)?;
                offset += step;
            }
        }
        Ok(())
    }

    /// The first bytes from `offset` on that are no hole; empty at the end if there are none.
    fn next_data_bytes(&self, offset: u64) -> Result<Range<u64>, RamError> {
        let page = PAGE_BYTES as u64;
        let data = self.image.next_data(PageRun {
            block: BlockId(0),
            first: offset / page,
            count: (self.bytes - offset) / page,
        })?;
        Ok(data.map_or(self.bytes..self.bytes, |data| {
            data.first * page..(data.first + data.count) * page
        }))
    }

    /// The block's file, if it has one that isn't the image. Each QEMU with `aux-ram-share` makes
    /// files of its own, and a standby's are the image as long as it lives.
    fn other_file(&self, block: &RamBlock) -> Result<Option<SharedFile>, RamError> {
        match &block.backing {
            Backing::Shared { fd, offset, .. } if !self.image.is_of(fd, *offset)? => {
                let file = fd.try_clone().map_err(|source| RamError::Map {
                    block: block.name.clone(),
                    bytes: block.bytes,
                    source,
                })?;
                SharedFile::map(&block.name, file, *offset, block.bytes).map(Some)
            }
            _ => Ok(None),
        }
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

/// A standby that has ended lacks nothing: a fresh one is given what the image has.
fn unless_gone(written: Result<(), RamError>) -> Result<(), RamError> {
    match written {
        Err(RamError::Remote { source, .. })
            if source.raw_os_error() == Some(Errno::ESRCH as i32) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn private_address(block: &RamBlock) -> Option<u64> {
    match block.backing {
        Backing::Private { host_address } => Some(host_address),
        Backing::Shared { .. } => None,
    }
}
