//! `ft-sim`: see `--help`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ft_sim::{Outcome, run_seed};

const HELP: &str = "\
Runs the primary's and the backup's machines on virtual time under faults.

  --seeds N             seeds to run (default 1000)
  --epochs-per-seed N   acknowledged epochs of a seed (default 100)
  --first N             the first seed (default 1)
  --seconds N           stop after that long
  --threads N           default 2
  --seed N [--trace]    repeat one seed; show every input and action";

struct Arguments {
    first: u64,
    seeds: u64,
    epochs: u64,
    seconds: Option<u64>,
    threads: u64,
    single: bool,
    trace: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut parsed = Arguments {
        first: 1,
        seeds: 1000,
        epochs: 100,
        seconds: None,
        threads: 2,
        single: false,
        trace: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--trace" {
            parsed.trace = true;
            continue;
        }
        let mut number = || {
            let value = words.next().ok_or(format!("{word} needs a number"))?;
            value
                .parse::<u64>()
                .map_err(|error| format!("{word} {value}: {error}"))
        };
        match word.as_str() {
            "--seeds" => parsed.seeds = number()?,
            "--epochs-per-seed" => parsed.epochs = number()?,
            "--first" => parsed.first = number()?,
            "--seconds" => {
                parsed.seconds = Some(number()?);
                parsed.seeds = u64::MAX - parsed.first;
            }
            "--threads" => parsed.threads = number()?.max(1),
            "--seed" => {
                (parsed.first, parsed.seeds, parsed.threads) = (number()?, 1, 1);
                parsed.single = true;
            }
            "--help" | "-h" => return Err(HELP.to_owned()),
            other => return Err(format!("{other} is unknown\n{HELP}")),
        }
    }
    Ok(parsed)
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    let began = Instant::now();
    let total = run_all(&arguments, began);
    println!("{}", total.0.table);
    let Outcome {
        epochs,
        lives,
        failovers,
        late_writes,
        ..
    } = total.0;
    println!(
        "{} seeds, {lives} lives, {epochs} epochs, {failovers} failovers, {late_writes} late \
         writes dropped, {} violations in {:.1} s",
        total.1,
        total.2,
        began.elapsed().as_secs_f64()
    );
    if total.2 > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

/// What all seeds came to, how many ran, and how many showed a violation.
fn run_all(arguments: &Arguments, began: Instant) -> (Outcome, u64, u64) {
    let next = AtomicU64::new(arguments.first);
    let enough = AtomicBool::new(false);
    let total = Mutex::new((Outcome::default(), 0, 0));
    let end = arguments.first + arguments.seeds;
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads {
            scope.spawn(|| {
                while !enough.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let limit = arguments.seconds.map(Duration::from_secs);
                    if seed >= end || limit.is_some_and(|limit| began.elapsed() > limit) {
                        break;
                    }
                    let outcome = run_one(seed, arguments);
                    let mut total = total.lock().unwrap_or_else(|broken| broken.into_inner());
                    total.1 += 1;
                    total.0.epochs += outcome.epochs;
                    total.0.lives += outcome.lives;
                    total.0.failovers += outcome.failovers;
                    total.0.late_writes += outcome.late_writes;
                    total.0.table.add(&outcome.table);
                    if let Some(text) = outcome.violation {
                        total.2 += 1;
                        println!("seed {seed}: {text}");
                        let epochs = arguments.epochs;
                        println!(
                            "  repeat: cargo run --release -p ft-sim -- --seed {seed} \
                             --epochs-per-seed {epochs} --trace"
                        );
                        enough.fetch_or(total.2 >= 5, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    total
        .into_inner()
        .unwrap_or_else(|broken| broken.into_inner())
}

/// A panic of a machine is a violation like any other.
fn run_one(seed: u64, arguments: &Arguments) -> Outcome {
    let run = || run_seed(seed, arguments.epochs, arguments.trace);
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_default();
        Outcome {
            violation: Some(format!("panic: {text}")),
            ..Outcome::default()
        }
    })
}
