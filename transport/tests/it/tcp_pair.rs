//! Pairs of TCP links over loopback, and ways to hurt them.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "not every test file uses all of it"
)]

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::shutdown;
use transport::Lane;
use transport::tcp::{Incoming, PairingId, TcpConfig, TcpConnector, TcpLink, TcpListener};

use crate::conformance::{WATCHDOG, wait_readable};

pub(crate) fn listener(config: &TcpConfig) -> (TcpListener, SocketAddr) {
    let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listener = TcpListener::bind(any_port, config).expect("listening on loopback");
    let address = listener.local_addr().expect("it is bound");
    (listener, address)
}

/// Unlike any other of this process.
pub(crate) fn pairing() -> PairingId {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut id = [0; 16];
    let serial = NEXT.fetch_add(1, Ordering::Relaxed);
    id[..8].copy_from_slice(&serial.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    id[8..12].copy_from_slice(&std::process::id().to_le_bytes());
    PairingId(id)
}

pub(crate) fn pair() -> (TcpLink, TcpLink) {
    pair_with(&TcpConfig::default())
}

pub(crate) fn pair_with(config: &TcpConfig) -> (TcpLink, TcpLink) {
    let (mut listener, address) = listener(config);
    connect_to(&mut listener, address, config)
}

/// The connecting end and the accepting end of a new link.
pub(crate) fn connect_to(
    listener: &mut TcpListener,
    address: SocketAddr,
    config: &TcpConfig,
) -> (TcpLink, TcpLink) {
    let mut connector = TcpConnector::start(address, pairing(), config).expect("connecting");
    let (mut near, mut far) = (None, None);
    while near.is_none() || far.is_none() {
        let mut fds = vec![PollFd::new(listener.ready_fd(), PollFlags::POLLIN)];
        if near.is_none() {
            fds.push(PollFd::new(connector.ready_fd(), PollFlags::POLLIN));
        }
        let ready = poll(&mut fds, 10_000u16).expect("poll");
        assert_ne!(ready, 0, "pairing goes on");
        listener
            .progress(&mut |incoming| match incoming {
                Incoming::Link(link) => far = Some(link),
                Incoming::Refused { peer, reason } => panic!("{peer} refused: {reason}"),
            })
            .expect("listener");
        if near.is_none() {
            near = connector.progress().expect("connector");
        }
    }
    (near.expect("just made"), far.expect("just made"))
}

/// The next link that somebody makes.
pub(crate) fn accept(listener: &mut TcpListener) -> TcpLink {
    let mut link = None;
    while link.is_none() {
        wait_readable(&[listener.ready_fd()], WATCHDOG);
        listener
            .progress(&mut |incoming| match incoming {
                Incoming::Link(it) => link = Some(it),
                Incoming::Refused { peer, reason } => panic!("{peer} refused: {reason}"),
            })
            .expect("listener");
    }
    link.expect("just made")
}

/// Ends one of `link`'s lanes, as the kernel does when the process dies or when it resets.
pub(crate) fn cut(link: &TcpLink, lane: Lane, reset: bool) {
    let fd = link.lane_fd(lane).as_raw_fd();
    if reset {
        // Disconnecting sends a reset at once, also while a ring has operations on the socket.
        let unspecified = libc::sockaddr {
            sa_family: libc::AF_UNSPEC as u16,
            sa_data: [0; 14],
        };
        // SAFETY: the address is a whole sockaddr, and lives during the call.
        let done = unsafe {
            libc::connect(
                fd,
                &raw const unspecified,
                size_of::<libc::sockaddr>() as u32,
            )
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    } else {
        shutdown(fd, nix::sys::socket::Shutdown::Write).expect("shutdown");
    }
}
