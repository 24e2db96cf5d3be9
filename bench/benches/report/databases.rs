//! What protection takes from two databases, and what their epochs weigh on the wire. The guest and
//! its network are those of `scripts/transparency`.

use std::time::Duration;

use anyhow::Result;
use bench::measure::{Epoch, epochs};
use bench::process::Workplace;
use bench::report::plot::{Bar, bars, number};
use bench::report::{Bound, Figure, Group, Latency, Ratio, Table, median, quantile};
use bench::transparency::hosts::Hosts;
use bench::transparency::latency::clock_lost_percent;
use bench::transparency::load::Load;
use serde_json::{Value, json};

use crate::options::{Options, PATIENT};

/// Of what was written, with deltas on.
const BYTES_LIMIT: f64 = 0.25;
/// A rehearsal after the first epoch holds the applies, and the processors.
const SETTLE: Duration = Duration::from_secs(2);
const PAGE_BYTES: f64 = 4096.0;

/// A way to protect.
#[derive(Debug)]
struct Way {
    name: &'static str,
    /// Epochs of a fixed length; none: they follow the guest's output, at default settings.
    epoch_ms: Option<u64>,
    deltas: bool,
    /// Measured by a quick run as well.
    quick: bool,
}

const fn fixed(name: &'static str, epoch_ms: u64, deltas: bool, quick: bool) -> Way {
    Way {
        name,
        epoch_ms: Some(epoch_ms),
        deltas,
        quick,
    }
}

const fn following(name: &'static str, deltas: bool) -> Way {
    Way {
        name,
        epoch_ms: None,
        deltas,
        quick: true,
    }
}

const WAYS: [Way; 8] = [
    fixed("5 ms", 5, false, false),
    fixed("10 ms", 10, false, false),
    fixed("20 ms", 20, false, true),
    fixed("50 ms", 50, false, false),
    fixed("100 ms", 100, false, false),
    following("following output", false),
    fixed("20 ms, deltas on", 20, true, true),
    following("following output, deltas on", true),
];

/// One load under one way.
#[derive(Debug)]
struct Seen {
    load: Load,
    way: &'static Way,
    /// Requests or transactions a second, without protection and just after that with it.
    free: Vec<f64>,
    protected: Vec<f64>,
    clock_lost: Vec<f64>,
    epochs: Vec<Epoch>,
}

pub(crate) fn measure(options: &Options) -> Result<Group> {
    let mut all = Vec::new();
    for load in [Load::Redis, Load::Pgbench] {
        all.extend(of_load(options, load)?);
    }
    Ok(report(&all))
}

/// All ways in turns, each beside a stretch without protection, on a guest of its own.
fn of_load(options: &Options, load: Load) -> Result<Vec<Seen>> {
    let place = Workplace::new("databases")?;
    let mut hosts = Hosts::start(place.path(), &options.qemu)?;
    load.prepare(hosts.network(), place.path())?;
    let time = Duration::from_secs(options.pick(3, 10));
    let ways = WAYS.iter().filter(|way| way.quick || options.full);
    let mut all: Vec<_> = ways.map(|way| Seen::new(load, way)).collect();
    for _ in 0..options.pick(2, 5) {
        for seen in &mut all {
            seen.free
                .push(load.run(hosts.network(), place.path(), time)?);
            seen.protect(&mut hosts, &place, time)?;
        }
    }
    for seen in &all {
        eprintln!(
            "report: {}, {}: tax {:.1} %, {:.2} of the dirty pages' bytes",
            load.name(),
            seen.way.name,
            seen.tax(),
            seen.bytes_of_raw()
        );
    }
    Ok(all)
}

impl Way {
    fn options(&self) -> Vec<String> {
        let mut line = PATIENT.map(str::to_owned).to_vec();
        if let Some(ms) = self.epoch_ms {
            for option in ["--epoch-ms", "--min-epoch-ms"] {
                line.extend([option.to_owned(), ms.to_string()]);
            }
        }
        if self.deltas {
            line.extend(["--deltas", "on"].map(str::to_owned));
        }
        line
    }
}

impl Seen {
    fn new(load: Load, way: &'static Way) -> Seen {
        Seen {
            load,
            way,
            free: vec![],
            protected: vec![],
            clock_lost: vec![],
            epochs: vec![],
        }
    }

    fn protect(&mut self, hosts: &mut Hosts, place: &Workplace, time: Duration) -> Result<()> {
        let options = self.way.options();
        hosts.protect(&options.iter().map(String::as_str).collect::<Vec<_>>())?;
        std::thread::sleep(SETTLE);
        let from_us = bench::pair::now_us();
        let network = hosts.network();
        let (rate, clock_lost) = std::thread::scope(|scope| {
            let clock = scope.spawn(|| clock_lost_percent(network, time));
            let rate = self.load.run(network, place.path(), time);
            (rate, clock.join())
        });
        self.protected.push(rate?);
        let clock_lost = clock_lost.map_err(|_| anyhow::anyhow!("the clock's reader panicked"))?;
        self.clock_lost.push(clock_lost?);
        let until_us = bench::pair::now_us();
        let events = hosts.primary()?.events();
        let during = from_us..=until_us;
        self.epochs
            .extend(epochs(&events, |at| during.contains(&at)));
        hosts.unprotect()
    }

    /// Of the work, in percent: median of what each protected stretch lost beside the free one
    /// before it.
    fn tax(&self) -> f64 {
        let pairs = self.protected.iter().zip(&self.free);
        let lost = pairs.map(|(ours, free)| 100.0 * (1.0 - ours / free.max(1e-9)));
        median(&lost.collect::<Vec<_>>())
    }

    fn bytes_of_raw(&self) -> f64 {
        let sum = |pick: fn(&Epoch) -> u64| self.epochs.iter().map(pick).sum::<u64>() as f64;
        sum(|e| e.bytes) / (sum(|e| e.dirty_pages) * PAGE_BYTES).max(1.0)
    }

    fn each(&self, pick: fn(&Epoch) -> u64) -> Vec<u64> {
        self.epochs.iter().map(pick).collect()
    }

    fn p50(&self, pick: fn(&Epoch) -> u64) -> u64 {
        quantile(&self.each(pick), 50)
    }

    fn to_json(&self) -> Value {
        json!({
            "load": self.load.name(), "epochs_are": self.way.name, "options": self.way.options().join(" "),
            "tax_percent": self.tax(), "clock_lost_percent": median(&self.clock_lost),
            "epochs": self.epochs.len(), "bytes_of_raw": self.bytes_of_raw(),
            "dirty_pages_p50": self.p50(|e| e.dirty_pages), "bytes_p50": self.p50(|e| e.bytes),
            "pause_us": Latency::of_us(&self.each(|e| e.pause_us)).to_json(),
            "commit_us": Latency::of_us(&self.each(|e| e.commit_us)).to_json(),
            "rates_free": self.free, "rates_protected": self.protected,
        })
    }
}

fn report(all: &[Seen]) -> Group {
    Group {
        name: "databases",
        title: "Databases: Redis and PostgreSQL in a guest, their clients outside",
        data: all.iter().map(Seen::to_json).collect(),
        figures: vec![work_lost(all), bytes(all)],
        ratios: all
            .iter()
            .filter(|seen| seen.way.deltas)
            .map(|seen| Ratio {
                name: format!(
                    "bytes_of_raw_{}_{}",
                    seen.load.name().to_lowercase(),
                    seen.way
                        .epoch_ms
                        .map_or("following".into(), |ms| format!("{ms}_ms"))
                ),
                value: seen.bytes_of_raw(),
                bound: Bound::AtMost(BYTES_LIMIT),
                meaning:
                    "all bytes sent, device state included / bytes of the dirty pages, deltas on"
                        .into(),
            })
            .collect(),
        missing: vec![],
    }
}

fn labelled(all: &[Seen], value: impl Fn(&Seen) -> f64) -> Vec<Bar> {
    all.iter()
        .map(|seen| Bar {
            label: format!("{}, {}", seen.load.name(), seen.way.name),
            parts: vec![value(seen)],
        })
        .collect()
}

fn work_lost(all: &[Seen]) -> Figure {
    let mut table = Table::new([
        "load",
        "epochs",
        "unprotected /s",
        "protected /s",
        "tax %",
        "clock lost %",
        "pause p50 ms",
        "commit p50 ms",
        "dirty pages",
    ]);
    for seen in all {
        table.row([
            seen.load.name().into(),
            seen.way.name.into(),
            number(median(&seen.free)),
            number(median(&seen.protected)),
            number(seen.tax()),
            number(median(&seen.clock_lost)),
            number(seen.p50(|e| e.pause_us) as f64 / 1e3),
            number(seen.p50(|e| e.commit_us) as f64 / 1e3),
            number(seen.p50(|e| e.dirty_pages) as f64),
        ]);
    }
    Figure {
        heading: "Work lost under a closed loop (medians)".into(),
        plot: bars(
            "% of the requests",
            &["lost"],
            &labelled(all, |seen| seen.tax().max(0.0)),
        ),
        sentence: "Every answer waits for its epoch, and a client that waits sends nothing: what is lost is bounded \
                   by the length of an epoch and its commit, not by the pause alone. More clients lose less."
            .into(),
        table,
    }
}

fn bytes(all: &[Seen]) -> Figure {
    let mut table = Table::new([
        "load",
        "epochs",
        "KiB an epoch",
        "dirty KiB",
        "of it %",
        "epochs seen",
    ]);
    for seen in all {
        table.row([
            seen.load.name().into(),
            seen.way.name.into(),
            number(seen.p50(|e| e.bytes) as f64 / 1024.0),
            number(seen.p50(|e| e.dirty_pages) as f64 * 4.0),
            number(100.0 * seen.bytes_of_raw()),
            seen.epochs.len().to_string(),
        ]);
    }
    Figure {
        heading: "Bytes sent, beside those of the dirty pages".into(),
        plot: bars(
            "% of the dirty pages' bytes",
            &["sent"],
            &labelled(all, |seen| 100.0 * seen.bytes_of_raw()),
        ),
        sentence: "Sent is everything: device state, headers, pages or what has changed in them. By default deltas \
                   are made where the benefit that is measured pays for it, which on a fast link it does not."
            .into(),
        table,
    }
}
