//! Memory windows of type 2: what lets the peer write one chunk, once.
//!
//! A window's key is taken away by the message that the peer sends when it is done, or by dropping
//! the window. Not by a local invalidation: the peer's message may come first, and soft-RoCE
//! follows a null pointer in the kernel when a window is invalidated twice (Linux 6.12,
//! `rxe_do_invalidate_mw`), while other devices end the queue pair.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;

use super::ffi;
use super::region::MemoryRegion;

/// A window on a region. Binding it makes its key good; each binding has another key, the low
/// eight bits of which count: the same one comes back after 256 bindings.
pub struct MemoryWindow {
    mw: NonNull<ffi::ibv_mw>,
    region: Rc<MemoryRegion>,
    /// Of the last binding, or what the device gave to begin with.
    rkey: u32,
}

/// Where the peer may write: what it needs to know of a bound window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteWindow {
    pub address: u64,
    pub rkey: u32,
}

impl MemoryWindow {
    pub fn new(region: &Rc<MemoryRegion>) -> io::Result<MemoryWindow> {
        // SAFETY: the protection domain lives as long as the region, which the result keeps.
        let mw =
            unsafe { ffi::ibv_alloc_mw(region.domain().as_ptr(), ffi::ibv_mw_type::IBV_MW_TYPE_2) };
        let mw = mw
            .and_then(NonNull::new)
            .ok_or_else(io::Error::last_os_error)?;
        Ok(MemoryWindow {
            // SAFETY: it was just made.
            rkey: unsafe { mw.as_ref() }.rkey,
            mw,
            region: Rc::clone(region),
        })
    }

    /// The next binding, of the whole region, and the key that it will have. The one before must
    /// have been posted, and its key taken away.
    pub fn next_binding(&mut self) -> (Binding, RemoteWindow) {
        // The bind request names the window by the key that it has now, which the library leaves to
        // its user to keep.
        // SAFETY: the window is alive, and this is its only user.
        unsafe { (*self.mw.as_ptr()).rkey = self.rkey };
        // SAFETY: it is arithmetic.
        self.rkey = unsafe { ffi::ibv_inc_rkey(self.rkey) };
        // SAFETY: the region is alive.
        let (address, bytes) = unsafe {
            let mr = &*self.region.as_ptr();
            (mr.addr as u64, mr.length as u64)
        };
        let binding = Binding {
            mw: self.mw.as_ptr(),
            mr: self.region.as_ptr(),
            rkey: self.rkey,
            address,
            bytes,
        };
        let remote = RemoteWindow {
            address,
            rkey: self.rkey,
        };
        (binding, remote)
    }

    pub fn rkey(&self) -> u32 {
        self.rkey
    }
}

/// What a bind request needs to know. The window must outlive the request.
#[derive(Clone, Copy, Debug)]
pub struct Binding {
    pub(super) mw: *mut ffi::ibv_mw,
    pub(super) mr: *mut ffi::ibv_mr,
    pub(super) rkey: u32,
    pub(super) address: u64,
    pub(super) bytes: u64,
}

impl fmt::Debug for MemoryWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryWindow")
            .field("rkey", &self.rkey)
            .finish_non_exhaustive()
    }
}

impl Drop for MemoryWindow {
    fn drop(&mut self) {
        // SAFETY: it was made by `ibv_alloc_mw`, and nobody uses it again.
        let errno = unsafe { ffi::ibv_dealloc_mw(self.mw.as_ptr()) };
        if errno != 0 {
            tracing::warn!(errno, "a memory window is left behind");
        }
    }
}
