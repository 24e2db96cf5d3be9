//! What each step costs in CPU time: figures to read, nothing is asserted about them.
//!
//! `cargo test --release -p qemu-bridge --test bridge costs -- --ignored --nocapture`

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use ft_core::image::{ChunkBuilder, ChunkHead};
use ft_core::limits::CHUNK_BYTES;
use ft_core::types::PAGE_BYTES;
use ft_core::wire::Frame;
use ft_core::{Epoch, EpochKind, Session, Term, VmTag};
use nix::time::{ClockId, clock_gettime};
use qemu_bridge::audit::hash_blocks;
use qemu_bridge::blocks::Backing;
use qemu_bridge::gather::{Cursor, Progress, fill};
use qemu_bridge::tracker::{CompareTracker, Tracker, UffdTracker};

use crate::guests::{Guest, MainRam, accelerators};

const GIB_PAGES: u64 = 1 << 18;
const REPEATS: usize = 15;

#[test]
#[ignore = "prints figures"]
fn costs_of_one_gib() {
    for accelerator in accelerators() {
        for main in [MainRam::Shared, MainRam::Private] {
            let arguments = [accelerator, &["-machine", "pc", "-nodefaults"]].concat();
            let mut guest = Guest::start("qemu-system-x86_64", &arguments, main, 1024);
            std::thread::sleep(Duration::from_millis(500));
            guest.stop();
            fill_ram(&guest);
            eprintln!("{} {main:?}, 1 GiB of data:", accelerator[1]);
            print_uffd(&guest);
            if main == MainRam::Shared {
                let (mut compare, made) = timed(|| CompareTracker::new(&guest.ram).unwrap());
                let (_, armed) = timed(|| compare.arm_all(&guest.ram).unwrap());
                let collected = median(|| {
                    compare.collect(&guest.ram, &mut guest.dirty_set()).unwrap();
                });
                eprintln!("  compare: made {made:?}, armed {armed:?}, collected {collected:?}");
            }
            let hashed = median(|| drop(hash_blocks(&guest.ram).unwrap()));
            let speed = guest.ram.bytes() as f64 / hashed.as_secs_f64() / 1e9;
            eprintln!("  audit: {hashed:?}, {speed:.1} GB/s");
        }
    }
}

fn print_uffd(guest: &Guest) {
    let mut tracker = UffdTracker::attach(&guest.ram).unwrap();
    let (_, armed) = timed(|| tracker.arm_all(&guest.ram).unwrap());
    let idle = median(|| {
        tracker.collect(&guest.ram, &mut guest.dirty_set()).unwrap();
    });
    eprintln!("  uffd: first arming {armed:?}, idle scan {idle:?}");
    // Neighbours, pages that share a region of the page table, and pages that don't.
    for (pages, stride) in [(1000, 1), (1000, 20), (1000, 200), (10_000, 20)] {
        let mut scans = Vec::new();
        let mut gathers = Vec::new();
        for _ in 0..REPEATS {
            for page in 0..pages {
                let page = (64 + page * stride) % GIB_PAGES;
                tracker.touch(&guest.ram, guest.main_ram(), page).unwrap();
            }
            let mut dirty = guest.dirty_set();
            scans.push(timed(|| tracker.collect(&guest.ram, &mut dirty).unwrap()).1);
            assert_eq!(dirty.count(), pages);
            gathers.push(timed_gather(guest, &dirty));
        }
        scans.sort();
        gathers.sort();
        eprintln!(
            "  {pages} pages, every {stride}th: collected {:?}, gathered {:?}",
            scans[REPEATS / 2],
            gathers[REPEATS / 2]
        );
    }
}

/// Copying into memory that was written before, as an arena's is; the checksums are not counted.
fn timed_gather(guest: &Guest, dirty: &ft_core::DirtySet) -> Duration {
    let frame = Frame {
        vm: VmTag(1),
        session: Session(2),
        term: Term(3),
        epoch: Epoch(4),
    };
    let mut memory = vec![1; CHUNK_BYTES];
    let mut cursor = Cursor::default();
    let (_, mut total) = timed(|| cursor.load(dirty, false));
    for index in 0.. {
        let head = ChunkHead {
            frame,
            kind: EpochKind::Delta,
            index,
        };
        let mut builder = ChunkBuilder::new(&mut memory, head);
        let (progress, took) = timed(|| fill(&guest.ram, &mut builder, &mut cursor).unwrap());
        total += took;
        if progress == Progress::Done {
            break;
        }
    }
    total
}

fn fill_ram(guest: &Guest) {
    let pattern: Vec<u8> = (0..1_usize << 20)
        .map(|i| (i * 7 + i / PAGE_BYTES + 1) as u8)
        .collect();
    let block = &guest.blocks[usize::from(guest.main_ram().0)];
    let (file, base) = match &block.backing {
        Backing::Shared { fd, offset, .. } => (File::from(fd.try_clone().unwrap()), *offset),
        Backing::Private { host_address } => {
            let path = format!("/proc/{}/mem", guest.vm.process.pid());
            (
                File::options().write(true).open(path).unwrap(),
                *host_address,
            )
        }
    };
    // The first MiB is the firmware's.
    for offset in (1 << 20..block.bytes).step_by(pattern.len()) {
        file.write_all_at(&pattern, base + offset).unwrap();
    }
}

/// CPU time of this thread: on a shared machine the wall clock measures the neighbours.
fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let now = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
    let began = now();
    let result = work();
    (result, now() - began)
}

fn median(mut work: impl FnMut()) -> Duration {
    let mut times: Vec<_> = (0..REPEATS).map(|_| timed(&mut work).1).collect();
    times.sort();
    times[REPEATS / 2]
}
