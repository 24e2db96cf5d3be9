//! `lab test`: the product across two hosts, on soft-RoCE: failovers compared bit by bit, faults,
//! and the link's speed beside that of perftest. docs/lab.md says what is looked at.

mod failovers;
mod faults;
mod guest_ram;
mod pair;
mod speed;
mod stand;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

pub use stand::{Role, serve};

use super::{Command, Ended, Host, Lab, Settings};
use crate::draw::Draw;
use failovers::{Count, Death};
use pair::{Pair, Plan};

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the figures go, as JSON.
    pub report: Option<PathBuf>,
    /// Failovers on RDMA.
    pub kills: usize,
    /// More of everything.
    pub full: bool,
    /// One part alone, by its name.
    pub only: Option<String>,
    /// Draws the moments of the kills.
    pub seed: u64,
}

/// Boots a lab of its own and runs all parts.
///
/// # Errors
/// Something is not as it must be: all of it is said, and is in the report.
pub fn test(settings: Settings, options: &Options) -> Result<()> {
    let lab = Lab::up(settings).context("booting both hosts")?;
    let mut run = Run {
        lab: &lab,
        options,
        draw: Draw(options.seed),
        failed: Vec::new(),
        faults: BTreeMap::new(),
        rdma: Count::default(),
        tcp: Count::default(),
    };
    let began = Instant::now();
    let suite = run.part("suite", |run| suite(run.lab));
    let speed = run.part("speed", |run| {
        let (alternations, mib) = if options.full { (10, 256) } else { (3, 32) };
        speed::measure(run.lab, alternations, mib)
    });
    let rounds = if options.full { 5 } else { 2 };
    for round in 0..rounds {
        run.faults(round);
    }
    // Those of the faults are among them.
    while run.rdma.run + run.failed.len() < options.kills && run.is_wanted("failovers") {
        run.failover("rdma", Death::Processes);
    }
    for _ in 0..if options.full { rounds } else { 1 } {
        run.failover("tcp", Death::Host);
    }
    if run.rdma.torn + run.tcp.torn > 0 {
        run.failed.push("torn survivors".to_owned());
    }

    let mut report = json!({
        "link": "rdma",
        "failovers": run.rdma,
        "failovers_tcp": run.tcp,
        "faults": run.faults,
        "suite": suite,
        "failed": run.failed,
        "seed": options.seed,
        "full": options.full,
        "took_s": began.elapsed().as_secs(),
    });
    if let (Some(Value::Object(speed)), Some(report)) = (speed, report.as_object_mut()) {
        report.extend(speed);
    }
    write(options, &report)?;
    ensure!(run.failed.is_empty(), "failed: {}", run.failed.join(", "));
    Ok(())
}

/// The tests of the transport crate that need an RDMA device: how many passed.
fn suite(lab: &Lab) -> Result<Value> {
    let Some(program) = std::env::var_os("CURLING_LINK_TESTS") else {
        bail!("CURLING_LINK_TESTS does not name the tests of transport: use scripts/lab test");
    };
    let line = format!("{} --test-threads=1 rdma choice", program.display());
    let mut command = Command::shell(&line);
    command
        .environment
        .push(("RDMA_TESTS".into(), "required".into()));
    let output = lab.run(Host::A, &command)?;
    let said = String::from_utf8_lossy(&output.output).into_owned();
    ensure!(
        output.ended == Ended::Exit(0),
        "{:?}:\n{said}",
        output.ended
    );
    let passed = said.lines().filter(|line| line.ends_with("... ok")).count();
    ensure!(passed > 0, "no tests were run:\n{said}");
    Ok(json!({"passed": passed}))
}

fn write(options: &Options, report: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    if let Some(path) = &options.report {
        std::fs::write(path, &text).with_context(|| format!("writing {}", path.display()))?;
    }
    println!("{text}");
    Ok(())
}

/// A run as it goes.
struct Run<'a> {
    lab: &'a Lab,
    options: &'a Options,
    draw: Draw,
    failed: Vec<String>,
    faults: BTreeMap<&'static str, Held>,
    rdma: Count,
    tcp: Count,
}

/// How often a fault was tried, and all was as promised.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
struct Held {
    run: usize,
    held: usize,
}

impl Run<'_> {
    fn is_wanted(&self, name: &str) -> bool {
        let only = self.options.only.as_ref();
        only.is_none_or(|only| name.starts_with(only))
    }

    /// Runs a part, unless another was asked for, and remembers whether it failed.
    fn part<T>(&mut self, name: &str, part: impl FnOnce(&mut Self) -> Result<T>) -> Option<T> {
        if !self.is_wanted(name) {
            return None;
        }
        let began = Instant::now();
        let result = part(self);
        let took = began.elapsed().as_secs_f64();
        match result {
            Ok(result) => {
                eprintln!("lab test: {name}: {took:.1} s");
                Some(result)
            }
            Err(error) => {
                eprintln!("lab test: {name}: FAILED after {took:.1} s: {error:#}");
                self.failed.push(name.to_owned());
                None
            }
        }
    }

    fn failover(&mut self, transport: &'static str, death: Death) {
        self.part(&format!("failovers-{transport}"), |run| {
            let (moment, plan) = (run.draw.number(), Plan::new(transport));
            let count = if transport == "tcp" {
                &mut run.tcp
            } else {
                &mut run.rdma
            };
            failovers::one(run.lab, &plan, death, moment, count)
        });
    }

    fn fault(&mut self, name: &'static str, fault: impl FnOnce(&mut Self) -> Result<()>) {
        if self.is_wanted(name) {
            self.faults.entry(name).or_default().run += 1;
        }
        if self.part(name, fault).is_some() {
            self.faults.entry(name).or_default().held += 1;
        }
    }

    /// Every fault once; those that are the same in each round, in a short test only in the first.
    fn faults(&mut self, round: usize) {
        if round == 0 || self.options.full {
            self.silences();
        }
        let removed_from = Host::BOTH[round % 2];
        self.fault("device_removed", |run| {
            let moment = run.draw.number();
            // What dies there is on TCP by then.
            faults::device_removed(run.lab, removed_from, moment, &mut run.tcp)
        });
        self.fault("no_lockable_memory", |run| {
            faults::no_lockable_memory(run.lab, round % 2 == 1)
        });
        self.disturbances(round);
    }

    /// What ends in silence, or in half of it.
    fn silences(&mut self) {
        self.fault("host_powered_off", |run| {
            let (moment, plan) = (run.draw.number(), Plan::new("rdma"));
            failovers::one(run.lab, &plan, Death::Host, moment, &mut run.rdma)
        });
        self.fault("cable_cut", |run| faults::cut(run.lab, &Host::BOTH));
        self.fault("cut_a_to_b", |run| faults::cut(run.lab, &[Host::A]));
        self.fault("cut_b_to_a", |run| faults::cut(run.lab, &[Host::B]));
    }

    /// What a pair has to live through; then its primary dies.
    fn disturbances(&mut self, round: usize) {
        let names = ["cut_and_mended", "garbage", "silent_write"];
        if !names.iter().any(|name| self.is_wanted(name)) {
            return;
        }
        let pair = self.part_of(names, |run| Pair::protected(run.lab, &Plan::new("rdma")));
        let Some(pair) = pair else { return };
        self.fault("cut_and_mended", |_| faults::cut_and_mended(&pair, round));
        self.fault("garbage", |_| faults::garbage(&pair));
        self.fault("silent_write", |_| faults::silent_write(&pair));
        let moment = self.draw.number();
        self.part_of(names, |run| {
            failovers::death(&pair, Death::Processes, moment, &mut run.rdma)
        });
    }

    /// What several faults need.
    fn part_of<T>(
        &mut self,
        names: [&str; 3],
        part: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Option<T> {
        let name = names.into_iter().find(|name| self.is_wanted(name))?;
        self.part(name, part)
    }
}
