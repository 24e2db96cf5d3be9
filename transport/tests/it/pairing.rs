//! How connections become links, and what is said when they don't.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use transport::Lane;
use transport::tcp::preamble::{Preamble, REPLY_BYTES, Reply};
use transport::tcp::{
    Incoming, PairingId, Refusal, TcpConfig, TcpConnector, TcpError, TcpListener,
};

use crate::conformance::{WATCHDOG, wait_readable};
use crate::tcp_pair;

fn impatient() -> TcpConfig {
    TcpConfig {
        pairing_timeout: Duration::from_millis(200),
        ..TcpConfig::default()
    }
}

fn open(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).expect("the listener is there");
    stream.set_read_timeout(Some(WATCHDOG)).expect("a time-out");
    stream.write_all(bytes).expect("room for a few bytes");
    stream
}

fn lane(address: SocketAddr, pairing: PairingId, lane: Lane) -> TcpStream {
    open(address, &Preamble { pairing, lane }.encode())
}

/// Runs the listener until it has refused `count` connections.
fn refusals(listener: &mut TcpListener, count: usize) -> Vec<Refusal> {
    let mut refused = Vec::new();
    let watchdog = Instant::now() + WATCHDOG;
    while refused.len() < count {
        assert!(Instant::now() < watchdog, "only {refused:?}");
        let deadline = listener.next_deadline().unwrap_or(watchdog);
        let left = deadline.saturating_duration_since(Instant::now());
        // poll counts in milliseconds: not to be too early for the deadline.
        let left = left + Duration::from_millis(1);
        wait_readable(&[listener.ready_fd().as_fd()], left);
        listener
            .progress(&mut |incoming| match incoming {
                Incoming::Refused { reason, .. } => refused.push(reason),
                Incoming::Link(link) => panic!("{link:?}"),
            })
            .expect("listener");
    }
    refused
}

fn reason(mut stream: TcpStream) -> String {
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    let head = answer.first_chunk().expect("a whole reply");
    assert!(matches!(Reply::decode(head), Ok(Reply::Refused { .. })));
    String::from_utf8(answer.split_off(REPLY_BYTES)).expect("text")
}

#[test]
fn a_lane_that_comes_twice_is_a_replay() {
    let (mut listener, address) = tcp_pair::listener(&impatient());
    let pairing = tcp_pair::pairing();
    let first = lane(address, pairing, Lane::Bulk);
    let second = lane(address, pairing, Lane::Bulk);
    let refused = refusals(&mut listener, 2);
    assert!(matches!(refused[0], Refusal::Replayed), "{refused:?}");
    assert!(matches!(refused[1], Refusal::Incomplete(_)), "{refused:?}");
    assert_eq!(reason(second), Refusal::Replayed.to_string());
    assert!(reason(first).contains("other lanes"));
}

#[test]
fn a_pairing_is_used_once() {
    let (mut listener, address) = tcp_pair::listener(&impatient());
    let pairing = tcp_pair::pairing();
    let _lanes = [Lane::Control, Lane::Bulk, Lane::Proof].map(|it| lane(address, pairing, it));
    let _link = tcp_pair::accept(&mut listener);
    let late = lane(address, pairing, Lane::Control);
    let refused = refusals(&mut listener, 1);
    assert!(matches!(refused[0], Refusal::Used), "{refused:?}");
    assert_eq!(reason(late), Refusal::Used.to_string());
}

#[test]
fn what_does_not_pair_is_told_why() {
    let (mut listener, address) = tcp_pair::listener(&impatient());
    let good = Preamble {
        pairing: tcp_pair::pairing(),
        lane: Lane::Control,
    }
    .encode();
    let mut newer = good;
    newer[8] = 2;
    let mut no_lane = good;
    no_lane[10] = 9;
    let mut talkative = good.to_vec();
    talkative.push(0);
    let cases = [
        (&newer[..], "preamble version 2, this side speaks 1"),
        (&no_lane[..], "unknown lane 9"),
        (&[b'x'; 32][..], "not the start"),
        (&good[..31], "no whole preamble"),
        (&talkative[..], "before the connection was accepted"),
    ];
    for (bytes, expected) in cases {
        let stream = open(address, bytes);
        let refused = refusals(&mut listener, 1);
        assert!(
            refused[0].to_string().contains(expected),
            "{refused:?} instead of {expected:?}"
        );
        assert!(reason(stream).contains(expected));
    }
}

#[test]
fn the_oldest_of_a_crowd_makes_room() {
    let (mut listener, address) = tcp_pair::listener(&TcpConfig::default());
    let first = open(address, b"");
    wait_readable(&[listener.ready_fd().as_fd()], WATCHDOG);
    listener.progress(&mut |_| {}).expect("listener");
    let _crowd: Vec<_> = (0..64).map(|_| open(address, b"")).collect();
    let refused = refusals(&mut listener, 1);
    assert!(matches!(refused[0], Refusal::Crowded), "{refused:?}");
    assert_eq!(reason(first), Refusal::Crowded.to_string());
}

/// Runs a connector against whatever answers, to its end.
fn connect(mut connector: TcpConnector, mut serve: impl FnMut()) -> TcpError {
    loop {
        let left = connector
            .next_deadline()
            .saturating_duration_since(Instant::now());
        let left = left.min(Duration::from_millis(5)) + Duration::from_millis(1);
        wait_readable(&[connector.ready_fd().as_fd()], left);
        serve();
        match connector.progress() {
            Ok(None) => {}
            Ok(Some(link)) => panic!("{link:?}"),
            Err(error) => return error,
        }
    }
}

#[test]
fn the_connector_says_why_it_was_refused() {
    let (mut listener, address) = tcp_pair::listener(&impatient());
    let pairing = tcp_pair::pairing();
    // Somebody else is in the middle of the same pairing.
    let _other = lane(address, pairing, Lane::Proof);
    wait_readable(&[listener.ready_fd().as_fd()], WATCHDOG);
    listener.progress(&mut |_| {}).expect("listener");
    let connector = TcpConnector::start(address, pairing, &impatient()).expect("start");
    let error = connect(connector, || {
        listener.progress(&mut |_| {}).expect("listener");
    });
    match error {
        // Whichever of the two comes last.
        TcpError::Refused { reason } => assert!(
            reason == Refusal::Replayed.to_string() || reason == Refusal::Used.to_string(),
            "{reason}"
        ),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_connector_gives_up_on_silence_and_on_strangers() {
    let silent = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let address = silent.local_addr().expect("bound");
    let start = || TcpConnector::start(address, tcp_pair::pairing(), &impatient()).expect("start");
    let error = connect(start(), || {});
    assert!(matches!(error, TcpError::TimedOut(_)), "{error:?}");

    let mut strangers = Vec::new();
    silent.set_nonblocking(true).expect("fcntl");
    let error = connect(start(), || {
        while let Ok((mut stream, _)) = silent.accept() {
            let greeting = b"220 mail.example.org ESMTP ready\r\n";
            // Those of the first attempt are gone.
            let _ = stream.write_all(greeting);
            strangers.push(stream);
        }
    });
    assert!(matches!(error, TcpError::NotAPeer(_)), "{error:?}");

    let error = connect(start(), || {
        while let Ok((stream, _)) = silent.accept() {
            // Closing it with the preamble unread would be a reset.
            let _ = stream.shutdown(Shutdown::Write);
            strangers.push(stream);
        }
    });
    assert!(matches!(error, TcpError::ClosedEarly), "{error:?}");

    drop(silent);
    let started = TcpConnector::start(address, tcp_pair::pairing(), &impatient());
    let error = match started {
        Ok(connector) => connect(connector, || {}),
        Err(error) => error,
    };
    assert!(
        matches!(&error, TcpError::Io { operation: "connect", source }
            if source.kind() == std::io::ErrorKind::ConnectionRefused),
        "{error:?}"
    );
}
