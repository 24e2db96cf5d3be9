//! A saved device state, loaded by a standby on the same RAM.

use std::os::fd::AsFd;
use std::time::Duration;

use qemu_bridge::device_state::{StateSink, check, into_memory, sections};
use qemu_bridge::qmp::Command;
use qemu_bridge::spawn::{
    GuestOutput, Prepared, QemuProcess, QemuVersion, RamSource, Role, SpawnOptions, prepare,
};
use qemu_bridge::standby::{Activation, Progress, StandbyError, load_blocking, prepare_standby};

use crate::support::{PATIENCE, TestDir, TestQemu, has_kvm, qemus};

fn prepared(
    qemu: &str,
    arguments: &[&str],
    role: Role,
    ram: RamSource<'_>,
    dir: &TestDir,
) -> Prepared {
    let mut argv = vec![qemu.to_owned()];
    let fixed = ["-display", "none", "-nodefaults", "-m", "64", "-accel"];
    argv.extend(fixed.map(str::to_owned));
    argv.extend(arguments.iter().map(|a| (*a).to_owned()));
    let version = QemuVersion::probe(qemu).unwrap();
    prepare(&argv, role, &version, &dir.0.join("qmp"), ram).unwrap()
}

fn start(prepared: &Prepared, dir: TestDir) -> TestQemu {
    let ram = prepared.ram.as_ref().unwrap();
    let options = SpawnOptions {
        inherited: &[ram.as_fd()],
        output: GuestOutput::Discard,
        dies_with_thread: false,
    };
    TestQemu::adopt(QemuProcess::spawn(&prepared.argv, &options).unwrap(), dir)
}

/// Stops the guest and saves its device state that many times.
fn save_often(vm: &mut TestQemu, times: usize) -> Vec<Vec<u8>> {
    let mut sink = StateSink::install(&mut vm.qmp, PATIENCE).unwrap();
    vm.qmp.call(Command::new("stop"), PATIENCE).unwrap();
    let mut states = Vec::new();
    for _ in 0..times {
        sink.rewind().unwrap();
        vm.qmp.call(sink.save_command(), PATIENCE).unwrap();
        states.push(sink.read().unwrap());
    }
    vm.qmp.call(sink.remove_command(), PATIENCE).unwrap();
    states
}

fn save(vm: &mut TestQemu) -> Vec<u8> {
    save_often(vm, 1).remove(0)
}

/// The name of the first section in which two states differ, and where in it.
fn differing_section(one: &[u8], other: &[u8]) -> Option<(String, usize)> {
    let mut at = 8;
    for section in sections(one).unwrap() {
        let range = at..at + section.bytes;
        let other = other.get(range.clone()).unwrap_or_default();
        if let Some(byte) = (0..section.bytes).find(|n| one[range.start + n] != other[*n]) {
            return Some((section.name, byte));
        }
        at = range.end;
    }
    None
}

#[test]
fn state_moves_to_a_standby_that_then_runs() {
    for qemu in qemus() {
        for machine in [
            &["tcg", "-machine", "pc"][..],
            &["tcg", "-machine", "q35", "-device", "virtio-net-pci"],
            &["kvm", "-machine", "pc", "-cpu", "qemu64"],
        ] {
            if machine[0] == "kvm" && !has_kvm() {
                continue;
            }
            let dirs = [TestDir::new(), TestDir::new()];
            let primary_line = prepared(&qemu, machine, Role::Primary, RamSource::Fresh, &dirs[0]);
            let ram = RamSource::PrivateCopy(primary_line.ram.as_ref().unwrap().as_fd());
            let standby_line = prepared(&qemu, machine, Role::Backup, ram, &dirs[1]);
            let [primary_dir, standby_dir] = dirs;
            let mut primary = start(&primary_line, primary_dir);
            std::thread::sleep(Duration::from_millis(500));
            let states = save_often(&mut primary, 3);
            for later in &states[1..] {
                let difference = differing_section(&states[0], later);
                assert_eq!(difference, None, "saves in one stop differ");
            }
            let state = &states[0];
            let parts = sections(state).unwrap();
            assert!(
                parts.iter().any(|s| s.name == "timer")
                    && parts.iter().any(|s| s.name.to_lowercase().contains("pci"))
            );

            let mut standby = start(&standby_line, standby_dir);
            prepare_standby(&mut standby.qmp, PATIENCE).unwrap();
            let memory = into_memory(state).unwrap();
            let load = load_blocking(&mut standby.qmp, memory.as_fd(), PATIENCE).unwrap();
            eprintln!(
                "{qemu} {machine:?}: loaded {} bytes in {load:?}",
                state.len()
            );
            let status = standby
                .qmp
                .call(Command::new("query-status"), PATIENCE)
                .unwrap();
            assert_eq!(status["status"], "paused");
            // The load changes nothing that a save would see, except the clock.
            let again = save(&mut standby);
            assert_eq!(again.len(), state.len());
        }
    }
}

#[test]
fn broken_state_fails_by_name_and_a_running_qemu_is_no_standby() {
    for qemu in qemus() {
        let dirs = [TestDir::new(), TestDir::new()];
        let primary_line = prepared(
            &qemu,
            &["tcg", "-machine", "pc"],
            Role::Primary,
            RamSource::Fresh,
            &dirs[0],
        );
        let standby_line = prepared(
            &qemu,
            &["tcg", "-machine", "pc"],
            Role::Backup,
            RamSource::Fresh,
            &dirs[1],
        );
        let [primary_dir, standby_dir] = dirs;
        let mut primary = start(&primary_line, primary_dir);
        let wrong = prepare_standby(&mut primary.qmp, PATIENCE).unwrap_err();
        assert!(
            matches!(&wrong, StandbyError::NotWaiting { found } if found == "running"),
            "{wrong}"
        );

        let mut state = save(&mut primary);
        assert!(check(&state[..state.len() - 1]).is_err());
        // A section that no device of the standby knows.
        let at = state.windows(5).position(|w| w == b"timer").unwrap();
        state[at..at + 5].copy_from_slice(b"tamer");
        let mut standby = start(&standby_line, standby_dir);
        prepare_standby(&mut standby.qmp, PATIENCE).unwrap();
        let memory = into_memory(&state).unwrap();
        let failed = load_blocking(&mut standby.qmp, memory.as_fd(), PATIENCE).unwrap_err();
        eprintln!("{failed}");
        assert!(
            standby.process.wait(PATIENCE).unwrap(),
            "a failed load ends the process"
        );
        assert!(standby.process.stderr_tail().contains("tamer"));
    }
}

#[test]
fn activation_is_driven_by_messages_alone() {
    for qemu in qemus() {
        let dirs = [TestDir::new(), TestDir::new()];
        let machine = ["tcg", "-machine", "q35", "-device", "virtio-net-pci"];
        let primary_line = prepared(&qemu, &machine, Role::Primary, RamSource::Fresh, &dirs[0]);
        let ram = RamSource::PrivateCopy(primary_line.ram.as_ref().unwrap().as_fd());
        let standby_line = prepared(&qemu, &machine, Role::Backup, ram, &dirs[1]);
        let [primary_dir, standby_dir] = dirs;
        let state = into_memory(&save(&mut start(&primary_line, primary_dir))).unwrap();
        let mut standby = start(&standby_line, standby_dir);
        prepare_standby(&mut standby.qmp, PATIENCE).unwrap();

        let mut activation = Activation::begin(&mut standby.qmp, state.as_fd()).unwrap();
        let mut steps = Vec::new();
        while !matches!(
            steps.last(),
            Some(Progress::Running { .. } | Progress::Failed { .. })
        ) {
            standby.qmp.wait_ready_for(PATIENCE).unwrap();
            let known = steps.len();
            let feed = &mut |message| steps.extend(activation.feed(&message));
            standby.qmp.progress(feed).unwrap();
            if matches!(steps[known..], [Progress::Loaded { .. }]) {
                activation.start(&mut standby.qmp).unwrap();
            }
        }
        eprintln!("{qemu}: {steps:?}");
        assert!(matches!(
            steps[..],
            [Progress::Loaded { .. }, Progress::Running { .. }]
        ));
        let status = standby
            .qmp
            .call(Command::new("query-status"), PATIENCE)
            .unwrap();
        assert_eq!(status["running"], true);
    }
}
