//! Options of the three connections.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{setsockopt, sockopt};

use crate::link::LossKind;
use crate::tcp::TcpConfig;

/// The peer closed, this side has not.
const TCP_CLOSE_WAIT: u8 = 8;
/// There is no connection any more.
const TCP_CLOSE: u8 = 7;
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

/// What an end of file on the TCP connection `fd` means.
///
/// The kernel reports a connection's error once, to whoever asks first, and the end of file to
/// everybody after. A send that was cut short can have taken the error without showing it (the
/// ring returns the bytes that did get out), so a receive's 0 alone doesn't tell. The connection's
/// state does: a FIN from the peer leads to CLOSE_WAIT, an error to CLOSE.
pub fn end_of_file(fd: BorrowedFd<'_>) -> LossKind {
    match state(fd) {
        Ok(TCP_CLOSE_WAIT) => LossKind::Fin,
        Ok(TCP_CLOSE) => LossKind::Error("connection reset or timed out".to_owned()),
        Ok(state) => LossKind::Error(format!("end of file in TCP state {state}")),
        Err(error) => LossKind::Error(format!("end of file, and no TCP state: {error}")),
    }
}

/// The connection's state, as `include/net/tcp_states.h` of the kernel numbers them.
fn state(fd: BorrowedFd<'_>) -> io::Result<u8> {
    // SAFETY: all-zero is a valid tcp_info: it is integers.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut bytes = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: `info` and `bytes` live during the call, `bytes` says how large `info` is, and the
    // descriptor is borrowed and so open.
    let done = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut bytes,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info.tcpi_state)
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
