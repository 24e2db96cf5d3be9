//! What the guest can see of its machine, as QEMU tells it.
//!
//! Two QEMUs with equal shapes can exchange device state. Host-side options (where a netdev leads
//! to, which file is behind a serial line) are left out, except for a netdev's type, which is part of
//! the device state.

mod images;
mod network;
mod watch;

use std::collections::BTreeMap;
use std::time::Duration;

use ft_core::VmShape;
use ft_core::limits::{SHAPE_PROPERTIES_MAX, STRING_BYTES_MAX};
use serde_json::Value;

use crate::blocks::RamBlock;
use crate::qmp::{Command, Qmp, QmpError, QmpFailure};
use crate::spawn::QemuVersion;

pub use network::{Netdev, Nic, parse_network};
pub(crate) use watch::migration_blockers;
pub use watch::{Finding, ShapeWatch};

/// Where QEMU keeps devices: named by the user, without a name, and the board's own.
const DEVICE_FOLDERS: [&str; 3] = [
    "/machine/peripheral",
    "/machine/peripheral-anon",
    "/machine/unattached",
];

/// Values that are longer are compared by length and hash.
const VALUE_BYTES_MAX: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum ShapeError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("QEMU refuses to describe itself: {command}")]
    Refused {
        command: &'static str,
        source: QmpFailure,
    },
    #[error("QEMU's answer to {0} can't be understood")]
    Answer(&'static str),
    #[error("the VM has more than {SHAPE_PROPERTIES_MAX} devices and other properties")]
    TooLarge,
}

/// Asks a QEMU for its VM's shape. Blocks.
///
/// # Errors
/// QEMU doesn't answer as expected, or the VM has too many devices.
pub fn query_shape(
    qmp: &mut Qmp,
    blocks: &[RamBlock],
    timeout: Duration,
) -> Result<VmShape, ShapeError> {
    let mut properties = BTreeMap::new();
    properties.insert(
        "qemu-version".to_owned(),
        QemuVersion::from_qmp(qmp.version()).to_string(),
    );
    add_machine(qmp, &mut properties, timeout)?;
    add_cpus(qmp, &mut properties, timeout)?;
    add_devices(qmp, &mut properties, timeout)?;
    for nic in parse_network(&qmp.human("info network", timeout)?) {
        properties.insert(nic.shape_name(), nic.shape_value());
    }
    if properties.len() > SHAPE_PROPERTIES_MAX {
        return Err(ShapeError::TooLarge);
    }
    let mut blocks: Vec<_> = blocks.iter().map(RamBlock::shape).collect();
    blocks.sort_by(|a, b| a.name.cmp(&b.name));
    let fit = |(name, value): (String, String)| {
        (
            shorten(name, STRING_BYTES_MAX),
            shorten(value, VALUE_BYTES_MAX),
        )
    };
    Ok(VmShape {
        properties: properties.into_iter().map(fit).collect(),
        blocks,
    })
}

/// The machine's type, what it boots without a disk, and what runs its instructions: with KVM
/// the state has sections that it lacks without.
fn add_machine(
    qmp: &mut Qmp,
    properties: &mut BTreeMap<String, String>,
    timeout: Duration,
) -> Result<(), ShapeError> {
    let kvm = qmp.call(Command::new("query-kvm"), timeout)?;
    let accelerator = if kvm["enabled"] == true {
        "kvm"
    } else {
        "not kvm"
    };
    properties.insert("accelerator".to_owned(), accelerator.to_owned());
    let names = ["type", "smp", "append"];
    let questions = names.map(|name| get("/machine", name));
    for (name, reply) in names.iter().zip(qmp.call_all(&questions, timeout)?) {
        // Not every machine has all of them.
        if let Ok(value) = reply {
            properties.insert((*name).replace("type", "machine"), plain(&value));
        }
    }
    Ok(())
}

/// Count, model and the feature bits that the guest sees.
fn add_cpus(
    qmp: &mut Qmp,
    properties: &mut BTreeMap<String, String>,
    timeout: Duration,
) -> Result<(), ShapeError> {
    let cpus = qmp.call(Command::new("query-cpus-fast"), timeout)?;
    let cpus = cpus
        .as_array()
        .ok_or(ShapeError::Answer("query-cpus-fast"))?;
    properties.insert("cpus".to_owned(), cpus.len().to_string());
    let Some(path) = cpus.first().and_then(|cpu| cpu["qom-path"].as_str()) else {
        return Ok(());
    };
    let names = [
        "type", "vendor", "family", "model", "stepping", "model-id", "level", "xlevel",
    ];
    let mut questions: Vec<_> = names.iter().map(|name| get(path, name)).collect();
    questions.push(get(path, "feature-words"));
    let mut replies = qmp.call_all(&questions, timeout)?;
    let features = replies.pop().and_then(Result::ok);
    let model: Vec<String> = replies.into_iter().flatten().map(|v| plain(&v)).collect();
    properties.insert("cpu-model".to_owned(), model.join(" "));
    for word in features.iter().filter_map(Value::as_array).flatten() {
        let number = |key| word[key].as_u64().unwrap_or(0);
        let register = word["cpuid-register"].as_str().unwrap_or("?");
        let (eax, ecx) = (number("cpuid-input-eax"), number("cpuid-input-ecx"));
        let name = format!("cpuid {eax:#x}.{ecx}.{register}");
        properties.insert(name, format!("{:#x}", number("features")));
    }
    Ok(())
}

/// Every device: its type and, where it has one, its place on a bus.
fn add_devices(
    qmp: &mut Qmp,
    properties: &mut BTreeMap<String, String>,
    timeout: Duration,
) -> Result<(), ShapeError> {
    let devices = device_types(qmp, timeout)?;
    if devices.len() > SHAPE_PROPERTIES_MAX {
        return Err(ShapeError::TooLarge);
    }
    let questions: Vec<_> = devices
        .iter()
        .flat_map(|(path, _)| [get(path, "parent_bus"), get(path, "addr")])
        .collect();
    let places = qmp.call_all(&questions, timeout)?;
    for ((path, kind), place) in devices.into_iter().zip(places.chunks_exact(2)) {
        let bus = place[0]
            .as_ref()
            .ok()
            .and_then(Value::as_str)
            .filter(|b| !b.is_empty());
        let value = match (bus, &place[1]) {
            (Some(bus), Ok(address)) => format!("{kind} on {bus} at {}", plain(address)),
            (Some(bus), Err(_)) => format!("{kind} on {bus}"),
            (None, _) => kind,
        };
        properties.insert(format!("device {path}"), value);
    }
    Ok(())
}

/// Path and type of every device.
pub(crate) fn device_types(
    qmp: &mut Qmp,
    timeout: Duration,
) -> Result<Vec<(String, String)>, ShapeError> {
    let mut devices = Vec::new();
    for folder in DEVICE_FOLDERS {
        let listing = qmp.call(list(folder), timeout)?;
        let children = children(&listing).ok_or(ShapeError::Answer("qom-list"))?;
        devices.extend(children.map(|(name, kind)| (format!("{folder}/{name}"), kind.to_owned())));
    }
    Ok(devices)
}

fn get(path: &str, property: &str) -> Command {
    Command::new("qom-get")
        .arg("path", path)
        .arg("property", property)
}

fn list(path: &str) -> Command {
    Command::new("qom-list").arg("path", path)
}

/// The devices in an answer to `qom-list`: name and type. Lines, memory regions and the CPUs, which are counted
/// elsewhere, are left out.
fn children(listing: &Value) -> Option<impl Iterator<Item = (&str, &str)>> {
    Some(listing.as_array()?.iter().filter_map(|item| {
        let kind = item["type"]
            .as_str()?
            .strip_prefix("child<")?
            .strip_suffix('>')?;
        let plumbing = ["irq", "memory-region", "container"].contains(&kind)
            || kind.contains("iommu-memory-region");
        let counted = kind.ends_with("-cpu");
        (!plumbing && !counted).then_some((item["name"].as_str()?, kind))
    }))
}

/// A JSON value without quotes around strings; objects have their keys sorted.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Keeps a text within `max` bytes: what is too long is cut, and its length and FNV-1a hash are added.
fn shorten(text: String, max: usize) -> String {
    if text.len() <= max {
        return text;
    }
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    });
    let tail = format!("... ({} bytes, hash {hash:016x})", text.len());
    let head = text.floor_char_boundary(max - tail.len());
    format!("{}{tail}", &text[..head])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_values_stay_distinct() {
        let long = |last: char| shorten(format!("{}{last}", "ä".repeat(500)), VALUE_BYTES_MAX);
        assert!(long('a').len() <= VALUE_BYTES_MAX);
        assert_ne!(long('a'), long('b'));
        assert_eq!(shorten("short".to_owned(), VALUE_BYTES_MAX), "short");
    }

    #[test]
    fn only_devices_count_as_children() {
        let listing = serde_json::json!([
            {"name": "type", "type": "string"},
            {"name": "device[0]", "type": "child<qemu64-x86_64-cpu>"},
            {"name": "device[1]", "type": "child<VGA>"},
            {"name": "x", "type": "child<memory-region>"},
            {"name": 3, "type": "child<odd>"},
        ]);
        assert_eq!(
            children(&listing).unwrap().collect::<Vec<_>>(),
            [("device[1]", "VGA")]
        );
    }
}
