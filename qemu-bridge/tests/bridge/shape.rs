//! Shapes of real machines: equal for a pair, different when something is plugged.

use std::time::Duration;

use ft_core::VmShape;
use qemu_bridge::blocks::ram_blocks;
use qemu_bridge::qmp::Command;
use qemu_bridge::shape::{Finding, ShapeWatch, query_shape};

use crate::support::{PATIENCE, TestDir, TestQemu, qemus};

const Q35: &[&str] = &[
    "-m",
    "64",
    "-machine",
    "q35",
    "-smp",
    "2",
    "-device",
    "pcie-root-port,id=rp1",
];

fn shape(vm: &mut TestQemu) -> VmShape {
    let blocks = ram_blocks(&mut vm.qmp, vm.process.pid(), PATIENCE).unwrap();
    query_shape(&mut vm.qmp, &blocks, PATIENCE).unwrap()
}

/// One round of questions; what it found.
fn look(vm: &mut TestQemu, watch: &mut ShapeWatch) -> Vec<Finding> {
    let mut found = Vec::new();
    watch.ask(&mut vm.qmp).unwrap();
    while !watch.is_idle() {
        vm.qmp.wait_ready_for(Duration::from_secs(1)).unwrap();
        vm.qmp
            .progress(&mut |message| found.extend(watch.feed(&message)))
            .unwrap();
    }
    found
}

#[test]
fn shape_is_that_of_the_standby_and_stays_when_the_guest_boots() {
    for qemu in qemus() {
        let nic = ["-nic", "user"];
        let mut primary = TestQemu::start(&qemu, &[Q35, &nic].concat());
        let early = shape(&mut primary);
        let standby_nic = ["-nic", "user,restrict=on", "-incoming", "defer", "-S"];
        let mut standby = TestQemu::start(&qemu, &[Q35, &standby_nic].concat());
        // Firmware assigns addresses and bus numbers meanwhile.
        std::thread::sleep(Duration::from_secs(2));
        let late = shape(&mut primary);
        assert_eq!(early, late);
        assert_eq!(late.check_standby(&shape(&mut standby)), Ok(()));
        let bytes: usize = late
            .properties
            .iter()
            .map(|(n, v)| n.len() + v.len() + 8)
            .sum();
        eprintln!("{} properties, {bytes} bytes", late.properties.len());
        assert!(bytes < 20_000, "leave room for a much larger machine");
    }
}

#[test]
fn every_kind_of_difference_is_named() {
    let qemu = "qemu-system-x86_64";
    let base = shape(&mut TestQemu::start(
        qemu,
        &[
            "-nodefaults",
            "-m",
            "64",
            "-machine",
            "pc",
            "-netdev",
            "user,id=n",
        ],
    ));
    let variants: &[(&str, &[&str])] = &[
        (
            "RAM block main-ram",
            &["-m", "65", "-machine", "pc", "-netdev", "user,id=n"],
        ),
        (
            "machine",
            &[
                "-m",
                "64",
                "-machine",
                "pc-i440fx-7.1",
                "-netdev",
                "user,id=n",
            ],
        ),
        (
            "cpu",
            &[
                "-m",
                "64",
                "-machine",
                "pc",
                "-smp",
                "2",
                "-netdev",
                "user,id=n",
            ],
        ),
        (
            "cpu",
            &[
                "-m",
                "64",
                "-machine",
                "pc",
                "-cpu",
                "max",
                "-netdev",
                "user,id=n",
            ],
        ),
        (
            "device",
            &[
                "-m",
                "64",
                "-machine",
                "pc",
                "-device",
                "piix3-usb-uhci",
                "-netdev",
                "user,id=n",
            ],
        ),
        (
            "netdev n",
            &[
                "-m",
                "64",
                "-machine",
                "pc",
                "-netdev",
                "hubport,hubid=0,id=n",
            ],
        ),
    ];
    for (what, arguments) in variants {
        let other = shape(&mut TestQemu::start(
            qemu,
            &[&["-nodefaults"], *arguments].concat(),
        ));
        let difference = base.check_standby(&other).unwrap_err();
        eprintln!("{difference}");
        assert!(
            difference.to_string().contains(what),
            "{difference}, not {what}"
        );
    }
}

#[test]
fn watch_names_what_was_plugged() {
    for qemu in qemus() {
        let mut vm = TestQemu::start(&qemu, Q35);
        let mut watch = ShapeWatch::begin(&mut vm.qmp, vm.process.pid(), PATIENCE).unwrap();
        let running = [Finding::RunState("running".to_owned())];
        let start = std::time::Instant::now();
        assert_eq!(look(&mut vm, &mut watch), running);
        eprintln!("{qemu}: all answers after {:?}", start.elapsed());

        let netdev = Command::new("netdev_add")
            .arg("type", "user")
            .arg("id", "late");
        vm.qmp.call(netdev, PATIENCE).unwrap();
        let found = look(&mut vm, &mut watch);
        assert!(
            matches!(&found[0], Finding::Changed { what } if what.contains("netdev late")),
            "{found:?}"
        );

        let device = Command::new("device_add")
            .arg("driver", "nvme")
            .arg("serial", "x")
            .arg("id", "plugged")
            .arg("bus", "rp1");
        vm.qmp.call(device, PATIENCE).unwrap();
        let found = look(&mut vm, &mut watch);
        let named = |text: &str| {
            found
                .iter()
                .any(|f| matches!(f, Finding::Changed { what } if what.contains(text)))
        };
        assert!(named("plugged"), "{found:?}");
        assert_eq!(look(&mut vm, &mut watch), running, "a change is told once");

        vm.qmp.call(Command::new("stop"), PATIENCE).unwrap();
        assert_eq!(
            look(&mut vm, &mut watch),
            [Finding::RunState("paused".to_owned())]
        );
    }
}

/// Copies of a running guest's pages are relied on only where no disk's data can come into them late.
#[test]
fn disks_that_may_be_read_past_the_page_cache_are_known() {
    let place = TestDir::new();
    let image = place.0.join("image").display().to_string();
    std::fs::write(&image, [0; 4096]).unwrap();
    let drive = |file: &str, cache: &str| {
        format!("file={file},format=raw,if=none,id=d,readonly=on,cache={cache}")
    };
    for qemu in qemus() {
        let watch = |drive: &str| {
            let mut vm = TestQemu::start(&qemu, &["-m", "64", "-drive", drive]);
            let pid = vm.process.pid();
            let watch = ShapeWatch::begin(&mut vm.qmp, pid, PATIENCE).unwrap();
            (vm, watch)
        };
        let (mut vm, mut seen) = watch(&drive(&image, "writeback"));
        assert!(!seen.direct_io(), "by way of the page cache");
        let late = Command::new("blockdev-add")
            .arg("driver", "file")
            .arg("node-name", "late")
            .arg("read-only", true)
            .arg("filename", "/proc/self/exe");
        vm.qmp.call(late, PATIENCE).unwrap();
        look(&mut vm, &mut seen);
        assert!(seen.direct_io(), "a file that came later");

        // sysfs stands for every file system that isn't known to copy.
        let (_vm, seen) = watch(&drive("/sys/kernel/notes", "writeback"));
        assert!(seen.direct_io(), "an unknown file system");
        let (_vm, seen) = watch(&drive(&image, "none"));
        assert!(seen.direct_io(), "O_DIRECT");
        let (_vm, seen) = watch("if=none,id=d,driver=null-co,read-zeroes=on");
        assert!(!seen.direct_io(), "no file at all");
    }
}
