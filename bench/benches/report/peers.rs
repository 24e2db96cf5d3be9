//! What one could use instead, on the same machine and guest.

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::guest::Guest;
use bench::measure::boundaries;
use bench::pair::wait_tick_page;
use bench::process::{Process, Workplace, free_port};
use bench::qmp::Qmp;
use bench::report::plot::{Bar, bars, number};
use bench::report::{Bound, Figure, Group, Latency, Ratio, Table, quantile};
use serde_json::{Value, json};

use crate::options::Options;

const EPOCH: Duration = Duration::from_millis(20);
/// The first checkpoint of QEMU COLO as recorded on such a machine with QEMU 7.2 and 10.0, in six runs, in
/// milliseconds: the shortest and the longest. In none did it get past the second one.
const COLO_RECORDED_MS: (f64, f64) = (24.0, 104.0);
/// The limit: COLO's first checkpoint takes at least so many times our pause.
const COLO_TIMES: f64 = 10.0;
const COLO_PATIENCE: Duration = Duration::from_secs(20);

/// What a way to protect the guest has shown.
struct Seen {
    name: &'static str,
    label: &'static str,
    pause: Latency,
    /// From one epoch's begin until its bytes are away and the guest runs.
    epoch: Latency,
    bytes: Vec<u64>,
}

pub(crate) fn measure(options: &Options) -> Result<Group> {
    let epochs = options.pick(15, 100);
    let guest = options.guest()?;
    let seen = [
        ours(options, &guest, "ours", "curling-rdma", "auto")?,
        ours(
            options,
            &guest,
            "ours_ungated",
            "curling-rdma --gate off",
            "off",
        )?,
        migrate(&guest, epochs, false)?,
        migrate(&guest, epochs, true)?,
    ];
    let colo = colo(&guest);
    if let Err(error) = &colo {
        eprintln!("report: COLO's first checkpoint was not seen: {error:#}");
    }
    Ok(report(&seen, colo.ok()))
}

fn ours(
    options: &Options,
    guest: &Guest,
    name: &'static str,
    label: &'static str,
    gate: &str,
) -> Result<Seen> {
    let setup = options.setup(guest.clone(), &["--gate", gate]);
    let seen = boundaries(&setup, Duration::from_secs(options.pick(6, 30)))?;
    Ok(Seen {
        name,
        label,
        pause: Latency::of_us(&seen.pauses_us),
        epoch: Latency::of_us(&seen.of(|e| e.pause_us + e.commit_us)),
        bytes: seen.of(|e| e.bytes),
    })
}

/// Curling's own way on an unmodified QEMU: the guest's state is migrated away in each epoch, and
/// it goes on where it was.
fn migrate(guest: &Guest, epochs: u64, ignore_shared: bool) -> Result<Seen> {
    let place = Workplace::new("migrate")?;
    let sink = Sink::start()?;
    // `x-ignore-shared` leaves out named files only, from QEMU 8.1 on.
    let ram = Path::new("/dev/shm").join(place.path().file_name().context("a folder has a name")?);
    let ram = RamFile(ram);
    let backend = format!("memory-backend-file,mem-path={},share=on", ram.0.display());
    let line = guest.line(place.path(), "guest", &backend, false)?;
    let qemu = Process::start(place.path(), "guest", &guest.qemu, &line)?;
    wait_tick_page(&place.path().join("guest.console")).with_context(|| qemu.said())?;
    let mut qmp = Qmp::connect(&place.path().join("guest.qmp"))?;
    let on = |name: &str| json!({ "capability": name, "state": true });
    let mut wanted = vec![on("events")];
    if ignore_shared {
        wanted.push(on("x-ignore-shared"));
    }
    qmp.call(
        "migrate-set-capabilities",
        json!({ "capabilities": wanted }),
    )?;
    // As fast as it goes.
    qmp.call(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 1_u64 << 40 }),
    )?;
    let mut seen = Seen {
        name: if ignore_shared {
            "migrate_ignore_shared"
        } else {
            "migrate"
        },
        label: if ignore_shared {
            "migrate, x-ignore-shared"
        } else {
            "migrate"
        },
        pause: Latency::default(),
        epoch: Latency::default(),
        bytes: vec![],
    };
    for _ in 0..epochs {
        let (began, before) = (Instant::now(), sink.bytes());
        qmp.call("migrate", json!({ "uri": sink.uri }))?;
        let stopped = wait_completed(&mut qmp)?;
        let resumed = go_on(&mut qmp)?;
        seen.pause.record(Duration::from_micros(resumed - stopped));
        seen.epoch.record(began.elapsed());
        seen.bytes.push(sink.bytes() - before);
        std::thread::sleep(EPOCH);
    }
    Ok(seen)
}

/// When the guest was stopped for it.
fn wait_completed(qmp: &mut Qmp) -> Result<u64> {
    let mut stopped_us = None;
    loop {
        let event = qmp.event()?;
        match (event["event"].as_str(), event["data"]["status"].as_str()) {
            (Some("STOP"), _) => stopped_us = Some(stamp_us(&event)),
            (Some("MIGRATION"), Some("completed")) => {
                return stopped_us.context("a migration without a stop");
            }
            (Some("MIGRATION"), Some("failed")) => bail!("the migration failed: {event}"),
            _ => {}
        }
    }
}

/// Lets the guest run again, as soon as QEMU has cleaned up; when it did.
fn go_on(qmp: &mut Qmp) -> Result<u64> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while let Err(error) = qmp.call("cont", json!({})) {
        let early = error.to_string().contains("not finalized");
        ensure!(early && Instant::now() < deadline, "{error}");
        std::thread::sleep(Duration::from_micros(100));
    }
    loop {
        let event = qmp.event()?;
        if event["event"] == "RESUME" {
            return Ok(stamp_us(&event));
        }
    }
}

fn stamp_us(event: &Value) -> u64 {
    let stamp = &event["timestamp"];
    let part = |name: &str| stamp[name].as_u64().unwrap_or(0);
    part("seconds") * 1_000_000 + part("microseconds")
}

/// A peer that takes everything and looks at nothing.
struct Sink {
    uri: String,
    bytes: Arc<AtomicU64>,
}

impl Sink {
    fn start() -> Result<Sink> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let uri = format!("tcp:{}", listener.local_addr()?);
        let bytes = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&bytes);
        // Until this process ends: nobody connects any more once its QEMU is gone.
        std::thread::spawn(move || {
            let mut room = vec![0; 1 << 20];
            for mut stream in listener.incoming().flatten() {
                while let Ok(read @ 1..) = stream.read(&mut room) {
                    count.fetch_add(read as u64, Ordering::Relaxed);
                }
            }
        });
        Ok(Sink { uri, bytes })
    }

    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// Goes with its owner.
struct RamFile(std::path::PathBuf);

impl Drop for RamFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The pause of QEMU COLO's first checkpoint, in microseconds.
fn colo(guest: &Guest) -> Result<u64> {
    let place = Workplace::new("colo")?;
    let dir = place.path();
    // Nothing that COLO would want a proxy for.
    let mut guest = guest.clone();
    guest.machine = "pc".into();
    let backend = "memory-backend-ram";
    let line = guest.line(dir, "guest", backend, false)?;
    let mut line_there = guest.line(dir, "standby", backend, false)?;
    let peer = format!("tcp:127.0.0.1:{}", free_port()?);
    line_there.extend(["-incoming".to_owned(), peer.clone()]);
    let here = Process::start(dir, "guest", &guest.qemu, &line)?;
    let _there = Process::start(dir, "standby", &guest.qemu, &line_there)?;
    wait_tick_page(&dir.join("guest.console")).with_context(|| here.said())?;
    let mut there = Qmp::connect(&dir.join("standby.qmp"))?;
    let mut here = Qmp::connect(&dir.join("guest.qmp"))?;
    for qmp in [&mut there, &mut here] {
        let on = json!([{ "capability": "x-colo", "state": true }]);
        qmp.call("migrate-set-capabilities", json!({ "capabilities": on }))?;
    }
    here.call(
        "migrate-set-parameters",
        json!({ "x-checkpoint-delay": 100 }),
    )?;
    here.call("migrate", json!({ "uri": peer }))?;
    let deadline = Instant::now() + COLO_PATIENCE;
    let mut stopped_us = None;
    loop {
        ensure!(Instant::now() < deadline, "it did not come");
        let event = here.event()?;
        match (event["event"].as_str(), stopped_us) {
            (Some("STOP"), _) => stopped_us = Some(stamp_us(&event)),
            (Some("RESUME"), Some(stopped)) => return Ok(stamp_us(&event) - stopped),
            (Some("COLO_EXIT"), _) => bail!("it ended before: {event}"),
            _ => {}
        }
    }
}

fn report(seen: &[Seen], colo_us: Option<u64>) -> Group {
    let recorded_ms = (COLO_RECORDED_MS.0 + COLO_RECORDED_MS.1) / 2.0;
    let colo_ms = colo_us.map_or(recorded_ms, |us| us as f64 / 1e3);
    let mut data: serde_json::Map<_, _> = seen
        .iter()
        .map(|one| {
            let figures = json!({
                "pause_us": one.pause.to_json(), "epoch_us": one.epoch.to_json(),
                "bytes_p50": quantile(&one.bytes, 50),
            });
            (one.name.to_owned(), figures)
        })
        .collect();
    let colo = json!({
        "first_checkpoint_us": colo_us, "recorded_ms": [COLO_RECORDED_MS.0, COLO_RECORDED_MS.1],
    });
    data.insert("colo".into(), colo);
    Group {
        name: "peers",
        title: "Peers: what one could use instead",
        data: data.into(),
        figures: vec![pauses(seen, colo_ms, colo_us.is_some())],
        ratios: ratios(seen, colo_ms),
        missing: vec!["the tax of each of them".into()],
    }
}

fn pauses(seen: &[Seen], colo_ms: f64, measured: bool) -> Figure {
    let mut table = Table::new([
        "",
        "pause p50 ms",
        "p99 ms",
        "an epoch takes ms",
        "MiB an epoch",
        "epochs",
    ]);
    let mut rows = Vec::new();
    for one in seen {
        table.row([
            one.label.into(),
            number(one.pause.p50_us() / 1e3),
            number(one.pause.p99_us() / 1e3),
            number(one.epoch.p50_us() / 1e3),
            number(quantile(&one.bytes, 50) as f64 / f64::from(1 << 20)),
            number(one.pause.count() as f64),
        ]);
        rows.push(Bar {
            label: one.label.into(),
            parts: vec![one.pause.p50_us() / 1e3],
        });
    }
    let how = if measured {
        "measured here, once"
    } else {
        "recorded elsewhere"
    };
    rows.push(Bar {
        label: "COLO, first checkpoint".into(),
        parts: vec![colo_ms],
    });
    Figure {
        heading: "How long the guest stands still in an epoch (median)".into(),
        plot: bars("ms", &["pause"], &rows),
        sentence: format!(
            "The same guest of 256 MiB, writing 900 pages in 20 ms. One migrate per epoch sends all of RAM each time \
             ({} MiB); with x-ignore-shared none of it, so that it is no copy yet. COLO's figure is {how}; on six \
             earlier runs it was {} to {} ms, and none got past the second checkpoint.",
            number(
                quantile(&peers(seen).next().expect("migrate").bytes, 50) as f64
                    / f64::from(1 << 20)
            ),
            COLO_RECORDED_MS.0,
            COLO_RECORDED_MS.1
        ),
        table,
    }
}

/// What isn't ours.
fn peers(seen: &[Seen]) -> impl Iterator<Item = &Seen> {
    seen.iter().filter(|one| one.name.starts_with("migrate"))
}

fn ratios(seen: &[Seen], colo_ms: f64) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for ours in seen.iter().filter(|one| one.name.starts_with("ours")) {
        ratios.extend(peers(seen).map(|one| Ratio {
            name: format!("{}_pause_vs_{}", one.name, ours.name),
            value: one.pause.p50_us() / ours.pause.p50_us(),
            bound: Bound::AtLeast(1.0),
            meaning: format!("pause of an epoch, {} / {}, medians", one.label, ours.label),
        }));
    }
    let ours = seen[0].pause.p50_us();
    ratios.push(Ratio {
        name: "colo_first_checkpoint_vs_our_pause".into(),
        value: colo_ms * 1e3 / ours,
        bound: Bound::AtLeast(COLO_TIMES),
        meaning: "pause of COLO's first checkpoint / our median pause".into(),
    });
    ratios
}
