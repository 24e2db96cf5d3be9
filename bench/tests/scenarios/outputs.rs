//! What others on the network may have heard of a guest that is now somewhere else.

use anyhow::{Context, Result, bail, ensure};
use bench::listener::Listener;
use bench::pair::Pair;
use std::path::Path;
use std::time::Duration;

use crate::on_both_qemus;
use crate::stage::{PATIENCE, Stage, check_survivor, operate, wait_epochs, wait_until};

/// Each with a host that dies at another moment.
const KILLS: u64 = 3;

on_both_qemus! {
    output_waits_for_its_epoch,
    output_flows_when_nothing_holds_it,
    nothing_said_is_lost_in_a_planned_move,
}

/// Nobody has heard a count that the survivor doesn't remember. The same host deaths without the
/// gate show that this check can fail.
fn output_waits_for_its_epoch(stage: &Stage) -> Result<()> {
    for kill in 0..KILLS {
        let (said, remembered) = kill_a_talking_guest(stage, "auto", kill)?;
        ensure!(
            said <= remembered,
            "kill {kill}: {said} was heard, and the survivor remembers {remembered}"
        );
    }
    for kill in 0..KILLS {
        let (said, remembered) = kill_a_talking_guest(stage, "off", kill)?;
        if said > remembered {
            return Ok(());
        }
    }
    bail!("without the gate nothing was ahead either: the check sees nothing")
}

/// The last count that was heard from the guest that died, and the one that its survivor has.
fn kill_a_talking_guest(stage: &Stage, gate: &str, kill: u64) -> Result<(u64, u64)> {
    let listener = Listener::start()?;
    let dir = stage.dir().join(format!("{gate}-{kill}"));
    std::fs::create_dir(&dir)?;
    let mut pair = talking_pair(stage, &dir, &listener, gate)?;
    wait_epochs(&mut pair.primary, 30)?;
    std::thread::sleep(Duration::from_millis(7 * kill));
    pair.kill_host()?;
    let failover = check_survivor(&mut pair)?;
    let epoch = failover["epoch"]
        .as_u64()
        .context("the failover names no epoch")?;
    let remembered = pair.taken(|taken| {
        let boundary = taken.boundaries.iter().find(|b| b.number == epoch);
        boundary.map(|b| b.tick).context("no look at that boundary")
    })?;
    let heard = listener.heard();
    let first = heard
        .first()
        .context("nothing was heard of the guest")?
        .port;
    let said = heard.iter().filter(|h| h.port == first).map(|h| h.tick);
    let said = said.max().unwrap_or(0);
    // And the survivor is heard: its own packets are held by nothing.
    wait_until("the survivor is heard", PATIENCE, || {
        Ok(listener.heard().iter().any(|h| h.port != first))
    })?;
    Ok((said, remembered))
}

/// With its backup gone the guest is unprotected, and heard at once; with a new one it is held again.
fn output_flows_when_nothing_holds_it(stage: &Stage) -> Result<()> {
    use nix::sys::signal::Signal;
    let listener = Listener::start()?;
    let mut pair = talking_pair(stage, stage.dir(), &listener, "filter")?;
    wait_epochs(&mut pair.primary, 10)?;
    let ticks = || listener.heard().len();
    pair.backup.process.signal(Signal::SIGKILL)?;
    pair.standby.signal(Signal::SIGKILL)?;
    pair.primary.wait_event("backup_lost", PATIENCE)?;
    let before = ticks();
    wait_until("it is heard without a backup", PATIENCE, || {
        Ok(ticks() > before + 100)
    })?;
    pair.primary.process.signal(Signal::SIGTERM)?;
    pair.primary.wait_event("ended", PATIENCE)?;
    let before = ticks();
    wait_until("it is heard without a daemon", PATIENCE, || {
        Ok(ticks() > before + 100)
    })?;
    let objects = stage
        .qmp("guest")?
        .call("qom-list", serde_json::json!({ "path": "/objects" }))?;
    let left = objects.to_string();
    ensure!(
        !left.contains("\"ftb0\"") && !left.contains("\"ftm0\""),
        "left behind: {left}"
    );
    Ok(())
}

/// Also what the guest sends in the last moment before it is stopped is heard, once; the survivor goes on
/// with the next count.
fn nothing_said_is_lost_in_a_planned_move(stage: &Stage) -> Result<()> {
    let listener = Listener::start()?;
    let mut pair = talking_pair(stage, stage.dir(), &listener, "filter")?;
    wait_epochs(&mut pair.primary, 30)?;
    operate(&pair.primary, "switchover")?;
    pair.backup.wait_event("failover", PATIENCE)?;
    let old = listener.heard().first().context("nothing was heard")?.port;
    wait_until("the survivor is heard", PATIENCE, || {
        Ok(listener.heard().iter().filter(|h| h.port != old).count() > 100)
    })?;
    let ticks: Vec<u64> = listener.heard().iter().map(|h| h.tick).collect();
    let gap = ticks.windows(2).find(|two| two[1] != two[0] + 1);
    ensure!(gap.is_none(), "heard one after the other: {gap:?}");
    Ok(())
}

fn talking_pair(stage: &Stage, dir: &Path, listener: &Listener, gate: &str) -> Result<Pair> {
    let mut setup = stage.linux()?;
    setup.guest.say_every = 1;
    setup.guest.listener = Some(listener.port);
    setup.guest.workload_pages = 100;
    setup.options.extend(["--gate".into(), gate.into()]);
    Pair::start_relayed(dir, &setup)
}
