//! Everything that can die, or seem dead.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bench::pair::Pair;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::on_both_qemus;
use crate::stage::{PATIENCE, Stage, check_survivor, exit_code, wait_epochs, wait_until};

on_both_qemus! {
    host_is_killed,
    standby_dies_while_it_loads,
    only_qemu_is_killed,
    only_the_daemon_is_killed,
    frozen_daemon_ends_its_guest,
    frozen_qemu_waits_for_the_backups_word,
    host_is_killed_while_ram_is_compared,
    link_is_cut_again_and_again,
}

fn host_is_killed(stage: &Stage) -> Result<()> {
    let mut pair = stage.pair(&stage.boot_sector()?)?;
    wait_epochs(&mut pair.primary, 5)?;
    pair.kill_host()?;
    let failover = check_survivor(&mut pair)?;
    ensure!(
        failover["reason"] == "proof-of-death",
        "not at once: {failover}"
    );
    Ok(())
}

/// A fresh one takes over on the same RAM.
fn standby_dies_while_it_loads(stage: &Stage) -> Result<()> {
    let mut pair = stage.pair(&stage.boot_sector()?)?;
    wait_epochs(&mut pair.primary, 5)?;
    // It will be asked, and not answer.
    pair.standby.signal(Signal::SIGSTOP)?;
    pair.kill_host()?;
    pair.backup.wait_event("activating", PATIENCE)?;
    pair.standby.signal(Signal::SIGKILL)?;
    pair.backup.wait_event("failover", PATIENCE)?;
    // Made of the same command line, so it has the same socket for the test.
    let mut fresh = stage.qmp("standby")?;
    let counter = format!("xp /1gx {:#x}", pair.tick_page);
    let first = fresh.human(&counter);
    let counts = first.and_then(|first| {
        wait_until("the survivor's counter rises", PATIENCE, || {
            Ok(fresh.human(&counter)? != first)
        })
    });
    // It is nobody's child here.
    fresh.call("quit", json!({}))?;
    counts
}

fn only_qemu_is_killed(stage: &Stage) -> Result<()> {
    let mut pair = stage.pair(&stage.boot_sector()?)?;
    wait_epochs(&mut pair.primary, 5)?;
    pair.guest.signal(Signal::SIGKILL)?;
    let failover = check_survivor(&mut pair)?;
    ensure!(
        failover["reason"] != "silence",
        "the daemon did not say so: {failover}"
    );
    let code = exit_code(&mut pair.primary)?;
    ensure!(
        code == 4,
        "the primary's daemon ended with {code}, not 4 (failed over)"
    );
    Ok(())
}

/// The guardian kills QEMU, and that proves the death.
fn only_the_daemon_is_killed(stage: &Stage) -> Result<()> {
    let mut pair = stage.pair(&stage.boot_sector()?)?;
    wait_epochs(&mut pair.primary, 5)?;
    pair.primary.process.signal(Signal::SIGKILL)?;
    let failover = check_survivor(&mut pair)?;
    ensure!(
        failover["reason"] == "proof-of-death",
        "not at once: {failover}"
    );
    ensure!(
        pair.guest.wait(PATIENCE)?.is_some(),
        "the old guest runs on"
    );
    Ok(())
}

fn frozen_daemon_ends_its_guest(stage: &Stage) -> Result<()> {
    let mut setup = stage.boot_sector()?;
    setup.options = ["--failover-after-ms", "2000"].map(str::to_owned).to_vec();
    let mut pair = stage.pair(&setup)?;
    wait_epochs(&mut pair.primary, 5)?;
    pair.primary.process.signal(Signal::SIGSTOP)?;
    let failover = check_survivor(&mut pair)?;
    ensure!(
        failover["reason"] == "silence",
        "a frozen daemon proves nothing: {failover}"
    );
    pair.primary.process.signal(Signal::SIGCONT)?;
    primary_has_ended(&mut pair)?;
    pair.wait_ticking(10, PATIENCE)
}

/// The old daemon knows that it has failed over, and its guest is gone.
fn primary_has_ended(pair: &mut Pair) -> Result<()> {
    let code = exit_code(&mut pair.primary)?;
    ensure!(
        code == 4,
        "the primary's daemon ended with {code}, not 4 (failed over)"
    );
    ensure!(pair.guest.wait(PATIENCE)?.is_some(), "two guests run");
    Ok(())
}

/// A QEMU that can't even stop its guest is frozen; what becomes of it is the backup's to say: it goes
/// on if the backup has only been silent, and is ended if that has taken over.
fn frozen_qemu_waits_for_the_backups_word(stage: &Stage) -> Result<()> {
    let mut setup = stage.boot_sector()?;
    setup.options = ["--failover-after-ms", "2000"].map(str::to_owned).to_vec();
    let mut pair = stage.pair(&setup)?;
    wait_epochs(&mut pair.primary, 5)?;
    pair.guest.signal(Signal::SIGSTOP)?;
    pair.backup.process.signal(Signal::SIGSTOP)?;
    pair.primary.wait_event("fenced", PATIENCE)?;
    pair.backup.process.signal(Signal::SIGCONT)?;
    pair.primary.wait_event("unfenced", PATIENCE)?;
    wait_epochs(&mut pair.primary, 10)?;

    pair.guest.signal(Signal::SIGSTOP)?;
    pair.primary.process.signal(Signal::SIGSTOP)?;
    // Saves were given up before: this pair can't tell which copy is the survivor's.
    pair.backup.wait_event("failover", PATIENCE)?;
    pair.primary.process.signal(Signal::SIGCONT)?;
    primary_has_ended(&mut pair)
}

/// An epoch that was on its way is settled by the next hello, and what its deltas were made against
/// with it.
fn link_is_cut_again_and_again(stage: &Stage) -> Result<()> {
    const CUTS: u64 = 12;
    let mut setup = stage.boot_sector()?;
    setup.options = ["--deltas", "on", "--audit-every", "5"]
        .map(str::to_owned)
        .to_vec();
    let mut pair = Pair::start_relayed(stage.dir(), &setup)?;
    for cut in 0..CUTS {
        wait_epochs(&mut pair.primary, 4)?;
        std::thread::sleep(Duration::from_millis(cut * 7));
        pair.relay.as_ref().context("it has a relay")?.cut();
    }
    wait_epochs(&mut pair.primary, 6)?;
    let events = pair.primary.events();
    let count = |kind: &str| events.iter().filter(|e| e["event"] == kind).count();
    ensure!(count("backup_lost") == 0, "a cut proves nobody's death");
    let different = events
        .iter()
        .filter(|e| e["event"] == "audit" && e["ok"] != true)
        .count();
    ensure!(
        count("audit") > 0 && different == 0,
        "{different} audits found a difference"
    );
    pair.kill_host()?;
    check_survivor(&mut pair).map(drop)
}

fn host_is_killed_while_ram_is_compared(stage: &Stage) -> Result<()> {
    let mut setup = stage.boot_sector()?;
    setup
        .options
        .extend(["--tracker", "compare"].map(str::to_owned));
    let mut pair = stage.pair(&setup)?;
    wait_epochs(&mut pair.primary, 5)?;
    pair.kill_host()?;
    check_survivor(&mut pair).map(drop)
}
