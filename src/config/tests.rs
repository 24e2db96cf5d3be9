use std::fs;

use clap::Parser;

use super::*;
use crate::cli::Cli;

const QEMU: &str = "-- qemu-system-x86_64 -m 512";

fn settings(line: &str) -> Result<Settings, ConfigError> {
    let words = format!("curling-rdma {line}");
    let cli = Cli::try_parse_from(words.split_whitespace()).expect(line);
    Settings::new(cli.daemon)
}

fn primary(rest: &str) -> String {
    format!("--mode primary --peer 127.0.0.1:7070 {rest}")
}

/// A file that is gone when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, text: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("cr-{name}-{}.toml", std::process::id()));
        fs::write(&path, text).unwrap();
        Scratch(path)
    }

    fn line(&self, rest: &str) -> String {
        format!("--config {} {rest}", self.0.display())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn the_two_commands_of_the_readme_work() {
    let settings_ = settings(&primary(QEMU)).unwrap();
    assert_eq!(
        settings_.mode,
        Mode::Primary {
            peer: "127.0.0.1:7070".parse().unwrap()
        }
    );
    let argv = ["qemu-system-x86_64", "-m", "512"]
        .map(str::to_owned)
        .to_vec();
    assert_eq!(settings_.source, QemuSource::Spawn { argv });
    assert_eq!(settings_.vm_id, "vm");
    assert_eq!(settings_.epoch, Duration::from_millis(20));
    assert_eq!(settings_.heartbeat, Duration::from_millis(50));
    assert_eq!(settings_.lease, Duration::from_millis(1000));
    assert_eq!(settings_.max_unacked, Duration::from_millis(2000));
    assert_eq!(settings_.on_backup_loss, OnBackupLoss::Pause);
    assert_eq!(settings_.tracker, TrackerChoice::Auto);
    assert_eq!(settings_.audit_every, 0);
    assert!(settings_.control.ends_with("curling-rdma/vm-primary.sock"));

    let backup = settings("--mode backup --listen [::1]:7070 -- qemu -name guest=web,x=y").unwrap();
    assert_eq!(
        backup.mode,
        Mode::Backup {
            listen: "[::1]:7070".parse().unwrap()
        }
    );
    assert_eq!(backup.vm_id, "web");
    assert!(backup.control.ends_with("web-backup.sock"));
}

#[test]
fn a_running_qemu_is_attached_to() {
    let plain = settings(&primary("--qmp /run/q --vm-id a.b_c-1")).unwrap();
    assert_eq!(
        plain.source,
        QemuSource::Attach {
            qmp: "/run/q".into()
        }
    );
    assert_eq!(plain.vm_id, "a.b_c-1");
}

#[test]
fn every_misunderstanding_has_its_message() {
    let cases = [
        (QEMU.to_owned(), "no --mode"),
        (
            format!("--mode primary {QEMU}"),
            "--mode primary needs --peer",
        ),
        (
            format!("--mode backup {QEMU}"),
            "--mode backup needs --listen",
        ),
        (
            primary(&format!("--listen 127.0.0.1:1 {QEMU}")),
            "--listen is for --mode backup",
        ),
        (
            format!("--mode backup --listen 127.0.0.1:1 --peer 127.0.0.1:2 {QEMU}"),
            "--peer is for --mode primary, this is --mode backup",
        ),
        (
            format!("--mode backup --listen 127.0.0.1:1 --epoch-ms 5 {QEMU}"),
            "--epoch-ms is for --mode primary",
        ),
        (
            format!("--mode backup --listen 127.0.0.1:1 --tracker uffd {QEMU}"),
            "a backup tracks nothing",
        ),
        (primary(""), "no QEMU: end the line with"),
        (
            primary(&format!("--qmp /q {QEMU}")),
            "--qmp and a QEMU command line",
        ),
        (primary("--qmp /q --dry-run"), "--dry-run shows"),
        (primary("--dry-run"), "--dry-run shows"),
        (
            format!("--mode primary --peer 127.0.0.1 {QEMU}"),
            "--peer \"127.0.0.1\" is no address",
        ),
        (
            format!("--mode primary --peer 127.0.0.1:x {QEMU}"),
            "is no address",
        ),
        (
            format!("--mode primary --peer 127.0.0.1:0 {QEMU}"),
            "the port is 0",
        ),
        (
            format!("--mode primary --peer 192.0.2.1:7 {QEMU}"),
            "add --allow-unauthenticated",
        ),
        (
            format!("--mode backup --listen 0.0.0.0:7 {QEMU}"),
            "--listen 0.0.0.0:7 is not loopback",
        ),
        (
            format!("--mode backup --listen [::]:7 {QEMU}"),
            "is not loopback",
        ),
        (
            primary(&format!("--epoch-ms 0 {QEMU}")),
            "--epoch-ms is 0, expected 1 to 10000",
        ),
        (
            primary(&format!("--busy-poll-us 1001 {QEMU}")),
            "--busy-poll-us is 1001, expected 0 to 1000",
        ),
        (
            primary(&format!("--epoch-ms 10001 {QEMU}")),
            "--epoch-ms is 10001",
        ),
        (
            primary(&format!("--heartbeat-ms 0 {QEMU}")),
            "--heartbeat-ms is 0",
        ),
        (
            primary(&format!("--failover-after-ms 9 {QEMU}")),
            "expected 10 to 3600000",
        ),
        (
            primary(&format!("--failover-after-ms 149 {QEMU}")),
            "expected at least 3 heartbeats, 150",
        ),
        (
            primary(&format!("--max-unacked-ms 19 {QEMU}")),
            "expected at least --epoch-ms (20)",
        ),
        (
            primary(&format!("--max-unacked-ms 3600001 {QEMU}")),
            "--max-unacked-ms is 3600001",
        ),
        (
            primary(&format!("--vm-id ../etc {QEMU}")),
            "--vm-id \"../etc\" can't be used",
        ),
        (
            primary(&format!("--vm-id {} {QEMU}", "x".repeat(129))),
            "can't be used: 1 to 128",
        ),
        (
            primary(&format!("--config /nonexistent {QEMU}")),
            "configuration file /nonexistent",
        ),
    ];
    for (line, expected) in cases {
        let error = settings(&line).expect_err(&line).to_string();
        assert!(
            error.contains(expected),
            "{line}\n  said {error}\n  not  {expected}"
        );
        assert!(!error.contains('\n'), "more than one line: {error}");
    }
}

#[test]
fn other_addresses_need_a_word() {
    let line = format!("--mode backup --listen 0.0.0.0:7 --allow-unauthenticated {QEMU}");
    assert_eq!(
        settings(&line).unwrap().mode,
        Mode::Backup {
            listen: "0.0.0.0:7".parse().unwrap()
        }
    );
    let mapped = format!("--mode backup --listen [::ffff:127.0.0.1]:7 {QEMU}");
    settings(&mapped).unwrap();
}

#[test]
fn the_command_line_wins_over_the_file() {
    let file = Scratch::new(
        "wins",
        "mode = 'primary'\npeer = '127.0.0.1:1'\nlisten = '127.0.0.1:2'\nepoch-ms = 7\n\
         heartbeat-ms = 9\non-backup-loss = 'continue'\naudit-every = 3\nevents = '/tmp/e'\n\
         qemu = ['qemu', '-m', '1G']\n",
    );
    let from_file = settings(&file.line("")).unwrap();
    assert_eq!(from_file.epoch, Duration::from_millis(7));
    assert_eq!(from_file.on_backup_loss, OnBackupLoss::Continue);
    assert_eq!(from_file.audit_every, 3);
    assert_eq!(from_file.events, Some("/tmp/e".into()));
    let line = file.line("--epoch-ms 8 --peer 127.0.0.1:3 --on-backup-loss pause --qmp /q");
    let both = settings(&line).unwrap();
    assert_eq!(
        both.mode,
        Mode::Primary {
            peer: "127.0.0.1:3".parse().unwrap()
        }
    );
    assert_eq!(both.epoch, Duration::from_millis(8));
    assert_eq!(both.heartbeat, Duration::from_millis(9));
    assert_eq!(both.on_backup_loss, OnBackupLoss::Pause);
    assert_eq!(both.source, QemuSource::Attach { qmp: "/q".into() });
    // One file may serve both hosts.
    let backup = settings(&file.line("--mode backup")).unwrap();
    assert_eq!(
        backup.mode,
        Mode::Backup {
            listen: "127.0.0.1:2".parse().unwrap()
        }
    );
}

#[test]
fn what_is_wrong_in_a_file_is_named() {
    let cases = [
        (
            "epoch_ms = 5",
            "unknown key `epoch_ms` (did you mean `epoch-ms`?); known are mode, listen",
        ),
        ("colour = 'red'", "unknown key `colour`; known are"),
        ("config = 'x'", "unknown key `config`"),
        ("epoch-ms = 'five'", "has a wrong value"),
        ("epoch-ms = -5", "has a wrong value"),
        ("mode = 'sideways'", "sideways"),
        ("mode = ", "is no TOML"),
        ("mode = 'primary'\nmode = 'backup'", "is no TOML"),
    ];
    for (number, (text, expected)) in cases.into_iter().enumerate() {
        let file = Scratch::new(&format!("wrong{number}"), text);
        let error = settings(&file.line(&primary(QEMU)))
            .expect_err(text)
            .to_string();
        assert!(error.contains(expected), "{text}\n  said {error}");
        assert!(error.contains(&file.0.display().to_string()), "{error}");
    }
    let long = Scratch::new("long", &"#".repeat(65 << 10));
    let error = settings(&long.line(&primary(QEMU)))
        .unwrap_err()
        .to_string();
    assert!(error.contains("more than 65536 bytes"), "{error}");
}

#[test]
fn a_guest_without_a_usable_name_is_called_vm() {
    let cases = [
        ("-- qemu -name web", "web"),
        ("-- qemu -name process=q,guest=db", "db"),
        ("-- qemu -name process=q", "vm"),
        ("-- qemu -name a/b", "vm"),
        ("-- qemu -name", "vm"),
    ];
    for (line, id) in cases {
        assert_eq!(settings(&primary(line)).unwrap().vm_id, id, "{line}");
    }
}
