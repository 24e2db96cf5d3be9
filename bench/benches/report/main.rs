//! `cargo bench`: everything that an operator asks before trusting it, measured on this machine, as
//! one HTML page and as JSON. `cargo bench -- --full` takes longer and knows more.

mod boundary;
mod databases;
mod failover;
mod harvest;
mod iperf;
mod laps;
mod link;
mod options;
mod peers;
mod processor;
mod ram;
mod tax;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bench::report::{Group, machine, page, to_json};
use clap::Parser;
use criterion::Criterion;

use options::{Name, Options};

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("report: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    // Asked before anything runs: the load is that of others.
    let machine = machine::describe(&options::command_line(), &[&options.qemu]);
    let began = Instant::now();
    // Its own report is on the terminal and in `target/criterion`.
    let mut criterion = Criterion::default().without_plots();
    let mut groups = Vec::new();
    let mut failed = Vec::new();
    for name in options.groups() {
        eprintln!(
            "report: {name} ({:.0} s so far)",
            began.elapsed().as_secs_f64()
        );
        match measure(name, options, &mut criterion) {
            Ok(group) => groups.push(group),
            // The others are worth having; what failed is named at the end, and by the exit code.
            Err(error) => {
                eprintln!("report: measuring {name}: {error:#}");
                failed.push(name.to_string());
            }
        }
        // After each group, so that an interrupted run leaves what it has.
        write(&options.out, &machine, &groups)?;
    }
    for ratio in groups.iter().flat_map(|group| &group.ratios) {
        println!(
            "{:44} {:>9.3}  {:14} {}",
            ratio.name,
            ratio.value,
            ratio.bound.text(),
            if ratio.is_reached() {
                ""
            } else {
                "NOT REACHED"
            }
        );
    }
    println!(
        "{} in {:.0} s",
        options.out.join("index.html").display(),
        began.elapsed().as_secs_f64()
    );
    ensure!(failed.is_empty(), "not measured: {}", failed.join(", "));
    Ok(())
}

fn measure(name: Name, options: &Options, criterion: &mut Criterion) -> Result<Group> {
    match name {
        Name::Link => link::measure(options, criterion),
        Name::Harvest => harvest::measure(options, criterion),
        Name::Boundary => boundary::measure(options),
        Name::Tax => tax::measure(options),
        Name::Databases => databases::measure(options),
        Name::Failover => failover::measure(options),
        Name::Peers => peers::measure(options),
    }
}

fn write(out: &Path, machine: &serde_json::Value, groups: &[Group]) -> Result<()> {
    let write = |name: &str, text: String| {
        let path = out.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    std::fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
    let json = serde_json::to_string_pretty(&to_json(machine, groups))?;
    write("report.json", json + "\n")?;
    write("index.html", page::render(machine, groups))
}
