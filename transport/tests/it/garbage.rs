//! What strangers, and peers gone mad, can do to a listener and to a link: nothing.
//!
//! `CURLING_GARBAGE_CONNECTIONS` (default 3,000) says how many strangers come.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::conformance::{End, Seen, WHOLE, drive_one, filled, pattern, wait_readable};
use crate::noise::Noise;
use nix::sys::socket::{setsockopt, sockopt};
use transport::tcp::frame::{FrameHeader, GrantIndex};
use transport::tcp::preamble::{Preamble, REPLY_BYTES, Reply};
use transport::tcp::{Incoming, PairingId, TcpConfig, TcpConnector, TcpLink, TcpListener};
use transport::{Arena, Lane, Link, LossKind};

const LANES: [Lane; 3] = [Lane::Control, Lane::Bulk, Lane::Proof];

#[test]
fn strangers_do_not_disturb_a_live_link() {
    if !alone("garbage::strangers_do_not_disturb_a_live_link") {
        return;
    }
    let strangers: usize = std::env::var("CURLING_GARBAGE_CONNECTIONS")
        .map_or(3000, |text| text.parse().expect("a number"));
    let config = TcpConfig {
        pairing_timeout: Duration::from_millis(300),
        ..TcpConfig::default()
    };
    let (mut listener, address) = crate::tcp_pair::listener(&config);
    let pairing = crate::tcp_pair::pairing();
    let (near, far) = connect_as(pairing, &mut listener, address, &config);
    let (mut a, mut b) = (End::new(near), End::new(far));
    let arena = Arena::new(16);

    let mut refused = 0;
    let mut pushed = 0;
    let fds_before = open_descriptors();
    // The first hundred settle the allocator.
    for (count, is_measured) in [(100, false), (strangers, true)] {
        let rss_before = resident_kib();
        let expected = refused + count;
        let crowd = std::thread::spawn(move || crowd(address, pairing, count));
        while refused < expected {
            pushed += one_push(&mut a, &mut b, &arena, pushed);
            serve(&mut listener, &mut refused);
        }
        crowd.join().expect("the strangers are done");
        assert_eq!(refused, expected, "each is refused once");
        if is_measured {
            let growth = resident_kib().saturating_sub(rss_before);
            println!("{count} strangers, {pushed} pushes, {growth} KiB more");
            assert!(growth < 4096, "{growth} KiB more after {count} strangers");
        }
    }
    assert_eq!(open_descriptors(), fds_before);
    one_push(&mut a, &mut b, &arena, pushed);
}

/// Whether this is a process in which only `test` runs. If not, the test is run in one: it counts
/// descriptors and memory, and other tests have some of both.
fn alone(test: &str) -> bool {
    const MARK: &str = "CURLING_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let status = Command::new(std::env::current_exe().expect("procfs"))
        .args([test, "--exact", "--nocapture"])
        .env(MARK, "1")
        .status()
        .expect("the test binary runs");
    assert!(status.success(), "{test}: {status}");
    false
}

/// Carries one chunk over the link; returns 1, the number of chunks.
fn one_push(a: &mut End<TcpLink>, b: &mut End<TcpLink>, arena: &Arena, serial: u32) -> u32 {
    let chunk = arena.alloc().expect("the arena is large enough");
    let to = b.link.grant(chunk, 0).expect("grant");
    a.push(filled(arena, 5000, serial), to, serial);
    a.flush();
    crate::conformance::drive(a, b, |a, b| !a.seen.is_empty() && !b.seen.is_empty());
    let arrived = b.take_arrived();
    assert_eq!(arrived[0].0.bytes(), pattern(5000, serial));
    assert_eq!(a.take_pushed().len(), 1);
    assert!(a.seen.is_empty() && b.seen.is_empty());
    1
}

fn serve(listener: &mut TcpListener, refused: &mut usize) {
    let deadline = listener.next_deadline();
    let timeout = deadline.map_or(Duration::from_millis(1), |at| {
        at.saturating_duration_since(Instant::now())
            .min(Duration::from_millis(1))
    });
    wait_readable(&[listener.ready_fd().as_fd()], timeout);
    listener
        .progress(&mut |incoming| match incoming {
            Incoming::Refused { .. } => *refused += 1,
            Incoming::Link(link) => panic!("a stranger got in: {link:?}"),
        })
        .expect("listener");
}

/// Strangers of every kind, some of whom stay connected for a while.
fn crowd(address: SocketAddr, live: PairingId, count: usize) {
    let mut noise = Noise::new(7);
    let mut staying = Vec::new();
    for serial in 0..count {
        let mut stream = TcpStream::connect(address).expect("the listener is there");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("a time-out");
        let lane = LANES[noise.below(3)];
        let fresh = PairingId(noise.bytes());
        let good = Preamble {
            pairing: fresh,
            lane,
        };
        match serial % 10 {
            0 => {}
            1 => {
                let length = 1 + noise.below(200);
                send(&mut stream, &noise.vec(length));
            }
            2 => send(&mut stream, &noise.vec(100_000)),
            3 => {
                let mut bytes = good.encode();
                bytes[noise.below(16)] ^= 1 << noise.below(8);
                send(&mut stream, &bytes);
            }
            4 => {
                let replay = Preamble {
                    pairing: live,
                    lane,
                };
                send(&mut stream, &replay.encode());
                assert_refused(&mut stream);
            }
            5 => {
                // Two of the three lanes, one of them twice: never a pairing.
                send(&mut stream, &good.encode());
                staying.push(stream);
                continue;
            }
            6 => {
                let mut bytes = good.encode().to_vec();
                bytes.extend(noise.vec(50));
                send(&mut stream, &bytes);
            }
            7 => send(&mut stream, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            8 => {
                send(&mut stream, &good.encode()[..noise.below(32)]);
                staying.push(stream);
                continue;
            }
            _ => {
                let reset = libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                };
                setsockopt(&stream, sockopt::Linger, &reset).expect("SO_LINGER");
            }
        }
        drop(stream);
        if staying.len() > 100 {
            staying
                .drain(..50)
                .for_each(|mut it| assert_refused(&mut it));
        }
    }
    staying
        .into_iter()
        .for_each(|mut it| assert_refused(&mut it));
}

/// The other side may be gone already.
fn send(stream: &mut TcpStream, bytes: &[u8]) {
    match stream.write_all(bytes) {
        Ok(()) => {}
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
            ) => {}
        Err(error) => panic!("{error}"),
    }
}

/// Someone who sent no more than a preamble is told why.
fn assert_refused(stream: &mut TcpStream) {
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .expect("an answer, then the end");
    let head = answer.first_chunk().expect("a whole reply");
    let Ok(Reply::Refused { reason_bytes }) = Reply::decode(head) else {
        panic!("not a refusal: {answer:?}");
    };
    assert_eq!(answer.len(), REPLY_BYTES + reason_bytes);
    assert_ne!(reason_bytes, 0);
}

fn connect_as(
    pairing: PairingId,
    listener: &mut TcpListener,
    address: SocketAddr,
    config: &TcpConfig,
) -> (TcpLink, TcpLink) {
    let mut connector = TcpConnector::start(address, pairing, config).expect("connecting");
    let (mut near, mut far) = (None, None);
    while near.is_none() || far.is_none() {
        wait_readable(
            &[listener.ready_fd().as_fd(), connector.ready_fd().as_fd()],
            crate::conformance::WATCHDOG,
        );
        listener
            .progress(&mut |incoming| match incoming {
                Incoming::Link(link) => far = Some(link),
                Incoming::Refused { reason, .. } => panic!("{reason}"),
            })
            .expect("listener");
        if near.is_none() {
            near = connector.progress().expect("connector");
        }
    }
    (near.expect("just made"), far.expect("just made"))
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("procfs").count()
}

fn resident_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").expect("procfs");
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.expect("an Rss line").parse().expect("a number")
}

/// A peer that pairs as it should and then speaks raw bytes.
struct RawPeer {
    lanes: [TcpStream; 3],
}

fn raw_peer(listener: &mut TcpListener, address: SocketAddr) -> (RawPeer, End<TcpLink>) {
    let pairing = crate::tcp_pair::pairing();
    let mut lanes = LANES.map(|lane| {
        let mut stream = TcpStream::connect(address).expect("the listener is there");
        send(&mut stream, &Preamble { pairing, lane }.encode());
        stream
    });
    let link = crate::tcp_pair::accept(listener);
    for lane in &mut lanes {
        let mut answer = [0; REPLY_BYTES];
        lane.read_exact(&mut answer).expect("an answer");
        assert_eq!(Reply::decode(&answer), Ok(Reply::Accepted));
    }
    (RawPeer { lanes }, End::new(link))
}

fn lost(end: &mut End<TcpLink>) -> (Lane, LossKind) {
    drive_one(end, |end| {
        end.count(|seen| matches!(seen, Seen::Lost(_))) > 0
    });
    let loss = end.take_losses().remove(0);
    (loss.lane, loss.kind)
}

#[test]
fn a_byte_on_the_proof_lane_is_a_protocol_error() {
    let (mut listener, address) = crate::tcp_pair::listener(&TcpConfig::default());
    let (mut peer, mut end) = raw_peer(&mut listener, address);
    send(&mut peer.lanes[2], b"x");
    let (lane, kind) = lost(&mut end);
    assert_eq!(lane, Lane::Proof);
    assert!(matches!(kind, LossKind::Protocol(_)), "{kind:?}");
}

#[test]
fn a_message_that_is_too_long_is_not_waited_for() {
    let (mut listener, address) = crate::tcp_pair::listener(&TcpConfig::default());
    let (mut peer, mut end) = raw_peer(&mut listener, address);
    send(&mut peer.lanes[0], &[2, 0, 0, 0, b'o', b'k', 1, 0, 1, 0]);
    let (lane, kind) = lost(&mut end);
    assert_eq!(end.take_messages(), [b"ok"]);
    // Nor is anything heard after it.
    send(&mut peer.lanes[0], &[2, 0, 0, 0, b'n', b'o']);
    while wait_readable(&[end.link.ready_fd()], Duration::from_millis(50))[0] {
        end.progress();
    }
    assert!(end.seen.is_empty());
    assert_eq!(lane, Lane::Control);
    assert!(matches!(kind, LossKind::Protocol(_)), "{kind:?}");
}

#[test]
fn frames_that_fit_no_grant_end_the_bulk_lane() {
    let (mut listener, address) = crate::tcp_pair::listener(&TcpConfig::default());
    let arena = Arena::new(4);
    let good = FrameHeader {
        grant: GrantIndex {
            index: 0,
            generation: 0,
        },
        length: 100,
        tag: 0,
    };
    let never_given = FrameHeader {
        grant: GrantIndex {
            index: 5,
            generation: 0,
        },
        ..good
    };
    let from_the_future = FrameHeader {
        grant: GrantIndex {
            index: 0,
            generation: 1,
        },
        ..good
    };
    let empty = FrameHeader { length: 0, ..good };
    let long = FrameHeader {
        length: WHOLE as u32 + 1,
        ..good
    };
    for header in [never_given, from_the_future, empty, long] {
        let (mut peer, mut end) = raw_peer(&mut listener, address);
        let chunk = arena.alloc().expect("a chunk");
        end.link.grant(chunk, 0).expect("grant");
        send(&mut peer.lanes[1], &header.encode());
        let (lane, kind) = lost(&mut end);
        assert_eq!(lane, Lane::Bulk);
        assert!(
            matches!(kind, LossKind::Protocol(_)),
            "{header:?}: {kind:?}"
        );
        end.link.revoke(0).expect("revoke");
        drive_one(&mut end, |end| end.take_revoked().len() == 1);
    }
}

#[test]
fn a_mad_peer_is_survived() {
    let (mut listener, address) = crate::tcp_pair::listener(&TcpConfig::default());
    let arena = Arena::new(8);
    for seed in 0..150 {
        let mut noise = Noise::new(seed);
        let (mut peer, mut end) = raw_peer(&mut listener, address);
        for slot in 0..4 {
            let chunk = arena.alloc().expect("a chunk");
            end.link.grant(chunk, slot % 2).expect("grant");
        }
        for _ in 0..1 + noise.below(30) {
            let lane = noise.below(2);
            let bytes = match (lane, noise.below(3)) {
                (0, 0) => {
                    let body = noise.below(3000);
                    let mut bytes = (body as u32).to_le_bytes().to_vec();
                    bytes.extend(noise.vec(body));
                    bytes
                }
                (1, 0 | 1) => {
                    let length = 1 + noise.below(5000);
                    let header = FrameHeader {
                        grant: GrantIndex {
                            index: noise.below(5) as u32,
                            generation: noise.below(2) as u32,
                        },
                        length: length as u32,
                        tag: 0,
                    };
                    let mut bytes = header.encode().to_vec();
                    bytes.extend(noise.vec(length));
                    if noise.below(4) == 0 {
                        noise.mutate(&mut bytes[..24]);
                    }
                    bytes
                }
                _ => {
                    let length = 1 + noise.below(500);
                    noise.vec(length)
                }
            };
            // In pieces, so that headers and lengths arrive torn.
            for piece in bytes.chunks(1 + noise.below(700)) {
                send(&mut peer.lanes[lane], piece);
            }
            if noise.below(3) == 0 {
                end.link.revoke(noise.below(2) as u8).expect("revoke");
            }
            if end.is_ready() {
                end.progress();
            }
        }
        drop(peer);
        drive_one(&mut end, |end| {
            end.count(|seen| matches!(seen, Seen::Lost(_))) == LANES.len()
        });
        drop(end);
        assert_eq!(arena.stats().free_chunks, arena.stats().mapped_chunks);
    }
}
