//! A man in the middle between the two daemons: every connection passes through, and a test can
//! stop the traffic at a chosen byte of a push, or before an acknowledgement.
//!
//! So the phase in which a host dies is proven by what had passed, not guessed from the time. Of
//! the wire it knows only what it needs, on its own: which lane a connection is, where a chunk and
//! a control message begin and end, and the epoch in their headers.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The connecting side's first bytes on each lane, and the answer to them.
const PREAMBLE_BYTES: usize = 32;
const REPLY_BYTES: usize = 16;
const CONTROL_LANE: u8 = 1;
const BULK_LANE: u8 = 2;
/// Before a chunk: magic, grant, generation, length, tag, zero; 32 bits each.
const FRAME_BYTES: usize = 24;
const LENGTH_IN_FRAME: usize = 12;
/// The header of a chunk and of a message.
const HEADER_BYTES: usize = 64;
const KIND_IN_HEADER: usize = 6;
const EPOCH_IN_HEADER: usize = 32;
const FLAGS_IN_HEADER: usize = 52;
const ACK_KIND: u16 = 4;
const LAST_FLAG: u8 = 1;

/// Where the traffic is to stop; of the first epoch that begins to be pushed afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// When this many thousandths of the previous epoch's bytes have passed, at the latest before
    /// the end of the last chunk.
    InPush { thousandths: u64 },
    /// All of the epoch has passed, and its acknowledgement has arrived here: it goes no further.
    BeforeAck,
    /// Its acknowledgement has arrived here, and passes on; the backup is sent SIGSTOP `after`
    /// that, so that one can look how far it is.
    Freeze { backup: Pid, after: Duration },
}

/// What has passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// The newest epoch of which anything was pushed, and how many of its bytes.
    pub pushed_epoch: u64,
    pub pushed_bytes: u64,
    /// The newest epoch whose last chunk has passed as a whole, and how many bytes it had.
    pub complete_epoch: u64,
    pub complete_bytes: u64,
    /// The newest epoch whose acknowledgement has come from the backup.
    pub acked_epoch: u64,
}

#[derive(Debug, Default)]
struct State {
    passed: Passed,
    stop: Option<Stop>,
    /// The epoch that `stop` is about, once one has begun.
    target_epoch: Option<u64>,
    reached: bool,
    /// The guest stands still for its copy: what is pushed meanwhile waits.
    pushes_held: bool,
    /// The host is dead: what is held is lost with it.
    dead: bool,
    /// Both ends of every connection, to be ended with the relay.
    streams: Vec<TcpStream>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// A relay that runs until it is dropped.
#[derive(Debug)]
pub struct Relay {
    pub port: u16,
    shared: Arc<Shared>,
}

impl Relay {
    /// Listens on a loopback port in front of the backup at `backup_port`.
    ///
    /// # Errors
    /// There is no free port.
    pub fn start(backup_port: u16) -> Result<Relay> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("making the relay's socket")?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared::default());
        let accepting = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || {
                for primary in listener.incoming().flatten() {
                    if accepting.lock().dead {
                        return;
                    }
                    // A backup that doesn't listen yet: the primary sees its connection end, and
                    // tries again.
                    if let Ok(backup) = TcpStream::connect(("127.0.0.1", backup_port)) {
                        let _ = accepting.join(primary, backup);
                    }
                }
            })?;
        Ok(Relay { port, shared })
    }

    pub fn passed(&self) -> Passed {
        self.shared.lock().passed
    }

    /// What has passed, for a thread of its own to look at.
    pub fn watch(&self) -> Watcher {
        Watcher {
            shared: Arc::clone(&self.shared),
        }
    }

    /// Asks for the traffic to stop, and waits until it has. Returns the epoch that it is about.
    ///
    /// # Errors
    /// It does not come to that in time.
    pub fn stop_at(&self, stop: Stop, patience: Duration) -> Result<u64> {
        let mut state = self.shared.lock();
        state.stop = Some(stop);
        state.target_epoch = None;
        state.reached = false;
        let wait = |state: &mut State| !state.reached;
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, patience, wait);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        ensure!(
            state.reached,
            "{stop:?} was not reached in {patience:?}: {:?}",
            state.passed
        );
        state.target_epoch.context("a stop without an epoch")
    }

    /// Resets every connection, which proves nobody's death; new ones pass.
    pub fn cut(&self) {
        let streams = std::mem::take(&mut self.shared.lock().streams);
        streams.iter().for_each(reset);
    }

    /// The host is dead: what is held here is lost, and new connections are turned away.
    pub fn host_died(&self) {
        self.shared.lock().dead = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.host_died();
        for stream in &self.shared.lock().streams {
            let _ = stream.shutdown(Shutdown::Both);
        }
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// Looks at what has passed, from the thread that takes the copies.
#[derive(Clone, Debug)]
pub struct Watcher {
    shared: Arc<Shared>,
}

impl Watcher {
    pub fn passed(&self) -> Passed {
        self.shared.lock().passed
    }

    /// Lets pushes wait, or go on. A copy of all RAM takes so long that the whole epoch would be
    /// over before `cont` is let through: what comes after it in life has to come after it here.
    pub fn hold_pushes(&self, hold: bool) {
        self.shared.lock().pushes_held = hold;
        self.shared.changed.notify_all();
    }
}

/// Which way, on which lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    ToBackup,
    ToPrimary,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on between two connections, each way in a thread of its own.
    fn join(self: &Arc<Self>, primary: TcpStream, backup: TcpStream) -> Result<()> {
        for stream in [&primary, &backup] {
            stream.set_nodelay(true)?;
            self.lock().streams.push(stream.try_clone()?);
        }
        let lane = Arc::new(Mutex::new(0));
        let ends = [
            (Flow::ToBackup, primary.try_clone()?, backup.try_clone()?),
            (Flow::ToPrimary, backup, primary),
        ];
        for (flow, from, to) in ends {
            let mut pump = Pump {
                shared: Arc::clone(self),
                flow,
                lane: Arc::clone(&lane),
                parser: Parser::default(),
            };
            std::thread::Builder::new()
                .name("relay-pump".into())
                .spawn(move || pump.run(&from, &to))?;
        }
        Ok(())
    }

    /// False: the host has died meanwhile.
    fn wait_for_copy(&self) -> bool {
        let wait = |state: &mut State| state.pushes_held && !state.dead;
        let waited = self.changed.wait_while(self.lock(), wait);
        let state = waited.unwrap_or_else(PoisonError::into_inner);
        !(state.pushes_held && state.dead)
    }

    fn reached(&self, mut state: MutexGuard<'_, State>, hold: bool) {
        state.reached = true;
        self.changed.notify_all();
        if hold {
            let waited = self.changed.wait_while(state, |state| !state.dead);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }
}

struct Pump {
    shared: Arc<Shared>,
    flow: Flow,
    /// As the preamble says it; 0 before.
    lane: Arc<Mutex<u8>>,
    parser: Parser,
}

impl Pump {
    fn run(&mut self, mut from: &TcpStream, mut to: &TcpStream) {
        let mut buffer = vec![0; 256 << 10];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    let Some(allowed) = self.look(&buffer[..count]) else {
                        break;
                    };
                    if to.write_all(&buffer[..allowed]).is_err() {
                        break;
                    }
                    if allowed < count {
                        // Held until the host was dead.
                        self.hold();
                        break;
                    }
                }
                Err(_) => {
                    reset(to);
                    return;
                }
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }

    /// Follows the bytes; returns how many of them may pass now, or `None` to end.
    fn look(&mut self, bytes: &[u8]) -> Option<usize> {
        let lane = {
            let mut lane = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
            if self.flow == Flow::ToBackup && *lane == 0 {
                // A preamble is the connection's first write, and small: it comes as a whole.
                *lane = *bytes.get(10)?;
            }
            *lane
        };
        match (lane, self.flow) {
            (BULK_LANE, Flow::ToBackup) => self
                .shared
                .wait_for_copy()
                .then(|| self.look_at_bulk(bytes)),
            (CONTROL_LANE, Flow::ToPrimary) => Some(self.look_at_control(bytes)),
            _ => Some(bytes.len()),
        }
    }

    fn look_at_bulk(&mut self, bytes: &[u8]) -> usize {
        let mut state = self.shared.lock();
        let mut at = 0;
        while at < bytes.len() {
            let step = self.parser.bulk(&bytes[at..]);
            let Some(chunk) = step.chunk else {
                at += step.bytes;
                continue;
            };
            if chunk.epoch != state.passed.pushed_epoch {
                state.passed.pushed_epoch = chunk.epoch;
                state.passed.pushed_bytes = 0;
                if state.stop.is_some() && state.target_epoch.is_none() {
                    state.target_epoch = Some(chunk.epoch);
                }
            }
            let ends = chunk.last && step.ends_chunk;
            let limit = match state.stop {
                Some(Stop::InPush { thousandths }) if state.target_epoch == Some(chunk.epoch) => {
                    Some(state.passed.complete_bytes * thousandths / 1000)
                }
                _ => None,
            };
            let through = state.passed.pushed_bytes + step.bytes as u64;
            if let Some(limit) = limit
                && (through > limit || ends)
            {
                let fits = usize::try_from(limit.saturating_sub(state.passed.pushed_bytes));
                let part = fits.unwrap_or(step.bytes).min(step.bytes.saturating_sub(1));
                state.passed.pushed_bytes += part as u64;
                return at + part;
            }
            state.passed.pushed_bytes = through;
            if ends {
                state.passed.complete_epoch = chunk.epoch;
                state.passed.complete_bytes = through;
            }
            at += step.bytes;
        }
        bytes.len()
    }

    fn look_at_control(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let step = self.parser.control(&bytes[at..]);
            if let Some(epoch) = step.acked {
                let mut state = self.shared.lock();
                state.passed.acked_epoch = epoch;
                if state.target_epoch == Some(epoch) && !state.reached {
                    match state.stop {
                        // The part of it that has passed already makes no message.
                        Some(Stop::BeforeAck) => return at,
                        Some(Stop::Freeze { backup, after }) => {
                            drop(state);
                            freeze(backup, after);
                            self.shared.reached(self.shared.lock(), false);
                        }
                        _ => {}
                    }
                }
            }
            at += step.bytes;
        }
        bytes.len()
    }

    fn hold(&self) {
        let state = self.shared.lock();
        self.shared.reached(state, true);
    }
}

/// Follows the framing of one lane, however the bytes are cut.
#[derive(Debug, Default)]
struct Parser {
    started: bool,
    /// What was gathered of the preamble, or of a frame's or message's head.
    head: Vec<u8>,
    /// Of the frame's or message's body.
    left: usize,
    chunk: Option<ChunkHead>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ChunkHead {
    epoch: u64,
    last: bool,
}

/// What the next bytes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Step {
    bytes: usize,
    /// The chunk that they belong to.
    chunk: Option<ChunkHead>,
    ends_chunk: bool,
    /// They complete the head of an acknowledgement of this epoch.
    acked: Option<u64>,
}

impl Parser {
    fn bulk(&mut self, bytes: &[u8]) -> Step {
        if !self.started {
            return self.start(bytes, PREAMBLE_BYTES);
        }
        if self.left > 0 {
            let count = self.left.min(bytes.len());
            self.left -= count;
            return Step {
                bytes: count,
                chunk: self.chunk,
                ends_chunk: self.left == 0,
                acked: None,
            };
        }
        let (count, whole) = self.gather(bytes, FRAME_BYTES + HEADER_BYTES);
        let mut step = Step {
            bytes: count,
            ..Step::default()
        };
        if whole {
            let length = number(&self.head[LENGTH_IN_FRAME..], 4) as usize;
            let header = &self.head[FRAME_BYTES..];
            self.left = length.saturating_sub(HEADER_BYTES);
            self.chunk = Some(ChunkHead {
                epoch: number(&header[EPOCH_IN_HEADER..], 8),
                last: header[FLAGS_IN_HEADER] & LAST_FLAG != 0,
            });
            step.chunk = self.chunk;
            step.ends_chunk = self.left == 0;
            self.head.clear();
        }
        step
    }

    fn control(&mut self, bytes: &[u8]) -> Step {
        if !self.started {
            return self.start(bytes, REPLY_BYTES);
        }
        if self.left > 0 {
            let count = self.left.min(bytes.len());
            self.left -= count;
            return Step {
                bytes: count,
                ..Step::default()
            };
        }
        let (count, whole) = self.gather(bytes, 4 + HEADER_BYTES);
        let mut step = Step {
            bytes: count,
            ..Step::default()
        };
        if whole {
            let length = number(&self.head, 4) as usize;
            let header = &self.head[4..];
            if number(&header[KIND_IN_HEADER..], 2) == u64::from(ACK_KIND) {
                step.acked = Some(number(&header[EPOCH_IN_HEADER..], 8));
            }
            self.left = length.saturating_sub(HEADER_BYTES);
            self.head.clear();
        }
        step
    }

    fn start(&mut self, bytes: &[u8], wanted: usize) -> Step {
        let (count, whole) = self.gather(bytes, wanted);
        if whole {
            self.started = true;
            self.head.clear();
        }
        Step {
            bytes: count,
            ..Step::default()
        }
    }

    /// Takes bytes until `wanted` are there.
    fn gather(&mut self, bytes: &[u8], wanted: usize) -> (usize, bool) {
        let count = (wanted - self.head.len()).min(bytes.len());
        self.head.extend_from_slice(&bytes[..count]);
        (count, self.head.len() == wanted)
    }
}

/// Waits precisely, for an apply takes a few milliseconds in all.
fn freeze(backup: Pid, after: Duration) {
    let began = Instant::now();
    if let Some(most) = after.checked_sub(Duration::from_millis(2)) {
        std::thread::sleep(most);
    }
    while began.elapsed() < after {
        std::hint::spin_loop();
    }
    // A backup that is gone is found out by whoever waits for its failover.
    let _ = kill(backup, Signal::SIGSTOP);
}

/// Up to eight bytes, little-endian.
fn number(bytes: &[u8], count: usize) -> u64 {
    bytes[..count]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Ends a connection as the other one has ended: with a reset, which proves nobody's death.
fn reset(stream: &TcpStream) {
    let nowhere = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    let length = size_of_val(&nowhere) as libc::socklen_t;
    // SAFETY: the address is a live local of the length given, and the descriptor is open as long
    // as `stream` is borrowed.
    unsafe { libc::connect(stream.as_raw_fd(), &raw const nowhere, length) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(epoch: u64, last: bool, bytes: usize) -> Vec<u8> {
        let mut frame = vec![0; FRAME_BYTES];
        frame[LENGTH_IN_FRAME..LENGTH_IN_FRAME + 4].copy_from_slice(&(bytes as u32).to_le_bytes());
        let mut body = vec![0; bytes];
        body[EPOCH_IN_HEADER..EPOCH_IN_HEADER + 8].copy_from_slice(&epoch.to_le_bytes());
        body[FLAGS_IN_HEADER] = u8::from(last);
        frame.extend(body);
        frame
    }

    fn message(kind: u16, epoch: u64, body: usize) -> Vec<u8> {
        let mut bytes = ((HEADER_BYTES + body) as u32).to_le_bytes().to_vec();
        let mut header = vec![0; HEADER_BYTES + body];
        header[KIND_IN_HEADER..KIND_IN_HEADER + 2].copy_from_slice(&kind.to_le_bytes());
        header[EPOCH_IN_HEADER..EPOCH_IN_HEADER + 8].copy_from_slice(&epoch.to_le_bytes());
        bytes.extend(header);
        bytes
    }

    #[test]
    fn chunks_are_followed_however_they_are_cut() {
        let mut stream = vec![0; PREAMBLE_BYTES];
        stream.extend(chunk(7, false, 5000));
        stream.extend(chunk(7, true, 4096));
        for cut in [1, 3, 87, 88, 89, 4096, 1 << 20] {
            let mut parser = Parser::default();
            let (mut of_epoch, mut ends) = (0, Vec::new());
            for mut piece in stream.chunks(cut) {
                while !piece.is_empty() {
                    let step = parser.bulk(piece);
                    of_epoch += step.chunk.map_or(0, |_| step.bytes);
                    if step.ends_chunk {
                        ends.push(step.chunk.unwrap());
                    }
                    piece = &piece[step.bytes..];
                }
            }
            let head = |last| ChunkHead { epoch: 7, last };
            assert_eq!(ends, [head(false), head(true)], "cut into {cut}");
            assert!(of_epoch >= 5000 + 4096 - 2 * HEADER_BYTES);
        }
    }

    #[test]
    fn acknowledgements_are_told_from_other_messages() {
        let mut stream = vec![0; REPLY_BYTES];
        stream.extend(message(5, 0, 8));
        stream.extend(message(ACK_KIND, 9, 0));
        stream.extend(message(3, 10, 240));
        stream.extend(message(ACK_KIND, 10, 0));
        for cut in [1, 5, 68, 1 << 20] {
            let mut parser = Parser::default();
            let mut acked = Vec::new();
            for mut piece in stream.chunks(cut) {
                while !piece.is_empty() {
                    let step = parser.control(piece);
                    acked.extend(step.acked);
                    piece = &piece[step.bytes..];
                }
            }
            assert_eq!(acked, [9, 10], "cut into {cut}");
        }
    }

    #[test]
    fn a_fin_passes_as_a_fin_and_a_reset_as_a_reset() {
        for reset_it in [false, true] {
            let backup = TcpListener::bind(("127.0.0.1", 0)).unwrap();
            let relay = Relay::start(backup.local_addr().unwrap().port()).unwrap();
            let mut primary = TcpStream::connect(("127.0.0.1", relay.port)).unwrap();
            let (mut accepted, _) = backup.accept().unwrap();
            let mut preamble = [0; PREAMBLE_BYTES];
            preamble[10] = 3;
            primary.write_all(&preamble).unwrap();
            accepted.read_exact(&mut preamble).unwrap();
            if reset_it {
                reset(&primary);
            }
            drop(primary);
            let end = accepted.read(&mut preamble);
            if reset_it {
                assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
            } else {
                assert_eq!(end.unwrap(), 0);
            }
        }
    }
}
