//! A QEMU process: one that we started, or one that was running already.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as ProcessCommand, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::SigSet;
use nix::sys::stat::fstat;

use crate::qmp::{Command, Qmp, QmpError};

/// Bytes of QEMU's last words that are kept.
const STDERR_BYTES_MAX: usize = 16 << 10;
/// Processes come and go while they are looked through.
const ATTACH_TRIES: u32 = 5;
/// How often a starting QEMU is asked whether its QMP socket is there.
const CONNECT_RETRY: Duration = Duration::from_millis(5);

#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("starting {program} failed: is it installed, and the path right?")]
    Start { program: String, source: io::Error },
    #[error("QEMU ended before it could be used ({status}): {said}")]
    EndedEarly { status: ExitStatus, said: String },
    #[error("{operation} failed for QEMU's process {pid}")]
    System {
        operation: &'static str,
        pid: i32,
        source: io::Error,
    },
    #[error(
        "the process behind the QMP socket {path} can't be found: protection needs a QEMU on this host, in a process that we may look into (same user, or root)"
    )]
    NotFound { path: PathBuf },
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

/// Where a QEMU's standard output goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestOutput {
    /// To ours: `-serial stdio` and `-nographic` still show the guest.
    Inherit,
    Discard,
}

/// What a new QEMU gets besides its command line.
#[derive(Debug)]
pub struct SpawnOptions<'a> {
    /// Open in the child under the same numbers.
    pub inherited: &'a [BorrowedFd<'a>],
    pub output: GuestOutput,
    /// The kernel kills it when the thread that starts it ends: for QEMUs that nobody else knows.
    pub dies_with_thread: bool,
}

/// A handle on a QEMU process that can't come to mean another one when its number is reused.
///
/// Dropping it leaves QEMU alone.
#[derive(Debug)]
pub struct QemuProcess {
    pid: i32,
    pidfd: OwnedFd,
    /// Set if it is our child, and then it is ours to reap.
    child: Option<Child>,
    stderr: Option<StderrTail>,
}

impl QemuProcess {
    /// Starts `argv[0]` with the rest of `argv` in a process group of its own, so that ^C in our
    /// terminal doesn't reach it. Its standard input is empty: a background process that reads
    /// the terminal would be stopped.
    ///
    /// # Errors
    /// The program can't be started, or there are no descriptors left.
    ///
    /// # Panics
    /// `argv` is empty.
    pub fn spawn(argv: &[String], options: &SpawnOptions<'_>) -> Result<QemuProcess, ProcessError> {
        let program = &argv[0];
        let start = |source| ProcessError::Start {
            program: program.clone(),
            source,
        };
        let (stderr, stderr_writer) = StderrTail::pipe().map_err(start)?;
        let inherited: Vec<RawFd> = options.inherited.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = ProcessCommand::new(program);
        command
            .args(&argv[1..])
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(match options.output {
                GuestOutput::Inherit => Stdio::inherit(),
                GuestOutput::Discard => Stdio::null(),
            })
            .stderr(stderr_writer);
        let dies_with_thread = options.dies_with_thread;
        // SAFETY: the closure runs between fork and exec; it calls only fcntl, prctl and sigprocmask,
        // which are async-signal-safe, and neither allocates nor locks: `inherited` was made before.
        unsafe {
            command.pre_exec(move || {
                // QEMU would keep what we block, and SIGTERM could never end it.
                SigSet::empty().thread_set_mask()?;
                if dies_with_thread
                    && libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) < 0
                {
                    return Err(io::Error::last_os_error());
                }
                for fd in &inherited {
                    if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn().map_err(start)?;
        let pid = i32::try_from(child.id()).expect("process ids are positive and fit in 31 bits");
        Ok(QemuProcess {
            pid,
            pidfd: open_pidfd(pid)?,
            child: Some(child),
            stderr: Some(stderr),
        })
    }

    /// Finds the process behind a QMP connection, which need not be the one that listens on the
    /// socket: QEMU is handed a descriptor, and the process that holds it until QEMU is told to
    /// close it is QEMU.
    ///
    /// # Errors
    /// No such process on this host, or none that we may look into.
    pub fn attach(
        qmp: &mut Qmp,
        socket: &Path,
        timeout: Duration,
    ) -> Result<QemuProcess, ProcessError> {
        const MARKER: &str = "ft-marker";
        let operation = "making a marker";
        let marker =
            memfd_create(MARKER, MFdFlags::MFD_CLOEXEC).map_err(|e| ProcessError::System {
                operation,
                pid: 0,
                source: e.into(),
            })?;
        for _ in 0..ATTACH_TRIES {
            let getfd = Command::new("getfd").arg("fdname", MARKER);
            qmp.call_with_fd(&getfd, marker.as_fd(), timeout)?;
            let mut holders = holders_of(marker.as_fd());
            qmp.call(Command::new("closefd").arg("fdname", MARKER), timeout)?;
            // Whoever relays the connection may hold a copy, but doesn't drop it on command.
            let still = holders_of(marker.as_fd());
            holders.retain(|pid| !still.contains(pid));
            if let [pid] = holders[..] {
                return Ok(QemuProcess {
                    pid,
                    pidfd: open_pidfd(pid)?,
                    child: None,
                    stderr: None,
                });
            }
        }
        Err(ProcessError::NotFound {
            path: socket.to_owned(),
        })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// QEMU's last words, as far as they have come. Never blocks. Empty if it isn't our child.
    pub fn stderr_tail(&mut self) -> String {
        self.stderr
            .as_mut()
            .map(StderrTail::read)
            .unwrap_or_default()
    }

    /// Connects to the QMP socket of a QEMU that is just starting.
    ///
    /// # Errors
    /// It ended (with its last words), or did not open the socket within `timeout`.
    pub fn connect_qmp(&mut self, path: &Path, timeout: Duration) -> Result<Qmp, ProcessError> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match Qmp::connect(path, left) {
                Ok(qmp) => return Ok(qmp),
                Err(e) => {
                    if let Some(status) = self.exit_status()? {
                        return Err(ProcessError::EndedEarly {
                            status,
                            said: self.last_words(),
                        });
                    }
                    if left.is_zero() {
                        return Err(e.into());
                    }
                }
            }
            std::thread::sleep(CONNECT_RETRY);
        }
    }

    /// Whether it runs; never blocks.
    ///
    /// # Errors
    /// The kernel can't say.
    pub fn is_alive(&mut self) -> Result<bool, ProcessError> {
        if self.child.is_some() {
            return Ok(self.exit_status()?.is_none());
        }
        Ok(!self.wait_end(Duration::ZERO)?)
    }

    /// SIGKILL. A process that is gone already is no error.
    ///
    /// # Errors
    /// We may not signal it.
    pub fn kill(&self) -> Result<(), ProcessError> {
        kill_by_pidfd(self.pidfd.as_fd()).map_err(|source| ProcessError::System {
            operation: "SIGKILL",
            pid: self.pid,
            source,
        })
    }

    /// Waits up to `timeout` for the process to end and reaps it; whether it has.
    ///
    /// # Errors
    /// The kernel can't say.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, ProcessError> {
        let ended = self.wait_end(timeout)?;
        if ended {
            self.exit_status()?;
        }
        Ok(ended)
    }

    fn wait_end(&self, timeout: Duration) -> Result<bool, ProcessError> {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        loop {
            match poll(&mut fds, timeout) {
                Ok(count) => return Ok(count == 1),
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(self.system("poll on the pidfd", e.into())),
            }
        }
    }

    fn exit_status(&mut self) -> Result<Option<ExitStatus>, ProcessError> {
        let pid = self.pid;
        match &mut self.child {
            Some(child) => child.try_wait().map_err(|source| ProcessError::System {
                operation: "wait",
                pid,
                source,
            }),
            None => Ok(None),
        }
    }

    fn last_words(&mut self) -> String {
        let said = self.stderr_tail();
        match said.trim() {
            "" => "it said nothing".to_owned(),
            said => said.to_owned(),
        }
    }

    fn system(&self, operation: &'static str, source: io::Error) -> ProcessError {
        ProcessError::System {
            operation,
            pid: self.pid,
            source,
        }
    }
}

/// The tail of what a child writes to its standard error.
#[derive(Debug)]
struct StderrTail {
    pipe: File,
    tail: VecDeque<u8>,
}

impl StderrTail {
    /// Both ends are non-blocking: a QEMU that complains a lot loses words, not time.
    fn pipe() -> io::Result<(StderrTail, OwnedFd)> {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let tail = StderrTail {
            pipe: File::from(reader),
            tail: VecDeque::new(),
        };
        Ok((tail, writer))
    }

    fn read(&mut self) -> String {
        let mut buffer = [0u8; 4096];
        while let Ok(count @ 1..) = self.pipe.read(&mut buffer) {
            self.tail.extend(&buffer[..count]);
            let excess = self.tail.len().saturating_sub(STDERR_BYTES_MAX);
            self.tail.drain(..excess);
        }
        let (first, second) = self.tail.as_slices();
        String::from_utf8_lossy(&[first, second].concat()).into_owned()
    }
}

/// The processes other than ours that have the file behind `marker` open.
fn holders_of(marker: BorrowedFd<'_>) -> Vec<i32> {
    let (Ok(marker), Ok(entries)) = (fstat(marker), std::fs::read_dir("/proc")) else {
        return Vec::new();
    };
    let holds = |pid: &i32| -> bool {
        let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
            return false;
        };
        entries.flatten().any(|entry| {
            nix::sys::stat::stat(&entry.path())
                .is_ok_and(|s| (s.st_ino, s.st_dev) == (marker.st_ino, marker.st_dev))
        })
    };
    let ours = i32::try_from(std::process::id()).expect("process ids fit in 31 bits");
    let pids = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != ours).filter(holds).collect()
}

pub(crate) fn open_pidfd(pid: i32) -> Result<OwnedFd, ProcessError> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        let source = io::Error::last_os_error();
        return Err(ProcessError::System {
            operation: "pidfd_open",
            pid,
            source,
        });
    }
    let fd = RawFd::try_from(fd).expect("descriptors fit in 31 bits");
    // SAFETY: the kernel just returned this descriptor (close-on-exec) and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// SIGKILL; fine if the process is gone already.
pub(crate) fn kill_by_pidfd(pidfd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: pidfd_send_signal takes a valid descriptor (borrowed for the call), two integers
    // and a null pointer, which it accepts as "no siginfo".
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        e => Err(e),
    }
}
