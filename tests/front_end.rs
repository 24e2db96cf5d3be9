//! The program as a user meets it: messages, exit codes, `status` and the other subcommands, and
//! the events file, with real QEMUs that run nothing but firmware.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_curling-rdma");
const QEMU: [&str; 10] = [
    "qemu-system-x86_64",
    "-nodefaults",
    "-display",
    "none",
    "-accel",
    "tcg",
    "-machine",
    "pc",
    "-m",
    "32",
];
/// Everything here takes a second or two: whoever needs this long hangs.
const HANG: Duration = Duration::from_secs(120);

#[test]
fn help_teaches() {
    let output = run(&["--help"]);
    assert_eq!(code(&output), 0);
    let help = String::from_utf8(output.stdout).unwrap();
    for words in [
        "Examples:",
        "Exit codes:",
        "--failover-after-ms",
        "switchover",
        "defaults",
    ] {
        assert!(help.contains(words), "{words}");
    }
    assert_eq!(code(&run(&["status", "--help"])), 0);
    assert_eq!(code(&run(&["--version"])), 0);
}

#[test]
fn what_is_wrong_on_the_command_line_is_code_2_and_one_message() {
    let primary = "--mode primary --peer 127.0.0.1:7070";
    let cases = [
        (String::new(), "no --mode"),
        (primary.to_owned(), "no QEMU"),
        (
            format!("{primary} --listen 127.0.0.1:1 -- qemu"),
            "--listen is for --mode backup",
        ),
        (format!("{primary} --qmp /s -- qemu"), "exclude each other"),
        (
            format!("{primary} --epoch-ms 0 -- qemu"),
            "expected 1 to 10000",
        ),
        (
            "--mode primary --peer 192.0.2.1:1 -- qemu".to_owned(),
            "--allow-unauthenticated",
        ),
        (
            format!("{primary} --config /nonexistent -- qemu"),
            "/nonexistent",
        ),
        ("--mode sideways".to_owned(), "primary, backup"),
        ("fly".to_owned(), "unexpected argument"),
    ];
    for (line, expected) in cases {
        let output = run(&line.split_whitespace().collect::<Vec<_>>());
        let said = stderr(&output);
        assert_eq!(code(&output), 2, "{line}: {said}");
        assert!(said.contains(expected), "{line}: {said}");
        assert!(output.stdout.is_empty(), "{line}");
    }
}

/// Loopback is never an RDMA device's address, so this holds on any machine.
#[test]
fn rdma_where_there_is_none_is_refused_before_anything_starts() {
    for mode in ["primary --peer", "backup --listen"] {
        let line = format!("--mode {mode} 127.0.0.1:7070 --transport rdma -- qemu");
        let output = run(&line.split_whitespace().collect::<Vec<_>>());
        let said = stderr(&output);
        assert_eq!(code(&output), 3, "{line}: {said}");
        assert!(said.contains("--transport tcp"), "{line}: {said}");
    }
}

#[test]
fn an_unknown_key_in_a_file_is_named_with_the_known_ones() {
    let scratch = Scratch::new("key");
    let file = scratch.path("c.toml");
    fs::write(&file, "mode = 'primary'\nepoch_ms = 5\n").unwrap();
    let output = run(&["--config", text(&file), "--", "qemu"]);
    let said = stderr(&output);
    assert_eq!(code(&output), 2, "{said}");
    for part in ["`epoch_ms`", "`epoch-ms`", "heartbeat-ms", text(&file)] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn where_there_is_no_daemon_is_code_3() {
    let scratch = Scratch::new("nobody");
    let socket = scratch.path("none.sock");
    for command in ["status", "detach", "switchover", "continue", "rehearse"] {
        let output = run(&[command, "--control", text(&socket)]);
        assert_eq!(code(&output), 3, "{command}");
        assert!(stderr(&output).contains(text(&socket)), "{command}");
    }
}

#[test]
fn a_missing_privilege_is_code_6() {
    const NOBODY: u32 = 65534;
    let scratch = Scratch::new("privilege");
    // Where the program was built may be closed to others. Copied by another process: a child
    // that a test forks meanwhile would have the file open for writing, and it could not be run.
    let program = scratch.path("curling-rdma");
    let copied = Command::new("cp").arg(PROGRAM).arg(&program).status();
    assert!(copied.unwrap().success());
    let state = scratch.path("state");
    fs::create_dir(&state).unwrap();
    fs::set_permissions(&state, PermissionsExt::from_mode(0o500)).unwrap();
    let mut command = Command::new(&program);
    command.args([
        "--mode",
        "primary",
        "--peer",
        "127.0.0.1:1",
        "--state-dir",
        text(&state),
    ]);
    command.args(["--", QEMU[0]]);
    if Uid::effective().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let output = command.output().unwrap();
    assert_eq!(code(&output), 6, "{}", stderr(&output));
    assert!(
        stderr(&output).contains(text(&state)),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_qemu_that_can_not_be_had_is_code_3() {
    let scratch = Scratch::new("refused");
    let unmigratable = [&QEMU[..], &["-device", "nvme,serial=1"]].concat();
    for line in [vec!["/nonexistent/qemu"], unmigratable] {
        let daemon = Daemon::start(
            &scratch,
            "primary",
            1,
            &["--state-dir", text(&scratch.0)],
            &line,
        );
        let (code, said) = daemon.end();
        assert_eq!(code, 3, "{line:?}: {said}");
    }
}

#[test]
fn a_full_disk_stops_neither_protection_nor_answers() {
    let scratch = Scratch::new("full");
    let mut daemon = Daemon::start(
        &scratch,
        "primary",
        free_port(),
        &["--events", "/dev/full"],
        &QEMU,
    );
    let status = daemon.status_when(|status| status["guest_running"] == true);
    assert_eq!(status["mode"], "primary");
    assert_eq!(status["protected"], false);
    let output = daemon.ask(&["status"]);
    assert_eq!(code(&output), 1);
    assert!(String::from_utf8_lossy(&output.stdout).contains("protected"));

    let second = Daemon::start(&scratch, "primary", 1, &[], &QEMU);
    let (code_, said) = second.end();
    assert_ne!(code_, 0);
    assert!(said.contains("another primary daemon"), "{said}");

    assert_eq!(code(&daemon.ask(&["detach"])), 0);
    let socket = daemon.socket.clone();
    let (code, said) = daemon.end();
    assert_eq!(code, 0, "{said}");
    assert_eq!(
        said.matches("/dev/full").count(),
        1,
        "one warning is enough: {said}"
    );
    assert!(!socket.exists());
}

#[test]
fn a_pair_protects_moves_and_tells() {
    let scratch = Scratch::new("pair");
    let port = free_port();
    let events = |mode| scratch.path(&format!("{mode}.events"));
    let start = |mode| {
        Daemon::start(
            &scratch,
            mode,
            port,
            &["--events", text(&events(mode))],
            &QEMU,
        )
    };
    let (mut primary, mut backup) = (start("primary"), start("backup"));
    for daemon in [&mut primary, &mut backup] {
        let status = daemon.status_when(|status| status["protected"] == true);
        for key in status.as_object().unwrap().keys() {
            let documented = include_str!("../docs/control.md").contains(&format!("| `{key}` |"));
            assert!(documented, "docs/control.md lacks {key}");
        }
        let output = daemon.ask(&["status"]);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        assert!(String::from_utf8_lossy(&output.stdout).contains("yes"));
    }
    assert_eq!(code(&primary.ask(&["rehearse"])), 0);
    lines_until(&events("backup"), |line| line["event"] == "rehearsed");
    assert_eq!(
        code(&backup.ask(&["switchover"])),
        3,
        "that is for the primary"
    );

    let output = primary.ask(&["switchover"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let (code_, said) = primary.end();
    assert_eq!(code_, 0, "{said}");
    backup.status_when(|status| status["state"] == "active");
    assert_eq!(code(&backup.ask(&["status"])), 1, "it runs, unprotected");

    let primary_lines = lines_until(&events("primary"), |line| line["event"] == "ended");
    let backup_lines = lines_until(&events("backup"), |line| line["event"] == "failover");
    for name in ["attached", "connected", "synced", "epoch", "ended"] {
        assert!(
            primary_lines.iter().any(|line| line["event"] == name),
            "{name}"
        );
    }
    for name in [
        "attached",
        "connected",
        "syncing",
        "protecting",
        "flipped",
        "activating",
    ] {
        assert!(
            backup_lines.iter().any(|line| line["event"] == name),
            "{name}"
        );
    }
    let document = include_str!("../docs/events.md");
    for line in primary_lines.iter().chain(&backup_lines) {
        assert!(line["time_us"].as_u64().is_some(), "{line}");
        let heading = format!("### `{}`", line["event"].as_str().unwrap());
        assert!(
            document.contains(&heading),
            "docs/events.md lacks {heading}"
        );
    }
    let failover = backup_lines
        .iter()
        .find(|line| line["event"] == "failover")
        .unwrap();
    assert_eq!(failover["reason"], "switchover");
}

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output
        .status
        .code()
        .unwrap_or_else(|| panic!("ended by a signal: {}", output.status))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// Asks again and again until there is an answer.
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    while began.elapsed() < HANG {
        if let Some(found) = look() {
            return found;
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("waited {HANG:?} for {what}");
}

/// The whole lines of an events file, as soon as one of them is `wanted`.
fn lines_until(path: &Path, wanted: impl Fn(&Value) -> bool) -> Vec<Value> {
    wait_for(&format!("an event in {}", path.display()), || {
        let text = fs::read_to_string(path).ok()?;
        let (whole, _) = text.rsplit_once('\n')?;
        let parse = |line: &str| serde_json::from_str(line).expect("a line of JSON");
        let lines: Vec<Value> = whole.lines().map(parse).collect();
        lines.iter().any(&wanted).then_some(lines)
    })
}

/// A directory of its own, gone when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("cr-front-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A daemon that ends with the test, and its QEMUs with it.
struct Daemon {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    /// QEMUs and the guardian: some of them outlive a daemon on purpose.
    offspring: Vec<Pid>,
}

impl Daemon {
    fn start(scratch: &Scratch, mode: &str, port: u16, options: &[&str], qemu: &[&str]) -> Daemon {
        let number = (0..)
            .find(|n| !scratch.path(&format!("{mode}-{n}.log")).exists())
            .unwrap();
        let log = scratch.path(&format!("{mode}-{number}.log"));
        let socket = scratch.path(&format!("{mode}-{number}.sock"));
        let address = format!("127.0.0.1:{port}");
        let side = if mode == "primary" {
            "--peer"
        } else {
            "--listen"
        };
        let mut command = Command::new(PROGRAM);
        command.args(["--mode", mode, side, &address, "--control", text(&socket)]);
        if !options.contains(&"--state-dir") {
            command.args(["--state-dir", text(&scratch.0)]);
        }
        command.args(options).arg("--").args(qemu);
        let mut open = File::options();
        let file = open
            .create_new(true)
            .append(true)
            .mode(0o600)
            .open(&log)
            .unwrap();
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file);
        Daemon {
            child: command.spawn().unwrap(),
            socket,
            log,
            offspring: Vec::new(),
        }
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        let control = ["--control", text(&self.socket)];
        run(&[arguments, &control].concat())
    }

    fn status_when(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_for("a status", || {
            self.note_offspring();
            let output = self.ask(&["status", "--json"]);
            let status: Value = serde_json::from_slice(&output.stdout).ok()?;
            wanted(&status).then_some(status)
        })
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Its exit code and what it said.
    fn end(mut self) -> (i32, String) {
        let status = wait_for("a daemon's end", || {
            self.note_offspring();
            self.child.try_wait().unwrap()
        });
        let code = status
            .code()
            .unwrap_or_else(|| panic!("{status}: {}", self.said()));
        (code, self.said())
    }

    fn note_offspring(&mut self) {
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.child.id())) else {
            return;
        };
        for task in tasks.flatten() {
            let Ok(file) = File::open(task.path().join("children")) else {
                continue;
            };
            for line in BufReader::new(file).lines().map_while(Result::ok) {
                let pids = line.split_whitespace().filter_map(|word| word.parse().ok());
                for pid in pids.map(Pid::from_raw) {
                    if !self.offspring.contains(&pid) {
                        self.offspring.push(pid);
                    }
                }
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.note_offspring();
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in &self.offspring {
            // Its number may be somebody else's by now.
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if name.starts_with("qemu-system") {
                let _ = kill(*pid, Signal::SIGKILL);
            }
        }
    }
}
