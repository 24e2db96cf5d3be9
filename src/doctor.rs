//! What each device of a VM adds to every pause, and what to do about it.
//!
//! At each boundary QEMU writes the state of all its devices, field by field, while the guest stands
//! still: the bytes are a good measure of the time.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use qemu_bridge::device_state::{Section, StateSink, sections};
use qemu_bridge::qmp::{Command, Qmp};
use qemu_bridge::refusals::{Allowances, refusals};
use serde_json::Value;

use crate::exit::{self, Exit};
use crate::nursery::ANSWER_PATIENCE;

/// Saves that are timed; the guest stands still for a few milliseconds in each.
const SAVES: usize = 9;
/// Devices that are listed; the others share a line.
const LISTED: usize = 12;
/// A virtio device on PCI with more than this lists 1,024 queues, used or not: it is a modern one.
const MODERN_VIRTIO_BYTES: usize = 40_000;

/// What was found.
#[derive(Debug)]
pub(crate) struct Diagnosis {
    /// The largest first.
    sections: Vec<Section>,
    /// Of all devices together: the median of several saves.
    save: Duration,
}

/// `doctor`: examines a VM that runs, or that stands still.
///
/// # Errors
/// QEMU can't be asked, or its devices can't be saved.
pub(crate) fn run(socket: &Path) -> anyhow::Result<Exit> {
    let mut qmp = Qmp::connect(socket, ANSWER_PATIENCE).with_context(|| {
        format!(
            "asking QEMU at {}: a daemon that protects it keeps this socket to itself; detach, or give QEMU another -qmp",
            socket.display()
        )
    })?;
    // A device that can't be migrated makes QEMU crash in the save.
    let found = refusals(
        &mut qmp,
        Allowances {
            unreplicated_disks: true,
        },
        ANSWER_PATIENCE,
    )?;
    if let Some(first) = found.first() {
        let text = format!("{}: {}; {}", first.name, first.why, first.cure);
        return Err(exit::Refusal(text).into());
    }
    print!("{}", examine(&mut qmp)?);
    Ok(Exit::Clean)
}

/// Saves the devices of a VM that has no unmigratable ones a few times, stopping its guest for each.
///
/// # Errors
/// QEMU refuses.
pub(crate) fn examine(qmp: &mut Qmp) -> anyhow::Result<Diagnosis> {
    let status = qmp.call(Command::new("query-status"), ANSWER_PATIENCE)?;
    let running = status["running"] == Value::Bool(true);
    let mut sink = StateSink::install(qmp, ANSWER_PATIENCE)?;
    let mut times = Vec::new();
    for _ in 0..SAVES {
        sink.rewind()?;
        if running {
            qmp.call(Command::new("stop"), ANSWER_PATIENCE)?;
        }
        let began = Instant::now();
        let saved = qmp.call(sink.save_command(), ANSWER_PATIENCE);
        times.push(began.elapsed());
        if running {
            // Also when the save has failed: the guest runs on.
            qmp.call(Command::new("cont"), ANSWER_PATIENCE)?;
        }
        saved.context("saving the device state")?;
    }
    let state = sink.read()?;
    qmp.call(sink.remove_command(), ANSWER_PATIENCE)?;
    times.sort();
    let mut sections = sections(&state)?;
    sections.sort_by_key(|section| std::cmp::Reverse(section.bytes));
    Ok(Diagnosis {
        sections,
        save: times[SAVES / 2],
    })
}

/// What would make a device cheaper, if something is known.
fn advice(section: &Section) -> Option<&'static str> {
    let is = |kind: &str| {
        section
            .name
            .rsplit('/')
            .next()
            .is_some_and(|n| n.starts_with(kind))
    };
    if is("virtio") && section.bytes > MODERN_VIRTIO_BYTES {
        return Some(
            "a modern virtio device saves 1,024 queues, used or not: with disable-modern=on on both \
             sides it takes a fortieth (the guest must boot with it)",
        );
    }
    let emulated = is("e1000") || section.name == "e1000e";
    emulated.then_some(
        "saves hundreds of kilobytes: virtio-net-pci with disable-modern=on takes a hundredth",
    )
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: usize = self.sections.iter().map(|section| section.bytes).sum();
        // Fields cost QEMU the time, and fields make the bytes.
        let share = |bytes: usize| self.save.as_secs_f64() * 1e6 * bytes as f64 / all.max(1) as f64;
        let kib = |bytes: usize| bytes as f64 / 1024.0;
        writeln!(
            f,
            "# at each boundary QEMU saves {:.1} KiB of devices, which takes it {:.2} ms here; by their bytes:",
            kib(all),
            self.save.as_secs_f64() * 1e3
        )?;
        for section in self.sections.iter().take(LISTED) {
            let Section { name, bytes, .. } = section;
            writeln!(
                f,
                "#   {:9.1} KiB {:7.0} µs  {name}",
                kib(*bytes),
                share(*bytes)
            )?;
        }
        let rest = self.sections.iter().skip(LISTED);
        let (count, bytes) = rest.fold((0, 0), |(count, bytes), s| (count + 1, bytes + s.bytes));
        if count > 0 {
            let line = format!(
                "{:9.1} KiB {:7.0} µs  {count} others",
                kib(bytes),
                share(bytes)
            );
            writeln!(f, "#   {line}")?;
        }
        for section in &self.sections {
            if let Some(advice) = advice(section) {
                writeln!(f, "# {}: {advice}", section.name)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(name: &str, bytes: usize) -> Section {
        Section {
            name: name.to_owned(),
            instance: 0,
            bytes,
        }
    }

    #[test]
    fn the_dear_ones_get_advice() {
        assert!(advice(&section("0000:00:03.0/virtio-net", 45_000)).is_some());
        assert!(advice(&section("0000:00:03.0/virtio-net", 2000)).is_none());
        assert!(advice(&section("0000:00:03.0/e1000", 212_000)).is_some());
        assert!(advice(&section("timer", 20)).is_none());
    }

    #[test]
    fn small_devices_share_a_line() {
        let sections = (0..20)
            .map(|n| section(&format!("device-{n}"), 1024))
            .collect();
        let diagnosis = Diagnosis {
            sections,
            save: Duration::from_micros(500),
        };
        let text = diagnosis.to_string();
        assert!(
            text.contains("20.0 KiB") && text.contains("0.50 ms"),
            "{text}"
        );
        assert!(text.contains("8.0 KiB     200 µs  8 others"), "{text}");
    }
}
