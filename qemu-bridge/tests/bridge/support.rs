//! Real QEMUs for the tests: small guests that run only their firmware.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use qemu_bridge::qmp::Qmp;
use qemu_bridge::spawn::{GuestOutput, QemuProcess, SpawnOptions};

/// Generous: the machines that run the tests are small and shared.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The installed QEMU, and a newer one from the project's cache.
pub(crate) fn qemus() -> [String; 2] {
    ["qemu-system-x86_64".to_owned(), newer_qemu()]
}

/// The newer QEMU: what `QEMU_NEWER` names, or the one in the project's cache.
pub(crate) fn newer_qemu() -> String {
    if let Ok(path) = std::env::var("QEMU_NEWER") {
        return path;
    }
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/qemu-10.0");
    let path = cache.join("run/qemu-system-x86_64");
    assert!(path.exists(), "no QEMU 10.0: scripts/setup unpacks it");
    path.display().to_string()
}

/// Whether this user can run KVM here.
pub(crate) fn has_kvm() -> bool {
    let has = File::open("/dev/kvm").is_ok();
    if !has {
        not_run("the bridge on KVM", "no /dev/kvm that can be opened");
    }
    has
}

/// Says, once, that something can't be tested here, past the harness, which shows nothing of a
/// test that passes. `scripts/test` counts these lines. What `BRIDGE_MUST_RUN` names, words with
/// commas between them, fails instead: on the lab's kernel there is no excuse.
pub(crate) fn not_run(what: &str, why: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let required = std::env::var("BRIDGE_MUST_RUN").unwrap_or_default();
    let is_required = required
        .split(',')
        .any(|name| what.split(' ').any(|word| word == name));
    assert!(
        !is_required,
        "{what} must run here (BRIDGE_MUST_RUN): {why}"
    );
    let line = format!("\n--- {what}: NOT RUN: {why}\n");
    if SAID.lock().unwrap().insert(line.clone()) {
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }
}

/// A directory that is gone after the test.
#[derive(Debug)]
pub(crate) struct TestDir(pub(crate) PathBuf);

impl TestDir {
    pub(crate) fn new() -> TestDir {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ft-bridge-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).expect("a fresh directory");
        TestDir(path)
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A QEMU that is killed when the test ends, however it ends.
#[derive(Debug)]
pub(crate) struct TestQemu {
    pub(crate) process: QemuProcess,
    pub(crate) qmp: Qmp,
    dir: TestDir,
}

impl TestQemu {
    /// Starts `qemu` with `arguments`, no display, TCG and a QMP socket.
    pub(crate) fn start(qemu: &str, arguments: &[&str]) -> TestQemu {
        TestQemu::start_with(qemu, arguments, &[])
    }

    pub(crate) fn start_with(
        qemu: &str,
        arguments: &[&str],
        inherited: &[BorrowedFd<'_>],
    ) -> TestQemu {
        TestQemu::start_bare(qemu, &[&["-accel", "tcg"], arguments].concat(), inherited)
    }

    /// Without an accelerator.
    pub(crate) fn start_bare(
        qemu: &str,
        arguments: &[&str],
        inherited: &[BorrowedFd<'_>],
    ) -> TestQemu {
        let dir = TestDir::new();
        let socket = dir.0.join("qmp");
        let fixed = ["-display", "none", "-qmp"];
        let mut argv = vec![qemu.to_owned()];
        argv.extend(fixed.iter().map(|a| (*a).to_owned()));
        argv.push(format!("unix:{},server=on,wait=off", socket.display()));
        argv.extend(arguments.iter().map(|a| (*a).to_owned()));
        let options = SpawnOptions {
            inherited,
            output: GuestOutput::Discard,
            dies_with_thread: false,
        };
        TestQemu::adopt(
            QemuProcess::spawn(&argv, &options).expect("QEMU starts"),
            dir,
        )
    }

    /// Takes over a QEMU whose QMP socket is `qmp` in `dir`.
    pub(crate) fn adopt(process: QemuProcess, dir: TestDir) -> TestQemu {
        let mut guard = KillOnDrop(Some(process));
        let process = guard.0.as_mut().expect("just made");
        let qmp = process
            .connect_qmp(&dir.0.join("qmp"), PATIENCE)
            .expect("QEMU opens its QMP socket");
        let process = guard.0.take().expect("just used");
        TestQemu { process, qmp, dir }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.0.join("qmp")
    }
}

impl Drop for TestQemu {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

/// Covers the time until the process is part of a [`TestQemu`].
struct KillOnDrop(Option<QemuProcess>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(process) = &mut self.0 {
            end(process);
        }
    }
}

fn end(process: &mut QemuProcess) {
    let _ = process.kill();
    let _ = process.wait(PATIENCE);
}
