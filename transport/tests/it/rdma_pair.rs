//! Pairs of RDMA links on one host, and the device that they need.

use std::net::{IpAddr, SocketAddr};
use std::sync::OnceLock;

use crate::conformance::{WATCHDOG, wait_readable};
use transport::rdma::{CmListener, Connecting, RdmaConfig, RdmaLink, device};
use transport::tcp::{TcpConfig, TcpListener};

/// An address of this host that an RDMA device has. Without one the tests can only say so; with
/// `RDMA_TESTS=required` they fail.
pub(crate) fn address() -> Option<IpAddr> {
    static ADDRESS: OnceLock<Option<IpAddr>> = OnceLock::new();
    *ADDRESS.get_or_init(|| {
        let interfaces = nix::ifaddrs::getifaddrs().expect("getifaddrs");
        let addresses = interfaces.filter_map(|it| {
            let address = it.address?;
            let four = address.as_sockaddr_in().map(|it| IpAddr::V4(it.ip()));
            four.filter(|it| !it.is_loopback())
        });
        let found = addresses
            .into_iter()
            .find(|&it| device::device_of(it).is_ok());
        if found.is_none() {
            assert!(
                std::env::var_os("RDMA_TESTS").is_none(),
                "RDMA_TESTS is set, and there is no RDMA device"
            );
            crate::not_run("the link on RDMA", "no RDMA device here (the lab has)");
        }
        found
    })
}

/// The connecting end and the accepting end of a new link.
pub(crate) fn pair() -> (RdmaLink, RdmaLink) {
    let config = RdmaConfig::default();
    let address = SocketAddr::new(address().expect("asked for before"), 0);
    let mut listener = TcpListener::bind(address, &TcpConfig::default()).expect("listening");
    let address = listener.local_addr().expect("it is bound");
    let cm = CmListener::bind(address, &config).expect("listening with rdma_cm");
    let (tcp_near, tcp_far) =
        crate::tcp_pair::connect_to(&mut listener, address, &TcpConfig::default());
    let pairing = crate::tcp_pair::pairing();
    let mut near = Connecting::start(address.ip(), address, pairing, &config).expect("connecting");
    let mut far: Option<Connecting> = None;
    let (mut near_up, mut far_up) = (None, None);
    while near_up.is_none() || far_up.is_none() {
        let mut fds = vec![cm.ready_fd(), near.ready_fd()];
        fds.extend(far.as_ref().map(|it| it.ready_fd()));
        assert!(wait_readable(&fds, WATCHDOG).contains(&true), "connecting");
        if let Some((_, connecting)) = cm.progress(|it, _| it == pairing).expect("accepting") {
            far = Some(connecting);
        }
        if near_up.is_none() {
            near_up = near.progress().expect("connecting");
        }
        if let (None, Some(far)) = (&far_up, &mut far) {
            far_up = far.progress().expect("accepting");
        }
    }
    let near = near_up
        .expect("just made")
        .beside(tcp_near)
        .expect("a link");
    let far = far_up.expect("just made").beside(tcp_far).expect("a link");
    (near, far)
}
