//! Two builds of the daemon under the same guest, in turns, and whether they differ.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bench::guest::Guest;
use bench::measure::{boundaries, failover};
use bench::pair::{Setup, Watch};
use bench::report::rank::mann_whitney;
use bench::report::{median, quantile};
use clap::Parser;

/// A p below this says that there is a difference.
const SIGNIFICANT: f64 = 0.05;

/// Runs two builds of the daemon in turns, and compares what they do by a rank test. `bench/compare` makes them
/// from two revisions.
#[derive(Debug, Parser)]
struct Arguments {
    first: Option<PathBuf>,
    second: Option<PathBuf>,
    /// Runs of each; eight are needed to tell a small difference
    #[arg(long, default_value_t = 8)]
    rounds: u32,
    /// How long each run is watched
    #[arg(long, default_value_t = 6)]
    seconds: u64,
    /// Pages that the guest writes in 20 ms
    #[arg(long, default_value_t = 900)]
    pages: u32,
    /// Compare failovers alone
    #[arg(long)]
    only_failover: bool,
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// One run of the daemon that CURLING_RDMA names, as JSON: what this program starts itself for
    #[arg(long, hide = true)]
    one: bool,
}

/// What one run has shown: less is better.
type Run = BTreeMap<String, f64>;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if arguments.one {
        println!("{}", serde_json::to_string(&measure(arguments)?)?);
        return Ok(());
    }
    let (Some(first), Some(second)) = (&arguments.first, &arguments.second) else {
        bail!("two programs are needed; bench/compare builds them from revisions");
    };
    let mut runs: [Vec<Run>; 2] = Default::default();
    for round in 0..arguments.rounds {
        // The one that goes first goes second the next time.
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for which in order {
            let program = [first, second][which];
            let run = in_child(program)
                .with_context(|| format!("round {round} of {}", program.display()))?;
            runs[which].push(run);
        }
        eprintln!("compare: round {} of {}", round + 1, arguments.rounds);
    }
    show(&runs)
}

/// The program under test is named by the environment, so each run has a process of its own.
fn in_child(program: &Path) -> Result<Run> {
    let output = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .arg("--one")
        .env("CURLING_RDMA", program)
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "it ended with {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn show(runs: &[Vec<Run>; 2]) -> Result<()> {
    println!(
        "{:22} {:>12} {:>12} {:>9}  p",
        "median of the runs", "A", "B", "B / A"
    );
    let first = runs[0].first().context("no runs")?;
    for name in first.keys() {
        let of = |runs: &[Run]| {
            runs.iter()
                .filter_map(|run| run.get(name).copied())
                .collect()
        };
        let values: [Vec<f64>; 2] = [of(&runs[0]), of(&runs[1])];
        let [a, b] = [median(&values[0]), median(&values[1])];
        let test = mann_whitney(&values[0], &values[1]).context("no runs")?;
        let verdict = match test.p {
            p if p >= SIGNIFICANT => "no difference is shown",
            _ if test.second_larger > 0.5 => "B is larger",
            _ => "B is smaller",
        };
        let (ratio, p) = (b / a, test.p);
        println!("{name:22} {a:12.1} {b:12.1} {ratio:9.3}  {p:.4}  {verdict}");
    }
    Ok(())
}

/// The figures of one run, in microseconds.
fn measure(arguments: &Arguments) -> Result<Run> {
    let mut guest = Guest::tick(&arguments.qemu)?;
    guest.workload_pages = arguments.pages;
    let setup = Setup {
        guest,
        watch: Watch::Tick,
        floors: None,
        options: ["--failover-after-ms", "8000"].map(str::to_owned).to_vec(),
    };
    let figures = if arguments.only_failover {
        let one = failover(&setup, Duration::ZERO)?;
        vec![
            ("failover detect us", one.detect_us),
            ("failover total us", one.total_us),
        ]
    } else {
        let seen = boundaries(&setup, Duration::from_secs(arguments.seconds))?;
        let commits = seen.of(|epoch| epoch.commit_us);
        let harvests = seen.of(|epoch| epoch.harvest_us);
        vec![
            ("pause p50 us", quantile(&seen.pauses_us, 50)),
            ("pause p99 us", quantile(&seen.pauses_us, 99)),
            ("commit p50 us", quantile(&commits, 50)),
            ("commit p99 us", quantile(&commits, 99)),
            ("harvest p50 us", quantile(&harvests, 50)),
            ("bytes p50", quantile(&seen.of(|epoch| epoch.bytes), 50)),
        ]
    };
    let named = |(name, value): (&str, u64)| (name.to_owned(), value as f64);
    Ok(figures.into_iter().map(named).collect())
}
