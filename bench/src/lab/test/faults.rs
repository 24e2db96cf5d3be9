//! Faults done to a pair on two hosts, and whether all that was promised for them holds.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::failovers::{self, Count, Death};
use super::pair::{LEASE_MS, PATIENCE, PORT, Pair, Plan};
use super::stand::Role;
use crate::lab::check::say;
use crate::lab::{Command, Host, Lab};

/// Connections that bring garbage.
pub(super) const GARBAGE: usize = 1000;
/// Requests for an RDMA connection that belong to no pairing.
const GARBAGE_RDMA: usize = 5;
/// In a page that the guest doesn't write.
const SILENT_WRITE_AT: u64 = (24 << 20) + 123;
/// A cut that is mended while the lease runs, shorter and longer than a queue pair's patience.
const SHORT_CUTS_MS: [u64; 2] = [1000, LEASE_MS * 5 / 8];

/// The cable is cut in these directions for good: the primary stops its guest before the backup
/// starts its own, and when the cable is whole again the primary learns that it is over.
///
/// # Errors
/// Any of that isn't so.
pub(super) fn cut(lab: &Lab, from: &[Host]) -> Result<()> {
    let pair = Pair::protected(lab, &Plan::new("rdma"))?;
    pair.wait_epochs(2)?;
    from.iter().for_each(|&host| lab.cut(host));
    let outcome = cut_off(&pair);
    Host::BOTH.into_iter().for_each(|host| lab.mend(host));
    outcome?;
    let ended = pair.wait(Role::Primary, "ended", PATIENCE)?;
    // 4: the other host runs the guest now.
    ensure!(ended["exit_code"] == 4, "the primary ended with {ended}");
    Ok(())
}

fn cut_off(pair: &Pair<'_>) -> Result<()> {
    let activating = pair.wait(Role::Backup, "activating", PATIENCE)?;
    let fenced = pair.count(Role::Primary, |it| it["event"] == "fenced");
    ensure!(
        fenced == 1,
        "the backup activates, and the primary was fenced {fenced} times"
    );
    ensure!(
        activating["reason"] == "silence",
        "not for silence: {activating}"
    );
    let survivor = pair.survivor()?;
    ensure!(survivor.torn.is_none(), "torn: {survivor:?}");
    let stands = pair.counter(Role::Primary)?;
    std::thread::sleep(Duration::from_millis(500));
    let later = pair.counter(Role::Primary)?;
    ensure!(
        stands == later,
        "two copies run: the primary's counts from {stands} to {later}"
    );
    Ok(())
}

/// Garbage at the backup's ports: nothing changes.
///
/// # Errors
/// Something does.
pub(super) fn garbage(pair: &Pair<'_>) -> Result<()> {
    pair.tell(
        Role::Primary,
        &format!("garbage {}:{PORT} {GARBAGE}", Host::B.address()),
    )?;
    let call = format!("rping -c -a {} -p {PORT} -C 1", Host::B.address());
    say(
        pair.lab,
        Host::A,
        &format!("for i in $(seq {GARBAGE_RDMA}); do ! timeout 10 {call} 2>/dev/null; done"),
    )?;
    pair.wait_for("end of the garbage", PATIENCE, || {
        Ok(pair
            .said(Role::Primary)
            .into_iter()
            .find(|it| it["stand"] == "thrown"))
    })?;
    // A summary comes ten seconds after the first of its refusals.
    pair.wait_for("refusal by name of all garbage", PATIENCE, || {
        let refused = pair
            .events(Role::Backup)
            .into_iter()
            .filter(|it| it["event"] == "refused");
        let count: u64 = refused.filter_map(|it| it["count"].as_u64()).sum();
        Ok((count >= GARBAGE as u64).then_some(()))
    })?;
    undisturbed(pair)
}

/// A write that no page table shows: the audit's negative control.
///
/// # Errors
/// It is not found, or not mended.
pub(super) fn silent_write(pair: &Pair<'_>) -> Result<()> {
    let audits =
        |ok: bool| pair.count(Role::Primary, |it| it["event"] == "audit" && it["ok"] == ok);
    pair.wait_for("clean audit", PATIENCE, || {
        Ok((audits(true) > 0).then_some(()))
    })?;
    ensure!(
        audits(false) == 0,
        "an audit failed before anything was done"
    );
    let qemu = pair.pid(Role::Primary, "qemu")?;
    say(
        pair.lab,
        Host::A,
        &format!(
            "for file in /proc/{qemu}/fd/*; do \
             case $(readlink $file) in /memfd:memory-backend-memfd*) \
             printf Z | dd of=$file bs=1 seek={SILENT_WRITE_AT} conv=notrunc status=none; exit; \
             esac; done; exit 1"
        ),
    )?;
    pair.wait(Role::Primary, "tainted", PATIENCE)?;
    let mended = pair.wait(Role::Primary, "untainted", PATIENCE)?;
    let mended = mended["epoch"].as_u64().context("no epoch")?;
    let next = pair.wait_for("audit after that", PATIENCE, || {
        let later = |it: &serde_json::Value| {
            it["event"] == "audit" && it["epoch"].as_u64().is_some_and(|epoch| epoch > mended)
        };
        Ok(pair.events(Role::Primary).into_iter().find(later))
    })?;
    ensure!(next["ok"] == true, "not mended: {next}");
    Ok(())
}

/// The cable is cut, and whole again before the lease ends: everything goes on.
///
/// # Errors
/// It doesn't.
pub(super) fn cut_and_mended(pair: &Pair<'_>, round: usize) -> Result<()> {
    Host::BOTH.into_iter().for_each(|host| pair.lab.cut(host));
    std::thread::sleep(Duration::from_millis(
        SHORT_CUTS_MS[round % SHORT_CUTS_MS.len()],
    ));
    Host::BOTH.into_iter().for_each(|host| pair.lab.mend(host));
    undisturbed(pair)
}

fn undisturbed(pair: &Pair<'_>) -> Result<()> {
    pair.wait_epochs(3)?;
    for kind in ["fenced", "backup_lost"] {
        let seen = pair.count(Role::Primary, |it| it["event"] == kind);
        ensure!(seen == 0, "the primary says {kind}");
    }
    let activated = pair.count(Role::Backup, |it| it["event"] == "activating");
    ensure!(activated == 0, "the backup activates");
    Ok(())
}

/// The RDMA device of one host goes while epochs are pushed: the pair goes on over TCP.
///
/// # Errors
/// It doesn't, or the survivor of a death after that is torn.
pub(super) fn device_removed(lab: &Lab, host: Host, draw: u64, count: &mut Count) -> Result<()> {
    let plan = Plan {
        epoch_ms: 50,
        ..Plan::new("auto")
    };
    let pair = Pair::protected(lab, &plan)?;
    pair.wait_epochs(2)?;
    pair.ensure_transport("RDMA")?;
    // It may last as long as somebody holds on to the device.
    let removing = lab.spawn(host, &Command::new("rdma", &["link", "delete", "rxe0"]))?;
    let went_on = pair
        .wait_for("change to TCP", PATIENCE, || {
            Ok(pair.ensure_transport("TCP").ok())
        })
        .and_then(|()| undisturbed(&pair))
        .and_then(|()| {
            let devices = say(lab, host, "rdma link show")?;
            ensure!(devices.is_empty(), "the device is still there: {devices}");
            Ok(())
        });
    let survived = went_on.and_then(|()| pair.audited()).and_then(|audits| {
        count.audits += audits;
        failovers::death(&pair, Death::Processes, draw, count)
    });
    drop((removing, pair));
    if survived.is_ok() {
        say(lab, host, "rdma link add rxe0 type rxe netdev eth0")?;
    } else {
        lab.kill(host);
        lab.boot(&[host])?;
    }
    survived
}

/// The backup can't lock memory: demanded RDMA is refused with the cure, else it is TCP.
///
/// # Errors
/// It isn't so.
pub(super) fn no_lockable_memory(lab: &Lab, demanded: bool) -> Result<()> {
    let plan = Plan {
        backup_prefix: "ulimit -l 64; exec setpriv --bounding-set=-ipc_lock --inh-caps=-ipc_lock",
        ..Plan::new(if demanded { "rdma" } else { "auto" })
    };
    let why = "can be locked in memory";
    if demanded {
        let pair = Pair::start(lab, &plan)?;
        return pair.wait_for("refusal with the cure", PATIENCE, || {
            let log = pair.log(Role::Backup);
            Ok((log.contains(why) && log.contains("ulimit -l")).then_some(()))
        });
    }
    let pair = Pair::protected(lab, &plan)?;
    pair.wait_epochs(2)?;
    let said = pair.transport().unwrap_or_default();
    ensure!(
        said.starts_with("transport: TCP") && said.contains(why),
        "{said}"
    );
    undisturbed(&pair)
}
