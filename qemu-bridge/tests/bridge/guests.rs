//! Guests that write their RAM in ways that the tests know.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use ft_core::image::{ChunkBuilder, ChunkHead, Expect, check_chunk};
use ft_core::limits::CHUNK_BYTES;
use ft_core::shape::MAIN_RAM;
use ft_core::types::PAGE_BYTES;
use ft_core::wire::Frame;
use ft_core::{BlockId, DirtySet, Epoch, EpochKind, PageRun, Session, Term, VmTag};
use nix::sys::stat::fstat;
use qemu_bridge::blocks::{Backing, RamBlock, ram_blocks};
use qemu_bridge::gather::{Cursor, Progress, fill};
use qemu_bridge::guest_ram::GuestRam;
use qemu_bridge::qmp::Command;
use qemu_bridge::tracker::{Tracker, TrackerChoice, TrackerError, choose};

use crate::support::{PATIENCE, TestDir, TestQemu, has_kvm, not_run};

/// A boot sector that increments one word in each of the pages 0x20 to 0x2f, for ever, with
/// interrupts off: nothing else is ever written.
///
/// ```text
///     cli
///     xor %ax,%ax; mov %ax,%ds; mov $0x2000,%ax; mov %ax,%es
/// 1:  xor %di,%di
/// 2:  incw %es:(%di); add $0x1000,%di; jnz 2b
///     mov $0x3f8,%dx; mov $'.',%al; out %al,%dx
///     mov $200,%cx
/// 3:  loop 3b
///     jmp 1b
/// ```
const TOUCH_16_PAGES: [u8; 34] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0xb8, 0x00, 0x20, 0x8e, 0xc0, 0x31, 0xff, 0x26, 0xff, 0x05, 0x81,
    0xc7, 0x00, 0x10, 0x75, 0xf7, 0xba, 0xf8, 0x03, 0xb0, 0x2e, 0xee, 0xb9, 0xc8, 0x00, 0xe2, 0xfe,
    0xeb, 0xe8,
];
const TOUCHED_FIRST: u64 = 0x20;
const TOUCHED: u64 = 16;

/// TCG, and KVM where it is.
pub(crate) fn accelerators() -> Vec<&'static [&'static str]> {
    let mut found: Vec<&'static [&'static str]> = vec![&["-accel", "tcg"]];
    if has_kvm() {
        found.push(&["-accel", "kvm", "-cpu", "qemu64"]);
    }
    found
}

/// Whether main RAM can be mapped from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MainRam {
    Shared,
    Private,
}

/// A QEMU and its RAM, which nobody tracks yet.
pub(crate) struct Guest {
    pub(crate) vm: TestQemu,
    pub(crate) ram: GuestRam,
    pub(crate) blocks: Vec<RamBlock>,
    /// Holds the boot sector.
    _disk: Option<TestDir>,
}

impl Guest {
    /// Starts one that touches 16 pages per loop.
    pub(crate) fn touching(qemu: &str, accelerator: &[&str], main: MainRam) -> Guest {
        let disk = TestDir::new();
        let image = disk.0.join("boot");
        let mut sector = [0; 512];
        sector[..TOUCH_16_PAGES.len()].copy_from_slice(&TOUCH_16_PAGES);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(&image, sector).unwrap();
        let drive = format!("file={},format=raw,if=ide,snapshot=on", image.display());
        let machine = ["-machine", "pc", "-nodefaults", "-drive", &drive];
        let mut arguments = [accelerator, &machine[..]].concat();
        if accelerator.contains(&"kvm") {
            // SeaBIOS asks for a kvmclock, and then KVM writes its page at each `cont`.
            arguments.extend(["-cpu", "qemu64,kvmclock=off"]);
        }
        let mut guest = Guest::start(qemu, &arguments, main, 64);
        guest._disk = Some(disk);
        guest
    }

    /// Starts one of `mib` MiB that runs its firmware; `arguments` name machine and accelerator.
    pub(crate) fn start(qemu: &str, arguments: &[&str], main: MainRam, mib: u32) -> Guest {
        let size = mib.to_string();
        let backend = format!("memory-backend-memfd,id=ram,size={mib}M,share=on");
        let mut all = arguments.to_vec();
        all.extend(["-m", &size]);
        if main == MainRam::Shared {
            all.extend(["-object", &backend, "-machine", "memory-backend=ram"]);
        }
        let mut vm = TestQemu::start_bare(qemu, &all, &[]);
        let blocks = ram_blocks(&mut vm.qmp, vm.process.pid(), PATIENCE).unwrap();
        let ram = GuestRam::open(vm.process.pid(), &blocks).unwrap();
        Guest {
            vm,
            ram,
            blocks,
            _disk: None,
        }
    }

    pub(crate) fn stop(&mut self) {
        self.vm.qmp.call(Command::new("stop"), PATIENCE).unwrap();
    }

    pub(crate) fn cont(&mut self) {
        self.vm.qmp.call(Command::new("cont"), PATIENCE).unwrap();
    }

    pub(crate) fn main_ram(&self) -> BlockId {
        let at = self.blocks.iter().position(|b| b.name == MAIN_RAM);
        BlockId(u16::try_from(at.unwrap()).unwrap())
    }

    pub(crate) fn dirty_set(&self) -> DirtySet {
        DirtySet::new(&self.ram.pages_per_block())
    }

    /// What [`Guest::touching`] writes.
    pub(crate) fn touched(&self) -> PageRun {
        PageRun {
            block: self.main_ram(),
            first: TOUCHED_FIRST,
            count: TOUCHED,
        }
    }

    /// The trackers that this kernel has.
    pub(crate) fn trackers(&self) -> Vec<TrackerChoice> {
        let kernels = [TrackerChoice::Uffd, TrackerChoice::SoftDirty];
        let here = |choice: &TrackerChoice| match choose(*choice, &self.ram) {
            Ok(_) => true,
            Err(error @ (TrackerError::KernelTooOld { .. } | TrackerError::NoSoftDirty { .. })) => {
                not_run(&format!("the tracker {choice:?}"), &error.to_string());
                false
            }
            Err(error) => panic!("{choice:?}: {error}"),
        };
        let here = kernels.into_iter().filter(here);
        here.chain([TrackerChoice::Compare]).collect()
    }

    /// Waits until one collection reports exactly the 16 pages: the boot sector runs.
    pub(crate) fn wait_for_loop(&mut self, tracker: &mut dyn Tracker) {
        let deadline = Instant::now() + PATIENCE;
        let mut dirty = self.dirty_set();
        while !dirty.runs().eq([self.touched()]) {
            let (name, runs) = (tracker.name(), dirty.runs().collect::<Vec<_>>());
            let in_time = Instant::now() < deadline;
            assert!(
                in_time,
                "the boot sector doesn't run: {name} reports {runs:?}"
            );
            // The guest stands still meanwhile, and has to boot.
            std::thread::sleep(Duration::from_millis(200));
            dirty.clear();
            self.stop();
            tracker.collect(&self.ram, &mut dirty).unwrap();
            self.cont();
        }
    }

    /// Every byte of every block, holes left alone.
    pub(crate) fn bytes(&self) -> Vec<Vec<u8>> {
        let pages = self.ram.pages_per_block();
        let copy = |(index, count): (u16, u64)| {
            let mut bytes = vec![0; usize::try_from(count).unwrap() * PAGE_BYTES];
            let mut rest = whole(BlockId(index), count);
            while rest.count > 0
                && let Some(data) = self.ram.next_data(rest).unwrap()
            {
                let range = byte_range(data);
                self.ram
                    .copy_out(data.block, data.first, &mut bytes[range])
                    .unwrap();
                rest = PageRun {
                    first: data.first + data.count,
                    count: count - data.first - data.count,
                    ..rest
                };
            }
            bytes
        };
        (0..).zip(pages).map(copy).collect()
    }

    /// Fills each page of the shared main RAM with a byte of its own.
    pub(crate) fn write_pages(&self, run: PageRun, fill: &[u8]) {
        let Backing::Shared { fd, .. } = &self.blocks[usize::from(run.block.0)].backing else {
            panic!("main RAM is not shared")
        };
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let file = File::options().write(true).open(path).unwrap();
        for (page, byte) in (run.first..).zip(fill) {
            let at = page * PAGE_BYTES as u64;
            file.write_all_at(&[*byte; PAGE_BYTES], at).unwrap();
        }
    }

    /// Bytes that the shared main RAM takes.
    pub(crate) fn allocated_bytes(&self) -> u64 {
        allocated_bytes(&self.blocks[usize::from(self.main_ram().0)])
    }
}

pub(crate) fn allocated_bytes(block: &RamBlock) -> u64 {
    let Backing::Shared { fd, .. } = &block.backing else {
        panic!("{} is not shared", block.name)
    };
    u64::try_from(fstat(fd).unwrap().st_blocks).unwrap() * 512
}

pub(crate) fn whole(block: BlockId, count: u64) -> PageRun {
    PageRun {
        block,
        first: 0,
        count,
    }
}

pub(crate) fn byte_range(run: PageRun) -> std::ops::Range<usize> {
    let start = usize::try_from(run.first).unwrap() * PAGE_BYTES;
    start..start + usize::try_from(run.count).unwrap() * PAGE_BYTES
}

/// Gathers the pages of `dirty` into chunks, which are checked as a backup checks them.
pub(crate) fn gather(ram: &GuestRam, dirty: &DirtySet, check_holes: bool) -> Vec<Vec<u8>> {
    let frame = Frame {
        vm: VmTag(1),
        session: Session(2),
        term: Term(3),
        epoch: Epoch(4),
    };
    let pages = ram.pages_per_block();
    let mut cursor = Cursor::default();
    cursor.load(dirty, check_holes);
    let mut chunks = Vec::new();
    loop {
        let mut memory = vec![0xee; CHUNK_BYTES];
        let head = ChunkHead {
            frame,
            kind: EpochKind::SyncRound,
            index: u32::try_from(chunks.len()).unwrap(),
        };
        let mut builder = ChunkBuilder::new(&mut memory, head);
        let progress = fill(ram, &mut builder, &mut cursor).unwrap();
        let sealed = builder.seal(false);
        memory.truncate(sealed.used_bytes);
        let expect = Expect {
            frame,
            blocks: &pages,
        };
        check_chunk(&memory, &expect).unwrap();
        chunks.push(memory);
        if progress == Progress::Done {
            return chunks;
        }
    }
}
