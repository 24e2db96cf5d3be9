//! Real QEMUs for the tests: small guests that run only their firmware.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use qemu_bridge::qmp::Qmp;
use qemu_bridge::spawn::{GuestOutput, QemuProcess, SpawnOptions};

/// Generous: the machines that run the tests are small and shared.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The QEMUs that are here: the installed one, and a newer one from the project's cache.
pub(crate) fn qemus() -> Vec<String> {
    let mut found = vec!["qemu-system-x86_64".to_owned()];
    match newer_qemu() {
        Some(path) => found.push(path),
        None => eprintln!(
            "NOT TESTED on QEMU 10.0: it is not under .cache/qemu-10.0 (scripts/setup unpacks it)"
        ),
    }
    found
}

/// The newer QEMU: what `QEMU_NEWER` names, or the one in the project's cache.
pub(crate) fn newer_qemu() -> Option<String> {
    if let Ok(path) = std::env::var("QEMU_NEWER") {
        return Some(path);
    }
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/qemu-10.0");
    let path = cache.join("run/qemu-system-x86_64");
    path.exists().then(|| path.display().to_string())
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
