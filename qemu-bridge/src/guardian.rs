//! A tiny process that kills QEMU when the daemon is gone.
//!
//! A daemon that dies leaves a QEMU behind that nobody checkpoints any more; while the backup could
//! take over, that QEMU must not go on. Its end also closes the last copy of the control
//! connection, which tells the backup to take over at once.
//!
//! The guardian is this program once more, started with a hidden first argument. It has a pidfd of QEMU and
//! one end of a socket pair, whose other end only the daemon has: however the daemon ends, the kernel closes
//! it. One byte is a command, and comes back as its acknowledgement.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command as ProcessCommand, Stdio};
use std::time::Duration;

use nix::sys::signal::{SigHandler, Signal, signal};

use crate::spawn::kill_by_pidfd;

/// The first argument that makes this program a guardian. Call [`main`] if it is there, before
/// anything else.
pub const ARGUMENT: &str = "--guardian-of-qemu";

/// Where the guardian finds its two descriptors.
const SOCKET_FD: RawFd = 3;
const QEMU_FD: RawFd = 4;

const ARM: u8 = b'a';
const DISARM: u8 = b'd';
const QUIT: u8 = b'q';

/// A guardian answers within microseconds; after this it counts as dead.
const PATIENCE: Duration = Duration::from_secs(2);
/// Its first answer comes when it has been loaded, from a disk that may be slow.
const START_PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub enum GuardianError {
    #[error("starting the guardian failed")]
    Start(#[source] io::Error),
    #[error("the guardian is gone or doesn't answer: start another one")]
    Gone(#[source] io::Error),
    #[error("the guardian answered with something else than was asked")]
    Confused,
}

/// The daemon's handle on its guardian. It starts disarmed. Dropping an armed one kills QEMU, as
/// the daemon's death would.
#[derive(Debug)]
pub struct Guardian {
    socket: UnixStream,
    child: Child,
}

impl Guardian {
    /// Starts a guardian over the process behind `qemu`, a pidfd. `program` with `arguments` has to
    /// end up in [`main`]: in the daemon `/proc/self/exe` and [`ARGUMENT`].
    ///
    /// # Errors
    /// It doesn't start, or doesn't answer.
    pub fn spawn(
        program: &Path,
        arguments: &[&str],
        qemu: BorrowedFd<'_>,
    ) -> Result<Guardian, GuardianError> {
        let (socket, theirs) = UnixStream::pair().map_err(GuardianError::Start)?;
        let (theirs_fd, qemu_fd) = (theirs.as_raw_fd(), qemu.as_raw_fd());
        let mut command = ProcessCommand::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: the closure runs between fork and exec and makes only async-signal-safe calls
        // (setsid, fcntl, dup2), without allocating or locking; both descriptors are open in the
        // child, which has copies of all of ours.
        unsafe {
            command.pre_exec(move || place_descriptors(theirs_fd, qemu_fd));
        }
        let child = command.spawn().map_err(GuardianError::Start)?;
        let patience = |socket: &UnixStream, patience| {
            let set = socket.set_read_timeout(Some(patience));
            set.map_err(GuardianError::Start)
        };
        patience(&socket, START_PATIENCE)?;
        let mut guardian = Guardian { socket, child };
        guardian.disarm()?;
        patience(&guardian.socket, PATIENCE)?;
        Ok(guardian)
    }

    /// From now on QEMU dies with us. Returns once the guardian knows.
    ///
    /// # Errors
    /// There is no guardian any more.
    pub fn arm(&mut self) -> Result<(), GuardianError> {
        self.command(ARM)?;
        Ok(())
    }

    /// From now on QEMU survives us. Returns once the guardian knows.
    ///
    /// # Errors
    /// There is no guardian any more; then nothing kills QEMU either.
    pub fn disarm(&mut self) -> Result<(), GuardianError> {
        self.command(DISARM)?;
        Ok(())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Readable when the guardian has died.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Ends the guardian without touching QEMU.
    ///
    /// # Errors
    /// There is none any more.
    pub fn quit(mut self) -> Result<(), GuardianError> {
        self.command(QUIT)?;
        self.child.wait().map_err(GuardianError::Gone)?;
        Ok(())
    }

    fn command(&mut self, byte: u8) -> Result<(), GuardianError> {
        let mut answer = [0];
        // Rust ignores SIGPIPE, so a dead guardian is an error here and no signal.
        self.socket
            .write_all(&[byte])
            .map_err(GuardianError::Gone)?;
        self.socket
            .read_exact(&mut answer)
            .map_err(GuardianError::Gone)?;
        match answer == [byte] {
            true => Ok(()),
            false => Err(GuardianError::Confused),
        }
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        // It ends by itself when the socket closes; this only collects one that is dead already.
        let _ = self.child.try_wait();
    }
}

/// Moves the two descriptors to their places, by way of high numbers so that neither is run over.
fn place_descriptors(socket: RawFd, qemu: RawFd) -> io::Result<()> {
    let check = |result: i32| match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: these calls take integers only; 10 and above are free or are skipped by F_DUPFD. Copies by dup2
    // stay open across exec, the high ones (close-on-exec) don't.
    unsafe {
        check(libc::setsid())?;
        let socket = check(libc::fcntl(socket, libc::F_DUPFD_CLOEXEC, 10))?;
        let qemu = check(libc::fcntl(qemu, libc::F_DUPFD_CLOEXEC, 10))?;
        check(libc::dup2(socket, SOCKET_FD))?;
        check(libc::dup2(qemu, QEMU_FD))?;
    }
    Ok(())
}

/// The guardian itself: never returns. Its exit code is 0 if it had to do nothing or has done it.
pub fn main() -> ! {
    for ignored in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGPIPE,
    ] {
        // SAFETY: SIG_IGN runs no code of ours.
        let _ = unsafe { signal(ignored, SigHandler::SigIgn) };
    }
    // SAFETY: close_range takes integers only. Nothing in this process uses a descriptor above the
    // two that were placed for it: this is the first thing that its main function does.
    unsafe { libc::close_range((QEMU_FD + 1).cast_unsigned(), u32::MAX, 0) };
    // SAFETY: `Guardian::spawn` placed these two descriptors for us, and nobody else owns them.
    let (socket, qemu) = unsafe {
        (
            UnixStream::from_raw_fd(SOCKET_FD),
            OwnedFd::from_raw_fd(QEMU_FD),
        )
    };
    std::process::exit(match watch(&socket, qemu.as_fd()) {
        Ok(()) => 0,
        Err(_) => 1,
    })
}

fn watch(mut socket: &UnixStream, qemu: BorrowedFd<'_>) -> io::Result<()> {
    let mut armed = false;
    loop {
        let mut command = [0];
        let daemon_is_gone = match socket.read(&mut command) {
            Ok(count) => count == 0,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => true,
        };
        if daemon_is_gone {
            return if armed { kill_by_pidfd(qemu) } else { Ok(()) };
        }
        match command[0] {
            ARM => armed = true,
            DISARM | QUIT => armed = false,
            _ => continue,
        }
        // If the daemon is gone by now, the next read says so.
        let _ = socket.write_all(&command);
        if command[0] == QUIT {
            return Ok(());
        }
    }
}
