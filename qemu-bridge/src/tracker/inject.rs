//! Making a userfaultfd inside QEMU.
//!
//! QEMU's main thread is stopped by ptrace wherever it is, its instruction pointer is set to a
//! `syscall` instruction of its own libc or vDSO, and that one instruction is stepped. Then its
//! registers are put back, `orig_rax` included, so that a system call which the stop interrupted
//! is restarted as after any signal. Floating-point registers are never touched: a system call
//! keeps them.
//!
//! Meanwhile the thread's signals are blocked, all but SIGTRAP, which a step needs: they stay
//! pending with everything that came with them, and are delivered when the mask is put back.
//! SIGSTOP can't be blocked: QEMU then stops as it should, and is stepped all the same.
//!
//! If this process is killed between two of these steps, QEMU goes on with the wrong registers
//! and dies with it. The window is about 0.1 ms; nothing waits for anybody else, allocates or
//! logs inside of it, and our own signals are blocked.

use std::fs::{self, File};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::TrackerError;
use super::uffd::kernel_release;

/// A thread that doesn't stop in this time is stuck in the kernel.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// How long other stops may come in between. Each SIGSTOP with its SIGCONT makes three, and on a
/// loaded machine the next one can be there before the step.
const STEP_PATIENCE: Duration = Duration::from_secs(10);
/// A kernel's signal set: bit 0 is signal 1.
const ALL_BUT_SIGTRAP: u64 = !(1 << (libc::SIGTRAP - 1));
/// `syscall` on x86-64.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// From `include/uapi/linux/userfaultfd.h`. Asynchronous mode resolves all faults in the kernel,
/// so this one needs no privilege, and works for KVM's faults too.
const UFFD_USER_MODE_ONLY: u64 = 1;

/// Makes a userfaultfd in the process `pid` and takes it over; the process keeps no descriptor.
///
/// No other thread of ours may wait for that process meanwhile: it would be given the stops.
///
/// # Errors
/// ptrace or `pidfd_getfd` isn't permitted, somebody else traces the process, or the kernel
/// refuses.
pub(super) fn make_userfaultfd(pid: i32) -> Result<OwnedFd, TrackerError> {
    let pid = Pid::from_raw(pid);
    let instruction = find_syscall(pid).map_err(|error| failed(pid, "looking into", error))?;
    // When a thread ends, the kernel lets go of what it traces: so this one can't leave QEMU
    // stopped, even if a stop comes only after our patience has ended.
    let made = std::thread::scope(|scope| {
        let injection = scope.spawn(|| inject(pid, instruction));
        injection.join().expect("the injection doesn't panic")
    });
    match made {
        Err(TrackerError::NotPermitted { .. }) if let Some(tracer) = tracer_of(pid) => {
            let pid = pid.as_raw();
            Err(TrackerError::Traced { pid, tracer })
        }
        made => made,
    }
}

fn inject(pid: Pid, instruction: u64) -> Result<OwnedFd, TrackerError> {
    let pidfd = open_pidfd(pid).map_err(|error| failed(pid, "opening", error))?;
    let _quiet = BlockedSignals::new();
    let mut stopped = Stopped::stop(pid, instruction).map_err(|e| failed(pid, "stopping", e))?;

    let flags = UFFD_USER_MODE_ONLY | libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64;
    let making = "making a userfaultfd in";
    let made = stopped.call(libc::SYS_userfaultfd, flags);
    let theirs = match made.map_err(|error| failed(pid, making, error))? {
        Ok(fd) => fd,
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            let release = kernel_release();
            return Err(TrackerError::KernelTooOld { release });
        }
        Err(error) => return Err(failed(pid, making, error)),
    };
    let ours = pidfd_getfd(&pidfd, theirs);
    let closed = stopped
        .call(libc::SYS_close, theirs)
        .and_then(|result| result);
    closed.map_err(|error| failed(pid, "closing the userfaultfd in", error))?;
    ours.map_err(|error| failed(pid, "taking the userfaultfd from", error))
}

fn failed(pid: Pid, operation: &'static str, error: impl Into<io::Error>) -> TrackerError {
    let pid = pid.as_raw();
    let source = error.into();
    if source.kind() == io::ErrorKind::PermissionDenied {
        return TrackerError::NotPermitted {
            operation,
            pid,
            source,
        };
    }
    TrackerError::Process {
        operation,
        pid,
        source,
    }
}

/// A thread that stands still under ptrace; dropped, it goes on as if nothing had happened.
struct Stopped {
    pid: Pid,
    instruction: u64,
    registers: libc::user_regs_struct,
    signal_mask: u64,
}

impl Stopped {
    fn stop(pid: Pid, instruction: u64) -> nix::Result<Stopped> {
        ptrace::seize(pid, ptrace::Options::empty())?;
        let stopped = ptrace::interrupt(pid)
            .and_then(|()| wait_interrupted(pid))
            .and_then(|()| {
                Ok(Stopped {
                    pid,
                    instruction,
                    registers: ptrace::getregs(pid)?,
                    signal_mask: signal_mask(pid)?,
                })
            })
            .inspect_err(|_| {
                // Does nothing if it hasn't stopped: then the end of this thread lets it go.
                let _ = ptrace::detach(pid, None);
            })?;
        // From here on dropping puts things back.
        set_signal_mask(pid, ALL_BUT_SIGTRAP)?;
        Ok(stopped)
    }

    /// One system call with one argument. The outer error is ours, the inner one the call's.
    fn call(&mut self, number: i64, argument: u64) -> nix::Result<nix::Result<u64>> {
        let mut registers = self.registers;
        registers.rip = self.instruction;
        registers.rax = u64::try_from(number).expect("system call numbers are positive");
        // Not inside of a system call: the kernel must not restart anything here.
        registers.orig_rax = u64::MAX;
        registers.rdi = argument;
        ptrace::setregs(self.pid, registers)?;
        let deadline = Instant::now() + STEP_PATIENCE;
        let mut deliver = None;
        let mut executed = false;
        // Once it is executed there is a trap to take, however long that lasts.
        while executed || Instant::now() < deadline {
            ptrace::step(self.pid, deliver.take())?;
            let stop = wait_stop(self.pid)?;
            registers = ptrace::getregs(self.pid)?;
            executed = registers.rip == self.instruction + SYSCALL.len() as u64;
            match stop {
                // The step's own trap has to be taken: left pending, it would kill QEMU.
                Stop::Signal(Signal::SIGTRAP) if executed => {
                    let result = registers.rax.cast_signed();
                    return Ok(match result {
                        -4095..=-1 => Err(Errno::from_raw(i32::try_from(-result).unwrap_or(0))),
                        _ => Ok(registers.rax),
                    });
                }
                // SIGSTOP, which can't be blocked.
                Stop::Signal(signal) if signal != Signal::SIGTRAP => deliver = Some(signal),
                // A job-control stop, or its end, came in between.
                Stop::Signal(_) | Stop::Event => {}
            }
        }
        Err(Errno::ETIMEDOUT)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // If the thread is gone there is nothing to put back.
        let _ = ptrace::setregs(self.pid, self.registers);
        let _ = set_signal_mask(self.pid, self.signal_mask);
        let _ = ptrace::detach(self.pid, None);
    }
}

/// Why a traced thread has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// It is about to be given this signal.
    Signal(Signal),
    /// By our interruption, or by job control.
    Event,
}

/// Waits for the stop that `PTRACE_INTERRUPT` asks for. Signals that come first are delivered.
fn wait_interrupted(pid: Pid) -> nix::Result<()> {
    let deadline = Instant::now() + STEP_PATIENCE;
    while Instant::now() < deadline {
        match wait_stop(pid)? {
            Stop::Event => return Ok(()),
            Stop::Signal(signal) => ptrace::cont(pid, signal)?,
        }
    }
    Err(Errno::ETIMEDOUT)
}

fn wait_stop(pid: Pid) -> nix::Result<Stop> {
    // Without WEXITED: if QEMU is our child, its end is for its owner to collect.
    let flags = WaitPidFlag::__WALL | WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG;
    let deadline = Instant::now() + STOP_PATIENCE;
    loop {
        match waitid(Id::Pid(pid), flags)? {
            WaitStatus::StillAlive if Instant::now() > deadline => return Err(Errno::ETIMEDOUT),
            WaitStatus::StillAlive => std::thread::yield_now(),
            // waitid tells of every stop of a traced thread like this.
            WaitStatus::PtraceEvent(_, signal, 0) => return Ok(Stop::Signal(signal)),
            _ => return Ok(Stop::Event),
        }
    }
}

fn signal_mask(pid: Pid) -> nix::Result<u64> {
    let mut mask = 0_u64;
    // SAFETY: the kernel writes the eight bytes of its signal set, for which `mask` has room
    // and which it is told, and keeps no pointer.
    let result = unsafe {
        libc::ptrace(
            libc::PTRACE_GETSIGMASK,
            pid.as_raw(),
            size_of::<u64>(),
            &raw mut mask,
        )
    };
    Errno::result(result).map(|_| mask)
}

fn set_signal_mask(pid: Pid, mask: u64) -> nix::Result<()> {
    // SAFETY: as above; the kernel reads eight bytes.
    let result = unsafe {
        libc::ptrace(
            libc::PTRACE_SETSIGMASK,
            pid.as_raw(),
            size_of::<u64>(),
            &raw const mask,
        )
    };
    Errno::result(result).map(drop)
}

/// Keeps signals of our own away while a QEMU stands still half-way.
struct BlockedSignals {
    before: SigSet,
}

impl BlockedSignals {
    fn new() -> BlockedSignals {
        // Can't fail with valid arguments; if it did, only the window would be wider.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
        BlockedSignals {
            before: before.unwrap_or_else(|_| SigSet::empty()),
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        let _ = self.before.thread_set_mask();
    }
}

/// Who traces the process already: a debugger, or strace.
fn tracer_of(pid: Pid) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let tracer = status.lines().find_map(|l| l.strip_prefix("TracerPid:"))?;
    tracer.trim().parse().ok().filter(|tracer| *tracer != 0)
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

fn open_pidfd(pid: Pid) -> nix::Result<OwnedFd> {
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
