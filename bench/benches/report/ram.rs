//! The RAM of a real QEMU whose guest stands still, and room for copies of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bench::guest::words;
use bench::process::{Process, Workplace};
use ft_core::image::{ChunkBuilder, ChunkHead, DATA_PAGES_MAX, ENTRIES_MAX};
use ft_core::limits::CHUNK_BYTES;
use ft_core::shape::MAIN_RAM;
use ft_core::types::PAGE_BYTES;
use ft_core::wire::Frame;
use ft_core::{BlockId, DirtySet, Epoch, EpochKind, Session, Term, VmTag};
use qemu_bridge::blocks::{Backing, RamBlock, ram_blocks};
use qemu_bridge::gather::{Cursor, Progress, fill};
use qemu_bridge::guest_ram::GuestRam;
use qemu_bridge::qmp::Qmp;
use qemu_bridge::tracker::Tracker;

use crate::harvest::Dirt;
use crate::options::Options;

const PATIENCE: Duration = Duration::from_secs(10);
const PAGES_PER_CHUNK: usize = DATA_PAGES_MAX;
/// The firmware's own pages lie below.
const FIRST_PAGE: u64 = 256;

/// A QEMU that has not started its guest.
pub(crate) struct Ram {
    pub(crate) guest: GuestRam,
    main: BlockId,
    _qemu: Process,
    _place: Workplace,
}

impl Ram {
    /// Its pages hold data, but QEMU's page tables don't have them before they are touched.
    pub(crate) fn start(options: &Options, ram_mib: u64) -> Result<Ram> {
        let place = Workplace::new("harvest")?;
        let socket = place.path().join("qmp");
        let qemu = start(options, ram_mib, place.path(), &socket)?;
        bench::qmp::Qmp::connect(&socket).with_context(|| qemu.said())?;
        let mut qmp = Qmp::connect(&socket, PATIENCE)?;
        let blocks = ram_blocks(&mut qmp, qemu.pid().as_raw(), PATIENCE)?;
        let at = blocks.iter().position(|block| block.name == MAIN_RAM);
        let at = at.context("QEMU has no main RAM")?;
        fill_file(&blocks[at])?;
        let guest = GuestRam::open(qemu.pid().as_raw(), &blocks)?;
        Ok(Ram {
            guest,
            main: BlockId(u16::try_from(at)?),
            _qemu: qemu,
            _place: place,
        })
    }

    /// Pages that can be made dirty.
    pub(crate) fn pages(&self) -> u64 {
        self.guest.pages_per_block()[usize::from(self.main.0)] - FIRST_PAGE
    }

    /// Makes pages dirty, as writes of the guest would.
    pub(crate) fn touch(&self, tracker: &mut dyn Tracker, dirt: Dirt) -> Result<()> {
        for nth in 0..dirt.pages {
            tracker.touch(&self.guest, self.main, FIRST_PAGE + nth * dirt.stride)?;
        }
        Ok(())
    }
}

fn start(options: &Options, ram_mib: u64, dir: &Path, socket: &Path) -> Result<Process> {
    let line = format!(
        "-accel tcg -machine {},memory-backend=ram -m {ram_mib} -nodefaults -display none -S \
         -object memory-backend-memfd,id=ram,size={ram_mib}M,share=on \
         -qmp unix:{},server=on,wait=off",
        options.machine,
        socket.display()
    );
    Process::start(dir, "qemu", &options.qemu, &words(&line))
}

/// Something in every page, so that none is a hole or all zero.
fn fill_file(main: &RamBlock) -> Result<()> {
    let Backing::Shared { fd, offset, .. } = &main.backing else {
        bail!("the main RAM is not shared");
    };
    let file = File::from(fd.try_clone()?);
    let pattern: Vec<u8> = (0..1_usize << 20)
        .map(|at| (at * 7 + at / PAGE_BYTES + 1) as u8)
        .collect();
    let first = FIRST_PAGE * PAGE_BYTES as u64;
    for at in (first..main.bytes).step_by(pattern.len()) {
        let length = pattern.len().min((main.bytes - at) as usize);
        file.write_all_at(&pattern[..length], offset + at)?;
    }
    Ok(())
}

/// As many chunks as an epoch takes, all of their pages in memory.
pub(crate) struct Room {
    chunks: Vec<Vec<u8>>,
    cursor: Cursor,
}

impl Room {
    pub(crate) fn of(pages: u64) -> Room {
        // A scattered page needs an entry of its own.
        let count = pages as usize / ENTRIES_MAX.min(PAGES_PER_CHUNK) + 1;
        Room {
            chunks: vec![vec![1; CHUNK_BYTES]; count],
            cursor: Cursor::default(),
        }
    }

    /// As the product does it at a boundary; the checksums come later.
    pub(crate) fn gather(&mut self, ram: &GuestRam, dirty: &DirtySet) -> Result<()> {
        let frame = Frame {
            vm: VmTag(1),
            session: Session(2),
            term: Term(3),
            epoch: Epoch(4),
        };
        self.cursor.load(dirty, false);
        for (index, chunk) in (0..).zip(&mut self.chunks) {
            let head = ChunkHead {
                frame,
                kind: EpochKind::Delta,
                index,
            };
            let mut builder = ChunkBuilder::new(chunk, head);
            if fill(ram, &mut builder, &mut self.cursor)? == Progress::Done {
                return Ok(());
            }
        }
        bail!("the dirty pages need more chunks than there are")
    }

    /// The same bytes into the same memory, and nothing else.
    pub(crate) fn copy(&mut self, ram: &GuestRam, dirty: &DirtySet) -> Result<()> {
        let mut at = 0;
        for run in dirty.runs() {
            let mut done = 0;
            while done < run.count {
                let (chunk, page) = (at / PAGES_PER_CHUNK, at % PAGES_PER_CHUNK);
                let pages = (PAGES_PER_CHUNK - page).min((run.count - done) as usize);
                let first = (1 + page) * PAGE_BYTES;
                let target = &mut self.chunks[chunk][first..first + pages * PAGE_BYTES];
                ram.copy_out(run.block, run.first + done, target)?;
                done += pages as u64;
                at += pages;
            }
        }
        Ok(())
    }
}
