//! The conformance suite on TCP over loopback.

use std::os::fd::AsFd;

use crate::conformance::{Cut, Network};
use transport::tcp::TcpLink;
use transport::{Lane, Link};

struct Loopback;

impl Network for Loopback {
    type Link = TcpLink;

    fn pair() -> (TcpLink, TcpLink) {
        crate::tcp_pair::pair()
    }

    fn cut(_: &mut TcpLink, peer: &mut TcpLink, lane: Lane, how: Cut) {
        crate::tcp_pair::cut(peer, lane, how == Cut::Reset);
    }
}

crate::conformance::conformance!(Loopback);

/// Zero-copy sends whatever the kernel says; over loopback it copies after all, but all of the
/// bookkeeping is the same.
mod zero_copy {
    use transport::tcp::{TcpConfig, ZeroCopy};

    use super::*;

    struct ZeroCopyLoopback;

    impl Network for ZeroCopyLoopback {
        type Link = TcpLink;

        fn pair() -> (TcpLink, TcpLink) {
            crate::tcp_pair::pair_with(&TcpConfig {
                zero_copy: ZeroCopy::Always,
                ..TcpConfig::default()
            })
        }

        fn cut(link: &mut TcpLink, peer: &mut TcpLink, lane: Lane, how: Cut) {
            Loopback::cut(link, peer, lane, how);
        }
    }

    crate::conformance::conformance!(ZeroCopyLoopback);
}

#[test]
fn the_proof_descriptor_closes_on_exec() {
    let (a, _b) = crate::tcp_pair::pair();
    let fd = a.proof_fd().expect("a proof lane");
    let flags = nix::fcntl::fcntl(fd.as_fd(), nix::fcntl::FcntlArg::F_GETFD).expect("fcntl");
    assert_eq!(flags, libc::FD_CLOEXEC);
}
