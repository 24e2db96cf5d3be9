//! Which QEMU it is.

use std::fmt;
use std::process::Command as ProcessCommand;

use serde_json::Value;

use super::command::CommandError;

/// A QEMU's version, as the guest's device state depends on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuVersion {
    pub major: u64,
    pub minor: u64,
    pub micro: u64,
    /// The distribution's own version, which may carry patches.
    pub package: String,
}

impl QemuVersion {
    /// From the `version` object of a QMP greeting.
    pub fn from_qmp(version: &Value) -> QemuVersion {
        let number = |key| version["qemu"][key].as_u64().unwrap_or(0);
        QemuVersion {
            major: number("major"),
            minor: number("minor"),
            micro: number("micro"),
            package: version["package"].as_str().unwrap_or("").to_owned(),
        }
    }

    /// Asks a program that has not been started yet.
    ///
    /// # Errors
    /// It can't be started, or is no QEMU.
    pub fn probe(program: &str) -> Result<QemuVersion, CommandError> {
        let failed = |source| CommandError::Probe {
            program: program.to_owned(),
            source,
        };
        let output = ProcessCommand::new(program)
            .arg("--version")
            .output()
            .map_err(failed)?;
        let said = String::from_utf8_lossy(&output.stdout);
        let first = said.lines().next().unwrap_or("");
        QemuVersion::parse(first).ok_or_else(|| CommandError::NotQemu {
            program: program.to_owned(),
            said: first.chars().take(80).collect(),
        })
    }

    /// `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)`.
    pub(super) fn parse(line: &str) -> Option<QemuVersion> {
        let rest = line.strip_prefix("QEMU emulator version ")?;
        let (numbers, package) = rest.split_once(' ').unwrap_or((rest, ""));
        let mut numbers = numbers.split('.').map(|n| n.parse::<u64>().ok());
        Some(QemuVersion {
            major: numbers.next()??,
            minor: numbers.next()??,
            micro: numbers.next().flatten().unwrap_or(0),
            package: package.trim_matches(['(', ')']).to_owned(),
        })
    }

    pub fn is_at_least(&self, (major, minor): (u64, u64)) -> bool {
        (self.major, self.minor) >= (major, minor)
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)?;
        match self.package.as_str() {
            "" => Ok(()),
            package => write!(f, " ({package})"),
        }
    }
}
