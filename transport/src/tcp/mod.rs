//! The link on three TCP connections, driven by one io_uring.
//!
//! [`TcpConnector`] and [`TcpListener`] make a [`TcpLink`] out of three connections to one port;
//! both are non-blocking and live in the driver's thread, as the link does: its ring belongs to
//! the thread that made it. [`frame`] and [`preamble`] are the bytes on the wire.

use std::io;
use std::time::Duration;

mod bulk_receive;
mod bulk_send;
mod connect;
mod control;
pub mod frame;
mod lanes;
mod link;
mod listen;
mod operation;
pub mod preamble;
mod provided;
mod ring;
mod socket;
mod zero_copy;

pub use connect::TcpConnector;
pub use link::TcpLink;
pub use listen::{Incoming, Refusal, TcpListener};
pub use preamble::PairingId;
pub use socket::end_of_file;
pub use zero_copy::ZeroCopy;

/// What an operator may want to choose about the connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpConfig {
    /// How long sent bytes may stay unacknowledged before the kernel gives the connection up
    /// (TCP_USER_TIMEOUT), and how long an idle connection may be silent (keepalive).
    pub user_timeout: Duration,
    /// How long a pairing may take from its first connection to its last.
    pub pairing_timeout: Duration,
    pub zero_copy: ZeroCopy,
}

impl Default for TcpConfig {
    fn default() -> TcpConfig {
        TcpConfig {
            user_timeout: Duration::from_secs(10),
            pairing_timeout: Duration::from_secs(2),
            zero_copy: ZeroCopy::default(),
        }
    }
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum TcpError {
    #[error("the kernel lacks {missing}: Linux 6.1 or later is needed, with io_uring compiled in")]
    KernelTooOld { missing: &'static str },
    #[error(
        "io_uring is forbidden here: set the sysctl kernel.io_uring_disabled to 0, or allow \
         io_uring in the container's seccomp profile"
    )]
    RingForbidden,
    #[error(
        "io_uring gets no memory: raise RLIMIT_MEMLOCK (ulimit -l), which some kernels count its \
         rings against"
    )]
    RingMemory,
    #[error("refused by the peer: {reason}")]
    Refused { reason: String },
    #[error("the peer does not answer as curling-rdma does: {0}")]
    NotAPeer(#[from] preamble::PreambleError),
    #[error("the peer closed the connection before it answered")]
    ClosedEarly,
    #[error("no pairing within {} ms", .0.as_millis())]
    TimedOut(Duration),
    #[error("{operation} failed")]
    Io {
        operation: &'static str,
        source: io::Error,
    },
}

impl TcpError {
    pub(crate) fn io(operation: &'static str, source: io::Error) -> TcpError {
        TcpError::Io { operation, source }
    }
}
