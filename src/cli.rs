//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;

use crate::exit;

const ABOUT: &str = "Keeps a QEMU virtual machine alive through the death of its host";

const LONG_ABOUT: &str = "\
Keeps a QEMU virtual machine alive through the death of its host.

One daemon runs beside the guest (the primary), one on another host (the backup). Many times a \
second the primary stops the guest for a moment, takes what has changed, lets it run on, and sends \
the change to the backup. When the primary dies, the backup starts the guest from the last epoch \
that it has acknowledged.";

const EXAMPLES: &str = "\
Examples:
  The backup first or second, as you like; both with the same guest-visible options:
    curling-rdma --mode backup  --listen 127.0.0.1:7070 -- qemu-system-x86_64 -m 512 ...
    curling-rdma --mode primary --peer   127.0.0.1:7070 -- qemu-system-x86_64 -m 512 ...

  A guest that is already running (its QEMU has a QMP socket):
    curling-rdma --mode primary --peer 127.0.0.1:7070 --vm-id web --qmp /run/web.qmp

  What would be run, and whether it can be protected:
    curling-rdma --mode primary --peer 127.0.0.1:7070 --dry-run -- qemu-system-x86_64 ...

  Is it protected? How far is the backup behind?
    curling-rdma status

  Move the guest to the backup on purpose, or stop protecting it:
    curling-rdma switchover
    curling-rdma detach

The defaults:
  An epoch begins every 20 ms, sooner when the guest has sent something and later when it is idle:
  what the guest did in the last one is what a failover may repeat. Its packets leave when the
  backup has their epoch (--gate), so nobody has heard of what is repeated.
  A primary that hears nothing for 1000 ms stops its guest until the backup is heard again, and the
  backup starts it a little later: the network may be silent for that long without harm. A process
  that is killed is noticed at once.
  If the backup falls silent without proof of its death, the guest stops (--on-backup-loss pause):
  never two copies.

Configuration file: the same names without the dashes, TOML; the command line wins.
    mode = \"primary\"
    peer = \"127.0.0.1:7070\"
    epoch-ms = 10
    qemu = [\"qemu-system-x86_64\", \"-m\", \"512\"]
";

/// What the program was called with.
#[derive(Debug, Parser)]
#[command(
    name = "curling-rdma",
    version,
    about = ABOUT,
    long_about = LONG_ABOUT,
    after_help = "`--help` shows examples, what the defaults mean, and the exit codes.",
    after_long_help = format!("{EXAMPLES}\n{}", exit::TABLE),
    args_conflicts_with_subcommands = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Operation>,
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// Read options from this file (TOML); the command line wins.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Only show the QEMU command line that would be run, and refuse what can't be protected.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) options: Options,
}

/// Options that a configuration file can have too, by the same names.
#[derive(Clone, Debug, Default, PartialEq, Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Options {
    /// Which side this is: beside the guest, or waiting to take over.
    #[arg(long, value_enum)]
    pub(crate) mode: Option<ModeName>,
    /// Backup: where the primary may connect.
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Option<String>,
    /// Primary: where the backup listens. It may start later.
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) peer: Option<String>,
    /// Use the QEMU that has this QMP socket, instead of starting one.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) qmp: Option<PathBuf>,
    /// The VM's name, the same on both sides [default: the -name of the QEMU to start, else `vm`].
    #[arg(long, value_name = "NAME")]
    pub(crate) vm_id: Option<String>,

    /// Primary: the longest epoch, in milliseconds, of a guest that works [default: 20].
    #[arg(long, value_name = "MS")]
    pub(crate) epoch_ms: Option<u64>,
    /// Primary: milliseconds that the guest runs at least between two epochs, when output waits for
    /// an acknowledgement [default: 2].
    #[arg(long, value_name = "MS")]
    pub(crate) min_epoch_ms: Option<u64>,
    /// Primary: the longest epoch, in milliseconds, of a gated guest that does and says next to
    /// nothing [default: 250].
    #[arg(long, value_name = "MS")]
    pub(crate) idle_epoch_ms: Option<u64>,
    /// Primary: milliseconds between heartbeats [default: 50].
    #[arg(long, value_name = "MS")]
    pub(crate) heartbeat_ms: Option<u64>,
    /// Primary: milliseconds of silence after which it stops its guest, and the backup takes over
    /// [default: 1000].
    #[arg(long, value_name = "MS")]
    pub(crate) failover_after_ms: Option<u64>,
    /// Primary: what the guest does when the backup falls silent, which proves nothing [default:
    /// pause].
    #[arg(long, value_enum)]
    pub(crate) on_backup_loss: Option<OnBackupLossName>,
    /// Primary: milliseconds that the backup may be late before the guest waits for it [default:
    /// 2000].
    #[arg(long, value_name = "MS")]
    pub(crate) max_unacked_ms: Option<u64>,
    /// Primary: how writes to guest RAM are seen. `uffd` needs Linux 6.7 and ptrace,
    /// `soft-dirty` an older kernel with CONFIG_MEM_SOFT_DIRTY, `compare` nothing: it reads all of
    /// RAM in each epoch. `auto` takes the first of them that works [default: auto].
    #[arg(long, value_enum)]
    pub(crate) tracker: Option<TrackerName>,
    /// Primary: at every Nth boundary hash all of RAM and compare it with the backup's; 0 is never
    /// [default: 0].
    #[arg(long, value_name = "N")]
    pub(crate) audit_every: Option<u64>,
    /// Primary: what holds the guest's packets until the backup has their epoch. `filter` works with
    /// every netdev without vhost and with one queue, `plug` with every tap, on kernels with sch_plug
    /// and ifb; `off` lets them go at once, and clients may see what a failover undoes. `auto` takes
    /// the first that works for all NICs [default: auto].
    #[arg(long, value_enum)]
    pub(crate) gate: Option<GateName>,
    /// What carries the epochs. `auto` is RDMA where both hosts have it, else TCP [default: auto].
    #[arg(long, value_enum)]
    pub(crate) transport: Option<TransportName>,
    /// Microseconds that a daemon looks for what comes next before it sleeps, as long as that pays
    /// off: quicker acknowledgements for processor time [default: 0; for what RDMA completes, 20].
    #[arg(long, value_name = "US")]
    pub(crate) busy_poll_us: Option<u64>,

    /// Primary: send what has changed in a page in place of the page, or compress it. `auto` does so
    /// while epochs arrive sooner for it, and never on RDMA. Without `off` the device state is
    /// compressed wherever pages may be [default: auto].
    #[arg(long, value_enum)]
    pub(crate) deltas: Option<DeltasName>,
    /// Primary: MiB of pages that are kept to tell what has changed in them [default: 16].
    #[arg(long, value_name = "MIB")]
    pub(crate) delta_cache_mib: Option<u64>,

    /// Append one JSON object per event (docs/events.md). It never stops protection.
    #[arg(long, value_name = "FILE")]
    pub(crate) events: Option<PathBuf>,
    /// Where the daemon remembers its term [default: /var/lib/curling-rdma; for users
    /// $XDG_STATE_HOME/curling-rdma].
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// The socket for `status`, `detach`, … [default: <VM-ID>-<MODE>.sock in
    /// /run/curling-rdma; for users in $XDG_RUNTIME_DIR/curling-rdma].
    #[arg(long, value_name = "SOCKET")]
    pub(crate) control: Option<PathBuf>,
    /// Allow an address that is not loopback. Peers are not authenticated and nothing is encrypted
    /// yet: whoever reaches the port can read and replace the guest's memory.
    #[arg(long)]
    pub(crate) allow_unauthenticated: bool,
    /// Protect a guest with writable disks. Their contents are not replicated: after a failover
    /// the guest finds on them whatever the backup host has there.
    #[arg(long)]
    pub(crate) allow_unreplicated_disks: bool,
    /// Protect a guest that reaches other machines past the gate: a serial port on TCP, VNC, a
    /// shared folder. What it says there can't be held back.
    #[arg(long)]
    pub(crate) allow_ungated: bool,

    /// The QEMU to start, after `--`.
    #[arg(last = true, value_name = "QEMU COMMAND LINE")]
    pub(crate) qemu: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ModeName {
    Primary,
    Backup,
}

impl ModeName {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            ModeName::Primary => "primary",
            ModeName::Backup => "backup",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnBackupLossName {
    /// The guest stops when the lease ends: never two copies.
    Pause,
    /// It runs on: a backup that is only cut off may run a second copy.
    Continue,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TrackerName {
    Auto,
    Uffd,
    SoftDirty,
    Compare,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum GateName {
    Auto,
    Filter,
    Plug,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum TransportName {
    Auto,
    Tcp,
    Rdma,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DeltasName {
    Auto,
    On,
    Off,
}

/// What an operator asks of a daemon that runs on this host.
#[derive(Debug, Subcommand)]
pub(crate) enum Operation {
    /// Is the guest protected, since when, and how far is the backup behind?
    ///
    /// Ends with 0 if every VM found is protected, 1 if one is not or does not answer, 3 if no daemon
    /// is there.
    Status {
        /// One JSON object per daemon, as the daemon gave it.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Stop protecting: the guest runs on, its QEMU is as it was. A backup stands down.
    Detach {
        #[command(flatten)]
        target: Target,
    },
    /// Move the guest to the backup: last epoch, start there, end here.
    Switchover {
        #[command(flatten)]
        target: Target,
    },
    /// Let the guest run on without the backup. Only if you know that the backup doesn't run it.
    Continue {
        #[command(flatten)]
        target: Target,
    },
    /// What does each device add to every pause? Stops the guest nine times for a few milliseconds.
    ///
    /// For a VM that is not protected yet; `--dry-run` shows the same of a QEMU command line.
    Doctor {
        /// The VM's QMP socket.
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
    },
    /// Will it fail over? A throw-away QEMU on the backup loads the last epoch.
    Rehearse {
        #[command(flatten)]
        target: Target,
    },
}

/// Which daemon is meant.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Target {
    /// The daemon's control socket.
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["vm_id", "mode"])]
    pub(crate) control: Option<PathBuf>,
    /// The VM's name, if several are protected on this host.
    #[arg(long, value_name = "NAME")]
    pub(crate) vm_id: Option<String>,
    /// Which side, if both run on this host [default: the primary; for `status` both].
    #[arg(long, value_enum)]
    pub(crate) mode: Option<ModeName>,
}

impl Options {
    /// The names that a configuration file may use.
    pub(crate) fn names() -> Vec<String> {
        let command = Options::augment_args(clap::Command::new("options"));
        let long = |argument: &clap::Arg| match argument.get_long() {
            Some(name) => name.to_owned(),
            None => argument.get_id().to_string(),
        };
        command.get_arguments().map(long).collect()
    }

    /// These, and from `file` what they leave open.
    pub(crate) fn or(self, file: Options) -> Options {
        // Where QEMU comes from is one decision: a socket here overrules a line there.
        let source_here = self.qmp.is_some() || !self.qemu.is_empty();
        let (qmp, qemu) = if source_here {
            (self.qmp, self.qemu)
        } else {
            (file.qmp, file.qemu)
        };
        Options {
            mode: self.mode.or(file.mode),
            listen: self.listen.or(file.listen),
            peer: self.peer.or(file.peer),
            qmp,
            vm_id: self.vm_id.or(file.vm_id),
            epoch_ms: self.epoch_ms.or(file.epoch_ms),
            min_epoch_ms: self.min_epoch_ms.or(file.min_epoch_ms),
            idle_epoch_ms: self.idle_epoch_ms.or(file.idle_epoch_ms),
            heartbeat_ms: self.heartbeat_ms.or(file.heartbeat_ms),
            failover_after_ms: self.failover_after_ms.or(file.failover_after_ms),
            on_backup_loss: self.on_backup_loss.or(file.on_backup_loss),
            max_unacked_ms: self.max_unacked_ms.or(file.max_unacked_ms),
            tracker: self.tracker.or(file.tracker),
            audit_every: self.audit_every.or(file.audit_every),
            gate: self.gate.or(file.gate),
            transport: self.transport.or(file.transport),
            deltas: self.deltas.or(file.deltas),
            delta_cache_mib: self.delta_cache_mib.or(file.delta_cache_mib),
            busy_poll_us: self.busy_poll_us.or(file.busy_poll_us),
            events: self.events.or(file.events),
            state_dir: self.state_dir.or(file.state_dir),
            control: self.control.or(file.control),
            allow_unauthenticated: self.allow_unauthenticated || file.allow_unauthenticated,
            allow_unreplicated_disks: self.allow_unreplicated_disks
                || file.allow_unreplicated_disks,
            allow_ungated: self.allow_ungated || file.allow_ungated,
            qemu,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn clap_finds_nothing_wrong_with_the_definitions() {
        Cli::command().debug_assert();
    }

    #[test]
    fn lines_are_understood() {
        let cli = parse("x --mode primary --peer 127.0.0.1:7 --epoch-ms 5 -- qemu -m 512").unwrap();
        let options = cli.daemon.options;
        assert_eq!(options.mode, Some(ModeName::Primary));
        assert_eq!(options.peer.as_deref(), Some("127.0.0.1:7"));
        assert_eq!(options.epoch_ms, Some(5));
        assert_eq!(options.qemu, ["qemu", "-m", "512"]);
        assert!(cli.command.is_none());

        let cli = parse("x status --json --vm-id web").unwrap();
        let Some(Operation::Status { json: true, target }) = cli.command else {
            panic!()
        };
        assert_eq!(target.vm_id.as_deref(), Some("web"));

        for name in ["detach", "switchover", "continue", "rehearse"] {
            parse(&format!("x {name} --control /tmp/s")).unwrap();
            parse(&format!("x {name} --vm-id web --mode backup")).unwrap();
        }
    }

    #[test]
    fn wrong_lines_are_refused_with_code_2() {
        let wrong = [
            "x --mode sideways",
            "x --epoch-ms five",
            "x --epoch-ms -1",
            "x --on-backup-loss panic",
            "x --tracker guess",
            "x --transport carrier-pigeon",
            "x --no-such-option",
            "x status --control /tmp/s --vm-id web",
            "x --mode primary status",
            "x fly",
            "x qemu-system-x86_64",
        ];
        for line in wrong {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn help_teaches() {
        let help = Cli::command().render_long_help().to_string();
        let words = [
            "Examples:",
            "Exit codes:",
            "--on-backup-loss",
            "status",
            "Configuration file",
        ];
        for word in words {
            assert!(help.contains(word), "{word}");
        }
    }

    #[test]
    fn a_file_has_the_same_names_as_the_command_line() {
        let names = Options::names();
        assert!(names.contains(&"failover-after-ms".to_owned()));
        assert!(names.contains(&"qemu".to_owned()));
        assert!(!names.contains(&"config".to_owned()));
        for name in names {
            // Every name is known to the file's parser: the value is what it complains about.
            let error = toml::from_str::<Options>(&format!("{name} = 1979-05-27")).unwrap_err();
            assert!(
                !error.to_string().contains("unknown field"),
                "{name}: {error}"
            );
        }
    }
}
