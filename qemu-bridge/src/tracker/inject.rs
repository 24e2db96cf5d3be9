//! Making a userfaultfd inside QEMU.
//!
//! QEMU's main thread is stopped by ptrace wherever it is, its instruction pointer is set to a
//! `syscall` instruction of its own libc or vDSO, and that one instruction is stepped. Then its
//! registers are put back, `orig_rax` included, so that a system call which the stop interrupted
//! is restarted as after any signal. Signals that arrive meanwhile are queued again.
//!
//! If this process is killed between two of these steps, QEMU goes on with the wrong registers
//! and dies with it. The window is about 0.1 ms; nothing waits, allocates or logs inside of it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::TrackerError;
use super::uffd::kernel_release;

/// A thread that doesn't stop in this time is stuck in the kernel.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// Steps that may be taken for one system call: signals can come in between.
const STEPS_MAX: usize = 64;
/// `syscall` on x86-64.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// From `include/uapi/linux/userfaultfd.h`. Asynchronous mode resolves all faults in the kernel,
/// so this one needs no privilege, and works for KVM's faults too.
const UFFD_USER_MODE_ONLY: u64 = 1;

/// Makes a userfaultfd in the process `pid` and takes it over; the process keeps no descriptor.
///
/// # Errors
/// ptrace or `pidfd_getfd` isn't permitted, or the kernel refuses.
pub(super) fn make_userfaultfd(pid: i32) -> Result<OwnedFd, TrackerError> {
    let pid = Pid::from_raw(pid);
    let failed = |operation: &'static str, error: Errno| match error {
        Errno::EPERM => TrackerError::NotPermitted {
            operation,
            pid: pid.as_raw(),
        },
        error => TrackerError::Inject {
            operation,
            pid: pid.as_raw(),
            source: error.into(),
        },
    };
    let instruction = find_syscall(pid).map_err(|source| TrackerError::Inject {
        operation: "finding a syscall instruction",
        pid: pid.as_raw(),
        source,
    })?;
    let pidfd = pidfd_open(pid).map_err(|e| failed("pidfd_open", e))?;
    let _quiet = BlockedSignals::new();
    let mut stopped = Stopped::stop(pid, instruction).map_err(|e| failed("stopping", e))?;

    let flags = UFFD_USER_MODE_ONLY | libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64;
    let made = stopped.call(libc::SYS_userfaultfd, flags);
    let theirs = match made.map_err(|e| failed("making a userfaultfd in", e))? {
        Ok(fd) => fd,
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            return Err(TrackerError::KernelTooOld {
                release: kernel_release(),
            });
        }
        Err(error) => return Err(failed("making a userfaultfd in", error)),
    };
    let ours = pidfd_getfd(&pidfd, theirs);
    let closed = stopped.call(libc::SYS_close, theirs);
    closed
        .map_err(|e| failed("closing the userfaultfd in", e))?
        .map_err(|e| failed("closing", e))?;
    ours.map_err(|e| failed("taking the userfaultfd from", e))
}

/// A thread that stands still under ptrace; dropped, it goes on as if nothing had happened.
struct Stopped {
    pid: Pid,
    instruction: u64,
    registers: libc::user_regs_struct,
    /// Signals that were about to be delivered.
    held_back: Vec<Signal>,
}

impl Stopped {
    fn stop(pid: Pid, instruction: u64) -> nix::Result<Stopped> {
        ptrace::seize(pid, ptrace::Options::empty())?;
        let mut held_back = Vec::with_capacity(STEPS_MAX);
        let registers = ptrace::interrupt(pid)
            .and_then(|()| wait_stop(pid))
            .and_then(|status| {
                held_back.extend(delivered(status));
                ptrace::getregs(pid)
            })
            .inspect_err(|_| {
                let _ = ptrace::detach(pid, None);
            })?;
        Ok(Stopped {
            pid,
            instruction,
            registers,
            held_back,
        })
    }

    /// One system call with one argument. The outer error is ours, the inner one the call's.
    fn call(&mut self, number: i64, argument: u64) -> nix::Result<Result<u64, Errno>> {
        let mut registers = self.registers;
        registers.rip = self.instruction;
        registers.rax = u64::try_from(number).expect("system call numbers are positive");
        // Not inside of a system call: the kernel must not restart anything here.
        registers.orig_rax = u64::MAX;
        registers.rdi = argument;
        ptrace::setregs(self.pid, registers)?;
        for _ in 0..STEPS_MAX {
            ptrace::step(self.pid, None)?;
            let status = wait_stop(self.pid)?;
            registers = ptrace::getregs(self.pid)?;
            if registers.rip == self.instruction + SYSCALL.len() as u64 {
                let result = registers.rax.cast_signed();
                return Ok(match result {
                    -4095..=-1 => Err(Errno::from_raw(i32::try_from(-result).unwrap_or(0))),
                    _ => Ok(registers.rax),
                });
            }
            // Another stop came first; the instruction is still to be executed.
            self.held_back.extend(delivered(status));
        }
        Err(Errno::EAGAIN)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // If the thread is gone there is nothing to put back.
        let _ = ptrace::setregs(self.pid, self.registers);
        for signal in &self.held_back {
            // SAFETY: tgkill takes numbers only. The main thread's id is the process's.
            unsafe {
                libc::syscall(
                    libc::SYS_tgkill,
                    self.pid.as_raw(),
                    self.pid.as_raw(),
                    *signal as i32,
                )
            };
        }
        let _ = ptrace::detach(self.pid, None);
    }
}

/// The signal that a stop is about to deliver, if it is one of those.
fn delivered(status: WaitStatus) -> Option<Signal> {
    match status {
        WaitStatus::Stopped(_, Signal::SIGTRAP) => None, // our own step
        WaitStatus::Stopped(_, signal) => Some(signal),
        _ => None,
    }
}

fn wait_stop(pid: Pid) -> nix::Result<WaitStatus> {
    let deadline = Instant::now() + STOP_PATIENCE;
    loop {
        match waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive if Instant::now() > deadline => return Err(Errno::ETIMEDOUT),
            WaitStatus::StillAlive => std::hint::spin_loop(),
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return Err(Errno::ESRCH),
            status => return Ok(status),
        }
    }
}

/// Keeps signals of our own away while a QEMU stands still half-way.
struct BlockedSignals {
    before: SigSet,
}

impl BlockedSignals {
    fn new() -> BlockedSignals {
        let mut before = SigSet::empty();
        // Can't fail with valid arguments; if it did, only the window would be wider.
        let _ = sigprocmask(
            SigmaskHow::SIG_BLOCK,
            Some(&SigSet::all()),
            Some(&mut before),
        );
        BlockedSignals { before }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.before), None);
    }
}

/// The address of a `syscall` instruction in libc or the vDSO, which every process has.
fn find_syscall(pid: Pid) -> io::Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    for line in maps
        .lines()
        .filter(|l| l.contains("/libc") || l.contains("[vdso]"))
    {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(access)) = (fields.next(), fields.next()) else {
            continue;
        };
        let Some((start, end)) = parse_range(range).filter(|_| access.contains('x')) else {
            continue;
        };
        let mut code = vec![0; usize::try_from(end - start).map_err(io::Error::other)?];
        let read = memory.read_at(&mut code, start)?;
        if let Some(at) = code[..read]
            .windows(SYSCALL.len())
            .position(|w| w == SYSCALL)
        {
            return Ok(start + at as u64);
        }
    }
    Err(io::Error::other("neither libc nor the vDSO has one"))
}

fn parse_range(range: &str) -> Option<(u64, u64)> {
    let (start, end) = range.split_once('-')?;
    Some((
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    ))
}

fn pidfd_open(pid: Pid) -> nix::Result<OwnedFd> {
    // SAFETY: pidfd_open takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    own(result)
}

fn pidfd_getfd(pidfd: &OwnedFd, theirs: u64) -> nix::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    // SAFETY: pidfd_getfd takes numbers only, and the pidfd is open.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), theirs, 0) };
    own(result)
}

fn own(result: i64) -> nix::Result<OwnedFd> {
    let fd = i32::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
