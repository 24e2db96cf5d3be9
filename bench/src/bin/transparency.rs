//! Lets hosts die under databases, and asks their clients what they have noticed.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bench::draw::Draw;
use bench::pair::now_us;
use bench::process::Workplace;
use bench::report::{quantile, quantiles};
use bench::transparency::checker::{Verdict, acknowledged_within, judge};
use bench::transparency::clients::{Crowd, STUCK_AFTER};
use bench::transparency::hosts::{Death, Hosts};
use bench::transparency::latency::{clock_lost_percent, floors_us, ping_pongs_us, requests_us};
use bench::transparency::log::now_us as monotonic_us;
use bench::transparency::traffic::Traffic;
use clap::{Parser, Subcommand};
use serde_json::{Value, json};

/// Of each kind of database: a request of PostgreSQL's takes the guest several times as long.
const REDIS: u64 = 8;
const POSTGRES: u64 = 4;
/// From the clients' start to the kill, at least, and how much of that is drawn.
const LOAD: Duration = Duration::from_millis(800);
const LOAD_DRAWN_US: u64 = 1_500_000;
/// How often the moment is drawn again if the clients are not at work.
const PATIENCE_DRAWS: u32 = 10;
/// Before a kill in which a host is expected to have acknowledged writes, and how many.
const LAST_US: u64 = 200_000;
const LAST_WRITES: u64 = 10;
const WRITES: u64 = 1000;
/// After the failover, before the clients end.
const AFTERWARDS: Duration = Duration::from_secs(2);
/// Of the primary whenever something is measured: a busy machine must not look like a dead host.
const PATIENT: [&str; 2] = ["--failover-after-ms", "10000"];
/// Beside it in all kills, with the gate and without. With the gate epochs follow output, and the longest
/// one never comes. Without it every one is that long, and what was answered since it began is what
/// a kill can take back: in 20 ms, the default, a busy machine answers too little to be noticed.
const KILL_OPTIONS: [&str; 2] = ["--epoch-ms", "200"];
/// How much of the kills without the gate the checker has to notice, in percent.
const NOTICED_PERCENT: usize = 80;
/// What a request may cost beside pause and commit, in microseconds.
const ALLOWANCE_US: u64 = 3000;

/// Kills the hosts of a guest with Redis and PostgreSQL, and lets a checker that knows the clients'
/// logs alone say what they have noticed: with the output gate nothing, without it a lot.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    #[arg(long, default_value_t = 20)]
    kills: usize,
    /// Kills with --gate off, after the others [default: as many]
    #[arg(long)]
    ungated_kills: Option<usize>,
    /// Write the figures here, as JSON
    #[arg(long)]
    report: Option<PathBuf>,
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// For how long each of the latencies is measured; 0: none is
    #[arg(long, default_value_t = 8)]
    latency_seconds: u64,
    /// Draws the moments of the kills
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Subcommand)]
enum What {
    /// What this program starts on the guest's network.
    #[command(hide = true)]
    Clients {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        run: String,
        #[arg(long)]
        host: String,
        #[arg(long)]
        redis: u64,
        #[arg(long)]
        postgres: u64,
        /// An answer that takes longer does not come, in seconds
        #[arg(long, default_value_t = STUCK_AFTER.as_secs())]
        patience: u64,
    },
}

/// One kill and what the clients say of it.
#[derive(Debug)]
struct Outcome {
    death: Death,
    last_writes: u64,
    verdict: Verdict,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    let done = match arguments.what.take() {
        None => run(&arguments),
        Some(What::Clients {
            dir,
            run,
            host,
            redis,
            postgres,
            patience,
        }) => {
            let crowd = Crowd {
                host,
                redis,
                postgres,
                run,
                patience: Duration::from_secs(patience),
            };
            crowd.work(&dir)
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("transparency: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let place = Workplace::new("transparency")?;
    say("booting a guest with Redis and PostgreSQL …");
    let began = Instant::now();
    let mut hosts = Hosts::start(place.path(), &arguments.qemu)?;
    say(&format!(
        "it is up after {:.1} s",
        began.elapsed().as_secs_f64()
    ));
    let latency = (arguments.latency_seconds > 0)
        .then(|| {
            latency(
                &mut hosts,
                &place,
                Duration::from_secs(arguments.latency_seconds),
            )
        })
        .transpose()?;

    let mut draw = Draw(arguments.seed);
    let gated = kills(&mut hosts, &place, "auto", arguments.kills, &mut draw)?;
    let ungated = arguments.ungated_kills.unwrap_or(arguments.kills);
    let ungated = kills(&mut hosts, &place, "off", ungated, &mut draw)?;
    let report = report(arguments, latency, &gated, &ungated);
    let text = serde_json::to_string_pretty(&report)?;
    if let Some(path) = &arguments.report {
        std::fs::write(path, &text).with_context(|| format!("writing {}", path.display()))?;
    }
    println!("{text}");
    check(&gated, &ungated)
}

/// Request latencies of one client in a closed loop: without protection, without and with the gate,
/// at default settings beside [`PATIENT`]; and what they are compared with.
fn latency(hosts: &mut Hosts, place: &Workplace, seconds: Duration) -> Result<Value> {
    let outside = hosts.network().outside();
    let measure = |hosts: &Hosts, name: &str| -> Result<(Vec<u64>, f64)> {
        let traffic = Traffic::start(&outside, place.path().join(name), 1, 0)?;
        let lost_percent = clock_lost_percent(hosts.network(), seconds)?;
        Ok((requests_us(&traffic.end()?), lost_percent))
    };
    let (unprotected, clock_unprotected) = measure(hosts, "unprotected")?;
    let traffic = Traffic::start(&outside, place.path().join("floor"), 1, 0)?;
    let floors = floors_us(hosts.qmp())?;
    traffic.end()?;

    hosts.protect(&[PATIENT, ["--gate", "off"]].concat())?;
    let (gate_off, _) = measure(hosts, "gate-off")?;
    hosts.unprotect()?;
    hosts.protect(&PATIENT)?;
    let from_us = now_us();
    let (gate_on, clock_gate_on) = measure(hosts, "gate-on")?;
    let status = hosts.primary()?.status()?;
    let events = hosts.primary()?.events();
    let epochs = || {
        let during = |e: &&Value| e["event"] == "epoch" && e["time_us"].as_u64() > Some(from_us);
        events.iter().filter(during)
    };
    let numbers = |field: &str| {
        epochs()
            .filter_map(|e| e[field].as_u64())
            .collect::<Vec<_>>()
    };
    let (pause, commit, bytes) = (numbers("pause_us"), numbers("commit_us"), numbers("bytes"));
    hosts.unprotect()?;

    let typical_bytes = quantile(&bytes, 50);
    let ping_pongs = ping_pongs_us(hosts.network(), hosts.at, usize::try_from(typical_bytes)?)?;
    let p50 = |numbers: &[u64]| quantile(numbers, 50);
    let boundary = p50(&pause) + p50(&commit);
    let floor = p50(&floors) + p50(&ping_pongs);
    let request_limit = p50(&unprotected) + boundary + ALLOWANCE_US;
    Ok(json!({
        "request_us": {
            "unprotected": quantiles(&unprotected),
            "gate_off": quantiles(&gate_off),
            "gate_on": quantiles(&gate_on),
            "gate_on_limit_p50": request_limit,
            "gate_on_within_limit": p50(&gate_on) <= request_limit,
        },
        "epoch": {
            "epochs": pause.len(),
            "pause_us": quantiles(&pause),
            "commit_us": quantiles(&commit),
            "bytes": quantiles(&bytes),
            "floor_us": quantiles(&floors),
            "ping_pong_us": quantiles(&ping_pongs),
            "pause_and_commit_us": boundary,
            "limit_us": 3 * floor,
            "within_limit": boundary <= 3 * floor,
        },
        "guest_clock_lost_percent": {
            "unprotected": clock_unprotected,
            "gate_on": clock_gate_on,
            "paused_percent": status["paused_percent"],
        },
    }))
}

fn kills(
    hosts: &mut Hosts,
    place: &Workplace,
    gate: &str,
    kills: usize,
    draw: &mut Draw,
) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for number in 0..kills {
        let name = format!("gate-{gate}-{number}");
        let folder = place.path().join(&name);
        let outcome = kill(hosts, folder, gate, draw).with_context(|| format!("kill {name}"))?;
        let verdict = &outcome.verdict;
        let silence_us = quantile(&verdict.silences_us, 100);
        say(&format!(
            "{name}: {} writes acknowledged ({} just before), {} lost, {} reads back in time, {} \
             connections reset, {} stuck; longest silence {} ms",
            verdict.acknowledged_writes,
            outcome.last_writes,
            verdict.lost_writes,
            verdict.stale_reads,
            verdict.resets,
            verdict.stuck,
            silence_us / 1000,
        ));
        if gate != "off" {
            verdict
                .violations
                .iter()
                .for_each(|violation| say(violation));
        }
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

fn kill(hosts: &mut Hosts, folder: PathBuf, gate: &str, draw: &mut Draw) -> Result<Outcome> {
    hosts.protect(&[PATIENT, KILL_OPTIONS, ["--gate", gate]].concat())?;
    let outside = hosts.network().outside();
    let traffic = Traffic::start(&outside, folder, REDIS, POSTGRES)?;
    std::thread::sleep(LOAD);
    // A machine that others use may have let nobody work just now.
    for _ in 0..PATIENCE_DRAWS {
        std::thread::sleep(Duration::from_micros(draw.below(LOAD_DRAWN_US)));
        if acknowledged_within(&traffic.so_far()?, monotonic_us() - LAST_US, u64::MAX)
            >= 2 * LAST_WRITES
        {
            break;
        }
    }
    let death = hosts.die(draw.number().is_multiple_of(2))?;
    std::thread::sleep(AFTERWARDS);
    let logs = traffic.end()?;
    let last_writes = acknowledged_within(&logs, death.at_us - LAST_US, death.at_us);
    Ok(Outcome {
        death,
        last_writes,
        verdict: judge(&logs),
    })
}

fn report(
    arguments: &Arguments,
    latency: Option<Value>,
    gated: &[Outcome],
    ungated: &[Outcome],
) -> Value {
    let mut report = figures(gated);
    report["seed"] = arguments.seed.into();
    report["options_of_kills"] = [PATIENT, KILL_OPTIONS].concat().join(" ").into();
    report["without_gate"] = figures(ungated);
    if let Some(Value::Object(latency)) = latency {
        for (name, figure) in latency {
            report[name] = figure;
        }
    }
    report
}

fn figures(outcomes: &[Outcome]) -> Value {
    let verdict = total(outcomes);
    let silences_ms: Vec<_> = verdict.silences_us.iter().map(|us| us / 1000).collect();
    let sum = |number: fn(&Outcome) -> u64| outcomes.iter().map(number).sum::<u64>();
    let failovers_us = |field: &str| {
        let numbers = outcomes
            .iter()
            .filter_map(|o| o.death.failover[field].as_u64());
        quantiles(&numbers.collect::<Vec<_>>())
    };
    json!({
        "kills": outcomes.len(),
        "kills_noticed": noticed(outcomes),
        "acknowledged_writes": verdict.acknowledged_writes,
        "acknowledged_writes_in_last_200_ms_min": outcomes.iter().map(|o| o.last_writes).min(),
        "lost_writes": verdict.lost_writes,
        "stale_reads": verdict.stale_reads,
        "connections": verdict.connections,
        "resets": verdict.resets,
        "stuck": verdict.stuck,
        "keys_not_read_back": verdict.unread,
        "silence_ms": { "p50": quantile(&silences_ms, 50), "max": quantile(&silences_ms, 100) },
        "dropped_packets": sum(|o| o.death.dropped_packets),
        "detect_us": failovers_us("detect_us"),
        "activate_us": failovers_us("activate_us"),
    })
}

fn total(outcomes: &[Outcome]) -> Verdict {
    let mut total = Verdict::default();
    outcomes.iter().for_each(|o| total.add(o.verdict.clone()));
    total
}

/// After how many kills some client could complain.
fn noticed(outcomes: &[Outcome]) -> usize {
    outcomes.iter().filter(|o| !o.verdict.is_clean()).count()
}

fn check(gated: &[Outcome], ungated: &[Outcome]) -> Result<()> {
    let verdict = total(gated);
    ensure!(
        verdict.is_clean(),
        "clients have noticed: {}",
        verdict.violations.join("; ")
    );
    let fewest = gated.iter().map(|o| o.last_writes).min().unwrap_or(0);
    ensure!(
        verdict.acknowledged_writes >= WRITES && fewest >= LAST_WRITES,
        "too little was at stake: {} acknowledged writes, {fewest} just before some kill",
        verdict.acknowledged_writes
    );
    ensure!(
        // Whole kills: two of three, sixteen of twenty.
        noticed(ungated) >= ungated.len() * NOTICED_PERCENT / 100,
        "without the gate only {} of {} kills were noticed: the checker sees too little",
        noticed(ungated),
        ungated.len()
    );
    Ok(())
}

fn say(text: &str) {
    eprintln!("transparency: {text}");
}
