//! What rdma_cm knows: identifiers of connections, and the channels on which it reports.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::rc::Rc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{SockaddrLike, SockaddrStorage};

use super::RdmaError;
use super::ffi::{self, rdma_cm_event_type as kind};

/// Where rdma_cm reports.
pub struct EventChannel(NonNull<ffi::rdma_event_channel>);

/// One end of a connection, or a listener.
pub struct Identifier {
    id: NonNull<ffi::rdma_cm_id>,
    channel: Rc<EventChannel>,
}

/// What [`EventChannel::next`] found.
#[derive(Debug)]
pub(super) struct CmEvent {
    pub(super) kind: kind::Type,
    status: i32,
    /// Of a connection request: what the peer sent with it.
    pub(super) private: Vec<u8>,
    /// Of a connection request: the connection that it would be.
    pub(super) new: Option<NonNull<ffi::rdma_cm_id>>,
}

impl EventChannel {
    pub fn new() -> Result<Rc<EventChannel>, RdmaError> {
        // SAFETY: the function takes nothing.
        let channel = NonNull::new(unsafe { ffi::rdma_create_event_channel() })
            .ok_or_else(|| RdmaError::NoManager(io::Error::last_os_error()))?;
        let channel = EventChannel(channel);
        fcntl(channel.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(|errno| RdmaError::code("fcntl", errno as i32))?;
        Ok(Rc::new(channel))
    }

    /// Takes the next event, and acknowledges it.
    pub(super) fn next(&self) -> Result<Option<CmEvent>, RdmaError> {
        let mut event: *mut ffi::rdma_cm_event = ptr::null_mut();
        // SAFETY: the channel is alive, and the place lives during the call.
        if unsafe { ffi::rdma_get_cm_event(self.0.as_ptr(), &raw mut event) } != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(RdmaError::Io {
                    operation: "rdma_get_cm_event",
                    source: error,
                }),
            };
        }
        // SAFETY: the event is whole until it is acknowledged. All identifiers here are connected,
        // so that `conn` is the variant; its data is as long as it says, or null.
        let seen = unsafe {
            let event = &*event;
            let conn = event.param.conn;
            let private = match conn.private_data.is_null() {
                false if event.event == kind::RDMA_CM_EVENT_CONNECT_REQUEST => {
                    let bytes = usize::from(conn.private_data_len);
                    std::slice::from_raw_parts(conn.private_data.cast::<u8>(), bytes).to_vec()
                }
                _ => Vec::new(),
            };
            let is_new = event.event == kind::RDMA_CM_EVENT_CONNECT_REQUEST;
            CmEvent {
                kind: event.event,
                status: event.status,
                private,
                new: NonNull::new(event.id).filter(|_| is_new),
            }
        };
        // SAFETY: it was not acknowledged before, and nothing of it is used after.
        unsafe { ffi::rdma_ack_cm_event(event) };
        Ok(Some(seen))
    }
}

impl AsFd for EventChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the channel.
        unsafe { BorrowedFd::borrow_raw(self.0.as_ref().fd) }
    }
}

impl fmt::Debug for EventChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EventChannel").finish()
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: every identifier keeps its channel alive, so none is left on it.
        unsafe { ffi::rdma_destroy_event_channel(self.0.as_ptr()) };
    }
}

impl CmEvent {
    pub(super) fn error(&self, doing: &'static str) -> RdmaError {
        // SAFETY: the function takes any number and returns a C string that lives for ever.
        let text = unsafe { CStr::from_ptr(ffi::rdma_event_str(self.kind)) };
        RdmaError::Manager {
            event: text.to_string_lossy().into_owned(),
            status: self.status,
            doing,
        }
    }
}

impl Identifier {
    pub fn new(channel: Rc<EventChannel>) -> Result<Rc<Identifier>, RdmaError> {
        let mut id = ptr::null_mut();
        // SAFETY: the channel is alive, and stays so with the identifier.
        let done = unsafe {
            ffi::rdma_create_id(
                channel.0.as_ptr(),
                &raw mut id,
                ptr::null_mut(),
                ffi::rdma_port_space::RDMA_PS_TCP,
            )
        };
        match NonNull::new(id).filter(|_| done == 0) {
            Some(id) => Ok(Rc::new(Identifier { id, channel })),
            None => Err(RdmaError::last("rdma_create_id")),
        }
    }

    /// Takes a connection that a listener reported, onto a channel of its own.
    pub(super) fn adopt(id: NonNull<ffi::rdma_cm_id>) -> Result<Rc<Identifier>, RdmaError> {
        let channel = EventChannel::new()?;
        // SAFETY: the request's event is acknowledged, so that no event holds the identifier.
        let done = unsafe { ffi::rdma_migrate_id(id.as_ptr(), channel.0.as_ptr()) };
        let moved = Rc::new(Identifier { id, channel });
        if done != 0 {
            return Err(RdmaError::last("rdma_migrate_id"));
        }
        Ok(moved)
    }

    pub fn bind(&self, address: SocketAddr) -> Result<(), RdmaError> {
        let storage = SockaddrStorage::from(address);
        // SAFETY: the address is as long as its family says, and lives during the call, which
        // doesn't write it.
        let done = unsafe { ffi::rdma_bind_addr(self.as_ptr(), storage.as_ptr().cast_mut()) };
        match done {
            0 => Ok(()),
            _ => Err(RdmaError::last("rdma_bind_addr")),
        }
    }

    /// The device's context, if an address was bound or resolved.
    pub(super) fn verbs(&self) -> Option<NonNull<ffi::ibv_context>> {
        // SAFETY: the identifier is alive.
        NonNull::new(unsafe { self.id.as_ref() }.verbs)
    }

    pub(super) fn as_ptr(&self) -> *mut ffi::rdma_cm_id {
        self.id.as_ptr()
    }

    pub(super) fn channel(&self) -> &EventChannel {
        &self.channel
    }

    /// The peer's address, of a connection request.
    pub(super) fn peer(&self) -> Option<IpAddr> {
        // SAFETY: the union is as large as its largest variant and holds the address that rdma_cm
        // wrote; its family tells which.
        unsafe {
            let address = &self.id.as_ref().route.addr.dst_addr_union;
            let storage = SockaddrStorage::from_raw((&raw const *address).cast(), None)?;
            if let Some(four) = storage.as_sockaddr_in() {
                return Some(IpAddr::V4(four.ip()));
            }
            storage.as_sockaddr_in6().map(|six| IpAddr::V6(six.ip()))
        }
    }

    /// Says goodbye. The peer sees the end of the connection.
    pub(super) fn disconnect(&self) {
        // SAFETY: the identifier is alive. It fails if there is no connection: as good.
        unsafe { ffi::rdma_disconnect(self.as_ptr()) };
    }
}

impl fmt::Debug for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identifier")
            .field("device", &self.device_name())
            .finish()
    }
}

impl Drop for Identifier {
    fn drop(&mut self) {
        // SAFETY: what uses the identifier keeps it alive, and every event of it is acknowledged.
        unsafe { ffi::rdma_destroy_id(self.as_ptr()) };
    }
}
