//! Both trackers against guests whose writes are known, and against all of RAM.

use std::time::{Duration, Instant};

use ft_core::image::entries;
use ft_core::types::PAGE_BYTES;
use ft_core::{BlockId, DirtySet, PageRun};
use qemu_bridge::guest_ram::GuestRam;
use qemu_bridge::qmp::Command;
use qemu_bridge::tracker::{
    Collected, CompareTracker, Tracker, TrackerChoice, TrackerError, choose, self_test,
};

use crate::guests::{Guest, MainRam, accelerators, byte_range, gather};
use crate::support::{PATIENCE, qemus};

const SCANS: usize = 5;

#[test]
fn sixteen_pages_written_are_sixteen_pages_reported() {
    for qemu in qemus() {
        for accelerator in accelerators() {
            for main in [MainRam::Shared, MainRam::Private] {
                if main == MainRam::Private && accelerator.contains(&"kvm") {
                    continue; // nothing that the other three don't show
                }
                let mut guest = Guest::touching(&qemu, accelerator, main);
                for kind in guest.trackers() {
                    if kind == TrackerChoice::SoftDirty && main == MainRam::Private {
                        continue; // huge pages are reported as a whole: see below
                    }
                    let (mut tracker, _) = choose(kind, &guest.ram).unwrap();
                    guest.stop();
                    self_test(tracker.as_mut(), &guest.ram).unwrap();
                    guest.cont();
                    guest.wait_for_loop(tracker.as_mut());
                    check_scans(&mut guest, tracker.as_mut());
                }
            }
        }
    }
}

/// While the guest runs no other page is ever reported, and while it stands none at all.
fn check_scans(guest: &mut Guest, tracker: &mut dyn Tracker) {
    let touched = guest.touched();
    let mut dirty = guest.dirty_set();
    for _ in 0..SCANS {
        let deadline = Instant::now() + PATIENCE;
        dirty.clear();
        while dirty.count() < touched.count {
            assert!(Instant::now() < deadline, "{} sees no more", tracker.name());
            std::thread::sleep(Duration::from_millis(5));
            tracker.collect_live(&guest.ram, &mut dirty).unwrap();
        }
        let runs: Vec<_> = dirty.runs().collect();
        assert_eq!(runs, [touched], "{}", tracker.name());

        guest.stop();
        tracker.collect(&guest.ram, &mut dirty).unwrap();
        dirty.clear();
        let collected = tracker.collect(&guest.ram, &mut dirty).unwrap();
        assert_eq!(
            (collected.regions, dirty.count()),
            (0, 0),
            "of a paused guest"
        );
        guest.cont();
    }
}

#[test]
fn a_copy_of_what_is_reported_is_always_all_of_ram() {
    let machines: &[&[&str]] = &[
        &[
            "-accel",
            "tcg",
            "-machine",
            "pc",
            "-device",
            "virtio-net-pci",
        ],
        &["-accel", "tcg", "-machine", "q35", "-smp", "2"],
        &["-accel", "kvm", "-cpu", "qemu64", "-machine", "pc"],
    ];
    for qemu in qemus() {
        for machine in &machines[..accelerators().len() + 1] {
            let mut guest = Guest::start(&qemu, machine, MainRam::Shared, 64);
            for kind in guest.trackers() {
                let pages = check_copies(&mut guest, kind, machine.contains(&"tcg"));
                eprintln!("{qemu} {machine:?}: {kind:?}: {pages} pages written");
                guest.cont();
            }
        }
    }
}

/// Keeps a copy of RAM by what is reported, with all of RAM to compare it with.
fn check_copies(guest: &mut Guest, kind: TrackerChoice, resets: bool) -> u64 {
    let (mut tracker, _) = choose(kind, &guest.ram).unwrap();
    let mut compare = CompareTracker::new(&guest.ram).unwrap();
    guest.stop();
    tracker.arm_all(&guest.ram).unwrap();
    compare.arm_all(&guest.ram).unwrap();
    let mut copy = guest.bytes();
    let mut pages = 0;
    for round in 0..12 {
        guest.cont();
        if resets && round % 4 == 0 {
            // The firmware starts over and writes all over the place. (Where KVM is nested, as on
            // the machines that run this, it often can't emulate a reset at a random moment.)
            let reset = Command::new("system_reset");
            guest.vm.qmp.call(reset, PATIENCE).unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
        guest.stop();
        let mut written = guest.dirty_set();
        tracker.collect(&guest.ram, &mut written).unwrap();
        let mut changed = guest.dirty_set();
        compare.collect(&guest.ram, &mut changed).unwrap();
        pages += written.count();
        for run in changed.runs() {
            let mut pages = run.first..run.first + run.count;
            let seen = pages.all(|page| written.contains(run.block, page));
            assert!(seen, "{run:?} has changed, {kind:?} has not reported it");
        }
        for run in written.runs() {
            let target = &mut copy[usize::from(run.block.0)][byte_range(run)];
            guest.ram.copy_out(run.block, run.first, target).unwrap();
        }
        assert!(guest.bytes() == copy, "a write was missed");
    }
    assert!(pages > 0);
    pages
}

#[test]
fn live_rounds_and_a_paused_one_leave_nothing_out() {
    // As in the first synchronisation: collect and copy while the guest runs.
    for accelerator in accelerators() {
        let mut guest = Guest::touching("qemu-system-x86_64", accelerator, MainRam::Shared);
        for kind in guest.trackers() {
            let (mut tracker, _) = choose(kind, &guest.ram).unwrap();
            guest.stop();
            tracker.arm_all(&guest.ram).unwrap();
            guest.cont();
            let mut copy = guest.bytes();
            for round in 0..200 {
                let last = round == 199;
                if last {
                    guest.stop();
                }
                let mut dirty = guest.dirty_set();
                match last {
                    true => tracker.collect(&guest.ram, &mut dirty).unwrap(),
                    false => tracker.collect_live(&guest.ram, &mut dirty).unwrap(),
                };
                for run in dirty.runs() {
                    let target = &mut copy[usize::from(run.block.0)][byte_range(run)];
                    guest.ram.copy_out(run.block, run.first, target).unwrap();
                }
            }
            assert!(
                guest.bytes() == copy,
                "{} has missed a write",
                tracker.name()
            );
            guest.cont();
        }
    }
}

#[test]
fn comparing_sees_what_was_undone_after_a_live_copy() {
    let tcg = ["-accel", "tcg", "-machine", "pc", "-nodefaults"];
    let mut guest = Guest::start("qemu-system-x86_64", &tcg, MainRam::Shared, 64);
    guest.stop();
    let mut tracker = CompareTracker::new(&guest.ram).unwrap();
    let pages = PageRun {
        count: 2,
        ..guest.touched()
    };
    let mut written = guest.dirty_set();
    written.set(pages);
    // One page has bytes and is zero when it is copied; the other one the other way round.
    for [before, meanwhile] in [[[1, 0], [0, 1]], [[1, 2], [3, 4]]] {
        guest.write_pages(pages, &before);
        tracker.arm_all(&guest.ram).unwrap();
        guest.write_pages(pages, &meanwhile);
        for chunk in gather(&guest.ram, &written, false) {
            entries(&chunk).for_each(|piece| tracker.copied(&piece));
        }
        guest.write_pages(pages, &before);
        let mut dirty = guest.dirty_set();
        tracker.collect(&guest.ram, &mut dirty).unwrap();
        assert!(dirty.runs().eq([pages]), "{before:?} {meanwhile:?}");
        dirty.clear();
        tracker.collect(&guest.ram, &mut dirty).unwrap();
        assert!(dirty.is_empty(), "{before:?} {meanwhile:?}");
    }
}

#[test]
fn auto_takes_the_best_and_says_why() {
    let guest = Guest::start(
        "qemu-system-x86_64",
        &["-accel", "tcg", "-machine", "pc", "-nodefaults"],
        MainRam::Shared,
        64,
    );
    // Each is taken by the one before.
    let mut taken: Vec<Box<dyn Tracker>> = Vec::new();
    for kind in guest.trackers() {
        let (tracker, said) = choose(TrackerChoice::Auto, &guest.ram).unwrap();
        let expected = choose_name(kind);
        assert_eq!(tracker.name(), expected, "{said}");
        match taken.last().map(|before| before.name()) {
            None => {}
            Some("uffd") => {
                assert!(said.contains("another userfaultfd"), "{said}");
                let refused = choose(TrackerChoice::Uffd, &guest.ram).unwrap_err();
                assert!(matches!(refused, TrackerError::Busy { .. }), "{refused}");
            }
            Some(_) => {
                assert!(said.contains("used by another daemon"), "{said}");
                let refused = choose(TrackerChoice::SoftDirty, &guest.ram).unwrap_err();
                let expected = matches!(refused, TrackerError::SoftDirtyInUse { .. });
                assert!(expected, "{refused}");
            }
        }
        taken.push(tracker);
    }
}

fn choose_name(kind: TrackerChoice) -> &'static str {
    match kind {
        TrackerChoice::Uffd => "uffd",
        TrackerChoice::SoftDirty => "soft-dirty",
        TrackerChoice::Compare | TrackerChoice::Auto => "compare",
    }
}

/// Writes to private RAM are reported too, in pieces as large as the pages of the host.
#[test]
fn private_ram_is_tracked_by_soft_dirty() {
    for qemu in qemus() {
        let mut guest = Guest::touching(&qemu, &["-accel", "tcg"], MainRam::Private);
        if !guest.trackers().contains(&TrackerChoice::SoftDirty) {
            return;
        }
        let (mut tracker, _) = choose(TrackerChoice::SoftDirty, &guest.ram).unwrap();
        guest.stop();
        self_test(tracker.as_mut(), &guest.ram).unwrap();
        guest.cont();
        drop(tracker);
        let pages = check_copies(&mut guest, TrackerChoice::SoftDirty, true);
        eprintln!("{qemu}: {pages} pages written");
    }
}

/// How a tracker may be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Reports nothing.
    Silent,
    /// Reports nothing of one block.
    BlockLost,
    /// Reports only the first page.
    TailLost,
    /// Reports a page that nobody wrote.
    Inventive,
    /// Does not arm again what it has reported.
    NotRearmed,
}

#[derive(Debug)]
struct Broken {
    fault: Fault,
    real: Box<dyn Tracker>,
    reported: Option<DirtySet>,
}

impl Tracker for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn arm_all(&mut self, ram: &GuestRam) -> Result<(), TrackerError> {
        self.real.arm_all(ram)
    }

    fn collect(&mut self, ram: &GuestRam, into: &mut DirtySet) -> Result<Collected, TrackerError> {
        let mut seen = DirtySet::new(&ram.pages_per_block());
        let collected = self.real.collect(ram, &mut seen)?;
        match self.fault {
            Fault::Silent => {}
            Fault::BlockLost => seen
                .runs()
                .filter(|r| r.block != BlockId(0))
                .for_each(|r| into.set(r)),
            Fault::TailLost => seen.runs().take(1).for_each(|r| into.set(r)),
            Fault::Inventive => {
                into.merge(&seen).unwrap();
                into.set(crate::guests::whole(BlockId(0), 1));
            }
            Fault::NotRearmed => {
                let reported = self.reported.get_or_insert_with(|| seen.clone());
                reported.merge(&seen).unwrap();
                into.merge(reported).unwrap();
            }
        }
        Ok(collected)
    }

    fn touch(&mut self, ram: &GuestRam, block: BlockId, page: u64) -> Result<(), TrackerError> {
        self.real.touch(ram, block, page)
    }
}

#[test]
fn self_test_finds_every_broken_tracker() {
    let mut guest = Guest::start(
        "qemu-system-x86_64",
        &["-accel", "tcg", "-machine", "pc"],
        MainRam::Shared,
        64,
    );
    std::thread::sleep(Duration::from_millis(500));
    guest.stop();
    let faults = [
        Fault::Silent,
        Fault::BlockLost,
        Fault::TailLost,
        Fault::Inventive,
        Fault::NotRearmed,
    ];
    for kind in guest.trackers() {
        for fault in faults {
            let (real, _) = choose(kind, &guest.ram).unwrap();
            let mut broken = Broken {
                fault,
                real,
                reported: None,
            };
            let found = self_test(&mut broken, &guest.ram).unwrap_err();
            assert!(
                matches!(found, TrackerError::Blind { .. }),
                "{fault:?}: {found}"
            );
        }
        let before = guest.bytes();
        let (mut real, _) = choose(kind, &guest.ram).unwrap();
        self_test(real.as_mut(), &guest.ram).unwrap();
        assert!(guest.bytes() == before, "the self-test changes nothing");
    }
}

#[test]
fn a_mostly_empty_guest_stays_empty() {
    for qemu in qemus() {
        let arguments = ["-accel", "tcg", "-machine", "q35", "-nodefaults"];
        let mut guest = Guest::start(&qemu, &arguments, MainRam::Shared, 4096);
        std::thread::sleep(Duration::from_millis(500));
        guest.stop();
        let allocated = guest.allocated_bytes();
        assert!(allocated < 64 << 20);
        for kind in guest.trackers() {
            let (mut tracker, _) = choose(kind, &guest.ram).unwrap();
            self_test(tracker.as_mut(), &guest.ram).unwrap();
            let mut all = guest.dirty_set();
            all.set_all();
            let chunks = crate::guests::gather(&guest.ram, &all, true);
            assert!(chunks.iter().map(Vec::len).sum::<usize>() as u64 <= 2 * allocated + (8 << 20));
            qemu_bridge::audit::hash_blocks(&guest.ram).unwrap();
            assert_eq!(guest.allocated_bytes(), allocated, "{kind:?} filled holes");
        }
        let pages = usize::try_from(allocated).unwrap() / PAGE_BYTES;
        eprintln!("{qemu}: {pages} pages of 4 GiB are there, before and after");
    }
}
