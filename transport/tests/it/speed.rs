//! How fast the TCP link is beside plain blocking sockets. Prints, asserts nothing:
//! `cargo test --release -p transport --test speed -- --ignored --nocapture`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use transport::link::CHUNK_BYTES;
use transport::tcp::{Incoming, TcpConfig, TcpConnector, TcpLink};
use transport::{Arena, Event, Grant, Link};

const ROUNDS: usize = 7;
const STREAM_BYTES: usize = 1 << 30;
const PING_PONGS: usize = 4_000;
/// Chunks that the receiver lets the sender fill at once.
const WINDOW: usize = 32;

#[test]
#[ignore = "a measurement"]
fn stream() {
    beside("stream, GB/s", plain_stream, link_stream);
}

#[test]
#[ignore = "a measurement"]
fn message_and_back() {
    beside("64 B and back, us", || plain_ping_pong(64), link_ping_pong);
}

#[test]
#[ignore = "a measurement"]
fn commit() {
    for pages in [1, 16, 64] {
        let bytes = pages * 4096;
        beside(
            &format!("{pages} pages and an ack, us"),
            || plain_ping_pong(bytes),
            || link_commit(bytes),
        );
    }
}

/// Alternates, and prints the medians: of what is measured, and of the CPU time that both ends
/// took together, which says more on a busy machine.
fn beside(what: &str, plain: impl Fn() -> f64, link: impl Fn() -> f64) {
    let with_cpu = |run: &dyn Fn() -> f64| {
        let before = cpu_ms();
        let value = run();
        (value, cpu_ms() - before)
    };
    let (plains, links): (Vec<_>, Vec<_>) = (0..ROUNDS)
        .map(|_| (with_cpu(&plain), with_cpu(&link)))
        .unzip();
    for (name, runs) in [("plain", plains), ("link", links)] {
        let (mut values, mut cpu): (Vec<_>, Vec<_>) = runs.into_iter().unzip();
        values.sort_by(f64::total_cmp);
        cpu.sort_by(f64::total_cmp);
        let (low, median, high) = (values[0], values[ROUNDS / 2], values[ROUNDS - 1]);
        let cpu = cpu[ROUNDS / 2];
        println!("{what:26} {name:6} {median:8.2}  ({low:.2} to {high:.2}), {cpu:.0} ms of CPU");
    }
}

/// What all threads of this process have used.
fn cpu_ms() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("getrusage");
    let total = usage.user_time() + usage.system_time();
    total.num_microseconds() as f64 / 1e3
}

fn plain_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let near = TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
    let (far, _) = listener.accept().expect("accept");
    near.set_nodelay(true).expect("nodelay");
    far.set_nodelay(true).expect("nodelay");
    (near, far)
}

fn buffers() -> Vec<Vec<u8>> {
    (0..WINDOW).map(|i| vec![i as u8; CHUNK_BYTES]).collect()
}

fn plain_stream() -> f64 {
    let (mut near, mut far) = plain_pair();
    let receiver = thread::spawn(move || {
        let mut buffers = buffers();
        for i in 0..STREAM_BYTES / CHUNK_BYTES {
            far.read_exact(&mut buffers[i % WINDOW]).expect("read");
        }
        far.write_all(&[1]).expect("write");
    });
    let buffers = buffers();
    let start = Instant::now();
    for i in 0..STREAM_BYTES / CHUNK_BYTES {
        near.write_all(&buffers[i % WINDOW]).expect("write");
    }
    near.read_exact(&mut [0]).expect("read");
    let speed = STREAM_BYTES as f64 / start.elapsed().as_secs_f64() / 1e9;
    receiver.join().expect("receiver");
    speed
}

/// Times of repeated laps.
#[derive(Default)]
struct Laps(Vec<Instant>);

impl Laps {
    fn lap(&mut self) {
        self.0.push(Instant::now());
    }

    /// A quick lap in microseconds, the first in ten: the machine is shared, and a slow one says
    /// more about the others.
    fn quick(&self) -> f64 {
        let mut laps: Vec<_> = self.0.windows(2).map(|it| it[1] - it[0]).collect();
        laps.sort();
        laps[laps.len() / 10].as_secs_f64() * 1e6
    }
}

/// Waits as a driver does: poll, then read.
fn wait(fd: std::os::fd::BorrowedFd<'_>) {
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE).expect("poll");
}

fn plain_ping_pong(bytes: usize) -> f64 {
    let (mut near, mut far) = plain_pair();
    let rounds = PING_PONGS;
    let echo = thread::spawn(move || {
        let mut buffer = vec![0; bytes];
        for _ in 0..rounds {
            wait(far.as_fd());
            far.read_exact(&mut buffer).expect("read");
            far.write_all(&buffer[..64]).expect("write");
        }
    });
    let buffer = vec![1; bytes];
    let mut answer = [0; 64];
    let mut laps = Laps::default();
    laps.lap();
    for _ in 0..rounds {
        near.write_all(&buffer).expect("write");
        wait(near.as_fd());
        near.read_exact(&mut answer).expect("read");
        laps.lap();
    }
    echo.join().expect("echo");
    laps.quick()
}

/// Each end in a thread of its own; the result is `near`'s.
fn with_links<T>(near: impl FnOnce(TcpLink) -> T, far: impl FnOnce(TcpLink) + Send) -> T {
    let config = TcpConfig::default();
    let (mut listener, address) = crate::tcp_pair::listener(&config);
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut link = None;
            while link.is_none() {
                wait(listener.ready_fd());
                listener
                    .progress(&mut |incoming| {
                        if let Incoming::Link(made) = incoming {
                            link = Some(made);
                        }
                    })
                    .expect("listener");
            }
            far(link.expect("just made"));
        });
        near(connected(address, &config))
    })
}

fn connected(address: SocketAddr, config: &TcpConfig) -> TcpLink {
    let mut connector =
        TcpConnector::start(address, crate::tcp_pair::pairing(), config).expect("start");
    loop {
        wait(connector.ready_fd());
        if let Some(link) = connector.progress().expect("connector") {
            return link;
        }
    }
}

fn turn(link: &mut TcpLink, mut sink: impl FnMut(Event<'_>)) {
    wait(link.ready_fd());
    link.progress(&mut |event| {
        if let Event::Lost(loss) = &event {
            panic!("lost: {loss:?}");
        }
        sink(event);
    })
    .expect("progress");
}

fn link_ping_pong() -> f64 {
    let message = [7; 64];
    with_links(
        |mut link| {
            let mut laps = Laps::default();
            laps.lap();
            for _ in 0..PING_PONGS {
                link.send(&message).expect("send");
                link.flush().expect("flush");
                let mut answered = false;
                while !answered {
                    turn(&mut link, |event| {
                        answered |= matches!(event, Event::Message(_))
                    });
                }
                laps.lap();
            }
            laps.quick()
        },
        |mut link| {
            for _ in 0..PING_PONGS {
                let mut asked = false;
                while !asked {
                    turn(&mut link, |event| {
                        asked |= matches!(event, Event::Message(_))
                    });
                }
                link.send(&message).expect("send");
                link.flush().expect("flush");
            }
            linger(link);
        },
    )
}

/// The other end may still be reading.
fn linger(mut link: TcpLink) {
    let mut open = true;
    while open {
        wait(link.ready_fd());
        link.progress(&mut |event| open &= !matches!(event, Event::Lost(_)))
            .expect("progress");
    }
}

fn read_grants(bytes: &[u8]) -> impl Iterator<Item = Grant> {
    let (grants, rest) = bytes.as_chunks::<24>();
    assert!(rest.is_empty());
    grants.iter().map(|it| Grant(*it))
}

/// Grants `fresh` and says so in one message.
fn grant(link: &mut TcpLink, fresh: impl Iterator<Item = transport::ChunkMut>) {
    let mut message = Vec::with_capacity(24 * WINDOW);
    for chunk in fresh {
        message.extend_from_slice(&link.grant(chunk, 0).expect("grant").0);
    }
    if !message.is_empty() {
        link.send(&message).expect("send");
    }
}

fn link_stream() -> f64 {
    let chunks = STREAM_BYTES / CHUNK_BYTES;
    with_links(
        |mut link| {
            let arena = Arena::new(WINDOW);
            arena.reserve(WINDOW);
            let mut free: Vec<_> = std::iter::from_fn(|| arena.alloc()).collect();
            let mut grants: Vec<Grant> = Vec::new();
            let (mut queued, mut pushed, mut done) = (0, 0, false);
            let start = Instant::now();
            while pushed < chunks {
                while queued < chunks && !grants.is_empty() && !free.is_empty() {
                    let chunk = free.pop().expect("one is free").freeze(CHUNK_BYTES);
                    let to = grants.pop().expect("one is there");
                    link.push(chunk, to, queued as u32).expect("push");
                    queued += 1;
                }
                link.flush().expect("flush");
                turn(&mut link, |event| match event {
                    Event::Message(b"done") => done = true,
                    Event::Message(bytes) => grants.extend(read_grants(bytes)),
                    Event::Pushed(chunk) => {
                        free.push(chunk.thaw());
                        pushed += 1;
                    }
                    _ => {}
                });
            }
            while !done {
                turn(&mut link, |event| {
                    done |= matches!(event, Event::Message(b"done"));
                });
            }
            STREAM_BYTES as f64 / start.elapsed().as_secs_f64() / 1e9
        },
        |mut link| {
            let arena = Arena::new(WINDOW);
            arena.reserve(WINDOW);
            grant(&mut link, std::iter::from_fn(|| arena.alloc()));
            link.flush().expect("flush");
            let mut arrived = 0;
            let mut back = Vec::new();
            while arrived < chunks {
                turn(&mut link, |event| {
                    if let Event::Arrived { chunk, .. } = event {
                        arrived += 1;
                        back.push(chunk.thaw());
                    }
                });
                grant(&mut link, back.drain(..));
                link.flush().expect("flush");
            }
            link.send(b"done").expect("send");
            link.flush().expect("flush");
            linger(link);
        },
    )
}

/// One chunk pushed and acknowledged; the grant comes with the acknowledgement.
fn link_commit(bytes: usize) -> f64 {
    with_links(
        move |mut link| {
            let arena = Arena::new(2);
            let mut free = vec![arena.alloc().expect("a chunk")];
            let mut next: Option<Grant> = None;
            let mut laps = Laps::default();
            for round in 0..=PING_PONGS {
                while next.is_none() || free.is_empty() {
                    turn(&mut link, |event| match event {
                        Event::Message(bytes) => next = read_grants(bytes).next(),
                        Event::Pushed(chunk) => free.push(chunk.thaw()),
                        _ => {}
                    });
                }
                laps.lap();
                if round == PING_PONGS {
                    break;
                }
                let chunk = free.pop().expect("one is free").freeze(bytes);
                let to = next.take().expect("one is there");
                link.push(chunk, to, 0).expect("push");
                link.flush().expect("flush");
            }
            laps.quick()
        },
        |mut link| {
            let arena = Arena::new(2);
            grant(&mut link, arena.alloc().into_iter());
            link.flush().expect("flush");
            for _ in 0..PING_PONGS {
                let mut back = None;
                while back.is_none() {
                    turn(&mut link, |event| {
                        if let Event::Arrived { chunk, .. } = event {
                            back = Some(chunk.thaw());
                        }
                    });
                }
                grant(&mut link, back.into_iter());
                link.flush().expect("flush");
            }
            linger(link);
        },
    )
}
