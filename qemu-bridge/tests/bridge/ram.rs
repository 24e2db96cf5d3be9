//! RAM from one QEMU to another: gathered, applied, adopted, hashed.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use ft_core::shape::MAIN_RAM;
use ft_core::types::PAGE_BYTES;
use ft_core::{DirtySet, PageRun};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use qemu_bridge::audit::hash_blocks;
use qemu_bridge::blocks::{Backing, RamBlock, ram_blocks};
use qemu_bridge::gather::{Cursor, Progress, fill};
use qemu_bridge::guest_ram::{GuestRam, RamError};
use qemu_bridge::qmp::Command;
use qemu_bridge::standby_ram::StandbyRam;
use qemu_bridge::tracker::{Tracker, UffdTracker};

use crate::guests::{Guest, MainRam, allocated_bytes, gather, whole};
use crate::support::{PATIENCE, TestQemu, newer_qemu, qemus};

const MIB: u32 = 64;

/// A standby on `ram`.
struct Standby {
    vm: TestQemu,
    blocks: Vec<RamBlock>,
}

impl Standby {
    fn start(qemu: &str, arguments: &[&str], ram: &OwnedFd) -> Standby {
        let number = std::os::fd::AsRawFd::as_raw_fd(ram);
        let backend = format!(
            "memory-backend-file,id=ram,size={MIB}M,mem-path=/proc/self/fd/{number},share=on"
        );
        let fixed = [
            "-m",
            "64",
            "-object",
            &backend,
            "-machine",
            "memory-backend=ram",
        ];
        let waiting = ["-incoming", "defer", "-S"];
        let all = [arguments, &fixed[..], &waiting].concat();
        let mut vm = TestQemu::start_bare(qemu, &all, &[ram.as_fd()]);
        let blocks = ram_blocks(&mut vm.qmp, vm.process.pid(), PATIENCE).unwrap();
        Standby { vm, blocks }
    }

    /// Bytes that its main RAM takes. Reading it through a mapping fills its holes.
    fn allocated_bytes(&self) -> u64 {
        let main = self.blocks.iter().find(|b| b.name == MAIN_RAM);
        allocated_bytes(main.unwrap())
    }

    /// What its process has, block by block.
    fn bytes(&self) -> Vec<Vec<u8>> {
        let memory = File::open(format!("/proc/{}/mem", self.vm.process.pid())).unwrap();
        let read = |block: &RamBlock| {
            let mut bytes = vec![0; usize::try_from(block.bytes).unwrap()];
            let address = block.backing.host_address();
            memory.read_exact_at(&mut bytes, address).unwrap();
            bytes
        };
        self.blocks.iter().map(read).collect()
    }
}

fn new_ram() -> OwnedFd {
    let ram = memfd_create("ram", MFdFlags::empty()).unwrap();
    nix::unistd::ftruncate(&ram, i64::from(MIB) << 20).unwrap();
    ram
}

fn apply(target: &StandbyRam, chunks: &[Vec<u8>]) {
    let mut device_state = Vec::new();
    for chunk in chunks {
        target.apply(chunk, &mut device_state).unwrap();
    }
    assert!(device_state.is_empty());
}

/// Machines of both kinds: the other blocks private to QEMU's process, and in files of its own.
fn machines() -> Vec<(String, Vec<&'static str>)> {
    let plain = [
        "-accel",
        "tcg",
        "-machine",
        "pc",
        "-device",
        "virtio-net-pci",
    ];
    let mut found: Vec<_> = qemus().into_iter().map(|q| (q, plain.to_vec())).collect();
    let shared = ["-accel", "tcg", "-machine", "q35,aux-ram-share=on"];
    found.push((newer_qemu(), shared.to_vec()));
    found
}

#[test]
fn epochs_arrive_bit_for_bit_and_outlive_the_standby() {
    for (qemu, arguments) in machines() {
        let mut guest = Guest::start(&qemu, &arguments, MainRam::Shared, MIB);
        std::thread::sleep(Duration::from_millis(700));
        let main_ram = new_ram();
        let standby = Standby::start(&qemu, &arguments, &main_ram);
        let mut target = StandbyRam::open(standby.vm.process.pid(), &standby.blocks).unwrap();
        let mut tracker = UffdTracker::attach(&guest.ram).unwrap();

        guest.stop();
        tracker.arm_all(&guest.ram).unwrap();
        let mut dirty = guest.dirty_set();
        dirty.set_all();
        apply(&target, &gather(&guest.ram, &dirty, true));
        assert!(
            standby.allocated_bytes() <= guest.allocated_bytes(),
            "zeros are holes there"
        );
        check_equal(&guest, &standby, &target);

        for round in 0..6 {
            guest.cont();
            if round == 2 {
                let reset = Command::new("system_reset");
                guest.vm.qmp.call(reset, PATIENCE).unwrap();
            }
            std::thread::sleep(Duration::from_millis(100));
            guest.stop();
            dirty.clear();
            tracker.collect(&guest.ram, &mut dirty).unwrap();
            apply(&target, &gather(&guest.ram, &dirty, false));
            check_equal(&guest, &standby, &target);
        }
        // A second one reads the first one's state: the rehearsal's way, and the next standby's.
        let second = Standby::start(&qemu, &arguments, &main_ram);
        target
            .poke(second.vm.process.pid(), &second.blocks)
            .unwrap();
        assert!(
            second.bytes() == guest.bytes(),
            "a poked QEMU has all of RAM"
        );
        drop(standby);
        target
            .adopt(second.vm.process.pid(), &second.blocks)
            .unwrap();
        check_equal(&guest, &second, &target);
        // And gets what comes later.
        guest.cont();
        std::thread::sleep(Duration::from_millis(100));
        guest.stop();
        dirty.set_all();
        apply(&target, &gather(&guest.ram, &dirty, false));
        check_equal(&guest, &second, &target);
    }
}

/// The standby's process, and what an audit sees, are as the guest is.
fn check_equal(guest: &Guest, standby: &Standby, target: &StandbyRam) {
    assert_eq!(
        hash_blocks(&guest.ram).unwrap(),
        hash_blocks(target).unwrap(),
        "the audit"
    );
    let theirs = standby.bytes();
    for ((block, ours), theirs) in guest.blocks.iter().zip(guest.bytes()).zip(&theirs) {
        assert!(&ours == theirs, "{} differs", block.name);
    }
}

#[test]
fn a_zero_page_is_applied_over_data_everywhere() {
    let qemu = "qemu-system-x86_64";
    let arguments = ["-accel", "tcg", "-machine", "pc", "-nodefaults"];
    let main_ram = new_ram();
    let standby = Standby::start(qemu, &arguments, &main_ram);
    let target = StandbyRam::open(standby.vm.process.pid(), &standby.blocks).unwrap();
    // A guest of which every third page of every block has data; then none has.
    let mut guest = Guest::start(
        qemu,
        &[&arguments[..], &["-S"]].concat(),
        MainRam::Shared,
        MIB,
    );
    let pages = guest.ram.pages_per_block();
    let mut dirty = DirtySet::new(&pages);
    dirty.set_all();
    for fill_byte in [0x5a, 0] {
        fill_every_third(&guest, fill_byte);
        apply(&target, &gather(&guest.ram, &dirty, false));
        if fill_byte == 0 {
            assert_eq!(standby.allocated_bytes(), 0, "all of it is zero");
        }
        check_equal(&guest, &standby, &target);
    }
    guest.stop();
}

fn fill_every_third(guest: &Guest, byte: u8) {
    let path = format!("/proc/{}/mem", guest.vm.process.pid());
    let memory = File::options().write(true).open(path).unwrap();
    for block in &guest.blocks {
        let address = block.backing.host_address();
        for offset in (0..block.bytes).step_by(3 * PAGE_BYTES) {
            memory
                .write_all_at(&[byte; PAGE_BYTES], address + offset)
                .unwrap();
        }
    }
}

#[test]
fn another_machine_is_not_adopted() {
    let qemu = "qemu-system-x86_64";
    let arguments = ["-accel", "tcg", "-machine", "pc", "-nodefaults"];
    let main_ram = new_ram();
    let standby = Standby::start(qemu, &arguments, &main_ram);
    let mut target = StandbyRam::open(standby.vm.process.pid(), &standby.blocks).unwrap();
    let more = [&arguments[..], &["-device", "VGA"]].concat();
    let other = Standby::start(qemu, &more, &main_ram);
    for refused in [
        target
            .poke(other.vm.process.pid(), &other.blocks)
            .unwrap_err(),
        target
            .adopt(other.vm.process.pid(), &other.blocks)
            .unwrap_err(),
    ] {
        assert!(matches!(refused, RamError::OtherBlocks { .. }), "{refused}");
    }
}

#[test]
fn an_audit_finds_one_flipped_bit_and_no_difference_between_hole_and_zeros() {
    for main in [MainRam::Shared, MainRam::Private] {
        let mut guest = Guest::start(
            "qemu-system-x86_64",
            &["-accel", "tcg", "-machine", "pc"],
            main,
            MIB,
        );
        std::thread::sleep(Duration::from_millis(500));
        guest.stop();
        let before = hash_blocks(&guest.ram).unwrap();
        let path = format!("/proc/{}/mem", guest.vm.process.pid());
        let memory = File::options().read(true).write(true).open(path).unwrap();
        for (index, block) in guest.blocks.iter().enumerate() {
            let address = block.backing.host_address();
            for offset in [0, block.bytes / 2, block.bytes - 1] {
                let mut byte = [0];
                memory.read_exact_at(&mut byte, address + offset).unwrap();
                memory
                    .write_all_at(&[byte[0] ^ 0x10], address + offset)
                    .unwrap();
                let flipped = hash_blocks(&guest.ram).unwrap();
                for (other, (was, is)) in before.iter().zip(&flipped).enumerate() {
                    assert_eq!(was != is, other == index, "{} at {offset:#x}", block.name);
                }
                memory.write_all_at(&byte, address + offset).unwrap();
                assert_eq!(hash_blocks(&guest.ram).unwrap(), before);
            }
        }
        if let Backing::Shared { fd, .. } = &guest.blocks[usize::from(guest.main_ram().0)].backing {
            check_holes(&guest, fd, &before);
        }
    }
}

/// Zeros written into a hole, and punched out again, change no hash and are found as they are.
fn check_holes(guest: &Guest, file: &OwnedFd, before: &[u64]) {
    let block = guest.main_ram();
    let all = whole(block, u64::from(MIB) << 8);
    let hole = (all.first..all.count)
        .find(|&first| {
            let run = PageRun {
                block,
                first,
                count: 8,
            };
            guest.ram.next_data(run).unwrap().is_none()
        })
        .expect("an idle guest has holes");
    let offset = i64::try_from(hole).unwrap() * PAGE_BYTES as i64;
    let writer = File::from(file.try_clone().unwrap());
    let zeros = [0; 4 * PAGE_BYTES];
    writer
        .write_all_at(&zeros, u64::try_from(offset).unwrap())
        .unwrap();
    let data = PageRun {
        block,
        first: hole,
        count: 4,
    };
    let around = PageRun {
        block,
        first: hole,
        count: 8,
    };
    assert_eq!(guest.ram.next_data(around).unwrap(), Some(data));
    assert_eq!(hash_blocks(&guest.ram).unwrap(), before);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, punch, offset, 4 * PAGE_BYTES as i64).unwrap();
    assert_eq!(guest.ram.next_data(around).unwrap(), None);
    assert_eq!(hash_blocks(&guest.ram).unwrap(), before);
}

#[test]
fn a_chunk_that_is_full_goes_on_where_it_ended() {
    // Alternating data and zero pages need most entries; all of them must arrive, in any split.
    let mut guest = Guest::start(
        "qemu-system-x86_64",
        &["-accel", "tcg", "-machine", "pc", "-nodefaults", "-S"],
        MainRam::Shared,
        MIB,
    );
    fill_every_third(&guest, 7);
    let mut dirty = guest.dirty_set();
    dirty.set_all();
    for check_holes in [false, true] {
        let chunks = gather(&guest.ram, &dirty, check_holes);
        let mut covered = guest.dirty_set();
        for chunk in &chunks {
            for piece in ft_core::image::entries(chunk) {
                use ft_core::image::Piece;
                let (Piece::Data { run, .. } | Piece::Zero { run }) = piece else {
                    panic!("no device state was gathered")
                };
                let new =
                    (run.first..run.first + run.count).all(|p| !covered.contains(run.block, p));
                assert!(new, "{run:?} comes twice");
                covered.set(run);
            }
        }
        assert!(covered == dirty, "every page is in a chunk");
    }
    guest.stop();
}

#[test]
fn a_qemu_that_is_gone_is_an_error_where_its_memory_was_private() {
    let guest = Guest::start(
        "qemu-system-x86_64",
        &["-accel", "tcg", "-machine", "pc", "-nodefaults"],
        MainRam::Private,
        MIB,
    );
    let mut tracker = UffdTracker::attach(&guest.ram).unwrap();
    let Guest { mut vm, ram, .. } = guest;
    vm.process.kill().unwrap();
    assert!(vm.process.wait(PATIENCE).unwrap());
    assert!(matches!(hash_blocks(&ram), Err(RamError::Remote { .. })));
    let mut dirty = DirtySet::new(&ram.pages_per_block());
    tracker.collect(&ram, &mut dirty).unwrap_err();
    tracker.arm_all(&ram).unwrap_err();
    check_fill_fails(&ram);
}

fn check_fill_fails(ram: &GuestRam) {
    use ft_core::image::{ChunkBuilder, ChunkHead};
    use ft_core::wire::Frame;
    use ft_core::{Epoch, EpochKind, Session, Term, VmTag};
    let frame = Frame {
        vm: VmTag(0),
        session: Session(0),
        term: Term(0),
        epoch: Epoch(1),
    };
    let mut memory = vec![0; ft_core::limits::CHUNK_BYTES];
    let head = ChunkHead {
        frame,
        kind: EpochKind::Full,
        index: 0,
    };
    let mut builder = ChunkBuilder::new(&mut memory, head);
    let mut dirty = DirtySet::new(&ram.pages_per_block());
    dirty.set_all();
    let mut cursor = Cursor::default();
    cursor.load(&dirty, true);
    let result: Result<Progress, RamError> = fill(ram, &mut builder, &mut cursor);
    assert!(matches!(result, Err(RamError::Remote { .. })), "{result:?}");
}
