//! Finding, arming and copying dirty pages of a real QEMU's RAM, beside copying them alone.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bench::report::plot::{Axis, Bar, Scale, Series, bars, lines, number};
use bench::report::{Bound, Figure, Group, Latency, Ratio, Table};
use criterion::{BenchmarkGroup, Criterion, SamplingMode, measurement::WallTime};
use ft_core::DirtySet;
use serde_json::json;

use crate::options::Options;
use crate::ram::{Ram, Room};
use qemu_bridge::tracker::{CompareTracker, Tracker, UffdTracker};

/// The limit: so many times the copy alone, and so much for each GiB that is looked at.
const TIMES_COPY: f64 = 1.3;
const SCAN_US_PER_GIB: f64 = 600.0;
/// Of how many pages one is dirty where they are scattered, as far as there is room.
const STRIDE: u64 = 20;

/// What is dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dirt {
    pub(crate) pages: u64,
    pub(crate) stride: u64,
}

struct Seen {
    ram_mib: u64,
    tracker: &'static str,
    dirt: Dirt,
    /// Scan and arm.
    collect: Latency,
    gather: Latency,
    both: Latency,
    copy: Latency,
}

pub(crate) fn measure(options: &Options, criterion: &mut Criterion) -> Result<Group> {
    let mut group = criterion.benchmark_group("harvest");
    group
        .sampling_mode(SamplingMode::Flat)
        .sample_size(options.pick(10, 30))
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(options.pick(400, 3000)));
    let mut all = Vec::new();
    for &ram_mib in options.pick(&[256, 1024][..], &[256, 1024, 2048, 4096, 8192]) {
        let ram = Ram::start(options, ram_mib)?;
        let mut uffd = UffdTracker::attach(&ram.guest).context("attaching the uffd tracker")?;
        let all_pages = Dirt {
            pages: ram.pages(),
            stride: 1,
        };
        ram.touch(&mut uffd, all_pages)?;
        uffd.arm_all(&ram.guest)?;
        for pages in [0, 100, 1000, 10_000, 100_000] {
            let strides: &[u64] = if pages == 0 { &[1] } else { &[1, STRIDE] };
            for &stride in strides {
                let stride = stride.min(ram.pages() / pages.max(1));
                if stride > 0 {
                    let dirt = Dirt { pages, stride };
                    all.push(one(&mut group, &ram, ram_mib, &mut uffd, dirt)?);
                }
            }
        }
        drop(uffd);
        if ram_mib <= 1024 {
            let mut compare = CompareTracker::new(&ram.guest)?;
            compare.arm_all(&ram.guest)?;
            let dirt = Dirt {
                pages: 1000,
                stride: 1,
            };
            all.push(one(&mut group, &ram, ram_mib, &mut compare, dirt)?);
        }
    }
    group.finish();
    Ok(report(options, &all))
}

fn one(
    group: &mut BenchmarkGroup<'_, WallTime>,
    ram: &Ram,
    ram_mib: u64,
    tracker: &mut dyn Tracker,
    dirt: Dirt,
) -> Result<Seen> {
    let mut seen = Seen {
        ram_mib,
        tracker: tracker.name(),
        dirt,
        collect: Latency::default(),
        gather: Latency::default(),
        both: Latency::default(),
        copy: Latency::default(),
    };
    let mut room = Room::of(dirt.pages);
    let mut dirty = DirtySet::new(&ram.guest.pages_per_block());
    let name = format!(
        "{}/{ram_mib}MiB/{}x{}",
        seen.tracker, dirt.pages, dirt.stride
    );
    let mut failed = None;
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|count| {
            let mut lap = || -> Result<Duration> {
                ram.touch(tracker, dirt)?;
                // In turns with the limit, on the same pages and into the same memory, both as warm.
                room.copy(&ram.guest, &dirty)?;
                dirty.clear();
                let began = Instant::now();
                tracker.collect(&ram.guest, &mut dirty)?;
                let collected = began.elapsed();
                room.gather(&ram.guest, &dirty)?;
                let both = began.elapsed();
                anyhow::ensure!(
                    dirty.count() == dirt.pages,
                    "{} pages were found",
                    dirty.count()
                );
                let began = Instant::now();
                room.copy(&ram.guest, &dirty)?;
                seen.copy.record(began.elapsed());
                seen.collect.record(collected);
                seen.gather.record(both.saturating_sub(collected));
                seen.both.record(both);
                Ok(both)
            };
            let laps: Result<Duration> = (0..count).map(|_| lap()).sum();
            laps.unwrap_or_else(|error| {
                failed.get_or_insert(error);
                Duration::from_nanos(1)
            })
        });
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(black_box(seen)),
    }
}

impl Seen {
    fn gib(&self) -> f64 {
        self.ram_mib as f64 / 1024.0
    }

    /// What the limit allows, in microseconds.
    fn budget_us(&self) -> f64 {
        let copy = if self.dirt.pages == 0 {
            0.0
        } else {
            self.copy.p50_us()
        };
        TIMES_COPY * copy + SCAN_US_PER_GIB * self.gib()
    }

    fn layout(&self) -> &'static str {
        if self.dirt.stride == 1 {
            "clustered"
        } else {
            "scattered"
        }
    }
}

fn report(options: &Options, all: &[Seen]) -> Group {
    let data: Vec<_> = all
        .iter()
        .map(|seen| {
            json!({
                "ram_mib": seen.ram_mib, "tracker": seen.tracker, "pages": seen.dirt.pages,
                "stride": seen.dirt.stride, "scan_and_arm_us": seen.collect.to_json(),
                "gather_us": seen.gather.to_json(), "harvest_us": seen.both.to_json(),
                "memcpy_us": seen.copy.to_json(), "budget_us": seen.budget_us(),
            })
        })
        .collect();
    let mut missing = vec!["a scan on two threads: the product scans on one".to_owned()];
    if !options.full {
        missing.push("RAM of 2 to 8 GiB: --full".to_owned());
    }
    Group {
        name: "harvest",
        title: "Harvest: find, arm and copy dirty pages",
        data: data.into(),
        figures: vec![by_pages(all), by_ram(all)],
        ratios: ratios(all),
        missing,
    }
}

fn by_pages(all: &[Seen]) -> Figure {
    let ram_mib = 1024;
    let uffd = || {
        all.iter()
            .filter(|s| s.tracker == "uffd" && s.ram_mib == ram_mib)
    };
    let series = |name: &str, layout: &'static str, limit, value: fn(&Seen) -> f64| Series {
        name: name.into(),
        points: uffd()
            .filter(|s| s.layout() == layout && s.dirt.pages > 0)
            .map(|s| (s.dirt.pages as f64, value(s)))
            .collect(),
        limit,
    };
    let mut table = Table::new([
        "RAM MiB",
        "tracker",
        "pages",
        "layout",
        "scan and arm µs",
        "gather µs",
        "memcpy µs",
        "of the limit",
        "laps",
    ]);
    for seen in all {
        table.row([
            number(seen.ram_mib as f64),
            seen.tracker.into(),
            number(seen.dirt.pages as f64),
            seen.layout().into(),
            number(seen.collect.p50_us()),
            number(seen.gather.p50_us()),
            number(seen.copy.p50_us()),
            format!("{:.2}", seen.both.p50_us() / seen.budget_us()),
            number(seen.both.count() as f64),
        ]);
    }
    let of = |layout| uffd().find(|s| s.layout() == layout && s.dirt.pages == 1000);
    let middle = |seen: Option<&Seen>| seen.map_or(0.0, |s| s.both.p50_us());
    Figure {
        heading: format!("By dirty pages, {ram_mib} MiB of RAM, uffd (medians)"),
        plot: lines(
            Axis {
                label: "dirty pages",
                scale: Scale::Log,
            },
            Axis {
                label: "µs",
                scale: Scale::Log,
            },
            &[
                series("clustered", "clustered", false, |s| s.both.p50_us()),
                series("scattered", "scattered", false, |s| s.both.p50_us()),
                series("memcpy of the clustered ones", "clustered", true, |s| {
                    s.copy.p50_us()
                }),
                series("memcpy of the scattered ones", "scattered", true, |s| {
                    s.copy.p50_us()
                }),
            ],
        ),
        sentence: format!(
            "1,000 neighbouring pages are found, armed and copied in {} µs; {} µs if only every {STRIDE}th page is \
             dirty.",
            number(middle(of("clustered"))),
            number(middle(of("scattered")))
        ),
        table,
    }
}

fn by_ram(all: &[Seen]) -> Figure {
    let mut idle = all.iter().filter(|s| s.dirt.pages == 0);
    let rows: Vec<_> = idle
        .clone()
        .map(|s| Bar {
            label: format!("{} MiB", number(s.ram_mib as f64)),
            parts: vec![s.collect.p50_us()],
        })
        .collect();
    let largest = idle.next_back();
    let per_gib = largest.map_or(0.0, |s| s.collect.p50_us() / s.gib());
    let compare = all.iter().find(|s| s.tracker == "compare");
    let compared = compare.map_or(0.0, |s| s.collect.p50_us() / 1e3 / s.gib());
    Figure {
        heading: "By RAM, when nothing is dirty".into(),
        plot: bars("µs", &["scan"], &rows),
        sentence: format!(
            "Looking for dirt costs {} µs for each GiB that the guest has touched; the fall-back, comparing all of RAM, \
             {} ms.",
            number(per_gib),
            number(compared)
        ),
        table: Table::default(),
    }
}

/// The worst and the best known cases, by name.
fn ratios(all: &[Seen]) -> Vec<Ratio> {
    let uffd = all.iter().filter(|seen| seen.tracker == "uffd");
    uffd.map(|seen| Ratio {
        name: format!(
            "harvest_vs_limit_{}_mib_{}_{}",
            seen.ram_mib,
            seen.dirt.pages,
            seen.layout()
        ),
        value: seen.both.p50_us() / seen.budget_us(),
        bound: Bound::AtMost(1.0),
        meaning: format!(
            "scan, arm and gather / ({TIMES_COPY} × memcpy of the dirty pages + 0.6 ms a GiB): {} pages {}, {} MiB",
            seen.dirt.pages,
            seen.layout(),
            seen.ram_mib
        ),
    })
    .collect()
}
