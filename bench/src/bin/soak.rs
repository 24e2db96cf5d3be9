//! Kills hosts at chosen moments and compares every byte of the survivor.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bench::daemon::Daemon;
use bench::guest::{Guest, Work};
use bench::pair::{Pair, Setup, Watch};
use bench::process::Workplace;
use bench::report::quantiles;
use clap::Parser;
use serde_json::json;

/// Epochs that pass before a kill: the first synchronisation is over, and slots are reused.
const EPOCHS_BEFORE: usize = 5;
const PHASES: [Phase; 5] =
    [Phase::Boundary, Phase::Push, Phase::BeforeAck, Phase::Apply, Phase::Idle];

/// Kills the host of a protected guest again and again, and compares every byte of RAM that the
/// standby loads with an independent copy of the boundary that it names.
#[derive(Debug, Parser)]
struct Arguments {
    #[arg(long, default_value_t = 10)]
    kills: usize,
    /// Write the figures here, as JSON
    #[arg(long)]
    report: Option<PathBuf>,
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    #[arg(long, default_value = "pc")]
    machine: String,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// tcg or kvm
    #[arg(long, default_value = "tcg")]
    accel: String,
}

/// What the primary was doing when it was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// The guest is paused, its state is being taken.
    Boundary,
    /// Right after `cont`: chunks are on their way.
    Push,
    /// A little later: all is sent, the acknowledgement is not back.
    BeforeAck,
    /// The backup has flipped and is applying.
    Apply,
    /// Between two epochs.
    Idle,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Boundary => "boundary",
            Phase::Push => "push",
            Phase::BeforeAck => "before-ack",
            Phase::Apply => "apply",
            Phase::Idle => "idle",
        }
    }
}

/// One kill and what came of it.
#[derive(Debug)]
struct Outcome {
    exact: bool,
    total_us: u64,
    backup_rss_kib: u64,
    primary_rss_kib: u64,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut phases: BTreeMap<&str, usize> = BTreeMap::new();
    let mut outcomes = Vec::new();
    for kill in 0..arguments.kills {
        let phase = PHASES[kill % PHASES.len()];
        let outcome = kill_once(arguments, kill, phase)
            .with_context(|| format!("kill {kill} ({})", phase.name()))?;
        eprintln!(
            "soak: kill {kill:3} {:10} {:6.1} ms {}",
            phase.name(),
            outcome.total_us as f64 / 1e3,
            if outcome.exact { "bit-exact" } else { "TORN" }
        );
        *phases.entry(phase.name()).or_default() += 1;
        outcomes.push(outcome);
    }
    let exact = outcomes.iter().filter(|o| o.exact).count();
    let totals: Vec<u64> = outcomes.iter().map(|o| o.total_us).collect();
    let rss = |pick: fn(&Outcome) -> u64| outcomes.iter().map(pick).collect::<Vec<_>>();
    let report = json!({
        "kills": outcomes.len(),
        "bit_exact": exact,
        "torn": outcomes.len() - exact,
        "phase": phases,
        "failover_total_us": quantiles(&totals),
        "backup_rss_kib": quantiles(&rss(|o| o.backup_rss_kib)),
        "primary_rss_kib": quantiles(&rss(|o| o.primary_rss_kib)),
        "seed": arguments.seed,
    });
    let text = serde_json::to_string_pretty(&report)?;
    if let Some(path) = &arguments.report {
        std::fs::write(path, &text).with_context(|| format!("writing {}", path.display()))?;
    }
    println!("{text}");
    ensure!(exact == outcomes.len(), "{} of the survivors are torn", outcomes.len() - exact);
    Ok(())
}

fn kill_once(arguments: &Arguments, kill: usize, phase: Phase) -> Result<Outcome> {
    let place = Workplace::new("soak")?;
    let mut guest = Guest::tick(&arguments.qemu)?;
    guest.machine.clone_from(&arguments.machine);
    guest.accel.clone_from(&arguments.accel);
    // The boot sector writes all the time and boots in a second: many kills in little time.
    guest.work = Work::BootSector;
    guest.ram_mib = 64;
    let setup = Setup { guest, watch: Watch::AllRam, floors: false, options: Vec::new() };
    let mut pair = Pair::start(place.path(), &setup)?;
    wait_epochs(&mut pair.primary)?;
    let primary_rss_kib = rss_kib(pair.primary.process.pid().as_raw())?;
    let backup_rss_kib = rss_kib(pair.backup.process.pid().as_raw())?;

    let jitter = arguments.seed.wrapping_add(kill as u64).wrapping_mul(0x9e37_79b9) % 400;
    wait_phase(&pair, phase, Duration::from_micros(jitter))?;
    let killed_us = pair.kill_host()?;
    let failover = pair.backup.wait_event("failover", Duration::from_secs(20))?;
    let epoch = failover["epoch"].as_u64().context("the failover names no epoch")?;
    let exact = compare(&pair, epoch)?;
    pair.wait_ticking(10, Duration::from_secs(20))?;
    let resumed_us = pair.standby_proxy.seen(|seen| seen.resumed_at_us);
    let total_us = resumed_us.saturating_sub(killed_us);
    Ok(Outcome { exact, total_us, backup_rss_kib, primary_rss_kib })
}

fn wait_epochs(primary: &mut Daemon) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while primary.numbers("epoch", "epoch").len() < EPOCHS_BEFORE {
        ensure!(Instant::now() < deadline, "no epochs:\n{}", primary.process.said());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits for the beginning of a phase, and a little into it.
fn wait_phase(pair: &Pair, phase: Phase, jitter: Duration) -> Result<()> {
    let count = || pair.guest_proxy.seen(|seen| (seen.stops, seen.pauses_us.len()));
    let begun = count();
    let deadline = Instant::now() + Duration::from_secs(10);
    let wait = |reached: &dyn Fn((u64, usize)) -> bool| {
        while !reached(count()) {
            ensure!(Instant::now() < deadline, "the next boundary did not come");
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    };
    match phase {
        Phase::Boundary => wait(&|now| now.0 > begun.0)?,
        _ => wait(&|now| now.1 > begun.1)?,
    }
    std::thread::sleep(match phase {
        Phase::Boundary | Phase::Push => jitter,
        Phase::BeforeAck => Duration::from_micros(300) + jitter,
        Phase::Apply => Duration::from_micros(900) + jitter,
        Phase::Idle => Duration::from_millis(8) + jitter,
    });
    Ok(())
}

/// Whether the standby's RAM at `migrate-incoming` is that of the epoch's boundary.
fn compare(pair: &Pair, epoch: u64) -> Result<bool> {
    pair.taken(|taken| {
        let numbers: Vec<u64> = taken.boundaries.iter().map(|b| b.number).collect();
        let boundary = taken.boundaries.iter().find(|b| b.number == epoch);
        let boundary = boundary.with_context(|| format!("epoch {epoch} is not in {numbers:?}"))?;
        let copy = boundary.copy.as_ref().context("the boundary was not copied")?;
        let standby = taken.standby.as_ref().context("the standby was not copied")?;
        if let Some(difference) = copy.difference(standby) {
            eprintln!("soak: epoch {epoch}: {difference}");
            return Ok(false);
        }
        Ok(true)
    })
}

/// Memory of a daemon without the guest's RAM, which it maps but doesn't own.
fn rss_kib(pid: i32) -> Result<u64> {
    let text = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("smaps"))?;
    let mut total = 0;
    let mut counted = true;
    for line in text.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if first.contains('-') && !first.ends_with(':') {
            counted = !(line.contains("memory-backend") || line.contains("memfd:"));
        } else if let Some(size) = line.strip_prefix("Rss:").filter(|_| counted) {
            total += size.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        }
    }
    Ok(total)
}
