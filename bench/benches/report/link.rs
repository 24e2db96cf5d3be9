//! An epoch's bytes to another process and the acknowledgement back, beside plain blocking sockets
//! that compute the same checksum and wait in the same way.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Duration;

use anyhow::Result;
use bench::report::plot::{Axis, Scale, Series, lines, number};
use bench::report::{Bound, Figure, Group, Latency, Ratio, Table, median};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use serde_json::json;

use crate::iperf::Iperf;
use crate::laps::{self, Epoch, Lap};
use crate::options::Options;
use crate::processor::Pinned;

const PAGES: [usize; 7] = [0, 16, 256, 1024, 4096, 16_384, 65_536];
/// The limits: of the speed from so many pages on, of the time up to so many.
const FAST_FROM: usize = 4096;
const SPEED_OF_SOCKETS: f64 = 0.95;
const QUICK_TO: usize = 16;
const TIME_OF_SOCKETS: f64 = 1.2;

/// The times of one epoch there and its acknowledgement back.
#[derive(Default)]
struct Seen {
    sockets: Latency,
    tcp: Latency,
    mem: Latency,
}

pub(crate) fn measure(options: &Options, criterion: &mut Criterion) -> Result<Group> {
    let time = Duration::from_secs(options.pick(2, 10));
    let mut group = criterion.benchmark_group("link");
    group
        .sampling_mode(SamplingMode::Flat)
        .sample_size(options.pick(20, 50))
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(time);
    let mut all = BTreeMap::new();
    let iperf = Iperf::start();
    let mut iperf_speeds = Vec::new();
    for pages in PAGES {
        if let Ok(iperf) = &iperf {
            iperf_speeds.push(iperf.measure()?);
        }
        let _pinned = Pinned::to(0)?;
        let epoch = Epoch::new(pages);
        group.throughput(Throughput::Bytes(epoch.bytes() as u64));
        let mut seen = Seen::default();
        {
            let mut sockets = laps::sockets(&epoch)?;
            let mut tcp = laps::tcp(&epoch)?;
            group.bench_function(BenchmarkId::new("tcp", pages), |bencher| {
                bencher.iter_custom(|count| {
                    // In turns, so that whatever else the machine does meets both.
                    let mut laps = || {
                        seen.sockets.record(sockets.lap());
                        recorded(&mut seen.tcp, &mut tcp)
                    };
                    (0..count).map(|_| laps()).sum()
                });
            });
        }
        let mut mem = laps::mem(&epoch)?;
        group.bench_function(BenchmarkId::new("mem", pages), |bencher| {
            bencher
                .iter_custom(|count| (0..count).map(|_| recorded(&mut seen.mem, &mut mem)).sum());
        });
        all.insert(pages, seen);
    }
    group.finish();
    let iperf = iperf.map(|_| median(&iperf_speeds));
    Ok(report(&all, iperf))
}

fn recorded(into: &mut Latency, what: &mut impl Lap) -> Duration {
    let took = black_box(what.lap());
    into.record(took);
    took
}

/// `iperf`: bytes a second.
fn report(all: &BTreeMap<usize, Seen>, iperf: Result<f64>) -> Group {
    let mut data: serde_json::Map<_, _> = all
        .iter()
        .map(|(pages, seen)| {
            let one = json!({
                "bytes": Epoch::new(*pages).bytes(), "sockets_us": seen.sockets.to_json(),
                "tcp_us": seen.tcp.to_json(), "mem_us": seen.mem.to_json(),
            });
            (pages.to_string(), one)
        })
        .collect();
    let mut missing =
        vec!["RDMA: only soft-RoCE can be had here, inside the lab (docs/lab.md)".to_owned()];
    let iperf = match iperf {
        Ok(speed) => Some(speed / 1e9),
        Err(error) => {
            missing.push(format!("{error:#}"));
            None
        }
    };
    data.insert("iperf3_gb_per_s".into(), iperf.into());
    Group {
        name: "link",
        title: "Link: an epoch there, its acknowledgement back",
        data: data.into(),
        figures: vec![times(all), speeds(all, iperf)],
        ratios: ratios(all),
        missing,
    }
}

fn series(all: &BTreeMap<usize, Seen>, value: impl Fn(usize, &Latency) -> f64) -> Vec<Series> {
    let one = |name: &str, limit, pick: fn(&Seen) -> &Latency| Series {
        name: name.into(),
        // A logarithm has no place for no pages.
        points: all
            .iter()
            .map(|(pages, seen)| ((*pages).max(1) as f64, value(*pages, pick(seen))))
            .collect(),
        limit,
    };
    vec![
        one("TCP link", false, |seen| &seen.tcp),
        one("plain sockets", true, |seen| &seen.sockets),
        one("mem (one process)", false, |seen| &seen.mem),
    ]
}

fn times(all: &BTreeMap<usize, Seen>) -> Figure {
    let mut table = Table::new([
        "pages",
        "sockets p50 µs",
        "tcp p50 µs",
        "tcp p99 µs",
        "mem p50 µs",
        "tcp / sockets",
        "laps",
    ]);
    for (pages, seen) in all {
        table.row([
            number(*pages as f64),
            number(seen.sockets.p50_us()),
            number(seen.tcp.p50_us()),
            number(seen.tcp.p99_us()),
            number(seen.mem.p50_us()),
            format!("{:.2}", seen.tcp.p50_us() / seen.sockets.p50_us()),
            number(seen.tcp.count() as f64),
        ]);
    }
    let least = &all[&QUICK_TO];
    Figure {
        heading: "Push and commit, median".into(),
        plot: lines(
            Axis {
                label: "pages in the epoch",
                scale: Scale::Log,
            },
            Axis {
                label: "µs",
                scale: Scale::Log,
            },
            &series(all, |_, latency| latency.p50_us()),
        ),
        sentence: format!(
            "{QUICK_TO} pages are pushed, checked and acknowledged in {} µs; plain blocking sockets need {} µs \
             for the same bytes, checksums and waiting.",
            number(least.tcp.p50_us()),
            number(least.sockets.p50_us())
        ),
        table,
    }
}

/// `iperf`: GB a second.
fn speeds(all: &BTreeMap<usize, Seen>, iperf: Option<f64>) -> Figure {
    let speed =
        |pages, latency: &Latency| Epoch::new(pages).bytes() as f64 / latency.p50_us() / 1e3;
    let seen = &all[&FAST_FROM];
    let mut shown = series(all, speed);
    shown.extend(iperf.map(|speed| {
        Series {
            name: "iperf3".into(),
            points: all
                .keys()
                .map(|pages| ((*pages).max(1) as f64, speed))
                .collect(),
            limit: true,
        }
    }));
    let without = iperf.map_or_else(String::new, |speed| {
        format!(
            "; iperf3 {} GB/s, without checksums and answers",
            number(speed)
        )
    });
    Figure {
        heading: "The same as a speed".into(),
        plot: lines(
            Axis {
                label: "pages in the epoch",
                scale: Scale::Log,
            },
            Axis {
                label: "GB/s",
                scale: Scale::Linear,
            },
            &shown,
        ),
        sentence: format!(
            "At {} pages the link moves {} GB/s over loopback, plain sockets {} GB/s{without}.",
            number(FAST_FROM as f64),
            number(speed(FAST_FROM, &seen.tcp)),
            number(speed(FAST_FROM, &seen.sockets))
        ),
        table: Table::default(),
    }
}

fn ratios(all: &BTreeMap<usize, Seen>) -> Vec<Ratio> {
    let ratio = |(pages, seen): (&usize, &Seen)| {
        let slower = seen.tcp.p50_us() / seen.sockets.p50_us();
        if *pages >= FAST_FROM {
            Some(Ratio {
                name: format!("tcp_push_speed_vs_sockets_{pages}"),
                value: 1.0 / slower,
                bound: Bound::AtLeast(SPEED_OF_SOCKETS),
                meaning: format!(
                    "bytes a second, TCP link / plain blocking sockets, {pages} pages"
                ),
            })
        } else {
            (*pages <= QUICK_TO).then(|| Ratio {
                name: format!("tcp_commit_time_vs_sockets_{pages}"),
                value: slower,
                bound: Bound::AtMost(TIME_OF_SOCKETS),
                meaning: format!(
                    "there and back, TCP link / plain blocking sockets, {pages} pages"
                ),
            })
        }
    };
    all.iter().filter_map(ratio).collect()
}
