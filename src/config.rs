//! What the operator wants, checked.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ft_core::primary::OnBackupLoss;
use qemu_bridge::tracker::TrackerChoice;

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) mode: Mode,
    pub(crate) source: QemuSource,
    pub(crate) vm_id: String,
    pub(crate) epoch: Duration,
    pub(crate) heartbeat: Duration,
    pub(crate) lease: Duration,
    pub(crate) on_backup_loss: OnBackupLoss,
    pub(crate) max_unacked: Duration,
    pub(crate) tracker: TrackerChoice,
    pub(crate) audit_every: u64,
    pub(crate) events: Option<PathBuf>,
    pub(crate) control: PathBuf,
    pub(crate) state_dir: PathBuf,
    pub(crate) dry_run: bool,
    pub(crate) allow_unreplicated_disks: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Primary { peer: SocketAddr },
    Backup { listen: SocketAddr },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum QemuSource {
    /// Start it.
    Spawn { argv: Vec<String> },
    /// It runs, and has a QMP socket here.
    Attach { qmp: PathBuf },
}
