//! Registered memory.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;

use super::device::ProtectionDomain;
use super::ffi;

/// Memory that the device may read and write when this side posts a request that names it. The
/// peer reaches it only through a [`super::window::MemoryWindow`].
pub struct MemoryRegion {
    mr: NonNull<ffi::ibv_mr>,
    pd: Rc<ProtectionDomain>,
}

/// What of a region a request reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub(super) address: u64,
    pub(super) bytes: u32,
    pub(super) lkey: u32,
}

impl MemoryRegion {
    /// Registers `bytes` bytes at `address`, and pins their pages.
    ///
    /// # Safety
    /// The range must be mapped, writable and this process's own. The registration holds on to its
    /// pages, not to the mapping: whoever posts a request on it answers for what is there.
    pub unsafe fn register(
        pd: &Rc<ProtectionDomain>,
        address: *mut u8,
        bytes: usize,
    ) -> io::Result<Rc<MemoryRegion>> {
        let access = ffi::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE
            | ffi::ibv_access_flags::IBV_ACCESS_MW_BIND;
        // SAFETY: the caller vouches for the range; the protection domain lives as long as the
        // result.
        let mr = unsafe { ffi::ibv_reg_mr(pd.as_ptr(), address.cast(), bytes, access.0 as i32) };
        let mr = NonNull::new(mr).ok_or_else(|| explain(io::Error::last_os_error()))?;
        Ok(Rc::new(MemoryRegion {
            mr,
            pd: Rc::clone(pd),
        }))
    }

    /// # Panics
    /// If the range isn't inside.
    pub fn piece(&self, offset: usize, bytes: usize) -> Piece {
        // SAFETY: the registration is alive.
        let mr = unsafe { self.mr.as_ref() };
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= mr.length),
            "outside the region"
        );
        Piece {
            address: mr.addr as u64 + offset as u64,
            bytes: u32::try_from(bytes).expect("a request is shorter than 4 GiB"),
            lkey: mr.lkey,
        }
    }

    pub(super) fn domain(&self) -> &Rc<ProtectionDomain> {
        &self.pd
    }

    pub(super) fn as_ptr(&self) -> *mut ffi::ibv_mr {
        self.mr.as_ptr()
    }
}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegion").finish_non_exhaustive()
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: requests and windows that use the registration keep it alive, so none is left.
        let errno = unsafe { ffi::ibv_dereg_mr(self.as_ptr()) };
        if errno != 0 {
            tracing::warn!(errno, "memory stays registered");
        }
    }
}

/// Puts the cure beside the error.
fn explain(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOMEM | libc::EAGAIN) => io::Error::new(
            error.kind(),
            "memory can't be locked: raise RLIMIT_MEMLOCK (ulimit -l) or grant CAP_IPC_LOCK",
        ),
        _ => error,
    }
}
