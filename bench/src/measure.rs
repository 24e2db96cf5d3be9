//! What a protected guest is judged by: how long it stands still, and how fast it is elsewhere.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::pair::{Pair, Setup, now_us};
use crate::process::Workplace;

/// After the first epoch a rehearsal holds the applies for a while; that is not the usual course.
const SETTLE: Duration = Duration::from_secs(2);
const FAILOVER_PATIENCE: Duration = Duration::from_secs(20);

/// The parts of an epoch, in microseconds, as the daemons say it.
#[derive(Clone, Copy, Debug)]
pub struct Epoch {
    pub pause_us: u64,
    pub stop_us: u64,
    /// From `stop`'s reply until the device state is saved; the harvest goes on meanwhile.
    pub save_us: u64,
    pub harvest_us: u64,
    pub scan_us: u64,
    pub copy_us: u64,
    pub cont_us: u64,
    /// From `stop` submitted: it is moved before the guest stands still.
    pub gate_us: u64,
    /// From `cont`'s reply until all chunks are ready.
    pub seal_us: u64,
    /// From there to the acknowledgement: push, check, flip, and the way back.
    pub push_us: u64,
    /// From there until the epoch's output has left.
    pub release_us: u64,
    /// From `cont`'s reply to the acknowledgement: seal, push, check, flip, and the way back.
    pub commit_us: u64,
    pub dirty_pages: u64,
    /// Of those, the ones that were copied before the pause.
    pub precopied_pages: u64,
    pub bytes: u64,
}

/// What the backup says of one acknowledged epoch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flip {
    /// From the first chunk to the last.
    pub arrive_us: u64,
    /// From there until all are checked.
    pub check_us: u64,
    /// From there to the flip.
    pub flip_us: u64,
    /// How long it took to apply the epoch before.
    pub apply_us: u64,
}

/// What was seen of a protected guest for some time.
#[derive(Clone, Debug, Default)]
pub struct Boundaries {
    /// STOP → RESUME of the daemon's boundaries.
    pub pauses_us: Vec<u64>,
    /// STOP → RESUME of the same QMP commands alone, on the same guest in between.
    pub floors_us: Vec<u64>,
    pub epochs: Vec<Epoch>,
    pub flips: Vec<Flip>,
    pub elapsed: Duration,
    /// As the daemon says it.
    pub gate: String,
    pub tracker: String,
    pub qemu: String,
}

impl Boundaries {
    /// One figure of every epoch.
    pub fn of(&self, pick: impl Fn(&Epoch) -> u64) -> Vec<u64> {
        self.epochs.iter().map(pick).collect()
    }
}

/// Protects a guest and watches its boundaries for `time`.
///
/// # Errors
/// It can't be protected, or protection ends early.
pub fn boundaries(setup: &Setup, time: Duration) -> Result<Boundaries> {
    let place = Workplace::new("measure")?;
    let mut pair = Pair::start(place.path(), setup)?;
    std::thread::sleep(SETTLE);
    let from_us = now_us();
    let floors_before = pair.guest_proxy.seen(|seen| seen.floors_us.len());
    std::thread::sleep(time);
    let until_us = now_us();
    ensure!(
        pair.primary.process.wait(Duration::ZERO)?.is_none(),
        "the primary has ended: {}",
        pair.primary.process.said()
    );
    let (pauses_us, floors_us) = pair.guest_proxy.seen(|seen| {
        let during = seen.pauses.iter().filter(|pause| pause.began_us >= from_us);
        let pauses = during.map(|pause| pause.took_us).collect();
        (pauses, seen.floors_us[floors_before..].to_vec())
    });
    let events = pair.primary.events();
    let attached = events.iter().find(|e| e["event"] == "attached");
    let attached = attached.context("the primary has said nothing of its guest")?;
    let text = |field: &str| attached[field].as_str().unwrap_or_default().to_owned();
    let during = from_us..=until_us;
    Ok(Boundaries {
        pauses_us,
        floors_us,
        epochs: epochs(&events, |at| during.contains(&at)),
        flips: flips(&pair.backup.events(), |at| during.contains(&at)),
        elapsed: Duration::from_micros(until_us - from_us),
        gate: text("gate"),
        tracker: text("tracker"),
        qemu: text("qemu_version"),
    })
}

/// The epochs that were acknowledged at a time that `counts`, from the log of a primary.
pub fn epochs(primary: &[Value], counts: impl Fn(u64) -> bool) -> Vec<Epoch> {
    let epoch = |event: &Value| {
        let number = |field: &str| event[field].as_u64();
        let phase = |name: &str| event["phases_us"][name].as_u64();
        Some(Epoch {
            pause_us: number("pause_us")?,
            stop_us: phase("stop")?,
            save_us: phase("save")?,
            harvest_us: phase("harvest")?,
            scan_us: phase("scan")?,
            copy_us: phase("copy")?,
            cont_us: phase("cont")?,
            gate_us: phase("gate")?,
            seal_us: phase("seal")?,
            push_us: phase("push")?,
            release_us: phase("release")?,
            commit_us: number("commit_us")?,
            dirty_pages: number("dirty_pages")?,
            precopied_pages: number("precopied_pages")?,
            bytes: number("bytes")?,
        })
    };
    let wanted = |e: &&Value| is_delta(e, "epoch", &counts);
    primary.iter().filter(wanted).filter_map(epoch).collect()
}

/// The same of a backup's log.
fn flips(backup: &[Value], counts: impl Fn(u64) -> bool) -> Vec<Flip> {
    let flip = |event: &Value| {
        let phase = |name: &str| event["phases_us"][name].as_u64();
        Some(Flip {
            arrive_us: phase("arrive")?,
            check_us: phase("check")?,
            flip_us: phase("flip")?,
            apply_us: phase("apply_before")?,
        })
    };
    let wanted = |e: &&Value| is_delta(e, "flipped", &counts);
    backup.iter().filter(wanted).filter_map(flip).collect()
}

fn is_delta(event: &Value, name: &str, counts: impl Fn(u64) -> bool) -> bool {
    event["event"] == name
        && event["kind"] == "delta"
        && event["time_us"].as_u64().is_some_and(counts)
}

/// How long a guest was gone, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Failover {
    /// From the first kill(2) to the backup's decision.
    pub detect_us: u64,
    /// From the decision until the daemon knows that the guest runs.
    pub activate_us: u64,
    /// From the first kill(2) to the standby's RESUME.
    pub total_us: u64,
}

/// Protects a guest, kills its QEMU and its daemon `after` it has settled, and waits for the standby.
///
/// # Errors
/// There is no failover, or the guest does not count on.
pub fn failover(setup: &Setup, after: Duration) -> Result<Failover> {
    let place = Workplace::new("failover")?;
    let mut pair = Pair::start(place.path(), setup)?;
    std::thread::sleep(SETTLE + after);
    let killed_us = pair.kill_host()?;
    let failover = pair.backup.wait_event("failover", FAILOVER_PATIENCE)?;
    pair.wait_ticking(10, FAILOVER_PATIENCE)?;
    let events = pair.backup.events();
    let decided = events.iter().find(|e| e["event"] == "activating");
    let decided_us = decided.and_then(|e| e["time_us"].as_u64());
    let decided_us = decided_us.context("the backup tells no decision")?;
    let resumed_us = pair.standby_proxy.seen(|seen| seen.resumed_at_us);
    ensure!(
        resumed_us > killed_us,
        "the standby has said nothing of running"
    );
    Ok(Failover {
        detect_us: decided_us.saturating_sub(killed_us),
        activate_us: failover["activate_us"]
            .as_u64()
            .context("the failover has no time")?,
        total_us: resumed_us - killed_us,
    })
}
