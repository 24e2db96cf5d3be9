//! Threads that carry packets and must not wait for those that compute.
//!
//! On a machine with few processors, hosts that spin keep QEMU's main loop and the switch waiting a
//! time slice (3 ms) at each hop. A short slice of their own lets them go first when they wake, and
//! gives them no more time in all (kernel 6.12 and later; before, it does nothing). Measured on two
//! processors, `ibv_rc_pingpong` from host to host: 15 ms a round trip without, 7 ms with.

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::libc::{SYS_sched_getattr, SYS_sched_setattr, sched_attr, syscall};
use nix::unistd::Pid;

/// The shortest that the kernel takes.
const SLICE_NS: u64 = 100_000;

/// Makes a thread prompt: this one for 0, a process's first for its number.
pub(super) fn make_prompt(thread: Pid) -> Result<()> {
    let size = u32::try_from(size_of::<sched_attr>())?;
    // SAFETY: `sched_attr` is integers only, for which zero is a value.
    let mut now: sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most `size` bytes to `now`, which is that long, and keeps no
    // pointer to it.
    let got = unsafe { syscall(SYS_sched_getattr, thread.as_raw(), &raw mut now, size, 0) };
    Errno::result(got).context("sched_getattr")?;
    now.size = size;
    now.sched_runtime = SLICE_NS;
    // SAFETY: the kernel reads `now.size` bytes of `now`, which is that long.
    let set = unsafe { syscall(SYS_sched_setattr, thread.as_raw(), &raw const now, 0) };
    Errno::result(set).context("sched_setattr")?;
    Ok(())
}
