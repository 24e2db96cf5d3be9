//! Options of the three connections.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{setsockopt, sockopt};

use crate::tcp::TcpConfig;

/// Probes that an idle connection may leave unanswered.
const KEEPALIVE_PROBES: u32 = 4;

/// Sets what every lane needs.
///
/// SO_SNDBUF and SO_RCVBUF are left alone: setting them ends the kernel's own tuning and is capped
/// by `net.core.{w,r}mem_max`, which is usually less than the tuning reaches (`tcp_{w,r}mem`).
pub(super) fn set_options(stream: &TcpStream, config: &TcpConfig) -> io::Result<()> {
    let fd = stream.as_fd();
    let timeout_ms = u32::try_from(config.user_timeout.as_millis()).unwrap_or(u32::MAX);
    let interval_s = timeout_ms.div_ceil(1000).div_ceil(KEEPALIVE_PROBES).max(1);
    stream.set_nodelay(true)?;
    setsockopt(&fd, sockopt::KeepAlive, &true)?;
    setsockopt(&fd, sockopt::TcpKeepIdle, &interval_s)?;
    setsockopt(&fd, sockopt::TcpKeepInterval, &interval_s)?;
    setsockopt(&fd, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    setsockopt(&fd, sockopt::TcpUserTimeout, &timeout_ms)?;
    Ok(())
}

/// Ends a connection with a reset, throwing away what it has not sent, whoever else has its
/// descriptor.
pub(super) fn reset(stream: &TcpStream) {
    let nowhere = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    // SAFETY: the address is a whole sockaddr that lives during the call.
    let done = unsafe {
        libc::connect(
            stream.as_raw_fd(),
            &raw const nowhere,
            size_of::<libc::sockaddr>() as libc::socklen_t,
        )
    };
    if done != 0 {
        let error = io::Error::last_os_error();
        tracing::warn!(%error, "a connection can't be reset");
    }
}
