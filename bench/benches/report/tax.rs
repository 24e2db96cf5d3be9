//! What protection takes from the guest's work.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bench::daemon::Daemon;
use bench::guest::Guest;
use bench::measure::epochs;
use bench::memory::Memory;
use bench::pair::{open_memory, wait_tick_page};
use bench::process::{Process, Workplace, free_port};
use bench::report::plot::{Axis, Bar, Scale, Series, bars, lines, number};
use bench::report::{Bound, Figure, Group, Latency, Ratio, Table, median};
use serde_json::json;

use crate::options::{Options, PATIENT};

const EPOCHS_MS: [u64; 5] = [5, 10, 20, 50, 100];
/// The limits: so many points above what the pauses take; and of a guest without work.
const POINTS: f64 = 5.0;
const IDLE_PERCENT: f64 = 2.0;
/// A rehearsal after the first epoch holds the applies, and the processors.
const SETTLE: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);
/// Of a tick of the guest.
const TICK_MS: f64 = 1.0;

/// A guest whose daemons come and go, with nothing in between.
struct Stage {
    place: Workplace,
    guest: Process,
    _standby: Process,
    /// Ends with it.
    _backup: Daemon,
    peer: String,
    memory: Memory,
    /// Where its counters are: of milliseconds, and of work behind it.
    page: u64,
    attached: u32,
}

/// The guest's progress in some time.
#[derive(Clone, Copy, Debug)]
struct Progress {
    /// Pieces of work in a second.
    rate: f64,
    /// Of its own clock, in percent of the time.
    clock_lost: f64,
}

/// A job at one length of an epoch.
struct Seen {
    job: &'static str,
    epoch_ms: u64,
    free: Vec<Progress>,
    protected: Vec<Progress>,
    pauses_us: Vec<u64>,
    dirty_pages: Vec<u64>,
    /// How much of the time the daemon says that the guest stood still, in percent.
    paused: Vec<f64>,
}

pub(crate) fn measure(options: &Options) -> Result<Group> {
    let mut all = Vec::new();
    for job in ["cpu", "memory"] {
        let mut guest = options.guest()?;
        guest.workload_pages = 0;
        guest.job = Some(job);
        all.extend(of_guest(options, &guest, job, &EPOCHS_MS)?);
    }
    let mut idle = options.guest()?;
    idle.workload_pages = 0;
    all.extend(of_guest(options, &idle, "none", &[20])?);
    Ok(report(&all))
}

/// All lengths in turns, each beside a stretch without protection.
fn of_guest(
    options: &Options,
    guest: &Guest,
    job: &'static str,
    lengths: &[u64],
) -> Result<Vec<Seen>> {
    let time = Duration::from_secs(options.pick(2, 10));
    let mut stage = Stage::start(guest)?;
    if job != "none" {
        stage.wait_for_work()?;
    }
    let mut all: Vec<_> = lengths.iter().map(|&ms| Seen::new(job, ms)).collect();
    for _ in 0..options.pick(3, 7) {
        for seen in &mut all {
            let free = stage.watch(time)?;
            seen.free.push(free);
            stage.protect(seen, time)?;
        }
    }
    for seen in &all {
        eprintln!(
            "report: {job} at {} ms: tax {:.1} %, clock lost {:.1} %",
            seen.epoch_ms,
            seen.tax(),
            seen.clock_lost()
        );
    }
    Ok(all)
}

impl Stage {
    fn start(guest: &Guest) -> Result<Stage> {
        let place = Workplace::new("tax")?;
        let dir = place.path();
        let (running, standby) = (
            guest.start(dir, "guest", false)?,
            guest.start(dir, "standby", true)?,
        );
        let page = wait_tick_page(&dir.join("guest.console"))?;
        let memory = open_memory(dir, "guest", &running)?;
        open_memory(dir, "standby", &standby)?;
        let peer = format!("127.0.0.1:{}", free_port()?);
        let socket = dir.join("standby.qmp").display().to_string();
        let options = ["--listen", &peer, "--qmp", &socket].map(str::to_owned);
        Ok(Stage {
            _backup: Daemon::start(dir, "backup", &options)?,
            guest: running,
            _standby: standby,
            peer,
            memory,
            page,
            attached: 0,
            place,
        })
    }

    /// The job has to be loaded, and its memory to be made.
    fn wait_for_work(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.memory.read_u64(self.page + 8)? == 0 {
            ensure!(
                Instant::now() < deadline,
                "the guest does not work: run scripts/setup"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn watch(&self, time: Duration) -> Result<Progress> {
        let read = || -> Result<(f64, f64)> {
            let tick = self.memory.read_u64(self.page)?;
            Ok((tick as f64, self.memory.read_u64(self.page + 8)? as f64))
        };
        let (began, (tick, work)) = (Instant::now(), read()?);
        std::thread::sleep(time);
        let (seconds, (ticks, worked)) = (began.elapsed().as_secs_f64(), read()?);
        let guest_seconds = (ticks - tick) * TICK_MS / 1e3;
        Ok(Progress {
            rate: (worked - work) / seconds,
            clock_lost: 100.0 * (1.0 - guest_seconds / seconds),
        })
    }

    /// Protects the guest for some time, and lets it run free again.
    fn protect(&mut self, seen: &mut Seen, time: Duration) -> Result<()> {
        self.attached += 1;
        let dir = self.place.path().join(format!("attach-{}", self.attached));
        std::fs::create_dir(&dir)?;
        let mut primary = self.attach(&dir, seen.epoch_ms)?;
        std::thread::sleep(SETTLE);
        let from_us = bench::pair::now_us();
        let progress = self.watch(time)?;
        let until_us = bench::pair::now_us();
        let during = from_us..=until_us;
        let seen_epochs = epochs(&primary.events(), |at| during.contains(&at));
        ensure!(
            !seen_epochs.is_empty(),
            "no epoch: {}",
            primary.process.said()
        );
        let pauses: Vec<u64> = seen_epochs.iter().map(|e| e.pause_us).collect();
        let paused_us: u64 = pauses.iter().sum();
        seen.paused
            .push(100.0 * paused_us as f64 / (until_us - from_us) as f64);
        seen.pauses_us.extend(pauses);
        seen.dirty_pages
            .extend(seen_epochs.iter().map(|e| e.dirty_pages));
        seen.protected.push(progress);
        primary.operate("detach")?;
        let ended = primary.process.wait(PATIENCE)?;
        ended.context("the primary does not end after a detach")?;
        Ok(())
    }

    fn attach(&self, dir: &Path, epoch_ms: u64) -> Result<Daemon> {
        let socket = self.place.path().join("guest.qmp").display().to_string();
        let epoch_ms = epoch_ms.to_string();
        let own = [
            "--peer",
            &self.peer,
            "--qmp",
            &socket,
            "--epoch-ms",
            &epoch_ms,
        ];
        let options: Vec<_> = PATIENT
            .iter()
            .chain(&own)
            .map(|&it| it.to_owned())
            .collect();
        let mut primary = Daemon::start(dir, "primary", &options)?;
        primary
            .wait_event("synced", PATIENCE)
            .with_context(|| format!("the guest's QEMU has said: {}", self.guest.said()))?;
        Ok(primary)
    }
}

impl Seen {
    fn new(job: &'static str, epoch_ms: u64) -> Seen {
        Seen {
            job,
            epoch_ms,
            free: vec![],
            protected: vec![],
            pauses_us: vec![],
            dirty_pages: vec![],
            paused: vec![],
        }
    }

    /// Of the work, in percent: median of what each protected stretch lost beside the free one
    /// before it.
    fn tax(&self) -> f64 {
        let pairs = self.protected.iter().zip(&self.free);
        let lost = pairs.map(|(ours, free)| 100.0 * (1.0 - ours.rate / free.rate.max(1e-9)));
        median(&lost.collect::<Vec<_>>())
    }

    /// Of the guest's clock, in percent, beyond what it lost without protection.
    fn clock_lost(&self) -> f64 {
        let pairs = self.protected.iter().zip(&self.free);
        let lost = pairs.map(|(ours, free)| ours.clock_lost - free.clock_lost);
        median(&lost.collect::<Vec<_>>())
    }

    fn has_job(&self) -> bool {
        self.job != "none"
    }

    /// What the pauses alone take, in percent.
    fn model(&self) -> f64 {
        let pause_ms = Latency::of_us(&self.pauses_us).p50_us() / 1e3;
        100.0 * pause_ms / (self.epoch_ms as f64 + pause_ms)
    }

    fn to_json(&self) -> serde_json::Value {
        let rates = |list: &[Progress]| list.iter().map(|p| p.rate).collect::<Vec<_>>();
        json!({
            "job": self.job, "epoch_ms": self.epoch_ms, "tax_percent": self.has_job().then(|| self.tax()),
            "pauses_alone_percent": self.model(), "paused_percent": median(&self.paused),
            "clock_lost_percent": self.clock_lost(), "pause_us": Latency::of_us(&self.pauses_us).to_json(),
            "dirty_pages_p50": bench::report::quantile(&self.dirty_pages, 50),
            "rates_free": rates(&self.free), "rates_protected": rates(&self.protected),
        })
    }
}

fn report(all: &[Seen]) -> Group {
    Group {
        name: "tax",
        title: "Tax: what it costs the guest's work",
        data: all.iter().map(Seen::to_json).collect(),
        figures: vec![by_length(all), at_twenty(all)],
        ratios: ratios(all),
        missing: vec![],
    }
}

fn by_length(all: &[Seen]) -> Figure {
    let series = |name: &str, job: &'static str, limit, value: fn(&Seen) -> f64| Series {
        name: name.into(),
        points: all
            .iter()
            .filter(|s| s.job == job)
            .map(|s| (s.epoch_ms as f64, value(s)))
            .collect(),
        limit,
    };
    let mut table = Table::new([
        "job",
        "epoch ms",
        "tax %",
        "pauses alone %",
        "clock lost %",
        "pause p50 ms",
        "dirty pages",
        "runs",
    ]);
    for seen in all {
        table.row([
            seen.job.into(),
            seen.epoch_ms.to_string(),
            if seen.has_job() {
                number(seen.tax())
            } else {
                String::new()
            },
            number(seen.model()),
            number(seen.clock_lost()),
            number(Latency::of_us(&seen.pauses_us).p50_us() / 1e3),
            number(bench::report::quantile(&seen.dirty_pages, 50) as f64),
            seen.protected.len().to_string(),
        ]);
    }
    let twenty = |job| {
        all.iter()
            .find(|s: &&Seen| s.job == job && s.epoch_ms == 20)
    };
    let tax = |job| number(twenty(job).map_or(0.0, Seen::tax));
    Figure {
        heading: "Work lost, by the length of an epoch (medians)".into(),
        plot: lines(
            Axis {
                label: "epoch, ms",
                scale: Scale::Log,
            },
            Axis {
                label: "% of the work",
                scale: Scale::Linear,
            },
            &[
                series("CPU job", "cpu", false, Seen::tax),
                series("CPU job, the pauses alone", "cpu", true, Seen::model),
                series("memory job", "memory", false, Seen::tax),
                series("memory job, the pauses alone", "memory", true, Seen::model),
            ],
        ),
        sentence: format!(
            "At 20 ms a job that only computes loses {} % of its speed, one that writes all over 64 MiB {} %. The \
             latter also pays for a fault on the first write to each page, in every epoch.",
            tax("cpu"),
            tax("memory")
        ),
        table,
    }
}

fn at_twenty(all: &[Seen]) -> Figure {
    let rows: Vec<_> = all
        .iter()
        .filter(|s| s.epoch_ms == 20)
        .map(|s| Bar {
            label: if !s.has_job() {
                "no job".into()
            } else {
                format!("{} job", s.job)
            },
            parts: vec![s.clock_lost().max(0.0)],
        })
        .collect();
    let idle = all
        .iter()
        .find(|s| !s.has_job())
        .map_or(0.0, Seen::clock_lost);
    Figure {
        heading: "The guest's own clock, at 20 ms".into(),
        plot: bars("%", &["lost"], &rows),
        sentence: format!(
            "Under emulation the guest's clock stands still with it: {} % of the time without work, where epochs are \
             longer because nothing happens.",
            number(idle)
        ),
        table: Table::default(),
    }
}

fn ratios(all: &[Seen]) -> Vec<Ratio> {
    let cpu = all.iter().filter(|s| s.job == "cpu").map(|s| Ratio {
        name: format!("tax_points_above_pauses_cpu_{}_ms", s.epoch_ms),
        value: s.tax() - s.model(),
        bound: Bound::AtMost(POINTS),
        meaning: format!(
            "percent of the CPU job's speed lost, less pause / (epoch + pause), epochs of {} ms",
            s.epoch_ms
        ),
    });
    let idle = all.iter().filter(|s| !s.has_job()).map(|s| Ratio {
        name: "tax_percent_idle".into(),
        value: s.clock_lost(),
        bound: Bound::AtMost(IDLE_PERCENT),
        meaning: "percent of its clock that a guest without work loses".into(),
    });
    cpu.chain(idle).collect()
}
