//! Processes that end with their test.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A child that is killed when it goes out of scope.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pub name: String,
    pub log: PathBuf,
}

impl Process {
    /// Starts a program with its output in `DIR/NAME.log`.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(
        dir: &Path,
        name: &str,
        program: impl AsRef<OsStr>,
        arguments: &[String],
    ) -> Result<Process> {
        let log = dir.join(format!("{name}.log"));
        let output = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let mut command = Command::new(program.as_ref());
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        // SAFETY: between fork and exec only this one system call is made, which is async-signal-safe:
        // it takes no lock and allocates nothing.
        unsafe {
            // Also a test that is killed leaves nothing behind.
            command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
        }
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", program.as_ref().to_string_lossy()))?;
        Ok(Process {
            child,
            name: name.to_owned(),
            log,
        })
    }

    /// The same in a network namespace.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start_inside(
        namespace: &str,
        dir: &Path,
        name: &str,
        program: impl AsRef<OsStr>,
        arguments: &[String],
    ) -> Result<Process> {
        // It becomes the program: the process is the same.
        let mut line = ["netns", "exec", namespace].map(str::to_owned).to_vec();
        line.push(program.as_ref().to_string_lossy().into_owned());
        line.extend_from_slice(arguments);
        Process::start(dir, name, "ip", &line)
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX))
    }

    /// # Errors
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// Its exit status if it ends in time.
    ///
    /// # Errors
    /// It can't be waited for.
    pub fn wait(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it has said.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder that goes with its test.
#[derive(Debug)]
pub struct Workplace {
    path: PathBuf,
}

impl Workplace {
    /// # Errors
    /// It can't be made.
    pub fn new(name: &str) -> Result<Workplace> {
        let base = std::env::temp_dir();
        let path = base.join(format!(
            "curling-{name}-{}-{}",
            std::process::id(),
            unique()
        ));
        std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Workplace { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        if std::env::var_os("CURLING_KEEP").is_some() {
            eprintln!("kept: {}", self.path.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

fn unique() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A loopback port that was free a moment ago.
///
/// # Errors
/// There is none.
pub fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
    Ok(listener.local_addr()?.port())
}
