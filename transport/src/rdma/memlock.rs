//! Whether memory can be registered: the kernel counts it against RLIMIT_MEMLOCK.

use std::fs;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::RdmaError;

/// Bit of CAP_IPC_LOCK, which lifts the limit (capabilities(7)).
const CAP_IPC_LOCK_BIT: u32 = 14;

/// Checks that `wanted` bytes can be locked, as far as the limit goes: what is locked already is
/// not known to be this process's own.
pub fn check(wanted: u64) -> Result<(), RdmaError> {
    if has_ipc_lock() {
        return Ok(());
    }
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((allowed, _)) if allowed != RLIM_INFINITY && allowed < wanted => {
            Err(RdmaError::MemoryLock { allowed, wanted })
        }
        // Without a limit to read, registering will tell.
        _ => Ok(()),
    }
}

fn has_ipc_lock() -> bool {
    let Ok(status) = fs::read_to_string("/proc/self/status") else {
        return false;
    };
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    effective.is_some_and(|bits| bits >> CAP_IPC_LOCK_BIT & 1 == 1)
}
