//! Getting into a QEMU and out of it again, without it noticing.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command as ProcessCommand, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use qemu_bridge::blocks::ram_blocks;
use qemu_bridge::guest_ram::GuestRam;
use qemu_bridge::qmp::{Command, Qmp};
use qemu_bridge::tracker::{Tracker, TrackerChoice, TrackerError, UffdTracker, choose, self_test};

use crate::guests::{Guest, MainRam};
use crate::support::{PATIENCE, TestDir, newer_qemu, qemus};

const INJECTIONS: usize = 60;

fn descriptors(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

/// Whether some of the process's memory is registered for write protection.
fn is_watched(pid: i32) -> bool {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut flags = smaps
        .lines()
        .filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.any(|flags| flags.split_whitespace().any(|flag| flag == "uw"))
}

/// The line of `/proc/PID/status` that begins with `name`.
fn status(pid: i32, name: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim().to_owned()
}

fn status_of_vm(qmp: &mut Qmp) -> String {
    let status = qmp.call(Command::new("query-status"), PATIENCE).unwrap();
    status["status"].as_str().unwrap().to_owned()
}

#[test]
fn many_injections_between_signals_and_commands_leave_no_trace() {
    for qemu in qemus() {
        let mut guest = Guest::touching(&qemu, &["-accel", "tcg"], MainRam::Shared);
        let pid = guest.vm.process.pid();
        let (before, mask) = (descriptors(pid), status(pid, "SigBlk:"));
        let over = AtomicBool::new(false);
        let Guest { vm, ram, .. } = &mut guest;
        let (commands, signals) = std::thread::scope(|scope| {
            let commands = scope.spawn(|| {
                let mut count = 0;
                while !over.load(Ordering::Relaxed) {
                    assert_eq!(status_of_vm(&mut vm.qmp), "running");
                    count += 1;
                }
                count
            });
            let signals = scope.spawn(|| {
                let mut count = 0;
                while !over.load(Ordering::Relaxed) {
                    disturb(Pid::from_raw(pid), count);
                    count += 1;
                }
                count
            });
            let end = SetOnDrop(&over);
            for _ in 0..INJECTIONS {
                let mut tracker = attach_again(ram);
                tracker.arm_all(ram).unwrap();
            }
            drop(end);
            (commands.join().unwrap(), signals.join().unwrap())
        });
        eprintln!("{qemu}: {INJECTIONS} injections, {commands} commands, {signals} signals");
        assert!(commands > 0 && signals > 0);
        assert_eq!(descriptors(pid), before, "descriptors are left in QEMU");
        assert_eq!(status(pid, "SigBlk:"), mask, "the signal mask");
        assert!(!is_watched(pid), "memory is still registered");
        // And the guest still runs, seen by one more.
        let mut tracker = UffdTracker::attach(&guest.ram).unwrap();
        guest.wait_for_loop(&mut tracker);
    }
}

/// A QEMU that another test of this process starts has a copy of the last tracker's descriptor from fork to exec.
fn attach_again(ram: &GuestRam) -> UffdTracker {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UffdTracker::attach(ram) {
            Err(TrackerError::Busy { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            attached => return attached.unwrap(),
        }
    }
}

/// Ends the other threads, also when an injection fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Signals that a QEMU has to survive: its vCPUs' kick, which it handles; a child's end; a
/// terminal's size, which it ignores; and job control.
fn disturb(pid: Pid, count: u32) {
    let harmless = [
        Signal::SIGUSR1,
        Signal::SIGCHLD,
        Signal::SIGWINCH,
        Signal::SIGURG,
    ];
    match count % 16 {
        15 => {
            kill(pid, Signal::SIGSTOP).unwrap();
            kill(pid, Signal::SIGCONT).unwrap();
        }
        other => kill(pid, harmless[other as usize % harmless.len()]).unwrap(),
    }
    std::thread::sleep(Duration::from_micros(50));
}

#[test]
fn stopped_process_stays_stopped() {
    let mut guest = Guest::touching("qemu-system-x86_64", &["-accel", "tcg"], MainRam::Shared);
    let pid = Pid::from_raw(guest.vm.process.pid());
    let is_stopped = || status(pid.as_raw(), "State:").starts_with('T');
    kill(pid, Signal::SIGSTOP).unwrap();
    wait_until(is_stopped, "QEMU stops");
    let mut tracker = UffdTracker::attach(&guest.ram).unwrap();
    assert_eq!(status(pid.as_raw(), "TracerPid:"), "0");
    wait_until(is_stopped, "QEMU goes on standing");
    kill(pid, Signal::SIGCONT).unwrap();
    assert_eq!(status_of_vm(&mut guest.vm.qmp), "running");
    guest.wait_for_loop(&mut tracker);
}

fn wait_until(mut holds: impl FnMut() -> bool, what: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn dropping_a_tracker_unregisters_and_lets_another_one_in() {
    for main in [MainRam::Shared, MainRam::Private] {
        let mut guest = Guest::touching("qemu-system-x86_64", &["-accel", "tcg"], main);
        let pid = guest.vm.process.pid();
        let before = descriptors(pid);
        for _ in 0..3 {
            let mut tracker = UffdTracker::attach(&guest.ram).unwrap();
            assert_eq!(
                descriptors(pid),
                before,
                "QEMU keeps no descriptor meanwhile either"
            );
            assert!(is_watched(pid));
            guest.wait_for_loop(&mut tracker);
            drop(tracker);
            assert!(!is_watched(pid));
        }
    }
}

#[test]
fn sandboxed_qemu_is_tracked_too() {
    // As libvirt starts it. With spawn=deny a child can't come of a system call of ours either.
    let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    let arguments = ["-accel", "tcg", "-sandbox", sandbox];
    for qemu in qemus() {
        let mut guest = Guest::touching(&qemu, &arguments, MainRam::Shared);
        assert_eq!(
            status(guest.vm.process.pid(), "Seccomp:"),
            "2",
            "a filter is on"
        );
        let mut tracker = UffdTracker::attach(&guest.ram).unwrap();
        guest.wait_for_loop(&mut tracker);
    }
}

/// `PID SOCKET` for the helper.
const HELPER_TARGET: &str = "FT_TEST_TRACK_AND_WAIT";

/// Not a test: the process that [`killed_daemon_leaves_qemu_as_it_was`] kills.
#[test]
#[ignore = "run by another test"]
fn helper_that_tracks_and_waits() {
    let Ok(target) = std::env::var(HELPER_TARGET) else {
        return;
    };
    let (pid, socket) = target.split_once(' ').unwrap();
    let pid = pid.parse().unwrap();
    let mut qmp = Qmp::connect(Path::new(socket), PATIENCE).unwrap();
    let blocks = ram_blocks(&mut qmp, pid, PATIENCE).unwrap();
    let ram = GuestRam::open(pid, &blocks).unwrap();
    let mut tracker = UffdTracker::attach(&ram).unwrap();
    tracker.arm_all(&ram).unwrap();
    println!("\ntracking");
    std::thread::sleep(PATIENCE * 10);
}

#[test]
fn killed_daemon_leaves_qemu_as_it_was() {
    let dir = TestDir::new();
    let socket = dir.0.join("second");
    let server = format!("unix:{},server=on,wait=off", socket.display());
    let arguments = ["-accel", "tcg", "-qmp", &server];
    let mut guest = Guest::touching("qemu-system-x86_64", &arguments, MainRam::Shared);
    let pid = guest.vm.process.pid();
    let before = descriptors(pid);
    for _ in 0..3 {
        let helper = ProcessCommand::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "inject::helper_that_tracks_and_waits",
                "--ignored",
                "--nocapture",
            ])
            .env(HELPER_TARGET, format!("{pid} {}", socket.display()))
            .stdout(Stdio::piped())
            .spawn();
        let mut helper = KilledAtEnd(helper.unwrap());
        let mut said = BufReader::new(helper.0.stdout.take().unwrap()).lines();
        assert!(
            said.any(|line| line.unwrap() == "tracking"),
            "the helper tracks"
        );
        assert!(is_watched(pid));
        drop(helper);
        assert!(
            !is_watched(pid),
            "the kernel unregisters what a dead process had"
        );
    }
    let mut tracker = UffdTracker::attach(&guest.ram).unwrap();
    guest.wait_for_loop(&mut tracker);
    // The helpers' connections end when QEMU has seen them end.
    wait_until(|| descriptors(pid) == before, "no descriptor is left");
}

struct KilledAtEnd(Child);

impl Drop for KilledAtEnd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn missing_privilege_names_the_cure_and_compare_is_the_way_out() {
    for qemu in qemus() {
        // A newer QEMU can have all of its blocks shared: comparing them needs no privilege.
        let shared = qemu == newer_qemu();
        let machine = if shared { "pc,aux-ram-share=on" } else { "pc" };
        let arguments = ["-accel", "tcg", "-machine", machine, "-nodefaults"];
        let mut guest = Guest::start(&qemu, &arguments, MainRam::Shared, 64);
        guest.stop();
        let ram = &guest.ram;
        std::thread::scope(|scope| {
            let unprivileged = scope.spawn(|| {
                // SAFETY: the raw system call takes numbers only. It changes the ids of this
                // thread alone, which ends right afterwards.
                let dropped = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
                assert_eq!(dropped, 0);
                let refused = choose(TrackerChoice::Uffd, ram).unwrap_err();
                assert!(
                    matches!(refused, TrackerError::NotPermitted { .. }),
                    "{refused}"
                );
                let text = refused.to_string();
                assert!(text.contains("CAP_SYS_PTRACE") && text.contains("--tracker compare"));
                if shared {
                    let (mut tracker, said) = choose(TrackerChoice::Auto, ram).unwrap();
                    assert!(said.contains("CAP_SYS_PTRACE"), "{said}");
                    self_test(tracker.as_mut(), ram).unwrap();
                }
            });
            unprivileged.join().unwrap();
        });
    }
}

#[test]
fn debugger_is_named() {
    let guest = Guest::touching("qemu-system-x86_64", &["-accel", "tcg"], MainRam::Shared);
    let pid = Pid::from_raw(guest.vm.process.pid());
    ptrace::seize(pid, ptrace::Options::empty()).unwrap();
    let refused = UffdTracker::attach(&guest.ram).unwrap_err();
    assert!(matches!(refused, TrackerError::Traced { .. }), "{refused}");
}
