//! What the link alone can do between two hosts: epochs pushed back to back, each after the
//! acknowledgement of the one before, and small ones pushed and acknowledged.
//!
//!     link_speed serve 10.77.0.2:7071 --transport rdma
//!     link_speed call  10.77.0.2:7071 --transport rdma --mib 64 --commits 500
//!
//! The caller prints one JSON object. `scripts/lab test` runs it beside perftest.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use transport::choice::{Connected, Incoming};
use transport::link::CHUNK_BYTES;
use transport::tcp::PairingId;
use transport::{
    Arena, Chunk, ChunkMut, Event, Grant, Link, TransportChoice, TransportConfig,
    TransportConnector, TransportListener,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Of the largest epoch.
const EPOCH_CHUNKS: usize = 16;
/// Of a small one.
const COMMIT_BYTES: usize = 4096;
/// Small epochs that don't count: memory is registered in the first ones.
const WARM_UP: usize = 20;
/// Chunks granted ahead, as in ft-core/src/backup/fill.rs.
const WINDOW_MIN: usize = 4;
const WINDOW_MAX: usize = 24;
/// What a chunk begins with: whether it is its epoch's last, whether its checksum counts, and the
/// checksum of the rest.
const HEADER_BYTES: usize = 16;
/// What the backup says.
const ACK: u8 = 1;
const GRANTS: u8 = 2;

fn main() -> ExitCode {
    match Arguments::parse().and_then(|it| it.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("link_speed: {error}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug)]
struct Arguments {
    serve: bool,
    address: SocketAddr,
    config: TransportConfig,
    mib: usize,
    commits: usize,
}

impl Arguments {
    fn parse() -> Result<Arguments> {
        let mut words = std::env::args().skip(1);
        let mut next = |what: &str| words.next().ok_or(format!("no {what}"));
        let serve = match next("serve or call")?.as_str() {
            "serve" => true,
            "call" => false,
            other => return Err(format!("{other}: serve or call").into()),
        };
        let address = next("ADDRESS:PORT")?.parse()?;
        let mut arguments = Arguments {
            serve,
            address,
            config: TransportConfig::default(),
            mib: 64,
            commits: 500,
        };
        while let Ok(option) = next("option") {
            let value = next(&option)?;
            match option.as_str() {
                "--transport" => arguments.config.choice = value.parse::<TransportChoice>()?,
                "--mib" => arguments.mib = value.parse()?,
                "--commits" => arguments.commits = value.parse()?,
                _ => return Err(format!("{option}: what?").into()),
            }
        }
        Ok(arguments)
    }

    fn run(&self) -> Result<()> {
        if self.serve {
            return Backup::new(accept(self.address, &self.config)?).serve();
        }
        let connected = connect(self.address, &self.config)?;
        let sentence = connected.sentence.clone();
        let mut primary = Primary::new(connected);
        let bytes = self.mib << 20;
        // Registers memory, and wakes both sides up.
        primary.push_epochs(EPOCH_CHUNKS * CHUNK_BYTES, false)?;
        let plain = primary.push_epochs(bytes, false)?;
        let checked = primary.push_epochs(bytes, true)?;
        let mut commits = primary.commits(self.commits)?;
        commits.sort();
        let quantile =
            |percent: usize| commits[(commits.len() * percent / 100).min(commits.len() - 1)];
        println!(
            "{{\"push_mb_s\": {checked:.3}, \"push_mb_s_without_checksum\": {plain:.3}, \
             \"chunk_commit_us\": {{\"p50\": {}, \"p99\": {}}}, \"said\": \"{sentence}\"}}",
            quantile(50).as_micros(),
            quantile(99).as_micros(),
        );
        Ok(())
    }
}

/// The side that pushes.
struct Primary {
    link: Box<dyn Link>,
    arena: Arena,
    grants: VecDeque<Grant>,
    acknowledged: usize,
    epochs: usize,
}

impl Primary {
    fn new(connected: Connected) -> Primary {
        let arena = Arena::new(2 * EPOCH_CHUNKS);
        arena.reserve(2 * EPOCH_CHUNKS);
        Primary {
            link: connected.link,
            arena,
            grants: VecDeque::new(),
            acknowledged: 0,
            epochs: 0,
        }
    }

    /// Pushes `bytes` in epochs of 1 to 16 MiB; MiB per second until the last acknowledgement.
    fn push_epochs(&mut self, bytes: usize, checksum: bool) -> Result<f64> {
        let mut left = bytes / CHUNK_BYTES;
        let mut size = 0;
        let began = Instant::now();
        while left > 0 {
            // Sizes that look random, and are the same each time.
            size = (size + 7) % EPOCH_CHUNKS;
            let chunks = (1 + size).min(left);
            self.epoch(chunks, CHUNK_BYTES, checksum)?;
            left -= chunks;
        }
        Ok(bytes as f64 / (1 << 20) as f64 / began.elapsed().as_secs_f64())
    }

    /// How long each small epoch took.
    fn commits(&mut self, count: usize) -> Result<Vec<Duration>> {
        let mut took = Vec::with_capacity(count);
        for number in 0..WARM_UP + count {
            // The grants come with the acknowledgement before.
            while self.grants.is_empty() {
                self.turn()?;
            }
            let began = Instant::now();
            self.epoch(1, COMMIT_BYTES, true)?;
            if number >= WARM_UP {
                took.push(began.elapsed());
            }
        }
        Ok(took)
    }

    fn epoch(&mut self, chunks: usize, bytes: usize, checksum: bool) -> Result<()> {
        for index in 0..chunks {
            let chunk = loop {
                match self.arena.alloc().filter(|_| !self.grants.is_empty()) {
                    Some(chunk) => break chunk,
                    None => self.turn()?,
                }
            };
            let chunk = fill(chunk, bytes, index + 1 == chunks, checksum);
            let to = self.grants.pop_front().ok_or("no grant")?;
            self.link.push(chunk, to, index as u32)?;
            self.link.flush()?;
        }
        self.epochs += 1;
        while self.acknowledged < self.epochs {
            self.turn()?;
        }
        Ok(())
    }

    fn turn(&mut self) -> Result<()> {
        wait(self.link.ready_fd(), None)?;
        let (grants, acknowledged) = (&mut self.grants, &mut self.acknowledged);
        let mut wrong = None;
        self.link.progress(&mut |event| match event {
            Event::Message([ACK]) => {
                *acknowledged += 1;
                // What is left was taken back.
                grants.clear();
            }
            Event::Message([GRANTS, fresh @ ..]) => {
                grants.extend(fresh.as_chunks::<24>().0.iter().map(|bytes| Grant(*bytes)));
            }
            // The arena has it again.
            Event::Pushed(_) => {}
            other => wrong = Some(format!("{other:?}")),
        })?;
        wrong.map_or(Ok(()), |what| Err(what.into()))
    }
}

/// The side that is filled, as the product's backup does it: grants are given ahead, and those that
/// an epoch didn't need are taken back before it is acknowledged.
struct Backup {
    link: Box<dyn Link>,
    arena: Arena,
    slot: u8,
    /// Chunks that are granted.
    outstanding: usize,
    /// Chunks of the last epoch.
    recent: usize,
}

impl Backup {
    fn new(connected: Connected) -> Backup {
        let arena = Arena::new(3 * WINDOW_MAX);
        arena.reserve(2 * WINDOW_MAX);
        Backup {
            link: connected.link,
            arena,
            slot: 0,
            outstanding: 0,
            recent: 0,
        }
    }

    /// Until the caller leaves.
    fn serve(&mut self) -> Result<()> {
        let mut filled = Vec::new();
        self.grant()?;
        loop {
            let (mut arrived, mut lost) = (Vec::new(), false);
            wait(self.link.ready_fd(), None)?;
            self.link.progress(&mut |event| match event {
                Event::Arrived { chunk, .. } => arrived.push(chunk),
                Event::Lost(_) => lost = true,
                // The arena has it again.
                _ => {}
            })?;
            if lost {
                return Ok(());
            }
            for chunk in arrived {
                self.outstanding -= 1;
                let is_last = check(&chunk)?;
                filled.push(chunk);
                if is_last {
                    self.link.revoke(self.slot)?;
                    self.link.send(&[ACK])?;
                    self.link.flush()?;
                    (self.recent, self.outstanding) = (filled.len(), 0);
                    self.slot ^= 1;
                    filled.clear();
                }
                self.grant()?;
            }
        }
    }

    fn grant(&mut self) -> Result<()> {
        let window = (self.recent + self.recent / 2 + 2).clamp(WINDOW_MIN, WINDOW_MAX);
        if self.outstanding > window / 2 {
            return Ok(());
        }
        let mut message = vec![GRANTS];
        while self.outstanding < window {
            let chunk = self.arena.alloc().ok_or("no chunk")?;
            message.extend(self.link.grant(chunk, self.slot)?.0);
            self.outstanding += 1;
        }
        self.link.send(&message)?;
        Ok(self.link.flush()?)
    }
}

fn fill(mut chunk: ChunkMut, bytes: usize, is_last: bool, checksum: bool) -> Chunk {
    let memory = &mut chunk.as_mut_slice()[..bytes];
    let sum = if checksum {
        sum(&memory[HEADER_BYTES..])
    } else {
        0
    };
    memory[0] = u8::from(is_last);
    memory[1] = u8::from(checksum);
    memory[8..HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
    chunk.freeze(bytes)
}

/// Whether it is its epoch's last.
fn check(chunk: &Chunk) -> Result<bool> {
    let bytes = chunk.bytes();
    let expected = u64::from_le_bytes(*bytes[8..].first_chunk().ok_or("a short chunk")?);
    if bytes[1] == 1 && sum(&bytes[HEADER_BYTES..]) != expected {
        return Err("a chunk arrived with other bytes".into());
    }
    Ok(bytes[0] == 1)
}

/// The product's checksum.
fn sum(bytes: &[u8]) -> u64 {
    u64::from(crc_fast::crc32_iscsi(bytes))
}

fn accept(address: SocketAddr, config: &TransportConfig) -> Result<Connected> {
    let mut listener = TransportListener::bind(address, config)?;
    loop {
        wait(listener.ready_fd(), listener.next_deadline())?;
        let (mut connected, mut refused) = (None, None);
        listener.progress(&mut |incoming| match incoming {
            Incoming::Link(link) => connected = Some(link),
            Incoming::Refused { reason, .. } => refused = Some(reason),
        })?;
        match (connected, refused) {
            (Some(connected), _) => return Ok(connected),
            (None, Some(reason)) => return Err(reason.into()),
            (None, None) => {}
        }
    }
}

fn connect(address: SocketAddr, config: &TransportConfig) -> Result<Connected> {
    let mut connector = TransportConnector::start(address, PairingId([7; 16]), config)?;
    loop {
        wait(connector.ready_fd(), Some(connector.next_deadline()))?;
        if let Some(connected) = connector.progress()? {
            return Ok(connected);
        }
    }
}

fn wait(fd: BorrowedFd<'_>, until: Option<Instant>) -> Result<()> {
    let patience = until.map_or(PollTimeout::NONE, |at| {
        let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    });
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], patience)?;
    Ok(())
}
