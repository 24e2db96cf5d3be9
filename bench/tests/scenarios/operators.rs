//! Planned moves, and losses of the backup.

use anyhow::{Result, ensure};
use bench::pair::Pair;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::on_both_qemus;
use crate::stage::{PATIENCE, Stage, exit_code, operate, run_state, wait_epochs, wait_until};

on_both_qemus! {
    backup_is_killed_and_another_attached,
    detached_and_attached_again,
    detached_while_the_backup_is_silent,
    moved_there_and_back,
    device_is_plugged_while_protected,
}

fn backup_is_killed_and_another_attached(stage: &Stage) -> Result<()> {
    let setup = stage.boot_sector()?;
    let mut pair = stage.pair(&setup)?;
    wait_epochs(&mut pair.primary, 5)?;
    pair.backup.process.signal(Signal::SIGKILL)?;
    pair.standby.signal(Signal::SIGKILL)?;
    let lost = pair.primary.wait_event("backup_lost", PATIENCE)?;
    ensure!(lost["proven"] == true, "its death was not proven: {lost}");
    guest_runs(stage, &pair)?;

    let synced = pair.primary.numbers("synced", "epoch").len();
    let mut second = stage.new_backup("second", &setup, &pair.peer)?;
    wait_until("the new backup is synchronised", PATIENCE, || {
        Ok(pair.primary.numbers("synced", "epoch").len() > synced)
    })?;
    wait_epochs(&mut pair.primary, 5)?;
    pair.kill_host()?;
    second.daemon.wait_event("failover", PATIENCE)?;
    survivor_runs(&second)
}

fn detached_and_attached_again(stage: &Stage) -> Result<()> {
    let setup = stage.boot_sector()?;
    let mut pair = stage.pair(&setup)?;
    wait_epochs(&mut pair.primary, 5)?;
    operate(&pair.primary, "detach")?;
    ensure!(
        exit_code(&mut pair.primary)? == 0,
        "the primary's daemon: not a clean end"
    );
    guest_runs(stage, &pair)?;

    // The standby waits for the next primary.
    let qmp = stage.dir().join("guest.qmp");
    let mut primary = stage.new_primary("again", &setup, &pair.peer, &qmp)?;
    primary.wait_event("synced", PATIENCE)?;
    wait_epochs(&mut primary, 5)?;
    primary.process.signal(Signal::SIGKILL)?;
    pair.guest.signal(Signal::SIGKILL)?;
    pair.backup.wait_event("failover", PATIENCE)?;
    pair.wait_ticking(10, PATIENCE)
}

/// It says what it waits for: leaving at once would let the backup start a second copy.
fn detached_while_the_backup_is_silent(stage: &Stage) -> Result<()> {
    let mut setup = stage.boot_sector()?;
    setup.options = ["--failover-after-ms", "2000"].map(str::to_owned).to_vec();
    let mut pair = stage.pair(&setup)?;
    wait_epochs(&mut pair.primary, 5)?;
    pair.backup.process.signal(Signal::SIGSTOP)?;
    pair.primary.wait_event("fenced", PATIENCE)?;
    pair.primary.process.signal(Signal::SIGTERM)?;
    let says_why = |event: &serde_json::Value| {
        event["text"]
            .as_str()
            .is_some_and(|t| t.contains("the detach waits for the backup"))
    };
    pair.primary
        .wait_for("word of the wait", PATIENCE, says_why)?;
    pair.backup.process.signal(Signal::SIGCONT)?;
    ensure!(
        exit_code(&mut pair.primary)? == 0,
        "the primary's daemon: not a clean end"
    );
    guest_runs(stage, &pair)
}

fn moved_there_and_back(stage: &Stage) -> Result<()> {
    let setup = stage.boot_sector()?;
    let mut pair = stage.pair(&setup)?;
    wait_epochs(&mut pair.primary, 5)?;
    operate(&pair.primary, "switchover")?;
    let moved = pair.backup.wait_event("failover", PATIENCE)?;
    ensure!(moved["reason"] == "switchover", "{moved}");
    ensure!(
        exit_code(&mut pair.primary)? == 0,
        "the primary's daemon: not a clean end"
    );
    ensure!(
        pair.guest.wait(PATIENCE)?.is_some(),
        "the old guest was not ended"
    );
    pair.wait_ticking(10, PATIENCE)?;

    // Its guest is the only copy, which a guardian must leave alone.
    pair.backup.process.signal(Signal::SIGKILL)?;
    ensure!(
        pair.backup.process.wait(PATIENCE)?.is_some(),
        "the daemon does not die"
    );
    let mut home = stage.new_backup("home", &setup, &pair.peer)?;
    let qmp = stage.dir().join("standby.qmp");
    let mut primary = stage.new_primary("there", &setup, &pair.peer, &qmp)?;
    primary.wait_event("synced", PATIENCE)?;
    wait_epochs(&mut primary, 5)?;
    operate(&primary, "switchover")?;
    home.daemon.wait_event("failover", PATIENCE)?;
    ensure!(
        exit_code(&mut primary)? == 0,
        "the primary's daemon: not a clean end"
    );
    ensure!(
        pair.standby.wait(PATIENCE)?.is_some(),
        "the old guest was not ended"
    );
    survivor_runs(&home)
}

/// QEMU sends no event for it.
fn device_is_plugged_while_protected(stage: &Stage) -> Result<()> {
    let mut setup = stage.boot_sector()?;
    let mut arguments = json!({ "driver": "virtio-rng-pci", "id": "plugged" });
    if stage.kind.machine == "q35" {
        setup
            .guest
            .devices
            .push("pcie-root-port,id=port0,chassis=1".into());
        arguments["bus"] = "port0".into();
    }
    let mut pair = stage.pair(&setup)?;
    wait_epochs(&mut pair.primary, 5)?;
    stage.qmp("guest")?.call("device_add", arguments)?;
    let names_it = |event: &serde_json::Value| {
        event["text"]
            .as_str()
            .is_some_and(|t| t.contains("plugged"))
    };
    pair.primary
        .wait_for("word of the device", PATIENCE, names_it)?;
    ensure!(
        exit_code(&mut pair.primary)? == 1,
        "the guest is not lost, and this was not asked for"
    );
    guest_runs(stage, &pair)
}

fn guest_runs(stage: &Stage, pair: &Pair) -> Result<()> {
    let mut qmp = stage.qmp("guest")?;
    wait_until("the guest is running", PATIENCE, || {
        Ok(run_state(&mut qmp)? == "running")
    })?;
    let first = pair.guest_memory.read_u64(pair.tick_page)?;
    wait_until("the guest counts on", PATIENCE, || {
        Ok(pair.guest_memory.read_u64(pair.tick_page)? > first + 10)
    })
}

fn survivor_runs(backup: &crate::stage::Backup) -> Result<()> {
    let mut qmp = bench::qmp::Qmp::connect(&backup.dir.join("standby.test"))?;
    ensure!(
        run_state(&mut qmp)? == "running",
        "the survivor does not run"
    );
    let memory = bench::memory::Memory::open(backup.standby.pid(), &qmp.human("info ramblock")?)?;
    let first = memory.read_u64(0x8000)?;
    ensure!(first > 0, "the survivor's counter is empty");
    wait_until("the survivor counts on", PATIENCE, || {
        Ok(memory.read_u64(0x8000)? > first + 10)
    })
}
