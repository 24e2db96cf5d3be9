//! The guardian as a process of its own, in front of something that can be killed.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use qemu_bridge::guardian::{self, Guardian};
use qemu_bridge::spawn::{GuestOutput, QemuProcess, SpawnOptions};

use crate::support::PATIENCE;

/// Tells this test program that it plays another part.
const PART: &str = "FT_BRIDGE_TEST_PART";

/// Not a test of its own: what the processes run that the tests start.
#[test]
fn other_part() {
    match std::env::var(PART).as_deref() {
        Ok("guardian") => guardian::main(),
        Ok(daemon) => play_daemon(daemon == "armed daemon"),
        Err(_) => {}
    }
}

/// Starts a victim and a guardian over it, says who they are, and waits to be killed.
fn play_daemon(armed: bool) {
    let victim = start_victim();
    let mut guardian = start_guardian(&victim);
    guardian.arm().unwrap();
    if !armed {
        guardian.disarm().unwrap();
    }
    println!("victim {}", victim.pid());
    std::thread::sleep(PATIENCE);
}

/// Anything that lives until it is killed will do for QEMU here.
fn start_victim() -> QemuProcess {
    let options = SpawnOptions {
        inherited: &[],
        output: GuestOutput::Discard,
        dies_with_thread: false,
    };
    QemuProcess::spawn(&["sleep".to_owned(), "60".to_owned()], &options).unwrap()
}

fn start_guardian(victim: &QemuProcess) -> Guardian {
    let part = format!("{PART}=guardian");
    let own = std::env::current_exe().unwrap();
    let arguments = [
        part.as_str(),
        own.to_str().unwrap(),
        "guardian::other_part",
        "--exact",
        "--nocapture",
    ];
    Guardian::spawn(Path::new("/usr/bin/env"), &arguments, victim.pidfd()).unwrap()
}

/// A daemon in a process of its own, and its victim's process id.
fn start_daemon(part: &str) -> (Child, Pid) {
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args(["guardian::other_part", "--exact", "--nocapture"])
        .env(PART, part)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(daemon.stdout.take().unwrap()).lines();
    let pid = lines
        .map_while(Result::ok)
        .find_map(|l| l.strip_prefix("victim ")?.parse().ok());
    (
        daemon,
        Pid::from_raw(pid.expect("the daemon names its victim")),
    )
}

/// Whether a process that isn't our child has ended; a zombie has.
fn has_ended(pid: Pid) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with('Z')),
        Err(_) => true,
    }
}

#[test]
fn armed_guardian_kills_when_the_daemon_is_killed() {
    let (mut daemon, victim) = start_daemon("armed daemon");
    assert!(!has_ended(victim));
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    while !has_ended(victim) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn disarmed_guardian_lets_live() {
    let (mut daemon, victim) = start_daemon("disarmed daemon");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    // Long after an armed one would have killed; a slow machine can only make this pass wrongly.
    std::thread::sleep(Duration::from_millis(300));
    assert!(!has_ended(victim));
    kill(victim, Signal::SIGKILL).unwrap();
}

#[test]
fn guardian_that_has_quit_lets_live() {
    let mut victim = start_victim();
    let mut guardian = start_guardian(&victim);
    guardian.arm().unwrap();
    guardian.quit().unwrap();
    assert!(victim.is_alive().unwrap());
    victim.kill().unwrap();
    assert!(victim.wait(PATIENCE).unwrap());
}

#[test]
fn guardian_outlives_signals_and_is_missed_when_killed() {
    let mut victim = start_victim();
    let mut guardian = start_guardian(&victim);
    guardian.arm().unwrap();
    let pid = Pid::from_raw(i32::try_from(guardian.pid()).unwrap());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        kill(pid, signal).unwrap();
    }
    guardian.disarm().unwrap();
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count();
    assert_eq!(descriptors, 5, "standard ones, the socket, the pidfd");
    kill(pid, Signal::SIGKILL).unwrap();
    assert!(guardian.arm().is_err());
    assert!(victim.is_alive().unwrap());
    victim.kill().unwrap();
    assert!(victim.wait(PATIENCE).unwrap());
}
