//! Agreeing on a transport.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::conformance::{WATCHDOG, wait_readable};
use transport::choice::message::Offer;
use transport::choice::{Connected, Incoming, Transport, TransportError};
use transport::tcp::{TcpConfig, TcpConnector};
use transport::{
    Arena, Event, Link, TransportChoice, TransportConfig, TransportConnector, TransportListener,
};

fn config(choice: TransportChoice) -> TransportConfig {
    TransportConfig {
        choice,
        ..TransportConfig::default()
    }
}

fn listener(ip: IpAddr, choice: TransportChoice) -> (TransportListener, SocketAddr) {
    let listener =
        TransportListener::bind(SocketAddr::new(ip, 0), &config(choice)).expect("listening");
    let address = listener.local_addr().expect("it is bound");
    (listener, address)
}

/// What became of the connecting side, and of the accepting one.
type Outcome = (Result<Connected, TransportError>, Result<Connected, String>);

fn agree(ip: IpAddr, near: TransportChoice, far: TransportChoice) -> Outcome {
    let (mut listener, address) = listener(ip, far);
    let pairing = crate::tcp_pair::pairing();
    let mut connector =
        TransportConnector::start(address, pairing, &config(near)).expect("connecting");
    let (mut here, mut there) = (None, None);
    while here.is_none() || there.is_none() {
        let mut fds = vec![listener.ready_fd()];
        if here.is_none() {
            fds.push(connector.ready_fd());
        }
        assert!(wait_readable(&fds, WATCHDOG).contains(&true), "agreeing");
        if here.is_none() {
            here = connector.progress().transpose();
            if here.as_ref().is_some_and(Result::is_err) {
                // Its end is what the other side waits for.
                let (_, idle) = self::listener(ip, TransportChoice::Tcp);
                connector = TransportConnector::start(idle, pairing, &config(near)).expect("idle");
            }
        }
        listener
            .progress(&mut |incoming| {
                there = Some(match incoming {
                    Incoming::Link(link) => Ok(link),
                    Incoming::Refused { reason, .. } => Err(reason),
                });
            })
            .expect("listener");
    }
    (here.expect("just seen"), there.expect("just seen"))
}

/// Each side speaks first, and a chunk goes over.
fn works(near: &mut dyn Link, far: &mut dyn Link) {
    let arena = Arena::new(2);
    let grant = far
        .grant(arena.alloc().expect("two chunks"), 0)
        .expect("grant");
    far.send(&grant.0).expect("send");
    far.flush().expect("flush");
    near.send(b"hello").expect("send");
    near.flush().expect("flush");
    let (mut hello, mut arrived) = (false, false);
    while !(hello && arrived) {
        wait_readable(&[near.ready_fd(), far.ready_fd()], WATCHDOG);
        let mut told = false;
        near.progress(&mut |event| {
            told |= matches!(event, Event::Message(bytes) if bytes == grant.0)
        })
        .expect("progress");
        if told {
            let chunk = arena.alloc().expect("two chunks").freeze(5000);
            near.push(chunk, grant, 7).expect("push");
            near.flush().expect("flush");
        }
        far.progress(&mut |event| match event {
            Event::Message(bytes) => hello = bytes == b"hello",
            Event::Arrived { chunk, tag } => arrived = (chunk.bytes().len(), tag) == (5000, 7),
            other => panic!("{other:?}"),
        })
        .expect("progress");
    }
}

#[test]
fn without_a_device_both_sides_say_why_it_is_tcp() {
    // Loopback has none, anywhere.
    let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
    for (near, far) in [
        (TransportChoice::Auto, TransportChoice::Auto),
        (TransportChoice::Tcp, TransportChoice::Auto),
        (TransportChoice::Auto, TransportChoice::Tcp),
    ] {
        let (here, there) = agree(ip, near, far);
        let (mut here, mut there) = (here.expect("a link"), there.expect("a link"));
        println!("{near}, {far}: {}", here.sentence);
        assert_eq!(here.transport, Transport::Tcp);
        assert_eq!(here.sentence, there.sentence);
        assert!(here.sentence.starts_with("transport: TCP, because on the "));
        works(&mut *here.link, &mut *there.link);
    }
}

#[test]
fn rdma_that_is_demanded_and_missing_is_refused_with_the_cure() {
    let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let (here, there) = agree(ip, TransportChoice::Rdma, TransportChoice::Auto);
    let text = here.expect_err("no device").to_string();
    println!("{text}");
    let cures = ["rdma_rxe", "rdma_ucm", "libibverbs-dev"];
    assert!(cures.iter().any(|it| text.contains(it)), "{text}");
    there.expect_err("nobody came");
    let bound = TransportListener::bind(SocketAddr::new(ip, 0), &config(TransportChoice::Rdma));
    assert!(matches!(bound, Err(TransportError::NoRdma(_))));
}

#[test]
fn a_peer_that_does_not_agree_is_turned_away() {
    let (mut listener, address) = listener(Ipv4Addr::LOCALHOST.into(), TransportChoice::Auto);
    let mut connector =
        TcpConnector::start(address, crate::tcp_pair::pairing(), &TcpConfig::default())
            .expect("connecting");
    let mut link = None;
    let mut refused = None;
    while refused.is_none() {
        let mut fds = vec![listener.ready_fd()];
        if link.is_none() {
            fds.push(connector.ready_fd());
        }
        assert!(wait_readable(&fds, WATCHDOG).contains(&true));
        if link.is_none()
            && let Some(mut new) = connector.progress().expect("connecting")
        {
            let offer = Offer {
                wants: TransportChoice::Auto,
                rdma: Ok(()),
                pairing: crate::tcp_pair::pairing(),
            };
            new.send(&offer.encode()[..20]).expect("send");
            new.flush().expect("flush");
            link = Some(new);
        }
        listener
            .progress(&mut |incoming| match incoming {
                Incoming::Refused { reason, .. } => refused = Some(reason),
                Incoming::Link(link) => panic!("{link:?}"),
            })
            .expect("listener");
    }
    assert!(refused.expect("just seen").contains("message of 20 bytes"));
}

#[cfg(feature = "rdma")]
#[test]
fn with_a_device_it_is_rdma() {
    let Some(ip) = crate::rdma_pair::address() else {
        return;
    };
    for (near, far) in [
        (TransportChoice::Auto, TransportChoice::Auto),
        (TransportChoice::Rdma, TransportChoice::Auto),
        (TransportChoice::Auto, TransportChoice::Rdma),
    ] {
        let (here, there) = agree(ip, near, far);
        let (mut here, mut there) = (here.expect("a link"), there.expect("a link"));
        println!("{near}, {far}: {}", here.sentence);
        assert_eq!(here.transport, Transport::Rdma);
        assert_eq!(there.transport, Transport::Rdma);
        works(&mut *here.link, &mut *there.link);
    }
    for (near, far) in [
        (TransportChoice::Tcp, TransportChoice::Auto),
        (TransportChoice::Auto, TransportChoice::Tcp),
    ] {
        let (here, there) = agree(ip, near, far);
        let (mut here, mut there) = (here.expect("a link"), there.expect("a link"));
        assert_eq!(here.transport, Transport::Tcp);
        works(&mut *here.link, &mut *there.link);
    }
    let (here, there) = agree(ip, TransportChoice::Rdma, TransportChoice::Tcp);
    let text = here.expect_err("demanded").to_string();
    assert!(text.contains("it is set to TCP"), "{text}");
    there.expect_err("demanded");
}
