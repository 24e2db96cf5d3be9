//! What the guest or its operator does while it is protected.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bench::pair::{Pair, Watch};
use bench::process::Process;
use bench::qmp::Qmp;
use serde_json::json;

use crate::on_both_qemus;
use crate::stage::{
    PATIENCE, Stage, check_survivor, exit_code, not_run, ram_file, run_state, wait_epochs,
    wait_until,
};

on_both_qemus! {
    guest_reboots_before_and_after,
    guest_powers_off,
    operator_stops_and_continues,
    stopped_guest_survives_stopped_with_its_screen,
    mostly_empty_guest_stays_empty,
    busy_guest_is_copied_before_its_pauses,
}

fn guest_reboots_before_and_after(stage: &Stage) -> Result<()> {
    let mut pair = stage.pair(&stage.linux()?)?;
    wait_epochs(&mut pair.primary, 5)?;
    stage.type_at("guest", b'r')?;
    stage.wait_boots("guest", 2)?;
    wait_epochs(&mut pair.primary, 5)?;
    pair.kill_host()?;
    pair.backup.wait_event("failover", PATIENCE)?;
    stage.type_at("standby", b'r')?;
    stage.wait_boots("standby", 1)
}

fn guest_powers_off(stage: &Stage) -> Result<()> {
    let mut pair = stage.pair(&stage.linux()?)?;
    wait_epochs(&mut pair.primary, 5)?;
    stage.type_at("guest", b'p')?;
    ensure!(
        exit_code(&mut pair.primary)? == 0,
        "the primary's daemon: not a clean end"
    );
    ensure!(
        exit_code(&mut pair.backup)? == 0,
        "the backup's daemon: not a clean end"
    );
    ensure!(
        pair.guest.wait(PATIENCE)?.is_some(),
        "the guest's QEMU did not end"
    );
    ensure!(
        pair.backup.numbers("failover", "epoch").is_empty(),
        "a failover after a power-off"
    );
    Ok(())
}

fn operator_stops_and_continues(stage: &Stage) -> Result<()> {
    let mut setup = stage.boot_sector()?;
    setup.watch = Watch::Tick;
    let mut pair = stage.pair(&setup)?;
    wait_epochs(&mut pair.primary, 5)?;
    let mut qmp = stage.qmp("guest")?;
    stop(&pair, &mut qmp)?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(
        run_state(&mut qmp)? == "paused",
        "an operator's stop was undone"
    );
    qmp.call("cont", json!({}))?;
    pair.primary.wait_event("guest_resumed", PATIENCE)?;
    wait_epochs(&mut pair.primary, 5)?;
    pair.kill_host()?;
    pair.backup.wait_event("failover", PATIENCE)?;
    pair.wait_ticking(10, PATIENCE)
}

fn stopped_guest_survives_stopped_with_its_screen(stage: &Stage) -> Result<()> {
    let mut setup = stage.boot_sector()?;
    setup.guest.vga = true;
    setup.watch = Watch::Tick;
    let mut pair = stage.pair(&setup)?;
    wait_epochs(&mut pair.primary, 5)?;
    stop(&pair, &mut stage.qmp("guest")?)?;
    wait_quiet(&pair)?;
    let before = screen(stage, "guest", &mut stage.qmp("guest")?)?;
    ensure!(
        before.iter().skip(16).any(|byte| *byte != 0),
        "the screen is black"
    );
    pair.kill_host()?;
    pair.backup.wait_event("failover", PATIENCE)?;
    let mut survivor = stage.qmp("standby")?;
    ensure!(
        run_state(&mut survivor)? == "paused",
        "a stopped guest was started"
    );
    ensure!(
        screen(stage, "standby", &mut survivor)? == before,
        "the screens differ"
    );
    survivor.call("cont", json!({}))?;
    pair.wait_ticking(10, PATIENCE)
}

/// Stops the guest as an operator. QEMU takes a `stop` for done, and says nothing, while the guest
/// stands still for a boundary, and the boundary's `cont` then undoes it: hence the repetition.
fn stop(pair: &Pair, qmp: &mut Qmp) -> Result<()> {
    wait_until("the guest is stopped", PATIENCE, || {
        if pair.primary.numbers("guest_stopped", "time_us").is_empty() {
            qmp.call("stop", json!({}))?;
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(!pair.primary.numbers("guest_stopped", "time_us").is_empty())
    })
}

/// A stopped guest has a last epoch: waits until no other has come for a while.
fn wait_quiet(pair: &Pair) -> Result<()> {
    let mut last = None;
    wait_until("epochs cease", PATIENCE, || {
        let before = last.replace(pair.backup.numbers("flipped", "epoch").len());
        std::thread::sleep(Duration::from_secs(1));
        Ok(before == Some(pair.backup.numbers("flipped", "epoch").len()))
    })
}

fn screen(stage: &Stage, role: &str, qmp: &mut Qmp) -> Result<Vec<u8>> {
    let path = stage.dir().join(format!("{role}.ppm"));
    let _ = std::fs::remove_file(&path);
    qmp.call("screendump", json!({ "filename": path }))?;
    std::fs::read(&path).context("reading the screen")
}

/// Neither side's daemon may fill the holes of the RAM.
fn mostly_empty_guest_stays_empty(stage: &Stage) -> Result<()> {
    const USED_MAX: u64 = 64 << 20;
    let mut setup = stage.boot_sector()?;
    setup.guest.ram_mib = 4096;
    setup.watch = Watch::Tick;
    let mut pair = stage.pair(&setup)?;
    wait_epochs(&mut pair.primary, 5)?;
    let used = |pair: &Pair| Ok::<_, anyhow::Error>((used(&pair.guest)?, used(&pair.standby)?));
    let (guest, standby) = used(&pair)?;
    ensure!(
        guest < USED_MAX && standby < USED_MAX,
        "{guest} and {standby} bytes are in use"
    );
    pair.kill_host()?;
    check_survivor(&mut pair)?;
    Ok(())
}

/// What a QEMU's RAM takes.
fn used(qemu: &Process) -> Result<u64> {
    Ok(std::fs::metadata(ram_file(qemu)?)?.blocks() * 512)
}

/// With the tracker that can: a page that is copied in advance is one less that the guest waits for.
fn busy_guest_is_copied_before_its_pauses(stage: &Stage) -> Result<()> {
    const PAGES: u32 = 900;
    let mut setup = stage.linux()?;
    setup.guest.workload_pages = PAGES;
    let mut pair = stage.pair(&setup)?;
    let attached = pair.primary.wait_event("attached", PATIENCE)?;
    if attached["tracker"] != "uffd" {
        let why = format!(
            "only uffd can, and the tracker here is {}",
            attached["tracker"]
        );
        return not_run("copying pages before a pause", &why);
    }
    wait_until("pages are copied before a pause", PATIENCE, || {
        wait_epochs(&mut pair.primary, 5)?;
        let copied = pair.primary.numbers("epoch", "precopied_pages");
        Ok(copied.iter().any(|pages| *pages > u64::from(PAGES / 2)))
    })?;
    pair.kill_host()?;
    check_survivor(&mut pair)?;
    Ok(())
}
