//! One epoch there and its acknowledgement back, over anything that can carry it. Both ends live in
//! this process, each in a thread of its own, on a processor of its own.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener as PlainListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use crc_fast::{CrcAlgorithm, checksum};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use transport::link::CHUNK_BYTES;
use transport::tcp::{Incoming, PairingId, TcpConfig, TcpConnector, TcpListener};
use transport::{Arena, Chunk, ChunkMut, Event, Grant, Link};

use crate::processor::Pinned;

const PAGE_BYTES: usize = 4096;
/// A chunk's first page holds its header and its entries.
const PAGES_PER_CHUNK: usize = CHUNK_BYTES / PAGE_BYTES - 1;
/// What sockets answer with: as long as a message's header.
const ACK_BYTES: usize = 64;

/// An epoch's chunks.
#[derive(Clone, Debug)]
pub(crate) struct Epoch {
    /// Bytes in use of each chunk.
    chunks: Vec<usize>,
}

impl Epoch {
    pub(crate) fn new(pages: usize) -> Epoch {
        let count = pages.div_ceil(PAGES_PER_CHUNK).max(1);
        let used = |chunk: usize| {
            let left = pages - chunk * PAGES_PER_CHUNK;
            (1 + left.min(PAGES_PER_CHUNK)) * PAGE_BYTES
        };
        let chunks = (0..count).map(used).collect();
        Epoch { chunks }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.chunks.iter().sum()
    }
}

/// Something that carries epochs.
pub(crate) trait Lap {
    /// Carries one: from the first checksum to the acknowledgement.
    fn lap(&mut self) -> Duration;
}

/// As the driver does it: sleep in poll, then look.
fn wait(fd: BorrowedFd<'_>) {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::NONE).expect("polling a descriptor that is open");
}

fn sum(bytes: &[u8]) {
    std::hint::black_box(checksum(CrcAlgorithm::Crc32Iscsi, bytes));
}

/// For the far ends; the near one is pinned by the group.
fn far_processor() -> Option<Pinned> {
    let pinned = Pinned::to(1);
    if let Err(error) = &pinned {
        eprintln!("report: the far end's processor: {error:#}");
    }
    pinned.ok()
}

/// Plain blocking sockets.
pub(crate) struct Sockets {
    near: TcpStream,
    epoch: Epoch,
    chunks: Vec<Vec<u8>>,
}

pub(crate) fn sockets(epoch: &Epoch) -> Result<Sockets> {
    let listener = PlainListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let buffers = || epoch.chunks.iter().map(|_| vec![1; CHUNK_BYTES]).collect();
    let (theirs, room) = (epoch.clone(), buffers());
    std::thread::spawn(move || {
        let _pinned = far_processor();
        answer(far, &theirs, room);
    });
    Ok(Sockets {
        near,
        epoch: epoch.clone(),
        chunks: buffers(),
    })
}

/// The far end; until the near one is dropped.
fn answer(mut far: TcpStream, epoch: &Epoch, mut room: Vec<Vec<u8>>) {
    loop {
        wait(far.as_fd());
        for (used, chunk) in epoch.chunks.iter().zip(&mut room) {
            if far.read_exact(&mut chunk[..*used]).is_err() {
                return;
            }
            sum(&chunk[..*used]);
        }
        if far.write_all(&[0; ACK_BYTES]).is_err() {
            return;
        }
    }
}

impl Lap for Sockets {
    fn lap(&mut self) -> Duration {
        let began = Instant::now();
        for (used, chunk) in self.epoch.chunks.iter().zip(&self.chunks) {
            sum(&chunk[..*used]);
            self.near
                .write_all(&chunk[..*used])
                .expect("writing to loopback");
        }
        wait(self.near.as_fd());
        self.near
            .read_exact(&mut [0; ACK_BYTES])
            .expect("reading from loopback");
        began.elapsed()
    }
}

/// One of our links.
pub(crate) struct Ours<L> {
    near: L,
    epoch: Epoch,
    free: Vec<ChunkMut>,
    /// A whole epoch's come in one message: the acknowledgement of the one before.
    grants: Vec<Grant>,
}

/// Inside this process.
pub(crate) fn mem(epoch: &Epoch) -> Result<impl Lap> {
    let (near, far) = transport::mem::pair()?;
    Ours::start(epoch, || Ok(near), move || Ok(far))
}

/// Over loopback.
pub(crate) fn tcp(epoch: &Epoch) -> Result<impl Lap> {
    let config = TcpConfig::default();
    let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut listener = TcpListener::bind(any_port, &config)?;
    let address = listener.local_addr()?;
    // A ring belongs to the thread that has made it.
    let far = move || {
        let mut link = Err(anyhow!("nobody connected"));
        while link.is_err() {
            wait(listener.ready_fd());
            listener.progress(&mut |incoming| {
                if let Incoming::Link(made) = incoming {
                    link = Ok(made);
                }
            })?;
        }
        link
    };
    let near = || {
        let mut connector = TcpConnector::start(address, pairing(), &config)?;
        loop {
            wait(connector.ready_fd());
            if let Some(link) = connector.progress()? {
                return Ok::<_, anyhow::Error>(link);
            }
        }
    };
    Ours::start(epoch, near, far)
}

/// Unlike any other of this process.
fn pairing() -> PairingId {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut id = [0; 16];
    id[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    id[8..12].copy_from_slice(&std::process::id().to_le_bytes());
    PairingId(id)
}

impl<L: Link> Ours<L> {
    /// Each end is made in the thread that drives it, and while the other one is.
    fn start<F: Link>(
        epoch: &Epoch,
        near: impl FnOnce() -> Result<L>,
        far: impl FnOnce() -> Result<F> + Send + 'static,
    ) -> Result<Ours<L>> {
        let theirs = epoch.clone();
        std::thread::spawn(move || {
            let _pinned = far_processor();
            let received = far().and_then(|link| receive(link, &theirs));
            if let Err(error) = received {
                eprintln!("report: the link's far end: {error:#}");
            }
        });
        let count = epoch.chunks.len();
        let arena = Arena::new(count);
        arena.reserve(count);
        let free: Vec<_> = std::iter::from_fn(|| arena.alloc()).collect();
        anyhow::ensure!(free.len() == count, "no memory for {count} chunks");
        Ok(Ours {
            near: near()?,
            epoch: epoch.clone(),
            free,
            grants: Vec::new(),
        })
    }

    fn turn(&mut self) {
        wait(self.near.ready_fd());
        let (grants, free) = (&mut self.grants, &mut self.free);
        let mut sink = |event: Event<'_>| match event {
            Event::Message(bytes) => {
                let (fresh, _) = bytes.as_chunks::<24>();
                grants.extend(fresh.iter().map(|it| Grant(*it)));
            }
            Event::Pushed(chunk) => free.push(chunk.thaw()),
            Event::Lost(loss) => panic!("the link under test is lost: {loss:?}"),
            Event::Arrived { .. } | Event::Revoked(_) => {}
        };
        self.near.progress(&mut sink).expect("the link under test");
    }
}

impl<L: Link> Lap for Ours<L> {
    fn lap(&mut self) -> Duration {
        let count = self.epoch.chunks.len();
        while self.grants.len() < count || self.free.len() < count {
            self.turn();
        }
        let began = Instant::now();
        for used in self.epoch.chunks.clone() {
            let chunk = self.free.pop().expect("they were counted");
            let grant = self.grants.pop().expect("they were counted");
            sum(&chunk.as_slice()[..used]);
            self.near
                .push(chunk.freeze(used), grant, 0)
                .expect("the link under test");
            self.near.flush().expect("the link under test");
        }
        while self.grants.len() < count {
            self.turn();
        }
        began.elapsed()
    }
}

/// The far end; until the near one is dropped.
fn receive(mut link: impl Link, epoch: &Epoch) -> Result<()> {
    let count = epoch.chunks.len();
    let arena = Arena::new(count);
    arena.reserve(count);
    let mut arrived: Vec<Chunk> = Vec::new();
    grant(&mut link, std::iter::from_fn(|| arena.alloc()))?;
    let mut open = true;
    while open {
        wait(link.ready_fd());
        let mut sink = |event: Event<'_>| match event {
            Event::Arrived { chunk, .. } => {
                sum(chunk.bytes());
                arrived.push(chunk);
            }
            Event::Lost(_) => open = false,
            _ => {}
        };
        link.progress(&mut sink).context("the far end")?;
        if arrived.len() == count {
            grant(&mut link, arrived.drain(..).map(Chunk::thaw))?;
        }
    }
    Ok(())
}

/// Grants chunks, in one message.
fn grant(link: &mut impl Link, chunks: impl Iterator<Item = ChunkMut>) -> Result<()> {
    let mut message = Vec::new();
    for chunk in chunks {
        message.extend_from_slice(&link.grant(chunk, 0)?.0);
    }
    link.send(&message)?;
    link.flush()?;
    Ok(())
}
