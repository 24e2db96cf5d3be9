//! From the death of the host to the guest's next instruction.

use std::time::Duration;

use anyhow::Result;
use bench::measure::{Failover, failover};
use bench::report::plot::{Axis, Bar, Scale, Series, bars, lines, number};
use bench::report::{Bound, Figure, Group, Latency, Ratio, Table, quantile};
use serde_json::json;

use crate::options::Options;

/// The limit of the median, in milliseconds.
const MEDIAN_MS: f64 = 30.0;

pub(crate) fn measure(options: &Options) -> Result<Group> {
    let kills = options.pick(8, 100);
    let setup = options.setup(options.guest()?, &[]);
    let mut seen = Vec::new();
    for number in 0..kills {
        // Somewhere in an epoch, another place each time.
        let after = Duration::from_micros(number * 7919 % 40_000);
        let one = failover(&setup, after)?;
        eprintln!(
            "report: failover {number}: {:.1} ms",
            one.total_us as f64 / 1e3
        );
        seen.push(one);
    }
    Ok(report(options, &seen))
}

fn report(options: &Options, seen: &[Failover]) -> Group {
    let of = |pick: fn(&Failover) -> u64| seen.iter().map(pick).collect::<Vec<_>>();
    let totals = of(|one| one.total_us);
    let total = Latency::of_us(&totals);
    let detect = Latency::of_us(&of(|one| one.detect_us));
    let activate = Latency::of_us(&of(|one| one.activate_us));
    let p50_ms = quantile(&totals, 50) as f64 / 1e3;
    let mut table = Table::new(["", "p50 ms", "p90 ms", "max ms"]);
    for (name, latency) in [
        ("detect", &detect),
        ("activate", &activate),
        ("total", &total),
    ] {
        let at = |percent| number(latency.percentile_us(percent) / 1e3);
        table.row([name.into(), at(50.0), at(90.0), at(100.0)]);
    }
    let medians = Figure {
        heading: format!("Where {} failovers spent their time (medians)", seen.len()),
        plot: bars(
            "ms",
            &["kill(2) to decision", "decision to running"],
            &[Bar {
                label: "both processes killed".into(),
                parts: vec![detect.p50_us() / 1e3, activate.p50_us() / 1e3],
            }],
        ),
        sentence: format!(
            "A guest of 256 MiB ran on the other QEMU {} ms after its QEMU and its daemon were sent \
             SIGKILL (median), at the latest after {} ms. Most of the first part is the kernel giving \
             the dead QEMU's memory back, which comes before it closes connections.",
            number(p50_ms),
            number(total.percentile_us(100.0) / 1e3)
        ),
        table,
    };
    let points = total.tail();
    let tail = Figure {
        heading: "All of them".into(),
        plot: lines(
            Axis {
                label: "one in so many takes longer",
                scale: Scale::Log,
            },
            Axis {
                label: "ms",
                scale: Scale::Linear,
            },
            &[Series {
                name: "first kill(2) to RESUME".into(),
                points: points.into_iter().map(|(x, us)| (x, us / 1e3)).collect(),
                limit: false,
            }],
        ),
        sentence: "The further right, the rarer: the last point is the slowest one seen.".into(),
        table: Table::default(),
    };
    Group {
        name: "failover",
        title: "Failover: the host dies",
        data: json!({
            "kills": seen.len(), "ram_mib": 256,
            "detect_us": detect.to_json(), "activate_us": activate.to_json(), "total_us": total.to_json(),
        }),
        figures: vec![medians, tail],
        ratios: vec![Ratio {
            name: "failover_p50_ms".into(),
            value: p50_ms,
            bound: Bound::AtMost(MEDIAN_MS),
            meaning: "first kill(2) to the standby's RESUME, median, in ms; 256 MiB, both processes killed".into(),
        }],
        missing: vec![
            format!("a host that dies silently, without FIN: it takes two kernels; scripts/lab has them{}",
                if options.full { "" } else { ". More kills: --full" }),
        ],
    }
}
