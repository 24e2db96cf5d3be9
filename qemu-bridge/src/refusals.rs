//! What can't be protected: found when attaching, refused by name with the way out.
//!
//! Three reasons come up again and again. A device may have no complete saved state (and saving some
//! of those crashes QEMU). Somebody else than QEMU's own threads may write guest RAM, or RAM may be
//! taken away behind the tracker's back. Or the guest may change something outside of RAM and devices, such
//! as a disk, that would not go back to the last epoch with it.

use std::fmt;
use std::time::Duration;

use serde_json::Value;

use crate::qmp::{Command, Qmp, QmpError};
use crate::shape::{ShapeError, device_types, migration_blockers, parse_network};
use crate::spawn::{OLDEST_QEMU, QemuVersion};

/// One thing that stands in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What was found, as QEMU or the user calls it.
    pub name: String,
    pub why: String,
    /// What to do about it.
    pub cure: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.name, self.why, self.cure)
    }
}

/// What the operator has taken responsibility for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowances {
    /// `--allow-unreplicated-disks`
    pub unreplicated_disks: bool,
}

/// A kind of device or backend that is refused.
struct Kind {
    /// The beginning of its type's name.
    prefix: &'static str,
    why: &'static str,
    cure: &'static str,
}

const SEES_RAM: &str = "another process than QEMU writes guest RAM, which the tracker can't see";
const PASSED_THROUGH: &str =
    "its commands go to the host's device, whose state would not go back to the last epoch";
const NO_VHOST_USER: &str =
    "use the QEMU device instead, such as virtio-blk-pci, virtio-net-pci with a tap";

const DEVICES: &[Kind] = &[
    Kind {
        prefix: "vhost-user",
        why: SEES_RAM,
        cure: NO_VHOST_USER,
    },
    Kind {
        prefix: "vhost-vdpa",
        why: "the hardware writes guest RAM, which the tracker can't see",
        cure: NO_VHOST_USER,
    },
    Kind {
        prefix: "vhost-scsi",
        why: "its disks are written by the kernel and would not go back to the last epoch",
        cure: "use virtio-scsi-pci with a read-only drive",
    },
    Kind {
        prefix: "scsi-block",
        why: PASSED_THROUGH,
        cure: "use scsi-hd with a host_device node",
    },
    Kind {
        prefix: "scsi-generic",
        why: PASSED_THROUGH,
        cure: "leave it out",
    },
    Kind {
        prefix: "vfio",
        why: "the hardware writes guest RAM, which the tracker can't see",
        cure: "use an emulated or virtio device",
    },
    Kind {
        prefix: "virtio-balloon",
        why: "it takes RAM away (also by free page reporting) without a write that the tracker could see",
        cure: "leave the balloon out",
    },
    Kind {
        prefix: "virtio-mem",
        why: "it takes RAM away without a write that the tracker could see",
        cure: "give the VM its final size with -m",
    },
    Kind {
        prefix: "virtio-pmem",
        why: "its memory is a file of its own that is not replicated",
        cure: "use -m for memory",
    },
    Kind {
        prefix: "pc-dimm",
        why: "RAM that was added as a DIMM is not tracked",
        cure: "give the VM its final size with -m",
    },
    Kind {
        prefix: "nvdimm",
        why: "its memory is a file of its own that is not replicated",
        cure: "use -m for memory",
    },
    Kind {
        prefix: "cxl-type3",
        why: "its memory is not tracked",
        cure: "use -m for memory",
    },
    Kind {
        prefix: "ivshmem",
        why: SEES_RAM,
        cure: "leave the shared memory device out",
    },
    Kind {
        prefix: "x-pci-proxy-dev",
        why: "the device lives in another process, which has state and writes guest RAM",
        cure: "put the device into this QEMU",
    },
];

/// Objects of `-object`.
const OBJECTS: &[Kind] = &[
    Kind {
        prefix: "cryptodev-vhost-user",
        why: SEES_RAM,
        cure: "use cryptodev-backend-builtin",
    },
    Kind {
        prefix: "x-remote-object",
        why: SEES_RAM,
        cure: "put the device into this QEMU",
    },
    Kind {
        prefix: "sev-",
        why: "the guest's memory is encrypted for this host's processor",
        cure: "run the VM without SEV",
    },
    Kind {
        prefix: "tdx-",
        why: "the guest's memory is encrypted for this host's processor",
        cure: "run the VM without TDX",
    },
];

const NETDEVS: &[Kind] = &[
    Kind {
        prefix: "vhost-user",
        why: SEES_RAM,
        cure: "use a tap or user netdev",
    },
    Kind {
        prefix: "vhost-vdpa",
        why: "the hardware writes guest RAM, which the tracker can't see",
        cure: "use a tap or user netdev",
    },
];

/// Block drivers that hand guest RAM to hardware or to another process (libblkio, NVMe by VFIO).
const BLOCK_DRIVERS: &[Kind] = &[
    Kind {
        prefix: "virtio-blk-v",
        why: SEES_RAM,
        cure: "use a file or host_device node",
    },
    Kind {
        prefix: "nvme",
        why: "the hardware writes guest RAM, which the tracker can't see",
        cure: "use a file or host_device node",
    },
];

/// QMP commands without which nothing works.
const COMMANDS: &[&str] = &[
    "add-fd",
    "closefd",
    "cont",
    "getfd",
    "human-monitor-command",
    "migrate-incoming",
    "qom-get",
    "qom-list",
    "query-migrate",
    "remove-fd",
    "set-action",
    "stop",
    "xen-save-devices-state",
];

/// Looks for everything that stands in the way of protecting this QEMU. Blocks.
///
/// Whether every RAM block can be reached is [`crate::blocks::ram_blocks`]'s to say.
///
/// # Errors
/// QEMU doesn't answer as expected.
pub fn refusals(
    qmp: &mut Qmp,
    allowed: Allowances,
    timeout: Duration,
) -> Result<Vec<Refusal>, ShapeError> {
    let mut found = Vec::new();
    let version = QemuVersion::from_qmp(qmp.version());
    if !version.is_at_least(OLDEST_QEMU) {
        // Nothing that such a QEMU answers to the other questions can be relied on.
        return Ok(vec![Refusal {
            name: format!("QEMU {version}"),
            why: format!("at least {}.{} is needed", OLDEST_QEMU.0, OLDEST_QEMU.1),
            cure: "install a newer one".to_owned(),
        }]);
    }
    missing_commands(qmp, &mut found, timeout)?;
    blockers(qmp, &mut found, timeout)?;
    for (path, kind) in device_types(qmp, timeout)? {
        found.extend(refuse_kind(DEVICES, &format!("device {path}"), &kind));
    }
    objects(qmp, &mut found, timeout)?;
    for nic in parse_network(&qmp.human("info network", timeout)?) {
        let refused = nic
            .netdevs
            .iter()
            .flat_map(|n| refuse_kind(NETDEVS, &format!("netdev {}", n.id), &n.kind));
        found.extend(refused);
    }
    nested_virtualisation(qmp, &mut found, timeout)?;
    block_nodes(qmp, &mut found, timeout)?;
    if !allowed.unreplicated_disks {
        writable_disks(qmp, &mut found, timeout)?;
    }
    Ok(found)
}

fn refuse_kind(kinds: &[Kind], what: &str, name: &str) -> Option<Refusal> {
    let kind = kinds.iter().find(|kind| name.starts_with(kind.prefix))?;
    Some(Refusal {
        name: format!("{what} ({name})"),
        why: kind.why.to_owned(),
        cure: kind.cure.to_owned(),
    })
}

fn missing_commands(
    qmp: &mut Qmp,
    found: &mut Vec<Refusal>,
    timeout: Duration,
) -> Result<(), ShapeError> {
    let answer = qmp.call(Command::new("query-commands"), timeout)?;
    let present: Vec<&str> = array(&answer, "query-commands")?
        .iter()
        .filter_map(|c| c["name"].as_str())
        .collect();
    let missing = COMMANDS.iter().filter(|name| !present.contains(name));
    found.extend(missing.map(|name| Refusal {
        name: format!("QMP command {name}"),
        why: "this QEMU was built without it".to_owned(),
        cure: "use a distribution's qemu-system-x86_64".to_owned(),
    }));
    Ok(())
}

/// Whatever QEMU itself would not migrate. Saving an unmigratable device's state crashes QEMU 7.2 and 10.0.
fn blockers(qmp: &mut Qmp, found: &mut Vec<Refusal>, timeout: Duration) -> Result<(), ShapeError> {
    let answer = qmp.call(Command::new("query-migrate"), timeout)?;
    found.extend(migration_blockers(&answer).map(|reason| Refusal {
        name: reason.to_owned(),
        why: "QEMU can't save this VM's state completely".to_owned(),
        cure: "leave out the device or feature that it names".to_owned(),
    }));
    Ok(())
}

fn objects(qmp: &mut Qmp, found: &mut Vec<Refusal>, timeout: Duration) -> Result<(), ShapeError> {
    let answer = qmp.call(Command::new("qom-list").arg("path", "/objects"), timeout)?;
    for object in array(&answer, "qom-list")? {
        let name = object["name"].as_str().unwrap_or("?");
        let kind = object["type"]
            .as_str()
            .and_then(|t| t.strip_prefix("child<"));
        found.extend(kind.and_then(|kind| {
            refuse_kind(
                OBJECTS,
                &format!("object {name}"),
                kind.trim_end_matches('>'),
            )
        }));
    }
    Ok(())
}

/// Under KVM a guest that is a hypervisor has pages that the processor writes by itself.
fn nested_virtualisation(
    qmp: &mut Qmp,
    found: &mut Vec<Refusal>,
    timeout: Duration,
) -> Result<(), ShapeError> {
    let kvm = qmp.call(Command::new("query-kvm"), timeout)?;
    if kvm["enabled"] != true {
        return Ok(());
    }
    let cpus = qmp.call(Command::new("query-cpus-fast"), timeout)?;
    let Some(path) = array(&cpus, "query-cpus-fast")?
        .first()
        .and_then(|cpu| cpu["qom-path"].as_str())
    else {
        return Ok(());
    };
    for feature in ["vmx", "svm"] {
        let get = Command::new("qom-get")
            .arg("path", path)
            .arg("property", feature);
        match qmp.call(get, timeout) {
            Ok(Value::Bool(true)) => found.push(Refusal {
                name: format!("CPU feature {feature}"),
                why: "nested virtualisation makes the processor write guest RAM unseen by the tracker".to_owned(),
                cure: format!("add ,{feature}=off to -cpu"),
            }),
            Ok(_) | Err(QmpError::Refused { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn block_nodes(
    qmp: &mut Qmp,
    found: &mut Vec<Refusal>,
    timeout: Duration,
) -> Result<(), ShapeError> {
    let nodes = qmp.call(
        Command::new("query-named-block-nodes").arg("flat", true),
        timeout,
    )?;
    for node in array(&nodes, "query-named-block-nodes")? {
        let driver = node["drv"].as_str().unwrap_or("");
        let name = node["node-name"].as_str().unwrap_or("?");
        found.extend(refuse_kind(
            BLOCK_DRIVERS,
            &format!("block node {name}"),
            driver,
        ));
    }
    Ok(())
}

/// Disks that the guest may write. Empty drives and read-only ones are fine; `snapshot=on` writes to a
/// temporary file that the standby has not.
fn writable_disks(
    qmp: &mut Qmp,
    found: &mut Vec<Refusal>,
    timeout: Duration,
) -> Result<(), ShapeError> {
    let drives = qmp.call(Command::new("query-block"), timeout)?;
    for drive in array(&drives, "query-block")? {
        let medium = &drive["inserted"];
        if medium.is_null() || medium["ro"] == true {
            continue;
        }
        let named = [&drive["device"], &drive["qdev"], &medium["node-name"]];
        let name = named
            .into_iter()
            .filter_map(Value::as_str)
            .find(|n| !n.is_empty())
            .unwrap_or("without a name");
        let file = medium["file"].as_str().unwrap_or("?");
        found.push(Refusal {
            name: format!("disk {name} ({file})"),
            why: "it is writable, and what the guest writes to it is not replicated: after a failover the guest's \
                  memory is that of the last epoch, the disk isn't"
                .to_owned(),
            cure: "add readonly=on, or take the risk with --allow-unreplicated-disks".to_owned(),
        });
    }
    Ok(())
}

fn array<'a>(answer: &'a Value, command: &'static str) -> Result<&'a Vec<Value>, ShapeError> {
    answer.as_array().ok_or(ShapeError::Answer(command))
}
