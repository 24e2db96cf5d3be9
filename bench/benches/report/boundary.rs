//! How long a real guest stands still, beside the same QMP commands alone.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use bench::floor::Floor;
use bench::guest::{Guest, Work};
use bench::measure::{Boundaries, Epoch, Flip, boundaries};
use bench::report::plot::{Axis, Bar, Scale, Series, bars, lines, number};
use bench::report::{Bound, Figure, Group, Latency, Ratio, Table, median};
use serde_json::{Value, json};

use crate::options::Options;

/// The longest epoch of a guest that works, in every case of this group.
const EPOCH: Duration = Duration::from_millis(20);
/// That most guests here write every 20 ms.
const USUAL_PAGES: u32 = 900;
/// The limits: so many times the floor.
const P50_OF_FLOOR: f64 = 1.2;
const P99_OF_FLOOR: f64 = 2.0;

/// One guest.
struct Case {
    name: &'static str,
    label: String,
    guest: Guest,
    gated: bool,
}

/// What one guest has shown.
struct Seen {
    case: Case,
    runs: Boundaries,
    pause: Latency,
    floor: Latency,
}

pub(crate) fn measure(options: &Options) -> Result<Group> {
    let time = Duration::from_secs(options.pick(8, 60));
    let mut seen = Vec::new();
    for case in cases(options)? {
        let gate = if case.gated { "auto" } else { "off" };
        let mut setup = options.setup(case.guest.clone(), &["--gate", gate]);
        setup.floors = Some(match case.gated {
            true => Floor::Gated,
            false => Floor::Plain,
        });
        let runs = boundaries(&setup, time).with_context(|| case.label.clone())?;
        let one = Seen {
            pause: Latency::of_us(&runs.pauses_us),
            floor: Latency::of_us(&runs.floors_us),
            case,
            runs,
        };
        eprintln!(
            "report: {}: {} epochs, pause {:.2} ms, floor {:.2} ms",
            one.case.label,
            one.runs.epochs.len(),
            one.pause.p50_us() / 1e3,
            one.floor.p50_us() / 1e3
        );
        seen.push(one);
    }
    Ok(report(&seen))
}

fn cases(options: &Options) -> Result<Vec<Case>> {
    let linux = |pages, ram_mib| -> Result<Guest> {
        let mut guest = options.guest()?;
        guest.workload_pages = pages;
        guest.ram_mib = ram_mib;
        Ok(guest)
    };
    let case = |name, label: &str, guest, gated| Case {
        name,
        label: label.to_owned(),
        guest,
        gated,
    };
    let mut cases = vec![
        case("pages_0", "idle Linux", linux(0, 256)?, true),
        case(
            "pages_900",
            "900 pages in 20 ms",
            linux(USUAL_PAGES, 256)?,
            true,
        ),
        case(
            "ungated",
            "900 pages, no gate",
            linux(USUAL_PAGES, 256)?,
            false,
        ),
        case(
            "pages_10000",
            "10,000 pages in 20 ms",
            linux(10_000, 256)?,
            true,
        ),
        case(
            "ram_1024",
            "900 pages, RAM 1 GiB",
            linux(USUAL_PAGES, 1024)?,
            true,
        ),
    ];
    if options.full {
        cases.push(case("pages_300", "300 pages", linux(300, 256)?, true));
        cases.push(case("pages_3000", "3,000 pages", linux(3000, 256)?, true));
        cases.push(case(
            "ram_4096",
            "900 pages, RAM 4 GiB",
            linux(USUAL_PAGES, 4096)?,
            true,
        ));
        let mut newer = linux(USUAL_PAGES, 256)?;
        newer.qemu = bench::cache::qemu_10()?;
        newer.machine = "q35".into();
        newer.vcpus = 2;
        cases.push(case("qemu_10", "QEMU 10.0, q35, 2 vCPUs", newer, true));
    }
    if Path::new("/dev/kvm").exists() {
        let mut sector = linux(0, 256)?;
        sector.work = Work::BootSector;
        sector.accel = "kvm".into();
        // Without a NIC there is nothing to hold.
        cases.push(case("kvm", "KVM, boot sector", sector, false));
    }
    Ok(cases)
}

fn report(seen: &[Seen]) -> Group {
    let data: serde_json::Map<String, Value> = seen
        .iter()
        .map(|one| (one.case.name.to_owned(), one.to_json()))
        .collect();
    let mut missing = Vec::new();
    if !seen.iter().any(|one| one.case.guest.accel == "kvm") {
        missing.push("KVM: there is no /dev/kvm here".to_owned());
    }
    Group {
        name: "boundary",
        title: "Boundary: how long the guest stands still",
        data: Value::Object(data),
        figures: [
            Some(pauses(seen)),
            Some(by_dirt(seen)),
            tail(seen),
            Some(phases(seen)),
            Some(behind(seen)),
        ]
        .into_iter()
        .flatten()
        .collect(),
        ratios: ratios(seen),
        missing,
    }
}

impl Seen {
    fn to_json(&self) -> Value {
        let Seen {
            case,
            runs,
            pause,
            floor,
        } = self;
        let scheduled = |times: &[u64]| Latency::of_scheduled_us(times, EPOCH).to_json();
        let of = |pick: fn(&Epoch) -> u64| Latency::of_us(&runs.of(pick)).to_json();
        let there = |pick: fn(&Flip) -> u64| Latency::of_us(&self.flips(pick)).to_json();
        json!({
            "guest": case.label, "machine": case.guest.machine, "accel": case.guest.accel,
            "ram_mib": case.guest.ram_mib, "vcpus": case.guest.vcpus, "qemu": runs.qemu,
            "gate": runs.gate, "tracker": runs.tracker,
            "epochs": runs.epochs.len(), "seconds": runs.elapsed.as_secs_f64(),
            "pause_us": pause.to_json(), "floor_us": floor.to_json(),
            // As somebody meets it who needs the guest at a moment that it doesn't know of.
            "pause_against_schedule_us": scheduled(&runs.pauses_us),
            "commit_us": of(|e| e.commit_us),
            "commit_against_schedule_us": scheduled(&runs.of(|e| e.commit_us)),
            "dirty_pages_p50": self.middle(|e| e.dirty_pages as f64),
            "precopied_pages_p50": self.middle(|e| e.precopied_pages as f64),
            "bytes_p50": self.middle(|e| e.bytes as f64),
            "phases_us": {
                "stop": of(|e| e.stop_us), "save": of(|e| e.save_us), "harvest": of(|e| e.harvest_us),
                "scan": of(|e| e.scan_us), "copy": of(|e| e.copy_us), "cont": of(|e| e.cont_us),
                "gate": of(|e| e.gate_us), "seal": of(|e| e.seal_us), "push": of(|e| e.push_us),
                "release": of(|e| e.release_us),
                "arrive": there(|f| f.arrive_us), "check": there(|f| f.check_us),
                "flip": there(|f| f.flip_us), "apply": there(|f| f.apply_us),
            },
            "gather_gb_per_s": self.gather_speed(),
        })
    }

    fn middle(&self, pick: impl Fn(&Epoch) -> f64) -> f64 {
        median(&self.runs.epochs.iter().map(pick).collect::<Vec<_>>())
    }

    fn flips(&self, pick: impl Fn(&Flip) -> u64) -> Vec<u64> {
        self.runs.flips.iter().map(pick).collect()
    }

    /// Bytes copied out of RAM in a second while the guest stands still.
    fn gather_speed(&self) -> f64 {
        let bytes = |e: &Epoch| (e.dirty_pages - e.precopied_pages) * 4096;
        self.middle(|e| bytes(e) as f64 / (e.copy_us.max(1) as f64 * 1e3))
    }
}

fn pauses(seen: &[Seen]) -> Figure {
    let mut rows = Vec::new();
    let mut table = Table::new([
        "guest",
        "epochs",
        "dirty pages",
        "copied before",
        "pause p50 ms",
        "p99",
        "max",
        "floor p50 ms",
        "p99",
        "floors",
    ]);
    for one in seen {
        let ms = |latency: &Latency, percent| latency.percentile_us(percent) / 1e3;
        for (kind, latency) in [("", &one.pause), (" · floor", &one.floor)] {
            // The others would be too short to see beside them.
            if one.case.guest.workload_pages <= USUAL_PAGES {
                rows.push(Bar {
                    label: format!("{}{kind}", one.case.label),
                    parts: vec![latency.p50_us() / 1e3],
                });
            }
        }
        let [pause, floor] = [&one.pause, &one.floor];
        table.row([
            one.case.label.clone(),
            number(one.runs.epochs.len() as f64),
            number(one.middle(|e| e.dirty_pages as f64)),
            number(one.middle(|e| e.precopied_pages as f64)),
            number(ms(pause, 50.0)),
            number(ms(pause, 99.0)),
            number(ms(pause, 100.0)),
            number(ms(floor, 50.0)),
            number(ms(floor, 99.0)),
            number(floor.count() as f64),
        ]);
    }
    let usual = usual(seen);
    Figure {
        heading: "STOP to RESUME, median".into(),
        plot: bars("ms", &["pause"], &rows),
        sentence: format!(
            "A Linux guest that writes 900 pages in 20 ms stands still for {} ms; the same QMP commands \
             without any of our work need {} ms on the same guest, in between.",
            number(usual.pause.p50_us() / 1e3),
            number(usual.floor.p50_us() / 1e3)
        ),
        table,
    }
}

fn by_dirt(seen: &[Seen]) -> Figure {
    let mut sizes: Vec<_> = seen
        .iter()
        .filter(|one| one.case.name.starts_with("pages_"))
        .collect();
    sizes.sort_by_key(|one| one.case.guest.workload_pages);
    let series = |name: &str, limit, value: fn(&Seen) -> f64| Series {
        name: name.into(),
        points: sizes
            .iter()
            .map(|one| (one.middle(|e| e.dirty_pages as f64), value(one) / 1e3))
            .collect(),
        limit,
    };
    let most = sizes.last().expect("every run has these guests");
    Figure {
        heading: "By dirty pages, median".into(),
        plot: lines(
            Axis {
                label: "dirty pages in an epoch",
                scale: Scale::Log,
            },
            Axis {
                label: "ms",
                scale: Scale::Log,
            },
            &[
                series("pause", false, |one| one.pause.p50_us()),
                series("floor", true, |one| one.floor.p50_us()),
                series("harvest", false, |one| one.middle(|e| e.harvest_us as f64)),
            ],
        ),
        sentence: format!(
            "Of {} dirty pages {} were copied before the pause and not written since; the others take {} ms of it, \
             at {} GB/s.",
            number(most.middle(|e| e.dirty_pages as f64)),
            number(most.middle(|e| e.precopied_pages as f64)),
            number(most.middle(|e| e.copy_us as f64) / 1e3),
            number(most.gather_speed())
        ),
        table: Table::default(),
    }
}

/// The guest that the limits are about.
fn usual(seen: &[Seen]) -> &Seen {
    let usual = seen.iter().find(|one| one.case.name == "pages_900");
    usual.expect("every run has this guest")
}

fn tail(seen: &[Seen]) -> Option<Figure> {
    let one = usual(seen);
    if one.floor.count() == 0 {
        return None;
    }
    let series = |name: &str, latency: &Latency, limit| Series {
        name: name.into(),
        points: latency
            .tail()
            .into_iter()
            .map(|(x, us)| (x, us / 1e3))
            .collect(),
        limit,
    };
    let scheduled = Latency::of_scheduled_us(&one.runs.pauses_us, EPOCH);
    Some(Figure {
        heading: "The rare ones: 900 pages in 20 ms".into(),
        plot: lines(
            Axis {
                label: "one in so many takes longer",
                scale: Scale::Log,
            },
            Axis {
                label: "ms",
                scale: Scale::Linear,
            },
            &[
                series("pause", &one.pause, false),
                series("floor", &one.floor, true),
                series("pause, against the schedule", &scheduled, false),
            ],
        ),
        sentence: format!(
            "One pause in a hundred is longer than {} ms (floor: {} ms). The third line counts a stall for \
             every epoch that was due while it lasted.",
            number(one.pause.p99_us() / 1e3),
            number(one.floor.p99_us() / 1e3)
        ),
        table: Table::default(),
    })
}

fn phases(seen: &[Seen]) -> Figure {
    let names = [
        "stop",
        "save",
        "harvest beyond the save",
        "cont",
        "the rest",
    ];
    let mut table = Table::new([
        "guest",
        "stop µs",
        "save µs",
        "harvest µs",
        "of it scan and arm µs",
        "of it copy µs",
        "cont µs",
        "copy GB/s",
    ]);
    let rows: Vec<_> = seen
        .iter()
        .map(|one| {
            let part = |pick: fn(&Epoch) -> u64| one.middle(|e| pick(e) as f64);
            table.row([
                one.case.label.clone(),
                number(part(|e| e.stop_us)),
                number(part(|e| e.save_us)),
                number(part(|e| e.harvest_us)),
                number(part(|e| e.scan_us)),
                number(part(|e| e.copy_us)),
                number(part(|e| e.cont_us)),
                number(one.gather_speed()),
            ]);
            let beyond: fn(&Epoch) -> u64 = |e| e.harvest_us.saturating_sub(e.save_us);
            let known = |e: &Epoch| e.stop_us + e.save_us.max(e.harvest_us) + e.cont_us;
            let rest = one.middle(|e| e.pause_us.saturating_sub(known(e)) as f64);
            let parts = [
                part(|e| e.stop_us),
                part(|e| e.save_us),
                part(beyond),
                part(|e| e.cont_us),
                rest,
            ];
            Bar {
                label: one.case.label.clone(),
                parts: parts.map(|us| us / 1e3).to_vec(),
            }
        })
        .collect();
    let one = usual(seen);
    Figure {
        heading: "Where the pause goes (medians of each part)".into(),
        plot: bars("ms", &names, &rows),
        sentence: format!(
            "What was not copied before the pause is found, armed and copied while QEMU saves its devices: of 900 \
             pages' harvest only what outlasts the save counts. Finding and arming take {} µs there, copying {} µs.",
            number(one.middle(|e| e.scan_us as f64)),
            number(one.middle(|e| e.copy_us as f64))
        ),
        table,
    }
}

fn behind(seen: &[Seen]) -> Figure {
    let mut table = Table::new([
        "guest",
        "commit p50 ms",
        "p90",
        "p99",
        "max",
        "KiB an epoch",
        "dirty KiB",
        "check p50 µs",
        "flip",
        "release",
        "apply",
    ]);
    let rows: Vec<_> = seen
        .iter()
        .map(|one| {
            let commit = Latency::of_us(&one.runs.of(|e| e.commit_us));
            let at = |percent| number(commit.percentile_us(percent) / 1e3);
            let there = |pick: fn(&Flip) -> u64| Latency::of_us(&one.flips(pick)).p50_us();
            let (check, flip) = (there(|f| f.check_us), there(|f| f.flip_us));
            let here = |pick: fn(&Epoch) -> u64| one.middle(|e| pick(e) as f64);
            table.row([
                one.case.label.clone(),
                at(50.0),
                at(90.0),
                at(99.0),
                at(100.0),
                number(one.middle(|e| e.bytes as f64 / 1024.0)),
                number(one.middle(|e| e.dirty_pages as f64 * 4.0)),
                number(check),
                number(flip),
                number(here(|e| e.release_us)),
                number(there(|f| f.apply_us)),
            ]);
            let on_the_way = (here(|e| e.push_us) - check - flip).max(0.0);
            Bar {
                label: one.case.label.clone(),
                parts: [here(|e| e.seal_us), on_the_way, check, flip]
                    .map(|us| us / 1e3)
                    .to_vec(),
            }
        })
        .collect();
    let one = usual(seen);
    Figure {
        heading: "How long until the backup has it, while the guest runs (medians)".into(),
        plot: bars(
            "ms",
            &["seal", "push and acknowledgement", "check", "flip"],
            &rows,
        ),
        sentence: format!(
            "{} KiB of 900 pages and the devices are on the backup, checked and acknowledged, {} ms after the \
             guest runs again; output waits for that.",
            number(one.middle(|e| e.bytes as f64 / 1024.0)),
            number(one.middle(|e| e.commit_us as f64) / 1e3)
        ),
        table,
    }
}

fn ratios(seen: &[Seen]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for one in seen.iter().filter(|one| one.floor.count() > 0) {
        let name = one.case.name;
        // What the limits are set for; the others are told as well.
        let limited = ["pages_0", "pages_900"].contains(&name);
        let mut add = |percent: u32, limit| {
            let at = |latency: &Latency| latency.percentile_us(f64::from(percent));
            ratios.push(Ratio {
                name: format!("pause_p{percent}_vs_floor_{name}"),
                value: at(&one.pause) / at(&one.floor),
                bound: Bound::AtMost(limit),
                meaning: format!(
                    "STOP to RESUME, ours / the same QMP commands alone: {}",
                    one.case.label
                ),
            });
        };
        if limited {
            add(50, P50_OF_FLOOR);
            add(99, P99_OF_FLOOR);
        }
    }
    ratios
}
