//! Protects a real Linux guest, kills its host in mid-flight, and shows it carry on.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
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
    let setup = Setup {
        guest,
        watch: Watch::Tick,
        floors: true,
        options: vec![
            "--audit-every".into(),
            AUDIT_EVERY.to_string(),
            "--tracker".into(),
            arguments.tracker.clone(),
        ],
    };
    say("booting a Linux guest under QEMU, and a standby QEMU that waits …");
    let mut pair = Pair::start(place.path(), &setup)?;
    let before = pair.guest_memory.read_u64(pair.tick_page)?;
    say(&format!("protected; the guest counts, and is at {before}"));
    wait_epochs(&mut pair, arguments)?;
    // In the middle of whatever it is at.
    std::thread::sleep(Duration::from_micros(arguments.seed.wrapping_mul(7919) % 40_000));

    say("SIGKILL to the guest's QEMU and its daemon: the host is dead");
    let killed_us = pair.kill_host()?;
    let failover = pair.backup.wait_event("failover", Duration::from_secs(20))?;
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
        ensure!(pair.primary.process.wait(Duration::ZERO)?.is_none(), "{}", pair.primary.process.said());
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
    let attached = pair.primary.events().into_iter().find(|e| e["event"] == "attached");
    let attached = attached.context("no attached event")?;
    let epochs = pair.primary.numbers("epoch", "epoch");
    let audits = pair.primary.events();
    let audits: Vec<_> = audits.iter().filter(|e| e["event"] == "audit").collect();
    let mismatches = audits.iter().filter(|e| e["ok"] != true).count();
    // Audited boundaries hash all of RAM while the guest stands still: they are not pauses of
    // the product's ordinary operation, and are left out by the epoch's own record.
    let pauses = pair.guest_proxy.seen(|seen| seen.pauses_us.clone());
    let ordinary: Vec<u64> = pair
        .primary
        .events()
        .iter()
        .filter(|e| e["event"] == "epoch")
        .filter(|e| e["epoch"].as_u64().is_some_and(|n| n % AUDIT_EVERY != 0))
        .filter_map(|e| e["pause_us"].as_u64())
        .collect();
    let floors = pair.guest_proxy.seen(|seen| seen.floors_us.clone());
    let resumed_us = pair.standby_proxy.seen(|seen| seen.resumed_at_us);
    let epoch = failover["epoch"].as_u64().context("the failover names no epoch")?;
    let (acknowledged, first) = pair.taken(|taken| {
        let boundary = taken.boundaries.iter().find(|b| b.number == epoch).map(|b| b.tick);
        (boundary, taken.standby_tick)
    });
    let acknowledged = acknowledged.context("no copy of the acknowledged boundary")?;
    let first = first.context("the standby's counter was not seen")?;
    Ok(json!({
        "qemu": attached["qemu_version"],
        "accel": attached["accel"],
        "machine": setup.guest.machine,
        "guest_ram_mib": setup.guest.ram_mib,
        "transport": "tcp",
        "tracker": attached["tracker"],
        "epochs": epochs.len(),
        "pause_us": quantiles(&trim(&pauses, ordinary.len())),
        "daemon_pause_us": quantiles(&ordinary),
        "floor_us": quantiles(&floors),
        "floors": floors.len(),
        "commit_us": quantiles(&pair.primary.numbers("epoch", "commit_us")),
        "dirty_pages": quantiles(&pair.primary.numbers("epoch", "dirty_pages")),
        "audits": { "run": audits.len(), "mismatches": mismatches },
        "failover": {
            "detect_us": failover["detect_us"],
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

/// Without the longest ones, as many as there were audits.
fn trim(pauses: &[u64], ordinary: usize) -> Vec<u64> {
    let mut sorted = pauses.to_vec();
    sorted.sort_unstable();
    sorted.truncate(ordinary.min(sorted.len()));
    sorted
}

fn check(report: &Value) -> Result<()> {
    let number = |a: &str, b: &str| report[a][b].as_u64().unwrap_or(u64::MAX);
    ensure!(report["audits"]["mismatches"] == 0, "an audit found a difference");
    ensure!(number("guest", "ticks_lost") == 0, "the guest lost acknowledged counts");
    let last = number("guest", "last_tick_acknowledged");
    let first = number("guest", "first_tick_after");
    ensure!(first == last || first == last + 1, "the guest resumed at {first}, not {last}");
    Ok(())
}

fn say(text: &str) {
    eprintln!("demo: {text}");
}
