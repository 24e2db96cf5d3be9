//! The link whose bulk lane is one RC queue pair.
//!
//! Control and proof stay TCP ([`crate::tcp`]): QEMU must hold a copy of the proof lane's
//! descriptor. The pairing's TCP bulk connection stays, silent: what the kernel says of its end
//! ends the bulk lane here, too.
//!
//! A chunk goes out as two requests: an RDMA WRITE into the granted chunk, and a SEND WITH
//! INVALIDATE of the frame header that TCP uses ([`crate::tcp::frame`]). A grant is a memory
//! window of type 2, bound to one chunk for one use. The header that says that the chunk is
//! complete takes the window away as it arrives, in the receiver's network card: so a chunk that is
//! reported as arrived can't be written any more, at no extra cost. A window that nobody used is
//! taken away by [`crate::Link::revoke`], which ends the window itself.
//!
//! A write that comes later is refused by the card. On a reliable connection that ends the queue
//! pair on both sides, and so the lane: unlike TCP, where such bytes are read and dropped.

mod bulk;
mod chunks;
pub mod cm;
pub mod completion;
mod connecting;
pub mod device;
mod ffi;
mod link;
pub mod memlock;
mod outbox;
pub mod queue_pair;
mod receives;
pub mod region;
pub mod window;

use std::io;
use std::time::Duration;

pub use connecting::{CmListener, Connecting, Established};
pub use link::RdmaLink;

/// What an operator may want to choose about RDMA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdmaConfig {
    /// How long the link looks for completions itself before it sleeps, at most. It gives up
    /// earlier, or doesn't begin, while looking has been in vain.
    pub busy_poll: Duration,
    /// Bytes of chunks that must be lockable, or there is no link.
    pub lockable_bytes_min: u64,
}

impl Default for RdmaConfig {
    fn default() -> RdmaConfig {
        RdmaConfig {
            busy_poll: Duration::from_micros(20),
            lockable_bytes_min: 64 << 20,
        }
    }
}

/// Why there is no RDMA.
#[derive(Debug, thiserror::Error)]
pub enum RdmaError {
    #[error(
        "no RDMA device for {address}: add one (for soft-RoCE: modprobe rdma_rxe, then rdma link \
         add rxe0 type rxe netdev DEVICE), or choose an address that one has"
    )]
    NoDevice { address: std::net::IpAddr },
    #[error(
        "/dev/infiniband/rdma_cm can't be used: load the kernel module rdma_ucm, and let this user \
         read and write /dev/infiniband/*"
    )]
    NoManager(#[source] io::Error),
    #[error(
        "only {allowed} bytes can be locked in memory, {wanted} are needed: raise RLIMIT_MEMLOCK \
         (ulimit -l) or grant CAP_IPC_LOCK"
    )]
    MemoryLock { allowed: u64, wanted: u64 },
    #[error("the RDMA device has no memory windows of type 2, by which a grant is taken back")]
    NoWindows(#[source] io::Error),
    #[error("rdma_cm: {event} (status {status}) while {doing}")]
    Manager {
        event: String,
        status: i32,
        doing: &'static str,
    },
    #[error("{operation} failed")]
    Io {
        operation: &'static str,
        source: io::Error,
    },
}

impl RdmaError {
    fn last(operation: &'static str) -> RdmaError {
        RdmaError::Io {
            operation,
            source: io::Error::last_os_error(),
        }
    }

    fn code(operation: &'static str, errno: i32) -> RdmaError {
        RdmaError::Io {
            operation,
            source: io::Error::from_raw_os_error(errno),
        }
    }
}
