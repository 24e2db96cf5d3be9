//! What the exit code says.

use std::io::ErrorKind;
use std::process::ExitCode;

use crate::config::ConfigError;

/// How the program ended. The numbers are promised to scripts: they never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// As it was asked to: powered off, detached, switched over, stood down.
    Clean = 0,
    /// Something else failed.
    Other = 1,
    /// The command line or the configuration file is wrong.
    Usage = 2,
    /// QEMU, the guest's devices or the peer can't do it. The guest is untouched.
    Refused = 3,
    /// The other host runs the guest now.
    FailedOver = 4,
    /// The guest is gone, and this side can't bring it back.
    Lost = 5,
    /// The user may not do what is needed.
    Privilege = 6,
}

/// The table for `--help`; the README has the same.
pub(crate) const TABLE: &str = "\
Exit codes:
  0  ended as asked: powered off, detached, switched over, stood down
  1  something else failed
  2  the command line or the configuration file is wrong
  3  refused: QEMU, a device or the peer can't do it; the guest is untouched
  4  failed over: the other host runs the guest now
  5  the guest is lost: there is nothing here to bring it back from
  6  a privilege is missing
`status` ends with 0 if every VM it found is protected, 1 if one is not or does not answer, 3 if no
daemon is there.";

/// Why something can't be protected. Anything that carries this exits with [`Exit::Refused`].
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refusal(pub(crate) String);

impl Exit {
    /// What an error that nobody handled means.
    pub(crate) fn of_error(error: &anyhow::Error) -> Exit {
        if error.chain().any(|cause| cause.is::<ConfigError>()) {
            return Exit::Usage;
        }
        if error.chain().any(is_privilege) {
            return Exit::Privilege;
        }
        if error.chain().any(is_refusal) {
            return Exit::Refused;
        }
        Exit::Other
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

type Cause<'a> = &'a (dyn std::error::Error + 'static);

fn is_privilege(cause: Cause<'_>) -> bool {
    use nix::errno::Errno;
    let denied = |error: &std::io::Error| error.kind() == ErrorKind::PermissionDenied;
    cause.downcast_ref().is_some_and(denied)
        || matches!(cause.downcast_ref(), Some(Errno::EPERM | Errno::EACCES))
}

fn is_refusal(cause: Cause<'_>) -> bool {
    use qemu_bridge::blocks::BlocksError;
    use qemu_bridge::qmp::QmpError;
    use qemu_bridge::shape::ShapeError;
    use qemu_bridge::spawn::{CommandError, ProcessError};
    use qemu_bridge::standby::StandbyError;
    use qemu_bridge::tracker::TrackerError;
    let no_qemu = |error: &QmpError| {
        matches!(
            error,
            QmpError::Connect { .. } | QmpError::NoGreeting { .. }
        )
    };
    let no_standby = |error: &StandbyError| matches!(error, StandbyError::NotWaiting { .. });
    cause.is::<Refusal>()
        || cause.downcast_ref().is_some_and(no_standby)
        || cause.downcast_ref().is_some_and(no_qemu)
        || cause.is::<CommandError>()
        || cause.is::<ProcessError>()
        || cause.is::<ShapeError>()
        || cause.is::<BlocksError>()
        || cause.is::<TrackerError>()
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};
    use qemu_bridge::gate::GateError;
    use qemu_bridge::qmp::QmpError;
    use qemu_bridge::standby::StandbyError;

    use super::*;

    #[test]
    fn an_error_says_why_by_its_causes() {
        let denied = std::io::Error::from_raw_os_error(libc::EACCES);
        let no_socket = |errno| {
            let source = std::io::Error::from_raw_os_error(errno);
            anyhow::Error::new(QmpError::Connect {
                path: "/s".into(),
                source,
            })
        };
        let cases = [
            (anyhow!("something"), Exit::Other),
            (no_socket(libc::ENOENT), Exit::Refused),
            (no_socket(libc::EACCES), Exit::Privilege),
            (
                anyhow::Error::new(denied).context("opening /dev/kvm"),
                Exit::Privilege,
            ),
            (
                anyhow::Error::new(nix::errno::Errno::EPERM).context("ptrace"),
                Exit::Privilege,
            ),
            (
                anyhow::Error::new(GateError::NoPlug {
                    netdev: "n0".into(),
                    why: "making the ifb device".into(),
                    source: Some(std::io::Error::from_raw_os_error(libc::EPERM)),
                }),
                Exit::Privilege,
            ),
            (
                anyhow::Error::new(Refusal("vhost-user".into())).context("attach"),
                Exit::Refused,
            ),
            (
                anyhow::Error::new(StandbyError::NotWaiting {
                    found: "running".into(),
                }),
                Exit::Refused,
            ),
        ];
        for (error, exit) in cases {
            assert_eq!(Exit::of_error(&error), exit, "{error:#}");
        }
        let gone = std::fs::read("/nonexistent")
            .context("reading")
            .unwrap_err();
        assert_eq!(Exit::of_error(&gone), Exit::Other);
    }

    #[test]
    fn every_code_is_in_the_table() {
        let all = [
            Exit::Clean,
            Exit::Other,
            Exit::Usage,
            Exit::Refused,
            Exit::FailedOver,
            Exit::Lost,
            Exit::Privilege,
        ];
        for exit in all {
            assert!(TABLE.contains(&format!("\n  {}  ", exit as u8)), "{exit:?}");
        }
    }
}
