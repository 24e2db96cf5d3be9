//! What the guest can see of its machine: it must be the same on both hosts.

use crate::types::PAGE_BYTES;

/// One RAM block, in an order that both sides derive from the names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockShape {
    /// QEMU's name, except that the machine's main RAM is always called [`MAIN_RAM`], because
    /// QEMU names it after an option that the guest can't see.
    pub name: String,
    pub bytes: u64,
    pub read_only: bool,
}

/// The name under which the machine's main RAM is compared.
pub const MAIN_RAM: &str = "main-ram";

impl BlockShape {
    pub fn pages(&self) -> u64 {
        self.bytes.div_ceil(PAGE_BYTES as u64)
    }
}

/// The guest-visible shape of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmShape {
    /// Name and value, sorted by name: `qemu-version`, `machine`, `cpu-model`, `cpus`,
    /// `device:/machine/peripheral/net0` = `virtio-net-pci`, `netdev:n0` = `user`, …
    pub properties: Vec<(String, String)>,
    /// Sorted by name.
    pub blocks: Vec<BlockShape>,
}

/// The first thing in which two shapes differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} differs: the primary has {primary}, the standby has {backup}")]
pub struct ShapeDifference {
    pub what: String,
    pub primary: String,
    pub backup: String,
}

impl VmShape {
    pub fn ram_bytes(&self) -> u64 {
        self.blocks.iter().map(|b| b.bytes).sum()
    }

    /// Compares a primary's shape (`self`) with a standby's.
    ///
    /// # Errors
    /// Names the first property or RAM block that differs, with both values.
    pub fn check_standby(&self, standby: &VmShape) -> Result<(), ShapeDifference> {
        let ours = self.properties.iter().map(|(k, v)| (k.clone(), v.clone()));
        let theirs = standby
            .properties
            .iter()
            .map(|(k, v)| (k.clone(), v.clone()));
        first_difference(ours.collect(), theirs.collect())?;
        first_difference(self.describe_blocks(), standby.describe_blocks())
    }

    fn describe_blocks(&self) -> Vec<(String, String)> {
        let access = |b: &BlockShape| if b.read_only { "read-only" } else { "writable" };
        let mut named: Vec<_> = self
            .blocks
            .iter()
            .map(|b| {
                (
                    format!("RAM block {}", b.name),
                    format!("{} bytes, {}", b.bytes, access(b)),
                )
            })
            .collect();
        named.sort();
        named
    }
}

/// Walks two lists that are sorted by name.
fn first_difference(
    ours: Vec<(String, String)>,
    theirs: Vec<(String, String)>,
) -> Result<(), ShapeDifference> {
    let missing = || "none".to_owned();
    let differs = |what: &str, primary: Option<&String>, backup: Option<&String>| {
        Err(ShapeDifference {
            what: what.to_owned(),
            primary: primary.cloned().unwrap_or_else(missing),
            backup: backup.cloned().unwrap_or_else(missing),
        })
    };
    for (name, value) in &ours {
        let other = theirs.iter().find(|(n, _)| n == name).map(|(_, v)| v);
        if other != Some(value) {
            return differs(name, Some(value), other);
        }
    }
    match theirs
        .iter()
        .find(|(n, _)| !ours.iter().any(|(o, _)| o == n))
    {
        Some((name, value)) => differs(name, None, Some(value)),
        None => Ok(()),
    }
}
