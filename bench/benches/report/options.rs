//! How the report was asked for.

use std::path::PathBuf;

use anyhow::Result;
use bench::cache;
use bench::guest::Guest;
use bench::pair::{Setup, Watch};
use clap::{Parser, ValueEnum};

/// Measures protection on this machine: `target/report/index.html` and `report.json`.
#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// More repeats, more sizes; an hour or more. Without it, a quarter of an hour
    #[arg(long)]
    pub(crate) full: bool,
    /// Only these groups
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Name>,
    /// Which QEMU
    #[arg(long, default_value = "qemu-system-x86_64")]
    pub(crate) qemu: PathBuf,
    #[arg(long, default_value = "pc")]
    pub(crate) machine: String,
    /// Where the report goes
    #[arg(long, default_value_os_t = default_out())]
    pub(crate) out: PathBuf,
    /// Cargo says so
    #[arg(long, hide = true)]
    bench: bool,
}

/// What can be measured on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Name {
    Link,
    Harvest,
    Boundary,
    Tax,
    Databases,
    Failover,
    Peers,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = self.to_possible_value().expect("no name is hidden");
        f.write_str(name.get_name())
    }
}

impl Options {
    pub(crate) fn groups(&self) -> Vec<Name> {
        let wanted = |name: &Name| self.only.is_empty() || self.only.contains(name);
        Name::value_variants()
            .iter()
            .copied()
            .filter(wanted)
            .collect()
    }

    /// One or the other.
    pub(crate) fn pick<T>(&self, quick: T, full: T) -> T {
        if self.full { full } else { quick }
    }

    /// Linux under emulation on one vCPU, with one NIC.
    pub(crate) fn guest(&self) -> Result<Guest> {
        let mut guest = Guest::tick(&self.qemu)?;
        guest.machine.clone_from(&self.machine);
        Ok(guest)
    }

    /// A pair with this guest; `options` are the daemon's.
    pub(crate) fn setup(&self, guest: Guest, options: &[&str]) -> Setup {
        let all = PATIENT.iter().chain(options);
        Setup {
            guest,
            watch: Watch::Tick,
            floors: None,
            options: all.map(|&it| it.to_owned()).collect(),
        }
    }
}

/// As it was typed: cargo adds `--bench`.
pub(crate) fn command_line() -> String {
    let own = std::env::args().skip(1).filter(|word| word != "--bench");
    let own: Vec<_> = own.collect();
    match own.is_empty() {
        true => "cargo bench".to_owned(),
        false => format!("cargo bench -- {}", own.join(" ")),
    }
}

/// Silence is not what is measured here, and a machine whose few processors emulate three guests may
/// keep a daemon off them for longer than the default.
pub(crate) const PATIENT: [&str; 2] = ["--failover-after-ms", "8000"];

/// Beside what cargo builds.
fn default_out() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target
        .unwrap_or_else(|| cache::repo().join("target"))
        .join("report")
}
