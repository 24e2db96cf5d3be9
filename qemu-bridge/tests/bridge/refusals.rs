//! Every refusal that can be provoked on this machine, from a real QEMU.

use std::fs::File;

use qemu_bridge::refusals::{Allowances, refusals};

use crate::support::{PATIENCE, TestDir, TestQemu, not_run, qemus};

fn refused(qemu: &str, arguments: &[&str], allowed: Allowances) -> Vec<String> {
    let base = ["-nodefaults", "-m", "64", "-machine", "pc"];
    let mut vm = TestQemu::start(qemu, &[&base, arguments].concat());
    let found = refusals(&mut vm.qmp, allowed, PATIENCE).unwrap();
    found.iter().map(ToString::to_string).collect()
}

#[test]
fn each_is_refused_by_name_and_alone() {
    let dir = TestDir::new();
    let image = dir.0.join("disk.img");
    std::fs::write(&image, [0; 1 << 20]).unwrap();
    let image = image.display();
    let writable = format!("if=none,id=d,format=raw,file={image}");
    let temporary = format!("if=none,id=d,format=raw,snapshot=on,file={image}");
    let cases: &[(&str, &[&str])] = &[
        ("virtio-balloon", &["-device", "virtio-balloon-pci"]),
        ("nvme", &["-device", "nvme,serial=x"]),
        (
            "pc-dimm",
            &[
                "-m",
                "64,slots=2,maxmem=256M",
                "-object",
                "memory-backend-ram,id=m,size=64M",
                "-device",
                "pc-dimm,memdev=m",
            ],
        ),
        (
            "virtio-mem",
            &[
                "-m",
                "64,slots=2,maxmem=256M",
                "-object",
                "memory-backend-ram,id=m,size=64M",
                "-device",
                "virtio-mem-pci,memdev=m",
            ],
        ),
        (
            "ivshmem",
            &[
                "-object",
                "memory-backend-ram,id=m,size=1M,share=on",
                "-device",
                "ivshmem-plain,memdev=m",
            ],
        ),
        (
            "disk d",
            &["-drive", &writable, "-device", "virtio-blk-pci,drive=d"],
        ),
        (
            "disk d",
            &["-drive", &temporary, "-device", "virtio-blk-pci,drive=d"],
        ),
    ];
    for qemu in qemus() {
        for (name, arguments) in cases {
            let found = refused(&qemu, arguments, Allowances::default());
            eprintln!("{found:#?}");
            // A device may also be a blocker of migration; nothing else may be refused.
            assert!(found.iter().any(|f| f.contains(name)), "{name}: {found:?}");
            assert!(found.len() <= 2, "{name}: {found:?}");
        }
    }
}

#[test]
fn harmless_machines_are_not_refused() {
    let dir = TestDir::new();
    let image = dir.0.join("disk.img");
    std::fs::write(&image, [0; 1 << 20]).unwrap();
    let image = image.display();
    let read_only = format!("if=none,id=d,format=raw,readonly=on,file={image}");
    let writable = format!("if=none,id=d,format=raw,file={image}");
    for qemu in qemus() {
        let none: [&str; 0] = [];
        let disk = [
            "-drive",
            &read_only,
            "-device",
            "virtio-blk-pci,drive=d",
            "-drive",
            "if=ide,media=cdrom",
        ];
        let devices = [
            "-nic",
            "user",
            "-vga",
            "std",
            "-device",
            "virtio-serial",
            "-usb",
            "-device",
            "usb-tablet",
        ];
        assert_eq!(
            refused(
                &qemu,
                &[&disk[..], &devices].concat(),
                Allowances::default()
            ),
            none
        );
        let disk = ["-drive", &writable, "-device", "virtio-blk-pci,drive=d"];
        assert_eq!(
            refused(
                &qemu,
                &disk,
                Allowances {
                    unreplicated_disks: true
                }
            ),
            none
        );
    }
}

#[test]
fn nested_virtualisation_is_refused_on_kvm_only() {
    let under = |accelerator: &str| {
        let arguments = [
            "-nodefaults",
            "-m",
            "64",
            "-machine",
            "pc",
            "-cpu",
            "host",
            "-accel",
            accelerator,
        ];
        let mut vm = TestQemu::start_bare("qemu-system-x86_64", &arguments, &[]);
        refusals(&mut vm.qmp, Allowances::default(), PATIENCE).unwrap()
    };
    let host = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let nests = ["vmx", "svm"]
        .iter()
        .any(|f| host.split_whitespace().any(|w| w == *f));
    if File::open("/dev/kvm").is_err() || !nests {
        let why = "needs a /dev/kvm that can be opened, and a processor that nests";
        return not_run("nested virtualisation", why);
    }
    let found = under("kvm");
    assert!(found.iter().any(|r| r.cure.contains("=off")), "{found:?}");
}
