//! From the command line and a configuration file to settings that are known to make sense.

mod file;
mod places;
#[cfg(test)]
mod tests;

use std::net::{SocketAddr, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use ft_core::limits::VM_ID_BYTES_MAX;
use ft_core::primary::OnBackupLoss;
use qemu_bridge::tracker::TrackerChoice;
use transport::TransportChoice;

pub(crate) use self::file::FileError;
pub(crate) use self::places::{control_socket, runtime_dir};
use crate::cli::{
    DaemonArgs, DeltasName, GateName, ModeName, OnBackupLossName, Options, TrackerName,
    TransportName,
};
use crate::driver::primary::Deltas;

const EPOCH_MS: u64 = 20;
const EPOCH_MIN_MS: u64 = 2;
const EPOCH_IDLE_MS: u64 = 250;
const HEARTBEAT_MS: u64 = 50;
const FAILOVER_AFTER_MS: u64 = 1000;
const MAX_UNACKED_MS: u64 = 2000;
const DELTA_CACHE_MIB: u64 = 16;
/// One that is lost or late must not end a lease.
const HEARTBEATS_PER_LEASE: u64 = 3;
/// The backup takes no other lease.
const LEASE_MS: RangeInclusive<u64> = 10..=3_600_000;
/// Longer than that is not looking, but waiting.
const BUSY_POLL_US: RangeInclusive<u64> = 0..=1000;
const VM_ID: &str = "vm";

/// Everything that the operator decides, checked.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) mode: Mode,
    pub(crate) source: QemuSource,
    pub(crate) vm_id: String,
    pub(crate) dry_run: bool,
    pub(crate) epoch: Duration,
    pub(crate) epoch_min: Duration,
    pub(crate) epoch_idle: Duration,
    pub(crate) heartbeat: Duration,
    pub(crate) lease: Duration,
    pub(crate) on_backup_loss: OnBackupLoss,
    pub(crate) max_unacked: Duration,
    pub(crate) tracker: TrackerChoice,
    /// 0 is never.
    pub(crate) audit_every: u64,
    pub(crate) gate: GateName,
    pub(crate) transport: TransportChoice,
    pub(crate) deltas: Deltas,
    pub(crate) delta_cache_bytes: usize,
    /// Nothing if the operator leaves it to each part.
    pub(crate) busy_poll: Option<Duration>,
    pub(crate) allow_unreplicated_disks: bool,
    pub(crate) allow_ungated: bool,
    pub(crate) events: Option<PathBuf>,
    pub(crate) state_dir: PathBuf,
    pub(crate) control: PathBuf,
}

/// Which side this is, and where the other one is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Primary { peer: SocketAddr },
    Backup { listen: SocketAddr },
}

/// Where QEMU comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum QemuSource {
    Spawn {
        argv: Vec<String>,
    },
    /// It runs already.
    Attach {
        qmp: PathBuf,
    },
}

/// Each says what was expected, what was found and what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(
        "no --mode: say --mode primary beside the guest, or --mode backup where it is to survive"
    )]
    NoMode,
    #[error("--mode {mode} needs {option}: {cure}")]
    Missing {
        mode: &'static str,
        option: &'static str,
        cure: &'static str,
    },
    #[error("{option} is for --mode {belongs}, this is --mode {mode}: {cure}")]
    OtherMode {
        option: &'static str,
        belongs: &'static str,
        mode: &'static str,
        cure: &'static str,
    },
    #[error(
        "no QEMU: end the line with `-- qemu-system-x86_64 ...` to start one, or give --qmp SOCKET \
         of one that runs"
    )]
    NoQemu,
    #[error(
        "--qmp and a QEMU command line after `--` exclude each other: the first uses a QEMU that \
         runs, the second starts one"
    )]
    TwoQemus,
    #[error(
        "--dry-run shows the QEMU command line that would be run: end the line with \
         `-- qemu-system-x86_64 ...`"
    )]
    DryRunWithoutLine,
    #[error("{option} {text:?} is no address: write it like 127.0.0.1:7070 or [::1]:7070 ({why})")]
    Address {
        option: &'static str,
        text: String,
        why: String,
    },
    #[error(
        "{option} {address} is not loopback: peers are not authenticated and nothing is encrypted \
         yet, so whoever reaches this port can read and replace the guest's memory. Use a tunnel \
         between loopback addresses, or, on a network that you trust, add --allow-unauthenticated"
    )]
    NotLoopback {
        option: &'static str,
        address: SocketAddr,
    },
    #[error("{option} is {found}, expected {least} to {most}: {cure}")]
    Range {
        option: &'static str,
        found: u64,
        least: u64,
        most: u64,
        cure: &'static str,
    },
    #[error(
        "--failover-after-ms is {lease_ms}, expected at least {HEARTBEATS_PER_LEASE} heartbeats, \
         {least_ms}: one that is late must not end the lease. Raise it, or lower --heartbeat-ms \
         ({heartbeat_ms})"
    )]
    LeaseTooShort {
        lease_ms: u64,
        least_ms: u64,
        heartbeat_ms: u64,
    },
    #[error(
        "--max-unacked-ms is {max_unacked_ms}, expected at least --epoch-ms ({epoch_ms}): an epoch \
         can't be acknowledged before it has ended. Raise it"
    )]
    UnackedTooShort { max_unacked_ms: u64, epoch_ms: u64 },
    #[error(
        "--vm-id {0:?} can't be used: 1 to {VM_ID_BYTES_MAX} letters, digits, `.`, `_` and `-`, not \
         beginning with `.` or `-`, because it is a part of file names"
    )]
    VmId(String),
    #[error("no place for {what}: {cure}")]
    NoPlace {
        what: &'static str,
        cure: &'static str,
    },
}

impl Settings {
    /// # Errors
    /// The first thing that is wrong.
    pub(crate) fn new(arguments: DaemonArgs) -> Result<Settings, ConfigError> {
        let DaemonArgs {
            config,
            dry_run,
            options,
        } = arguments;
        let line = options.clone();
        let options = match config {
            Some(path) => options.or(file::read(&path)?),
            None => options,
        };
        let mode_name = options.mode.ok_or(ConfigError::NoMode)?;
        refuse_other_modes(mode_name, &line)?;
        let mode = mode(mode_name, &options)?;
        let source = source(&options, dry_run)?;
        let vm_id = vm_id(&options, &source)?;
        let times = Times::new(&options)?;
        let delta_cache_mib = options.delta_cache_mib.unwrap_or(DELTA_CACHE_MIB);
        in_range(
            "--delta-cache-mib",
            delta_cache_mib,
            0..=1 << 20,
            "16 suits most guests; 0 keeps no pages, and only compresses",
        )?;
        let control = match options.control {
            Some(path) => path,
            None => control_socket(&vm_id, mode_name),
        };
        Ok(Settings {
            mode,
            source,
            vm_id,
            dry_run,
            epoch: times.epoch,
            epoch_min: times.epoch_min,
            epoch_idle: times.epoch_idle,
            heartbeat: times.heartbeat,
            lease: times.lease,
            on_backup_loss: match options.on_backup_loss {
                Some(OnBackupLossName::Continue) => OnBackupLoss::Continue,
                Some(OnBackupLossName::Pause) | None => OnBackupLoss::Pause,
            },
            max_unacked: times.max_unacked,
            tracker: match options.tracker {
                Some(TrackerName::Uffd) => TrackerChoice::Uffd,
                Some(TrackerName::SoftDirty) => TrackerChoice::SoftDirty,
                Some(TrackerName::Compare) => TrackerChoice::Compare,
                Some(TrackerName::Auto) | None => TrackerChoice::Auto,
            },
            audit_every: options.audit_every.unwrap_or(0),
            gate: options.gate.unwrap_or(GateName::Auto),
            transport: match options.transport {
                Some(TransportName::Tcp) => TransportChoice::Tcp,
                Some(TransportName::Rdma) => TransportChoice::Rdma,
                Some(TransportName::Auto) | None => TransportChoice::Auto,
            },
            deltas: match options.deltas {
                Some(DeltasName::On) => Deltas::On,
                Some(DeltasName::Off) => Deltas::Off,
                Some(DeltasName::Auto) | None => Deltas::Auto,
            },
            delta_cache_bytes: (delta_cache_mib as usize) << 20, // at most a TiB
            busy_poll: options.busy_poll_us.map(busy_poll).transpose()?,
            allow_unreplicated_disks: options.allow_unreplicated_disks,
            allow_ungated: options.allow_ungated,
            events: options.events,
            state_dir: options.state_dir.map_or_else(places::state_dir, Ok)?,
            control,
        })
    }
}

/// A configuration file may serve both hosts; on the command line an option that would have no
/// effect is a misunderstanding.
fn refuse_other_modes(mode: ModeName, line: &Options) -> Result<(), ConfigError> {
    let learns = "leave it out here, the backup learns it from the primary";
    let alone = "leave it out here, only the primary goes by it";
    let (belongs, options) = match mode {
        ModeName::Primary => {
            let cure = "the primary connects to --peer";
            ("backup", vec![("--listen", line.listen.is_some(), cure)])
        }
        ModeName::Backup => (
            "primary",
            vec![
                (
                    "--peer",
                    line.peer.is_some(),
                    "the backup waits on --listen",
                ),
                ("--epoch-ms", line.epoch_ms.is_some(), alone),
                ("--min-epoch-ms", line.min_epoch_ms.is_some(), alone),
                ("--idle-epoch-ms", line.idle_epoch_ms.is_some(), alone),
                (
                    "--gate",
                    line.gate.is_some(),
                    "leave it out here, the primary's output is held",
                ),
                ("--heartbeat-ms", line.heartbeat_ms.is_some(), learns),
                (
                    "--failover-after-ms",
                    line.failover_after_ms.is_some(),
                    learns,
                ),
                ("--on-backup-loss", line.on_backup_loss.is_some(), alone),
                ("--max-unacked-ms", line.max_unacked_ms.is_some(), alone),
                (
                    "--tracker",
                    line.tracker.is_some(),
                    "leave it out here, a backup tracks nothing",
                ),
                ("--audit-every", line.audit_every.is_some(), alone),
                ("--deltas", line.deltas.is_some(), alone),
                ("--delta-cache-mib", line.delta_cache_mib.is_some(), alone),
            ],
        ),
    };
    match options.into_iter().find(|(_, given, _)| *given) {
        Some((option, _, cure)) => Err(ConfigError::OtherMode {
            option,
            belongs,
            mode: mode.as_str(),
            cure,
        }),
        None => Ok(()),
    }
}

fn mode(mode: ModeName, options: &Options) -> Result<Mode, ConfigError> {
    let (option, text, cure) = match mode {
        ModeName::Primary => (
            "--peer",
            &options.peer,
            "the address where the backup listens, like 127.0.0.1:7070",
        ),
        ModeName::Backup => (
            "--listen",
            &options.listen,
            "an address of this host, like 127.0.0.1:7070",
        ),
    };
    let missing = ConfigError::Missing {
        mode: mode.as_str(),
        option,
        cure,
    };
    let address = resolve(option, text.as_ref().ok_or(missing)?)?;
    if !address.ip().to_canonical().is_loopback() && !options.allow_unauthenticated {
        return Err(ConfigError::NotLoopback { option, address });
    }
    Ok(match mode {
        ModeName::Primary => Mode::Primary { peer: address },
        ModeName::Backup => Mode::Backup { listen: address },
    })
}

fn resolve(option: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
    let wrong = |why: String| ConfigError::Address {
        option,
        text: text.to_owned(),
        why,
    };
    let mut addresses = text
        .to_socket_addrs()
        .map_err(|error| wrong(error.to_string()))?;
    let address = addresses
        .next()
        .ok_or_else(|| wrong("the name has no address".to_owned()))?;
    // A backup on a port that the kernel chooses is one that no primary finds.
    if address.port() == 0 {
        return Err(wrong("the port is 0".to_owned()));
    }
    Ok(address)
}

fn source(options: &Options, dry_run: bool) -> Result<QemuSource, ConfigError> {
    match (&options.qmp, options.qemu.is_empty()) {
        (Some(_), false) => Err(ConfigError::TwoQemus),
        (Some(_), true) if dry_run => Err(ConfigError::DryRunWithoutLine),
        (Some(qmp), true) => Ok(QemuSource::Attach { qmp: qmp.clone() }),
        (None, false) => Ok(QemuSource::Spawn {
            argv: options.qemu.clone(),
        }),
        (None, true) if dry_run => Err(ConfigError::DryRunWithoutLine),
        (None, true) => Err(ConfigError::NoQemu),
    }
}

fn vm_id(options: &Options, source: &QemuSource) -> Result<String, ConfigError> {
    let Some(id) = &options.vm_id else {
        let named = match source {
            QemuSource::Spawn { argv } => guest_name(argv),
            QemuSource::Attach { .. } => None,
        };
        return Ok(named.unwrap_or_else(|| VM_ID.to_owned()));
    };
    if is_vm_id(id) {
        Ok(id.clone())
    } else {
        Err(ConfigError::VmId(id.clone()))
    }
}

fn is_vm_id(id: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=VM_ID_BYTES_MAX).contains(&id.len()) && id.chars().all(fits) && !id.starts_with(['.', '-'])
}

/// The name in `-name web` or `-name guest=web,process=...`, if it can be a part of file names.
fn guest_name(argv: &[String]) -> Option<String> {
    let at = argv
        .iter()
        .position(|word| word == "-name" || word == "--name")?;
    let name = argv
        .get(at + 1)?
        .split(',')
        .find_map(|part| match part.split_once('=') {
            Some(("guest", name)) => Some(name),
            Some(_) => None,
            None => Some(part),
        })?;
    is_vm_id(name).then(|| name.to_owned())
}

struct Times {
    epoch: Duration,
    epoch_min: Duration,
    epoch_idle: Duration,
    heartbeat: Duration,
    lease: Duration,
    max_unacked: Duration,
}

impl Times {
    fn new(options: &Options) -> Result<Times, ConfigError> {
        let epoch_ms = options.epoch_ms.unwrap_or(EPOCH_MS);
        let heartbeat_ms = options.heartbeat_ms.unwrap_or(HEARTBEAT_MS);
        let lease_ms = options.failover_after_ms.unwrap_or(FAILOVER_AFTER_MS);
        let max_unacked_ms = options.max_unacked_ms.unwrap_or(MAX_UNACKED_MS);
        in_range("--epoch-ms", epoch_ms, 1..=10_000, "20 suits most guests")?;
        // Where the defaults don't fit an epoch that was asked for, they follow it.
        let min_ms = options.min_epoch_ms.unwrap_or(EPOCH_MIN_MS.min(epoch_ms));
        let idle_ms = options.idle_epoch_ms.unwrap_or(EPOCH_IDLE_MS.max(epoch_ms));
        in_range(
            "--min-epoch-ms",
            min_ms,
            0..=epoch_ms,
            "2 suits most guests; it is at most --epoch-ms",
        )?;
        in_range(
            "--idle-epoch-ms",
            idle_ms,
            epoch_ms..=10_000,
            "250 suits most guests; it is at least --epoch-ms",
        )?;
        in_range(
            "--heartbeat-ms",
            heartbeat_ms,
            1..=60_000,
            "50 suits most networks",
        )?;
        in_range(
            "--failover-after-ms",
            lease_ms,
            LEASE_MS,
            "1000 suits most networks",
        )?;
        in_range(
            "--max-unacked-ms",
            max_unacked_ms,
            1..=3_600_000,
            "2000 suits most networks",
        )?;
        let least_ms = heartbeat_ms * HEARTBEATS_PER_LEASE;
        if lease_ms < least_ms {
            return Err(ConfigError::LeaseTooShort {
                lease_ms,
                least_ms,
                heartbeat_ms,
            });
        }
        if max_unacked_ms < epoch_ms {
            return Err(ConfigError::UnackedTooShort {
                max_unacked_ms,
                epoch_ms,
            });
        }
        Ok(Times {
            epoch: Duration::from_millis(epoch_ms),
            epoch_min: Duration::from_millis(min_ms),
            epoch_idle: Duration::from_millis(idle_ms),
            heartbeat: Duration::from_millis(heartbeat_ms),
            lease: Duration::from_millis(lease_ms),
            max_unacked: Duration::from_millis(max_unacked_ms),
        })
    }
}

fn busy_poll(us: u64) -> Result<Duration, ConfigError> {
    in_range(
        "--busy-poll-us",
        us,
        BUSY_POLL_US,
        "20 to 100 is about what a NIC takes to answer",
    )?;
    Ok(Duration::from_micros(us))
}

fn in_range(
    option: &'static str,
    found: u64,
    range: RangeInclusive<u64>,
    cure: &'static str,
) -> Result<(), ConfigError> {
    if range.contains(&found) {
        return Ok(());
    }
    let (least, most) = range.into_inner();
    Err(ConfigError::Range {
        option,
        found,
        least,
        most,
        cure,
    })
}
