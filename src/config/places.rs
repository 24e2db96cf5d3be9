//! Where files are unless the operator says otherwise.

use std::env;
use std::path::PathBuf;

use nix::unistd::geteuid;

use super::ConfigError;
use crate::cli::ModeName;

const OURS: &str = "curling-rdma";

/// The directory of the control sockets.
pub(crate) fn runtime_dir() -> PathBuf {
    if geteuid().is_root() {
        return PathBuf::from("/run").join(OURS);
    }
    match absolute("XDG_RUNTIME_DIR") {
        Some(base) => base.join(OURS),
        None => env::temp_dir().join(format!("{OURS}-{}", geteuid())),
    }
}

pub(crate) fn control_socket(vm_id: &str, mode: ModeName) -> PathBuf {
    runtime_dir().join(format!("{vm_id}-{}.sock", mode.as_str()))
}

/// The directory of what must survive a restart.
pub(super) fn state_dir() -> Result<PathBuf, ConfigError> {
    if geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib").join(OURS));
    }
    let home = || absolute("HOME").map(|home| home.join(".local/state"));
    let base = absolute("XDG_STATE_HOME")
        .or_else(home)
        .ok_or(ConfigError::NoPlace {
            what: "the daemon's state",
            cure: "set HOME or XDG_STATE_HOME, or give --state-dir DIR",
        })?;
    Ok(base.join(OURS))
}

/// The specification of these variables says to ignore relative paths.
fn absolute(variable: &str) -> Option<PathBuf> {
    env::var_os(variable)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
}
