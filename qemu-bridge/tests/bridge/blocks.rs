//! The addresses of RAM blocks, proven by what lies there.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crate::support::{PATIENCE, TestDir, TestQemu, newer_qemu, qemus};
use ft_core::shape::MAIN_RAM;
use nix::sys::memfd::{MFdFlags, memfd_create};
use qemu_bridge::blocks::{Backing, BlocksError, RamBlock, ram_blocks};
use qemu_bridge::qmp::Command;

/// What QEMU has at `block`, by way of its process.
fn contents(vm: &TestQemu, block: &RamBlock) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(block.bytes).unwrap()];
    let memory = File::open(format!("/proc/{}/mem", vm.process.pid())).unwrap();
    memory
        .read_exact_at(&mut bytes, block.backing.host_address())
        .unwrap();
    bytes
}

/// Checks every piece of the guest-physical map that belongs to a block against `gpa2hva`, and the
/// bytes of main RAM against `pmemsave`.
fn check_against_qemu(vm: &mut TestQemu, blocks: &[RamBlock]) {
    vm.qmp.call(Command::new("stop"), PATIENCE).unwrap();
    let map = vm.qmp.human("info mtree -f", PATIENCE).unwrap();
    let mut checked = Vec::new();
    for line in map
        .lines()
        .filter(|l| l.contains(", ram): ") || l.contains(", rom): "))
    {
        let line = line.trim();
        let start = line.split('-').next().unwrap();
        let name = line
            .split("): ")
            .nth(1)
            .unwrap()
            .split(" @")
            .next()
            .unwrap();
        let printed = vm
            .qmp
            .human(&format!("gpa2hva 0x{start}"), PATIENCE)
            .unwrap();
        let Some(address) = printed
            .trim()
            .rsplit("0x")
            .next()
            .and_then(|a| u64::from_str_radix(a, 16).ok())
        else {
            continue;
        };
        // The SMM view shows other things than `gpa2hva` does at some addresses.
        if !printed.contains(&format!("({name})")) {
            continue;
        }
        let offset = line
            .split(" @")
            .nth(1)
            .map_or(0, |o| u64::from_str_radix(o, 16).unwrap());
        let block = blocks
            .iter()
            .find(|b| b.backing.host_address() == address - offset)
            .unwrap_or_else(|| panic!("no block at {address:#x} for {line}"));
        assert!(
            block.qemu_name.ends_with(name),
            "{line}: {}",
            block.qemu_name
        );
        checked.push(block.name.clone());
    }
    assert!(
        checked.iter().any(|n| n == MAIN_RAM) && checked.iter().any(|n| n == "pc.bios"),
        "{map}"
    );

    let dir = TestDir::new();
    let file = dir.0.join("ram");
    let save = Command::new("pmemsave")
        .arg("val", 0)
        .arg("size", 0xa0000)
        .arg("filename", file.display().to_string());
    vm.qmp.call(save, PATIENCE).unwrap();
    let main = blocks.iter().find(|b| b.name == MAIN_RAM).unwrap();
    let saved = std::fs::read(&file).unwrap();
    assert!(saved.iter().any(|b| *b != 0));
    assert!(
        contents(vm, main)[..0xa0000] == saved,
        "main RAM differs from pmemsave"
    );
    if let Backing::Shared { fd, offset, .. } = &main.backing {
        let mut through_file = vec![0; 0xa0000];
        File::from(fd.try_clone().unwrap())
            .read_exact_at(&mut through_file, *offset)
            .unwrap();
        assert!(through_file == saved, "the RAM file differs from pmemsave");
    }
}

fn start_with_memfd(qemu: &str, arguments: &[&str]) -> TestQemu {
    let ram = memfd_create("ram", MFdFlags::empty()).unwrap();
    nix::unistd::ftruncate(&ram, 64 << 20).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&ram);
    let backend =
        format!("memory-backend-file,id=m0,size=64M,mem-path=/proc/self/fd/{number},share=on");
    let mut all = vec![
        "-m",
        "64",
        "-object",
        &backend,
        "-machine",
        "memory-backend=m0",
    ];
    all.extend(arguments);
    TestQemu::start_with(qemu, &all, &[ram.as_fd()])
}

#[test]
fn every_block_of_small_and_of_crowded_machines_is_found() {
    let machines: &[&[&str]] = &[
        &["-machine", "pc", "-nodefaults"],
        &["-machine", "q35", "-nodefaults"],
        &["-machine", "pc", "-device", "virtio-net-pci"],
        // Three option ROMs of the same size, two blocks of 64 KiB.
        &[
            "-machine",
            "q35",
            "-device",
            "virtio-net-pci",
            "-device",
            "virtio-net-pci",
        ],
    ];
    for qemu in qemus() {
        for machine in machines {
            let mut vm = start_with_memfd(&qemu, machine);
            std::thread::sleep(std::time::Duration::from_millis(500));
            let blocks = ram_blocks(&mut vm.qmp, vm.process.pid(), PATIENCE).unwrap();
            let main = blocks.iter().find(|b| b.name == MAIN_RAM).unwrap();
            assert!(
                matches!(main.backing, Backing::Shared { offset: 0, .. }),
                "{main:?}"
            );
            assert!(blocks.is_sorted_by(|a, b| a.name < b.name));
            check_against_qemu(&mut vm, &blocks);
            check_firmware(&vm, &blocks);
        }
    }
}

/// Each ROM's bytes say what it is.
fn check_firmware(vm: &TestQemu, blocks: &[RamBlock]) {
    for block in blocks {
        let bytes = contents(vm, block);
        if block.name == "pc.bios" {
            let named = bytes.windows(7).any(|w| w == b"SeaBIOS");
            // The reset vector: a far jump.
            assert!(
                named && bytes[bytes.len() - 16] == 0xea,
                "pc.bios is not SeaBIOS"
            );
        }
        let ids: Option<[u8; 4]> = match block.name.rsplit('/').next().unwrap() {
            "virtio-net-pci.rom" => Some([0xf4, 0x1a, 0x00, 0x10]),
            "e1000e.rom" => Some([0x86, 0x80, 0xd3, 0x10]),
            "e1000.rom" => Some([0x86, 0x80, 0x0e, 0x10]),
            "vga.rom" => Some([0x34, 0x12, 0x11, 0x11]),
            _ => None,
        };
        if let Some(ids) = ids {
            assert_eq!(
                bytes[..2],
                [0x55, 0xaa],
                "{} is not an option ROM",
                block.name
            );
            let structure = usize::from(u16::from_le_bytes([bytes[0x18], bytes[0x19]]));
            assert_eq!(&bytes[structure..structure + 4], b"PCIR");
            assert_eq!(bytes[structure + 4..structure + 8], ids, "{}", block.name);
        }
    }
}

#[test]
fn blocks_of_a_standby_are_the_same_ones() {
    for qemu in qemus() {
        let arguments = ["-machine", "q35", "-device", "virtio-net-pci"];
        let mut primary = start_with_memfd(&qemu, &arguments);
        let mut standby = start_with_memfd(
            &qemu,
            &[&arguments[..], &["-incoming", "defer", "-S"]].concat(),
        );
        std::thread::sleep(std::time::Duration::from_millis(1500));
        let shapes = [&mut primary, &mut standby]
            .map(|vm| ram_blocks(&mut vm.qmp, vm.process.pid(), PATIENCE).unwrap())
            .map(|blocks| blocks.iter().map(RamBlock::shape).collect::<Vec<_>>());
        assert_eq!(shapes[0], shapes[1]);
        eprintln!("{:#?}", shapes[0]);
    }
}

#[test]
fn private_main_ram_is_reached_through_the_process() {
    for qemu in qemus() {
        let mut vm = TestQemu::start(&qemu, &["-m", "64", "-machine", "pc", "-nodefaults"]);
        std::thread::sleep(std::time::Duration::from_millis(500));
        let blocks = ram_blocks(&mut vm.qmp, vm.process.pid(), PATIENCE).unwrap();
        assert!(
            blocks
                .iter()
                .all(|b| matches!(b.backing, Backing::Private { .. })),
            "{blocks:#?}"
        );
        check_against_qemu(&mut vm, &blocks);
    }
}

#[test]
fn names_are_canonical_for_old_machines_and_without_one_main_backend() {
    let qemu = "qemu-system-x86_64";
    let names = |vm: &mut TestQemu| -> Vec<String> {
        let blocks = ram_blocks(&mut vm.qmp, vm.process.pid(), PATIENCE).unwrap();
        blocks.into_iter().map(|b| b.name).collect()
    };
    // It names the block by the backend's whole path.
    let mut old = start_with_memfd(qemu, &["-machine", "pc-i440fx-3.1", "-nodefaults"]);
    assert!(names(&mut old).iter().any(|n| n == MAIN_RAM));
    let nodes = [
        "-object",
        "memory-backend-memfd,id=a,size=32M",
        "-object",
        "memory-backend-memfd,id=b,size=32M",
    ];
    let numa = [
        "-m",
        "64",
        "-smp",
        "2",
        "-numa",
        "node,memdev=a",
        "-numa",
        "node,memdev=b",
    ];
    let mut numa = TestQemu::start(qemu, &[&nodes[..], &numa].concat());
    let found = names(&mut numa);
    assert!(
        found.iter().any(|n| n == "a") && found.iter().any(|n| n == "b"),
        "{found:?}"
    );
    assert!(found.iter().all(|n| n != MAIN_RAM), "{found:?}");
}

#[test]
fn newer_qemu_can_share_all_of_its_blocks() {
    let mut vm = start_with_memfd(
        &newer_qemu(),
        &[
            "-machine",
            "q35,aux-ram-share=on",
            "-device",
            "virtio-net-pci",
        ],
    );
    let blocks = ram_blocks(&mut vm.qmp, vm.process.pid(), PATIENCE).unwrap();
    assert!(
        blocks
            .iter()
            .all(|b| matches!(b.backing, Backing::Shared { .. })),
        "{blocks:#?}"
    );
}

#[test]
fn ram_in_a_file_that_is_not_shared_is_refused_by_name() {
    let dir = TestDir::new();
    let backend = format!(
        "memory-backend-file,id=m0,size=64M,mem-path={},share=off",
        dir.0.join("r").display()
    );
    let arguments = [
        "-m",
        "64",
        "-nodefaults",
        "-object",
        &backend,
        "-machine",
        "pc,memory-backend=m0",
    ];
    let mut vm = TestQemu::start("qemu-system-x86_64", &arguments);
    let error = ram_blocks(&mut vm.qmp, vm.process.pid(), PATIENCE).unwrap_err();
    assert!(
        matches!(&error, BlocksError::PrivateFile { name, .. } if name == "m0"),
        "{error}"
    );
}
