//! Kills hosts at chosen moments and compares every byte of the survivor.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bench::draw::Draw;
use bench::guest::{Guest, Work};
use bench::kill::{Kill, Phase, kill_in, resident_kib};
use bench::listener::Listener;
use bench::pair::{Pair, Setup, Watch};
use bench::process::Workplace;
use bench::report::{quantile, quantiles};
use clap::Parser;
use serde_json::{Value, json};

/// Epochs that pass before a kill: the first synchronisation is over, and slots are reused.
const EPOCHS_BEFORE: usize = 8;
/// Long enough that the guest runs on, and writes, between two boundaries: each of them takes as
/// long as a copy of all RAM.
const EPOCH_MS: &str = "300";
/// Between the kills RAM is compared as well, by the product's own audits.
const AUDIT_EVERY: &str = "4";
/// Copies on a busy machine must not look like a dead host: what is tested here is proof of death.
const FAILOVER_AFTER_MS: &str = "10000";
/// Kills per phase that a long run must have.
const KILLS_PER_PHASE: usize = 3;
const PAGE_BYTES: u64 = 4096;
/// What a daemon may have beside its epochs, in KiB.
const ALLOWANCE_KIB: u64 = 64 << 10;

/// Kills the host of a protected guest again and again, and compares every byte of RAM that the
/// standby loads with an independent copy of the boundary that the failover names.
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
    vcpus: u32,
    #[arg(long, default_value = "auto")]
    tracker: String,
    /// Draws the moments of the kills
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Network cards of the guest; their output waits in the gate
    #[arg(long, default_value_t = 2)]
    nics: u32,
    /// `kvm` runs a boot sector in place of Linux, with no network
    #[arg(long, default_value = "tcg")]
    accel: String,
    /// More options for the primary's daemon, after `--`
    #[arg(last = true)]
    options: Vec<String>,
}

/// One kill and what came of it.
#[derive(Debug)]
struct Outcome {
    kill: Kill,
    exact: bool,
    /// First kill(2) to the standby's RESUME, without the time that its load was held here.
    total_us: u64,
    blocks: Vec<String>,
    audits: usize,
    /// What the guest has said, and was let out.
    packets: usize,
    memory: Memory,
}

/// Of the daemons just before the kill.
#[derive(Clone, Copy, Debug)]
struct Memory {
    primary_kib: u64,
    backup_kib: u64,
    /// Of the largest epoch, the first synchronisation aside.
    epoch_kib: u64,
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
    let mut draw = Draw(arguments.seed);
    let mut hit = Vec::new();
    let mut outcomes = Vec::new();
    for number in 0..arguments.kills {
        let aim = Phase::rarest(&hit);
        let outcome = kill_once(arguments, aim, draw.number())
            .with_context(|| format!("kill {number} of --seed {} ({aim})", arguments.seed))?;
        eprintln!(
            "soak: kill {number:3} {:10} {:6.1} ms {}",
            outcome.kill.phase,
            outcome.total_us as f64 / 1e3,
            if outcome.exact { "bit-exact" } else { "TORN" }
        );
        hit.push(outcome.kill.phase);
        outcomes.push(outcome);
    }
    let report = report(arguments, &hit, &outcomes);
    let text = serde_json::to_string_pretty(&report)?;
    if let Some(path) = &arguments.report {
        std::fs::write(path, &text).with_context(|| format!("writing {}", path.display()))?;
    }
    println!("{text}");
    check(arguments, &hit, &outcomes)
}

fn kill_once(arguments: &Arguments, aim: Phase, draw: u64) -> Result<Outcome> {
    let place = Workplace::new("soak")?;
    let mut guest = Guest::tick(&arguments.qemu)?;
    guest.machine.clone_from(&arguments.machine);
    guest.accel.clone_from(&arguments.accel);
    guest.vcpus = arguments.vcpus;
    guest.nics = arguments.nics;
    let listener = Listener::start()?;
    guest.listener = Some(listener.port);
    guest.say_every = 1;
    if guest.accel == "kvm" {
        guest.work = Work::BootSector;
    }
    let options = [
        ("--tracker", arguments.tracker.as_str()),
        ("--epoch-ms", EPOCH_MS),
        // Waiting output asks for boundaries as well.
        ("--min-epoch-ms", EPOCH_MS),
        ("--audit-every", AUDIT_EVERY),
        ("--failover-after-ms", FAILOVER_AFTER_MS),
    ];
    let options = options.iter().flat_map(|(name, value)| [*name, *value]);
    let own = options.map(str::to_owned);
    let options = own.chain(arguments.options.iter().cloned()).collect();
    let setup = Setup {
        guest,
        watch: Watch::AllRam,
        floors: None,
        options,
    };
    let mut pair = Pair::start_relayed(place.path(), &setup)?;
    wait_epochs(&mut pair)?;
    let missing = &pair.guest_memory.missing;
    ensure!(
        missing.is_empty(),
        "RAM blocks that can't be found from outside: {missing:?}"
    );
    let memory = memory(&pair)?;
    let audits = audits(&pair)?;
    let packets = listener.heard().len();

    let kill = kill_in(&mut pair, aim, draw)?;
    let failover = pair
        .backup
        .wait_event("failover", Duration::from_secs(20))?;
    let epoch = failover["epoch"]
        .as_u64()
        .context("the failover names no epoch")?;
    let allowed = kill.oldest..=kill.newest;
    ensure!(
        allowed.contains(&epoch),
        "resumed from epoch {epoch}, not from one of {allowed:?}"
    );
    let exact = compare(&pair, epoch)?;
    pair.wait_ticking(10, Duration::from_secs(20))?;
    let resumed_us = pair.standby_proxy.seen(|seen| seen.resumed_at_us);
    let held_us = pair.taken(|taken| taken.standby_held.as_micros() as u64);
    let total_us = resumed_us
        .saturating_sub(kill.at_us)
        .saturating_sub(held_us);
    let blocks = pair
        .guest_memory
        .blocks
        .iter()
        .map(|block| block.name.clone())
        .collect();
    Ok(Outcome {
        kill,
        exact,
        total_us,
        blocks,
        audits,
        packets,
        memory,
    })
}

/// How many audits there were; all of them must have found RAM equal.
fn audits(pair: &Pair) -> Result<usize> {
    let events = pair.primary.events();
    let audits: Vec<_> = events.iter().filter(|e| e["event"] == "audit").collect();
    let different: Vec<_> = audits.iter().filter(|e| e["ok"] != true).collect();
    ensure!(
        different.is_empty(),
        "{} audits found a difference: {different:?}",
        different.len()
    );
    Ok(audits.len())
}

fn wait_epochs(pair: &mut Pair) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while pair.primary.numbers("epoch", "epoch").len() < EPOCHS_BEFORE {
        ensure!(
            Instant::now() < deadline,
            "no epochs:\n{}",
            pair.primary.process.said()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn memory(pair: &Pair) -> Result<Memory> {
    let events = pair.primary.events();
    let deltas = events
        .iter()
        .filter(|e| e["event"] == "epoch" && e["kind"] == "delta");
    // What was harvested: packed, less of it is sent.
    let harvested = |e: &Value| {
        Some(
            e["bytes"]
                .as_u64()?
                .max(e["dirty_pages"].as_u64()? * PAGE_BYTES),
        )
    };
    let largest = deltas.filter_map(harvested).max().unwrap_or(0);
    Ok(Memory {
        primary_kib: resident_kib(pair.primary.process.pid(), &pair.guest_memory)?,
        backup_kib: resident_kib(pair.backup.process.pid(), &pair.standby_memory)?,
        epoch_kib: largest.div_ceil(1024),
    })
}

/// Whether the standby's RAM at `migrate-incoming` is that of the epoch's boundary.
fn compare(pair: &Pair, epoch: u64) -> Result<bool> {
    pair.taken(|taken| {
        let numbers: Vec<u64> = taken.boundaries.iter().map(|b| b.number).collect();
        let boundary = taken.boundaries.iter().find(|b| b.number == epoch);
        let boundary = boundary.with_context(|| format!("epoch {epoch} is not in {numbers:?}"))?;
        let copy = boundary
            .copy
            .as_ref()
            .context("the boundary was not copied")?;
        let standby = taken
            .standby
            .as_ref()
            .context("the standby was not copied")?;
        if let Some(difference) = copy.difference(standby) {
            eprintln!("soak: epoch {epoch}: {difference}");
            return Ok(false);
        }
        Ok(true)
    })
}

fn report(arguments: &Arguments, hit: &[Phase], outcomes: &[Outcome]) -> Value {
    let exact = outcomes.iter().filter(|o| o.exact).count();
    let phases: BTreeMap<String, usize> = Phase::ALL
        .iter()
        .map(|phase| {
            (
                phase.to_string(),
                hit.iter().filter(|it| *it == phase).count(),
            )
        })
        .collect();
    // Where the backup was stopped to look at it, the time is ours, not the product's.
    let undisturbed = outcomes.iter().filter(|o| !o.kill.backup_stopped);
    let totals: Vec<u64> = undisturbed.map(|o| o.total_us).collect();
    let of = |pick: fn(&Memory) -> u64| -> Vec<u64> {
        outcomes.iter().map(|o| pick(&o.memory)).collect()
    };
    json!({
        "kills": outcomes.len(),
        "bit_exact": exact,
        "torn": outcomes.len() - exact,
        "phase": phases,
        "audits": outcomes.iter().map(|o| o.audits).sum::<usize>(),
        "packets": outcomes.iter().map(|o| o.packets).sum::<usize>(),
        "nics": arguments.nics,
        "blocks_compared": outcomes.first().map(|o| &o.blocks),
        "failover_total_us": quantiles(&totals),
        "failovers_timed": totals.len(),
        "primary_kib": memory_figures(&of(|m| m.primary_kib)),
        "backup_kib": memory_figures(&of(|m| m.backup_kib)),
        "largest_epoch_kib": of(|m| m.epoch_kib).into_iter().max(),
        "seed": arguments.seed,
        "qemu": arguments.qemu,
        "machine": arguments.machine,
        "vcpus": arguments.vcpus,
        "accel": arguments.accel,
    })
}

fn memory_figures(kib: &[u64]) -> Value {
    let ten = kib.len().min(10);
    json!({
        "max": quantile(kib, 100),
        "first_ten_p50": quantile(&kib[..ten], 50),
        "last_ten_p50": quantile(&kib[kib.len() - ten..], 50),
    })
}

fn check(arguments: &Arguments, hit: &[Phase], outcomes: &[Outcome]) -> Result<()> {
    let torn = outcomes.iter().filter(|o| !o.exact).count();
    ensure!(torn == 0, "{torn} of the survivors are torn");
    for Memory {
        primary_kib,
        backup_kib,
        epoch_kib,
    } in outcomes.iter().map(|o| o.memory)
    {
        let (primary, backup) = (epoch_kib + ALLOWANCE_KIB, 2 * epoch_kib + ALLOWANCE_KIB);
        // `compare` keeps a shadow of all RAM.
        let bounded = arguments.tracker != "compare";
        ensure!(
            !bounded || primary_kib <= primary,
            "the primary has {primary_kib} KiB, not {primary}"
        );
        ensure!(
            backup_kib <= backup,
            "the backup has {backup_kib} KiB, not {backup}"
        );
    }
    for outcome in outcomes {
        ensure!(outcome.audits > 0, "a run without an audit");
        let silent = arguments.accel != "kvm" && outcome.packets == 0;
        ensure!(!silent, "nothing was heard of the guest");
    }
    if outcomes.len() >= 2 * KILLS_PER_PHASE * Phase::ALL.len() {
        for phase in Phase::ALL {
            let count = hit.iter().filter(|it| **it == phase).count();
            ensure!(
                count >= KILLS_PER_PHASE,
                "only {count} kills were in the phase {phase}"
            );
        }
    }
    Ok(())
}
