//! The QMP client against a real QEMU.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use crate::support::{PATIENCE, TestQemu, qemus};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::Pid;
use qemu_bridge::qmp::{Command, Incoming, Qmp, QmpError};
use qemu_bridge::spawn::{GuestOutput, QemuProcess, SpawnOptions};

const SMALL: &[&str] = &["-m", "64", "-machine", "pc", "-nodefaults"];

#[test]
fn batch_is_answered_in_order_and_events_are_kept() {
    for qemu in qemus() {
        let mut vm = TestQemu::start(&qemu, SMALL);
        vm.qmp.call(Command::new("stop"), PATIENCE).unwrap();
        let ids = vm
            .qmp
            .submit(&[
                Command::new("cont"),
                Command::new("no-such-command"),
                Command::new("query-status"),
            ])
            .unwrap();
        let status = vm.qmp.call(Command::new("query-status"), PATIENCE).unwrap();
        assert_eq!(status["running"], true);
        let mut events = Vec::new();
        let mut replies = Vec::new();
        vm.qmp
            .progress(&mut |message| match message {
                Incoming::Event { name, at_us, .. } => events.push((name, at_us)),
                Incoming::Reply { id, result } => replies.push((id, result)),
            })
            .unwrap();
        let names: Vec<_> = events.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["STOP", "RESUME"]);
        assert!(events[0].1 > 1_600_000_000_000_000 && events[0].1 <= events[1].1);
        assert_eq!(replies.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids);
        assert_eq!(replies[1].1.as_ref().unwrap_err().class, "CommandNotFound");
        assert!(replies[0].1.is_ok() && replies[2].1.is_ok());
    }
}

/// QEMU serves one client at a time, and few may queue: a further one gives up instead of hanging.
#[test]
fn monitor_that_is_taken_is_an_error() {
    for qemu in qemus() {
        let vm = TestQemu::start(&qemu, SMALL);
        let mut queued = Vec::new();
        let error = loop {
            assert!(queued.len() < 10_000, "the queue has no end");
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let client = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
            let address = UnixAddr::new(&vm.socket()).unwrap();
            match connect(client.as_raw_fd(), &address) {
                Ok(()) => queued.push(client),
                Err(error) => break error,
            }
        };
        assert_eq!(error, Errno::EAGAIN);
        let error = Qmp::connect(&vm.socket(), Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, QmpError::NoGreeting { .. }), "{error}");
    }
}

#[test]
fn descriptors_that_go_out_together_all_arrive() {
    for qemu in qemus() {
        let mut vm = TestQemu::start(&qemu, SMALL);
        let fd = memfd_create("x", MFdFlags::MFD_CLOEXEC).unwrap();
        let mut waiting: Vec<_> = (0..20)
            .map(|n| {
                let add = Command::new("add-fd").arg("fdset-id", n);
                vm.qmp.submit_with_fd(&add, fd.as_fd()).unwrap()
            })
            .collect();
        let sets = vm.qmp.call(Command::new("query-fdsets"), PATIENCE).unwrap();
        assert_eq!(sets.as_array().unwrap().len(), 20);
        vm.qmp
            .progress(&mut |message| {
                if let Incoming::Reply { id, result } = message {
                    assert!(result.is_ok(), "{result:?}");
                    waiting.retain(|w| *w != id);
                }
            })
            .unwrap();
        assert!(waiting.is_empty());
    }
}

#[test]
fn end_of_qemu_is_closed_after_its_last_event() {
    let mut vm = TestQemu::start("qemu-system-x86_64", SMALL);
    vm.qmp.submit(&[Command::new("quit")]).unwrap();
    assert!(vm.process.wait(PATIENCE).unwrap());
    let mut seen = Vec::new();
    let end = loop {
        if let Err(end) = vm.qmp.progress(&mut |message| seen.push(message)) {
            break end;
        }
    };
    assert!(matches!(end, QmpError::Closed), "{end:?}");
    assert!(
        seen.iter()
            .any(|m| matches!(m, Incoming::Event { name, .. } if name == "SHUTDOWN"))
    );
    assert!(!vm.process.is_alive().unwrap());
}

#[test]
fn second_client_is_told_that_the_socket_is_taken() {
    let vm = TestQemu::start("qemu-system-x86_64", SMALL);
    let second = Qmp::connect(&vm.socket(), std::time::Duration::from_millis(200));
    assert!(
        matches!(&second, Err(QmpError::NoGreeting { .. })),
        "{second:?}"
    );
}

#[test]
fn process_behind_a_socket_is_found_and_not_killed_by_dropping() {
    let mut vm = TestQemu::start("qemu-system-x86_64", SMALL);
    let socket = vm.socket();
    let found = QemuProcess::attach(&mut vm.qmp, &socket, PATIENCE).unwrap();
    assert_eq!(found.pid(), vm.process.pid());
    drop(found);
    assert!(vm.process.is_alive().unwrap());
}

/// The daemon reads SIGTERM from a descriptor, so its threads block it.
#[test]
fn process_takes_the_signals_that_we_block() {
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGTERM);
    blocked.thread_block().unwrap();
    let argv = ["sleep", "60"].map(str::to_owned);
    let options = SpawnOptions {
        inherited: &[],
        output: GuestOutput::Discard,
        dies_with_thread: false,
    };
    let mut process = QemuProcess::spawn(&argv, &options).unwrap();
    blocked.thread_unblock().unwrap();
    kill(Pid::from_raw(process.pid()), Signal::SIGTERM).unwrap();
    let ended = process.wait(PATIENCE).unwrap();
    process.kill().unwrap();
    assert!(ended);
}

#[test]
fn qemu_that_ends_at_once_is_quoted() {
    let argv = [
        "qemu-system-x86_64",
        "-display",
        "none",
        "-machine",
        "no-such-machine",
    ]
    .map(str::to_owned);
    let options = SpawnOptions {
        inherited: &[],
        output: GuestOutput::Discard,
        dies_with_thread: false,
    };
    let mut process = QemuProcess::spawn(&argv, &options).unwrap();
    let error = process
        .connect_qmp(std::path::Path::new("/nonexistent/qmp"), PATIENCE)
        .unwrap_err()
        .to_string();
    assert!(error.contains("unsupported machine type"), "{error}");
}
