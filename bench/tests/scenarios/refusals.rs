//! What is refused, by name, before anything is touched; and what passes.

use std::fs::{self, File, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bench::cache;
use bench::daemon::Daemon;
use bench::guest::words;
use bench::process::{Process, free_port};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use serde_json::{Value, json};

use crate::on_both_qemus;
use crate::stage::{PATIENCE, Stage, not_run, wait_until};

const PRIMARY: &str = "--mode primary --peer 127.0.0.1:1";

on_both_qemus! {
    what_can_not_be_protected_is_named,
    what_is_wrong_is_said_before_anything_runs,
    what_fails_leaves_a_running_qemu_as_it_was,
    unreplicated_disks_pass_if_allowed,
    other_guests_are_refused_and_the_right_one_is_not,
    without_privileges_only_own_guests_are_protected,
}

fn what_can_not_be_protected_is_named(stage: &Stage) -> Result<()> {
    let _sweeper = Sweeper::new(stage);
    let taken = TcpListener::bind(("127.0.0.1", 0))?;
    let port = taken.local_addr()?.port().to_string();
    let disk = format!("{} -device virtio-blk-pci,drive=d", writable_disk(stage)?);
    let forward = format!(
        "-netdev user,id=n,hostfwd=tcp:127.0.0.1:{port}-:22 -device virtio-net-pci,netdev=n"
    );
    let cases = [
        ("-device nvme,serial=1", "nvme"),
        ("-device virtio-balloon-pci", "virtio-balloon"),
        (&disk, "--allow-unreplicated-disks"),
        (&forward, &port),
    ];
    for (options, named) in cases {
        for dry in ["", "--dry-run"] {
            let line = format!("{PRIMARY} {dry} -- {}", qemu(stage, 32, options)?);
            let (code, said) = talk(stage, &line)?;
            ensure!(code == 3, "{options}: {code}, not 3 (refused): {said}");
            ensure!(
                said.contains(named),
                "{options}: {named} is not named: {said}"
            );
        }
    }
    Ok(())
}

fn what_is_wrong_is_said_before_anything_runs(stage: &Stage) -> Result<()> {
    let _sweeper = Sweeper::new(stage);
    let qemu = qemu(stage, 32, "")?;
    let nowhere = stage.dir().join("nowhere.qmp").display().to_string();
    let events = stage.dir().join("missing/events").display().to_string();
    let listen = format!("127.0.0.1:{}", free_port()?);
    let cases = [
        (format!("{PRIMARY} --qmp {nowhere}"), 3, nowhere.as_str()),
        (
            format!("--mode primary --peer 192.0.2.1:1 -- {qemu}"),
            2,
            "--allow-unauthenticated",
        ),
        (
            format!("--mode backup --listen 0.0.0.0:1 -- {qemu}"),
            2,
            "--allow-unauthenticated",
        ),
        (
            format!("{PRIMARY} --epoch-ms 0 -- {qemu}"),
            2,
            "expected 1 to 10000",
        ),
        (
            format!("{PRIMARY} --qmp {nowhere} -- {qemu}"),
            2,
            "exclude each other",
        ),
        (
            format!("{PRIMARY} --events {events} -- {qemu}"),
            1,
            events.as_str(),
        ),
        (
            format!("--mode backup --listen {listen} --events {events} -- {qemu}"),
            1,
            events.as_str(),
        ),
        (
            format!("{PRIMARY} --dry-run -- {qemu}"),
            0,
            "memory-backend-file",
        ),
    ];
    for (line, expected, named) in cases {
        let (code, said) = talk(stage, &line)?;
        ensure!(code == expected, "{line}: {code}, not {expected}: {said}");
        ensure!(said.contains(named), "{line}: {named} is not named: {said}");
        ensure!(left_running(stage)?.is_empty(), "{line}: a QEMU runs");
    }
    Ok(())
}

fn what_fails_leaves_a_running_qemu_as_it_was(stage: &Stage) -> Result<()> {
    // It has a NIC, whose gate would stay.
    let _guest = stage.linux()?.guest.start(stage.dir(), "guest", false)?;
    let mut qmp = stage.qmp("guest")?;
    let mut holds = || -> Result<Value> {
        let objects = qmp.call("qom-list", json!({ "path": "/objects" }))?;
        Ok(json!([objects, qmp.call("query-fdsets", json!({}))?]))
    };
    let before = holds()?;
    let line = format!(
        "{PRIMARY} --qmp {}",
        stage.dir().join("guest.qmp").display()
    );

    // Its netdev is no tap.
    let (code, said) = talk(stage, &format!("{line} --gate plug"))?;
    ensure!(code == 3, "{code}, not 3 (refused): {said}");
    ensure!(holds()? == before, "left in QEMU: {}", holds()?);

    let events = stage.dir().join("missing/events").display().to_string();
    let (code, said) = talk(stage, &format!("{line} --events {events}"))?;
    ensure!(code == 1, "{code}, not 1: {said}");
    ensure!(said.contains(&events), "the file is not named: {said}");
    ensure!(holds()? == before, "left in QEMU: {}", holds()?);

    let control = stage.dir().join("talk.control");
    fs::write(&control, "no socket")?;
    let (code, said) = talk(stage, &line)?;
    ensure!(code == 1, "{code}, not 1: {said}");
    ensure!(said.contains("is no socket"), "{said}");
    ensure!(holds()? == before, "left in QEMU: {}", holds()?);
    Ok(())
}

fn unreplicated_disks_pass_if_allowed(stage: &Stage) -> Result<()> {
    let _sweeper = Sweeper::new(stage);
    let disk = format!("{} -device virtio-blk-pci,drive=d", writable_disk(stage)?);
    let qemu = qemu(stage, 32, &disk)?;
    let line = format!("--peer 127.0.0.1:1 --allow-unreplicated-disks -- {qemu}");
    let mut primary = Daemon::start(stage.dir(), "primary", &words(&line))?;
    primary.wait_event("attached", PATIENCE).map(drop)
}

/// A backup that has refused others protects its own guest afterwards.
fn other_guests_are_refused_and_the_right_one_is_not(stage: &Stage) -> Result<()> {
    let _sweeper = Sweeper::new(stage);
    let peer = format!("127.0.0.1:{}", free_port()?);
    let small = qemu(stage, 32, "")?;
    let line = format!("--listen {peer} -- {small}");
    let mut backup = Daemon::start(stage.dir(), "backup", &words(&line))?;
    backup.wait_event("attached", PATIENCE)?;

    let large = qemu(stage, 48, "")?;
    let device = qemu(stage, 32, "-device virtio-rng-pci")?;
    let cases = [
        ("other", &small, "this backup is for the VM test"),
        ("test", &large, "RAM"),
        ("test", &device, "virtio-rng"),
    ];
    for (vm, qemu, named) in cases {
        let line = format!("--mode primary --peer {peer} --vm-id {vm} -- {qemu}");
        let (code, said) = talk(stage, &line)?;
        ensure!(code == 3, "{qemu} as {vm}: {code}, not 3 (refused): {said}");
        ensure!(
            said.contains(named),
            "{qemu} as {vm}: {named} is not named: {said}"
        );
    }
    backup.wait_event("refused", PATIENCE)?;

    let line = format!("--peer {peer} -- {small}");
    let mut primary = Daemon::start(stage.dir(), "primary", &words(&line))?;
    primary.wait_event("synced", PATIENCE)?;
    primary.process.signal(Signal::SIGKILL)?;
    backup.wait_event("failover", PATIENCE).map(drop)
}

/// A user may protect a QEMU of their own, by comparing at least, and nobody else's.
fn without_privileges_only_own_guests_are_protected(stage: &Stage) -> Result<()> {
    const NOBODY: u32 = 65534;
    let not_run = |why: &str| not_run("a daemon without privileges", why);
    if !Uid::effective().is_root() {
        return not_run("only root can become nobody");
    }
    let as_nobody = format!("--reuid {NOBODY} --regid {NOBODY} --clear-groups --");
    let qemu = qemu(stage, 32, "")?;
    let program = qemu.split(' ').next().unwrap_or_default();
    let mut asked = std::process::Command::new("setpriv");
    asked.args(words(&as_nobody)).args([program, "--version"]);
    if !asked.output()?.status.success() {
        return not_run(&format!(
            "nobody may not run {program}, perhaps for a folder above it"
        ));
    }
    let _sweeper = Sweeper::new(stage);
    let home = stage.dir().join("nobody");
    fs::create_dir(&home)?;
    chown(&home, Some(NOBODY), Some(NOBODY))?;
    // Where it was built may be closed to others.
    let program = home.join("curling-rdma");
    fs::copy(cache::program()?, &program)?;
    let start = |name: &str, rest: &str| -> Result<Process> {
        let place = |what: &str| home.join(format!("{name}.{what}")).display().to_string();
        let (control, state, events) = (place("control"), place("state"), place("events"));
        let line = format!(
            "{as_nobody} {} {PRIMARY} --vm-id test --control {control} --state-dir {state} --events {events} {rest}",
            program.display(),
        );
        Process::start(stage.dir(), name, "setpriv", &words(&line))
    };

    for tracker in ["compare", "auto"] {
        let mut daemon = start(tracker, &format!("--tracker {tracker} -- {qemu}"))?;
        let events = home.join(format!("{tracker}.events"));
        wait_until("it attaches", PATIENCE, || {
            ensure!(
                daemon.wait(Duration::ZERO)?.is_none(),
                "it has ended: {}",
                daemon.said()
            );
            let events = fs::read_to_string(&events).unwrap_or_default();
            Ok(events.contains(r#""event":"attached""#))
        })?;
    }

    let _others = stage
        .boot_sector()?
        .guest
        .start(stage.dir(), "guest", false)?;
    stage.qmp("guest")?;
    let socket = stage.dir().join("guest.qmp");
    fs::set_permissions(&socket, Permissions::from_mode(0o777))?;
    for tracker in ["uffd", "compare"] {
        let rest = format!("--tracker {tracker} --qmp {}", socket.display());
        let mut daemon = start(&format!("others-{tracker}"), &rest)?;
        let code = daemon.wait(PATIENCE)?.context("it does not end")?.code();
        let said = daemon.said();
        ensure!(code == Some(3), "{code:?}, not 3 (refused): {said}");
        ensure!(
            said.contains("same user, or root"),
            "the way out is not named: {said}"
        );
    }
    Ok(())
}

/// The line of a small QEMU that runs nothing but firmware, and can be found by its name.
fn qemu(stage: &Stage, ram_mib: u32, options: &str) -> Result<String> {
    let guest = stage.boot_sector()?.guest;
    Ok(format!(
        "{} -name {} -machine {} -smp {} -accel tcg -m {ram_mib} -nodefaults -display none {options}",
        guest.qemu.display(),
        name(stage),
        guest.machine,
        guest.vcpus,
    ))
}

/// Of this stage alone.
fn name(stage: &Stage) -> String {
    stage
        .dir()
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn writable_disk(stage: &Stage) -> Result<String> {
    let path = stage.dir().join("disk.img");
    File::create(&path)?.set_len(1 << 20)?;
    Ok(format!(
        "-drive if=none,id=d,format=raw,file={}",
        path.display()
    ))
}

/// Runs the program to its end: its exit code and all that it has said.
fn talk(stage: &Stage, line: &str) -> Result<(i32, String)> {
    let place = |what: &str| {
        stage
            .dir()
            .join(format!("talk.{what}"))
            .display()
            .to_string()
    };
    let (front, back) = line.split_once(" -- ").unwrap_or((line, ""));
    let back = if back.is_empty() {
        String::new()
    } else {
        format!("-- {back}")
    };
    let files = format!(
        "--control {} --state-dir {}",
        place("control"),
        place("state")
    );
    let line = words(&format!("{front} {files} {back}"));
    let mut process = Process::start(stage.dir(), "talk", cache::program()?, &line)?;
    let status = process.wait(PATIENCE)?;
    let status = status.with_context(|| format!("{line:?} does not end: {}", process.said()))?;
    let code = status
        .code()
        .with_context(|| format!("ended by {status}: {}", process.said()))?;
    Ok((code, process.said()))
}

/// The QEMUs that the program has started here and left.
fn left_running(stage: &Stage) -> Result<Vec<Pid>> {
    find(&name(stage))
}

fn find(name: &str) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut arguments = line.split(|byte| *byte == 0);
        if arguments.any(|argument| argument == name.as_bytes()) {
            found.push(Pid::from_raw(pid));
        }
    }
    Ok(found)
}

/// A spawned QEMU outlives a daemon that is killed while nothing is protected.
struct Sweeper(String);

impl Sweeper {
    fn new(stage: &Stage) -> Sweeper {
        Sweeper(name(stage))
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        for pid in find(&self.0).unwrap_or_default() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}
