//! Two network namespaces with a cable between them that can be cut: what loopback can't show.
//!
//! Needs the right to make namespaces (CAP_SYS_ADMIN) and `ip`; without, the tests say loudly that
//! they did not run. The kernel removes everything when the threads end.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;
use transport::tcp::{Incoming, TcpConfig, TcpConnector, TcpLink, TcpListener, ZeroCopy};
use transport::{Arena, Event, Lane, Link, LossKind};

use crate::conformance::{End, Seen, WATCHDOG, WHOLE, drive_one, filled, wait_readable};
use crate::tcp_pair;

const NEAR: &str = "10.253.7.1";
const FAR: &str = "10.253.7.2";
/// Whatever the far side can fill, so that the near one never runs out of grants.
const GRANTS: usize = 32;

/// Runs `test` on a link from one host to another, with what cuts the cable.
fn on_two_hosts(config: &TcpConfig, test: impl FnOnce(End<TcpLink>, &dyn Fn()) + Send) {
    let over = &AtomicBool::new(false);
    let (to_near, from_far) = mpsc::channel();
    let (to_far, from_near) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
                crate::not_run("a cut cable", &format!("needs network namespaces: {errno}"));
                return to_near.send(None).expect("the near host waits");
            }
            to_near.send(Some(gettid())).expect("the near host waits");
            from_near.recv().expect("the near host laid the cable");
            ip(&format!("addr add {FAR}/24 dev far"));
            ip("link set far up");
            let address = format!("{FAR}:7070").parse().expect("an address");
            let listener = TcpListener::bind(address, config).expect("listening");
            to_near.send(None).expect("the near host waits");
            far_host(listener, over);
        });
        scope.spawn(move || {
            let Some(far) = from_far.recv().expect("the far host runs") else {
                return;
            };
            unshare(CloneFlags::CLONE_NEWNET).expect("the far host could");
            ip(&format!(
                "link add near type veth peer name far netns {far}"
            ));
            ip(&format!("addr add {NEAR}/24 dev near"));
            ip("link set near up");
            to_far.send(()).expect("the far host waits");
            from_far.recv().expect("the far host listens");
            let address = format!("{FAR}:7070").parse().expect("an address");
            let link = End::new(connected(address, config));
            let _over = SetOnDrop(over);
            test(link, &|| ip("link set near down"));
        });
    });
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// In the namespace of the calling thread.
fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .expect("iproute2 is installed");
    assert!(status.success(), "ip {arguments}");
}

/// Grants chunks and takes what comes, until the test is over.
fn far_host(mut listener: TcpListener, over: &AtomicBool) {
    let arena = Arena::new(GRANTS);
    let mut link: Option<TcpLink> = None;
    while !over.load(Ordering::Relaxed) {
        let Some(link) = &mut link else {
            wait_readable(&[listener.ready_fd()], Duration::from_millis(5));
            listener
                .progress(&mut |incoming| match incoming {
                    Incoming::Link(it) => link = Some(it),
                    Incoming::Refused { reason, .. } => panic!("{reason}"),
                })
                .expect("listener");
            continue;
        };
        while let Some(chunk) = arena.alloc() {
            let grant = link.grant(chunk, 0).expect("grant");
            // Without room the near host has enough of them.
            let _ = link.send(&grant.0);
        }
        link.flush().expect("flush");
        wait_readable(&[link.ready_fd()], Duration::from_millis(5));
        link.progress(&mut |event| drop(Seen::from(event)))
            .expect("progress");
    }
}

fn connected(address: SocketAddr, config: &TcpConfig) -> TcpLink {
    let mut connector = TcpConnector::start(address, tcp_pair::pairing(), config).expect("start");
    loop {
        wait_readable(&[connector.ready_fd()], WATCHDOG);
        if let Some(link) = connector.progress().expect("connector") {
            return link;
        }
    }
}

fn grants(end: &mut End<TcpLink>, count: usize) -> Vec<transport::Grant> {
    drive_one(end, |end| {
        end.count(|it| matches!(it, Seen::Message(_))) >= count
    });
    let messages = end.take_messages().into_iter();
    let grant = |it: Vec<u8>| transport::Grant(it.try_into().expect("24 bytes"));
    messages.map(grant).collect()
}

#[test]
fn a_cut_cable_is_an_error_on_every_lane_and_no_proof() {
    let config = TcpConfig {
        user_timeout: Duration::from_millis(500),
        ..TcpConfig::default()
    };
    on_two_hosts(&config, |mut end, cut| {
        let arena = Arena::new(4);
        let grants = grants(&mut end, 4);
        cut();
        end.push(filled(&arena, WHOLE, 1), grants[0], 1);
        end.send(b"are you there?");
        drive_one(&mut end, |end| {
            end.count(|it| matches!(it, Seen::Lost(_))) == 3
        });
        for loss in end.take_losses() {
            println!("{loss:?}");
            assert!(matches!(loss.kind, LossKind::Error(_)), "{loss:?}");
        }
        assert_eq!(end.take_pushed().len(), 1);
    });
}

#[test]
fn a_dropped_link_takes_back_what_was_sent_without_copying() {
    let config = TcpConfig {
        zero_copy: ZeroCopy::Always,
        ..TcpConfig::default()
    };
    on_two_hosts(&config, |mut end, cut| {
        let arena = Arena::new(8);
        let grants = grants(&mut end, 8);
        // One that goes through.
        end.push(filled(&arena, WHOLE, 0), grants[0], 0);
        end.flush();
        drive_one(&mut end, |end| end.take_pushed().len() == 1);
        cut();
        for (tag, to) in grants.into_iter().enumerate().take(8).skip(1) {
            end.push(filled(&arena, WHOLE, 0), to, tag as u32);
        }
        end.flush();
        while end.is_ready() {
            end.progress();
        }
        assert_eq!(end.take_pushed().len(), 0, "nobody acknowledged them");
        drop(end);
        assert_eq!(arena.stats().free_chunks, arena.stats().mapped_chunks);
    });
}

#[test]
fn a_lane_lost_to_silence_is_told_from_one_that_ended() {
    let config = TcpConfig {
        user_timeout: Duration::from_millis(500),
        ..TcpConfig::default()
    };
    on_two_hosts(&config, |mut end, cut| {
        grants(&mut end, 1);
        cut();
        // Nothing is sent: only keepalive can notice.
        let mut lost = Vec::new();
        while lost.len() < 3 {
            wait_readable(&[end.link.ready_fd()], WATCHDOG);
            end.link
                .progress(&mut |event| {
                    if let Event::Lost(loss) = event {
                        lost.push(loss);
                    }
                })
                .expect("progress");
        }
        let proof = lost.iter().find(|it| it.lane == Lane::Proof);
        let kind = &proof.expect("all three are lost").kind;
        assert!(matches!(kind, LossKind::Error(_)), "{kind:?}");
    });
}
