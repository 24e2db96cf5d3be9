//! A protection domain on the device that an identifier is bound to.

use std::ffi::CStr;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ptr::NonNull;
use std::rc::Rc;

use super::RdmaError;
use super::cm::{EventChannel, Identifier};
use super::ffi;

/// What registered memory, windows and queue pairs belong to.
pub struct ProtectionDomain {
    pd: NonNull<ffi::ibv_pd>,
    /// Keeps the device open.
    id: Rc<Identifier>,
}

/// Whether an RDMA device has `address`: its name, or why there is none.
pub fn device_of(address: IpAddr) -> Result<String, RdmaError> {
    let id = Identifier::new(EventChannel::new()?)?;
    id.bind(SocketAddr::new(address, 0))
        .map_err(|_| RdmaError::NoDevice { address })?;
    id.device_name().ok_or(RdmaError::NoDevice { address })
}

impl ProtectionDomain {
    /// # Panics
    /// If `id` has no device yet: its address is not resolved.
    pub fn new(id: &Rc<Identifier>) -> Result<Rc<ProtectionDomain>, RdmaError> {
        let verbs = id.verbs().expect("the address is resolved");
        // SAFETY: the device's context lives as long as `id`, which the result keeps.
        let pd = unsafe { ffi::ibv_alloc_pd(verbs.as_ptr()) };
        let pd = NonNull::new(pd).ok_or_else(|| RdmaError::last("ibv_alloc_pd"))?;
        Ok(Rc::new(ProtectionDomain {
            pd,
            id: Rc::clone(id),
        }))
    }

    pub(super) fn as_ptr(&self) -> *mut ffi::ibv_pd {
        self.pd.as_ptr()
    }
}

impl Identifier {
    /// The name of the device, as `rdma link` shows it.
    pub fn device_name(&self) -> Option<String> {
        let verbs = self.verbs()?;
        // SAFETY: the context is open, and its device's name is a C string that lives as long.
        let name = unsafe { CStr::from_ptr(ffi::ibv_get_device_name(verbs.as_ref().device)) };
        Some(name.to_string_lossy().into_owned())
    }
}

impl fmt::Debug for ProtectionDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ProtectionDomain").field(&self.id).finish()
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: whatever was made in it keeps it alive, so nothing is left in it.
        let errno = unsafe { ffi::ibv_dealloc_pd(self.as_ptr()) };
        if errno != 0 {
            tracing::warn!(errno, "a protection domain is left behind");
        }
    }
}
