//! Protects a real Linux guest, kills its host in mid-flight, and shows it carry on.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bench::floor::Floor;
use bench::guest::Guest;
use bench::pair::{Pair, Setup, Watch};
use bench::process::Workplace;
use bench::report::quantiles;
use clap::Parser;
use serde_json::{Value, json};

/// Of how many epochs one is audited.
const AUDIT_EVERY: u64 = 20;
const EPOCHS_MIN: usize = 200;

/// Protects a Linux guest, kills its host with SIGKILL, and shows the guest carry on.
#[derive(Debug, Parser)]
struct Arguments {
    /// Write the figures here, as JSON
    #[arg(long)]
    report: Option<PathBuf>,
    /// Which QEMU
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// How long the guest is protected before its host is killed; more if 200 epochs take longer
    #[arg(long, default_value_t = 12)]
    seconds: u64,
    /// Draws the moment of the kill
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value = "pc")]
    machine: String,
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    #[arg(long, default_value = "auto")]
    tracker: String,
    /// More options for the primary's daemon, after `--`
    #[arg(last = true)]
    options: Vec<String>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let place = Workplace::new("demo")?;
    let mut guest = Guest::tick(&arguments.qemu)?;
    guest.machine.clone_from(&arguments.machine);
    guest.vcpus = arguments.vcpus;
    let mut options = vec![
        "--audit-every".into(),
        AUDIT_EVERY.to_string(),
        "--tracker".into(),
        arguments.tracker.clone(),
    ];
    options.extend_from_slice(&arguments.options);
    let setup = Setup {
        guest,
        watch: Watch::Tick,
        floors: Some(Floor::Gated),
        options,
    };
    say("booting a Linux guest under QEMU, and a standby QEMU that waits …");
    let mut pair = Pair::start(place.path(), &setup)?;
    let before = pair.guest_memory.read_u64(pair.tick_page)?;
    say(&format!("protected; the guest counts, and is at {before}"));
    wait_epochs(&mut pair, arguments)?;
    // In the middle of whatever it is at.
    std::thread::sleep(Duration::from_micros(
        arguments.seed.wrapping_mul(7919) % 40_000,
    ));

    say("SIGKILL to the guest's QEMU and its daemon: the host is dead");
    let killed_us = pair.kill_host()?;
    let failover = pair
        .backup
        .wait_event("failover", Duration::from_secs(20))?;
    pair.wait_ticking(500, Duration::from_secs(30))?;
    let report = report(&pair, &setup, killed_us, &failover)?;
    let text = serde_json::to_string_pretty(&report)?;
    if let Some(path) = &arguments.report {
        std::fs::write(path, &text).with_context(|| format!("writing {}", path.display()))?;
    }
    let guest = &report["guest"];
    say(&format!(
        "the guest runs on, {:.1} ms after the kill: last acknowledged count {}, first count after {}, lost {}",
        report["failover"]["total_us"].as_u64().unwrap_or(0) as f64 / 1e3,
        guest["last_tick_acknowledged"],
        guest["first_tick_after"],
        guest["ticks_lost"]
    ));
    println!("{text}");
    check(&report)
}

fn wait_epochs(pair: &mut Pair, arguments: &Arguments) -> Result<()> {
    let began = std::time::Instant::now();
    let enough = Duration::from_secs(arguments.seconds);
    loop {
        std::thread::sleep(Duration::from_millis(250));
        ensure!(
            pair.primary.process.wait(Duration::ZERO)?.is_none(),
            "{}",
            pair.primary.process.said()
        );
        let epochs = pair.primary.numbers("epoch", "epoch").len();
        let audits = pair.primary.numbers("audit", "epoch").len();
        if began.elapsed() >= enough && epochs >= EPOCHS_MIN && audits >= 10 {
            return Ok(());
        }
        ensure!(
            began.elapsed() < enough + Duration::from_secs(120),
            "only {epochs} epochs and {audits} audits:\n{}",
            pair.primary.process.said()
        );
    }
}

fn report(pair: &Pair, setup: &Setup, killed_us: u64, failover: &Value) -> Result<Value> {
    let attached = pair
        .primary
        .events()
        .into_iter()
        .find(|e| e["event"] == "attached");
    let attached = attached.context("no attached event")?;
    let epochs = pair.primary.numbers("epoch", "epoch");
    let audits = pair.primary.events();
    let audits: Vec<_> = audits.iter().filter(|e| e["event"] == "audit").collect();
    let mismatches = audits.iter().filter(|e| e["ok"] != true).count();
    let boundaries = boundaries(pair);
    // Audited boundaries hash all of RAM while the guest stands still: they have their own line.
    let (audited, ordinary) = pauses(pair, &boundaries);
    let floors = pair.guest_proxy.seen(|seen| seen.floors_us.clone());
    // The backup's own figure counts from the last heartbeat, which is before the kill.
    let decided = pair
        .backup
        .events()
        .into_iter()
        .find(|e| e["event"] == "activating");
    let decided_us = decided.and_then(|e| e["time_us"].as_u64());
    let decided_us = decided_us.context("the backup tells no decision")?;
    let resumed_us = pair.standby_proxy.seen(|seen| seen.resumed_at_us);
    let epoch = failover["epoch"]
        .as_u64()
        .context("the failover names no epoch")?;
    let of_epoch = boundaries.iter().rev().find(|b| b.epoch == epoch);
    let acknowledged = of_epoch
        .context("no look at the acknowledged boundary")?
        .tick;
    let first = pair
        .taken(|taken| taken.standby_tick)
        .context("the standby's counter was not seen")?;
    Ok(json!({
        "qemu": attached["qemu_version"],
        "accel": attached["accel"],
        "machine": setup.guest.machine,
        "guest_ram_mib": setup.guest.ram_mib,
        "transport": "tcp",
        "tracker": attached["tracker"],
        "epochs": epochs.len(),
        "pause_us": quantiles(&ordinary),
        "pause_with_audit_us": quantiles(&audited),
        "floor_us": quantiles(&floors),
        "floors": floors.len(),
        "commit_us": quantiles(&pair.primary.numbers("epoch", "commit_us")),
        "dirty_pages": quantiles(&pair.primary.numbers("epoch", "dirty_pages")),
        "precopied_pages": quantiles(&pair.primary.numbers("epoch", "precopied_pages")),
        "sent_bytes": quantiles(&pair.primary.numbers("epoch", "bytes")),
        "audits": { "run": audits.len(), "mismatches": mismatches },
        "failover": {
            "detect_us": decided_us.saturating_sub(killed_us),
            "activate_us": failover["activate_us"],
            "total_us": resumed_us.saturating_sub(killed_us),
            "epoch": epoch,
            "reason": failover["reason"],
        },
        "guest": {
            "last_tick_acknowledged": acknowledged,
            "first_tick_after": first,
            "ticks_lost": acknowledged.saturating_sub(first),
        },
    }))
}

/// A boundary that was seen at the proxy.
#[derive(Clone, Copy, Debug)]
struct Boundary {
    epoch: u64,
    cont_us: u64,
    tick: u64,
}

/// Gives every boundary its epoch: the first whose acknowledgement was counted from a `cont` that
/// was not earlier. An aborted boundary gets the epoch that took its dirt over. Behind the last
/// acknowledged epoch there can be one more.
fn boundaries(pair: &Pair) -> Vec<Boundary> {
    let resumed: Vec<(u64, u64)> = (pair.primary.events().iter())
        .filter(|e| e["event"] == "epoch")
        .filter_map(|e| {
            let written_us = e["time_us"].as_u64()?;
            Some((written_us - e["commit_us"].as_u64()?, e["epoch"].as_u64()?))
        })
        .collect();
    let next = resumed.last().map_or(1, |(_, epoch)| epoch + 1);
    let seen: Vec<_> =
        pair.taken(|taken| taken.boundaries.iter().map(|b| (b.at_us, b.tick)).collect());
    let epoch = |cont_us| {
        resumed
            .iter()
            .find(|(at, _)| *at >= cont_us)
            .map_or(next, |(_, e)| *e)
    };
    let named = |(cont_us, tick)| Boundary {
        epoch: epoch(cont_us),
        cont_us,
        tick,
    };
    seen.into_iter().map(named).collect()
}

/// The pauses in microseconds: of audited boundaries, and of all others.
fn pauses(pair: &Pair, boundaries: &[Boundary]) -> (Vec<u64>, Vec<u64>) {
    let (mut audited, mut ordinary) = (Vec::new(), Vec::new());
    for pause in pair.guest_proxy.seen(|seen| seen.pauses.clone()) {
        let during = pause.began_us..=pause.began_us + pause.took_us;
        // Without a save it is no boundary: the test at the attach that writes are seen.
        let Some(boundary) = boundaries.iter().find(|b| during.contains(&b.cont_us)) else {
            continue;
        };
        let list = if boundary.epoch % AUDIT_EVERY == 0 {
            &mut audited
        } else {
            &mut ordinary
        };
        list.push(pause.took_us);
    }
    (audited, ordinary)
}

fn check(report: &Value) -> Result<()> {
    let number = |a: &str, b: &str| report[a][b].as_u64().unwrap_or(u64::MAX);
    ensure!(
        report["audits"]["mismatches"] == 0,
        "an audit found a difference"
    );
    ensure!(
        number("guest", "ticks_lost") == 0,
        "the guest lost acknowledged counts"
    );
    let last = number("guest", "last_tick_acknowledged");
    let first = number("guest", "first_tick_after");
    ensure!(
        first == last || first == last + 1,
        "the guest resumed at {first}, not {last}"
    );
    Ok(())
}

fn say(text: &str) {
    eprintln!("demo: {text}");
}
