//! [`TcpLink`]: two lanes on one ring, and the proof lane beside it.
//!
//! A request that is pending when its process is killed holds on to its socket for 5 to 10 ms more
//! (Linux 6.18: the ring is torn down by a worker, and the cancelled request completed by a
//! delayed one), while a socket without one sends its FIN after 0.3 ms. So the proof lane, on which
//! a failover waits, is watched by epoll.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::{cqueue, opcode};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv};

use crate::arena::{Chunk, ChunkMut};
use crate::grants::GrantIndex;
use crate::link::{Event, Grant, Lane, Link, LinkError, Loss, LossKind};
use crate::tcp::bulk_receive::{BulkReceive, Finished};
use crate::tcp::bulk_send::BulkSend;
use crate::tcp::control::Control;
use crate::tcp::preamble::PairingId;
use crate::tcp::ring::Ring;
use crate::tcp::{TcpConfig, TcpError, socket};

/// Completions that one call of `progress` handles: a peer that always has more to send must not
/// keep the driver from its other work.
const COMPLETIONS_PER_PROGRESS: usize = 32;
/// Bytes of the bulk lane after which a call of `progress` ends: with deferred task work it is the
/// driver thread that copies them, about 0.3 ms for a MiB.
const BULK_BYTES_PER_PROGRESS: usize = 1 << 20;
/// Room for completions that the backlog begins with: one of each operation.
const BACKLOG_COMPLETIONS: usize = 16;
/// How long a link that is dropped waits for its operations to end, and for what it sent without
/// copying to be acknowledged.
const CANCEL_PATIENCE: Duration = Duration::from_millis(50);
/// How long it then waits for the kernel to let go of its memory.
const RESET_PATIENCE: Duration = Duration::from_millis(500);
/// Names in the epoll set.
const RING_KEY: u64 = 0;
const PROOF_KEY: u64 = 1;

/// Three TCP connections to one peer, in the hands of the thread that made it.
pub struct TcpLink {
    core: ManuallyDrop<Box<Core>>,
    /// The ring is the property of one thread (IORING_SETUP_SINGLE_ISSUER).
    not_send: PhantomData<*const ()>,
}

/// The connections of a pairing, by lane.
#[derive(Debug)]
pub(super) struct Streams {
    pub(super) control: TcpStream,
    pub(super) bulk: TcpStream,
    pub(super) proof: TcpStream,
}

impl Streams {
    fn lane(&self, lane: Lane) -> &TcpStream {
        match lane {
            Lane::Control => &self.control,
            Lane::Bulk => &self.bulk,
            Lane::Proof => &self.proof,
        }
    }
}

/// Names an operation in its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Token {
    Cancel = 0,
    ControlReceive = 1,
    ControlSend = 2,
    BulkReceive = 3,
    BulkSend = 4,
    BulkHeader = 5,
    BulkBody = 6,
    BulkReceiveHeader = 7,
}

impl Token {
    const ALL: [Token; 8] = [
        Token::Cancel,
        Token::ControlReceive,
        Token::ControlSend,
        Token::BulkReceive,
        Token::BulkSend,
        Token::BulkHeader,
        Token::BulkBody,
        Token::BulkReceiveHeader,
    ];

    /// The completion's `user_data`: the token in the low byte, `serial` above.
    pub(super) fn with_serial(self, serial: u64) -> u64 {
        self as u64 | serial << 8
    }

    pub(super) fn serial(user_data: u64) -> u64 {
        user_data >> 8
    }

    fn of(user_data: u64) -> Token {
        Token::ALL[(user_data & 0xff) as usize]
    }
}

/// What a completed send or receive says, its errors aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Bytes(usize),
    /// Interrupted: to be started again.
    Again,
}

/// Reads an operation's result.
pub(super) fn outcome(result: i32) -> Result<Outcome, LossKind> {
    match result {
        0.. => Ok(Outcome::Bytes(result as usize)),
        _ if matches!(-result, libc::EINTR | libc::EAGAIN) => Ok(Outcome::Again),
        _ => Err(LossKind::Error(
            io::Error::from_raw_os_error(-result).to_string(),
        )),
    }
}

/// Everything that the kernel may have a pointer into, at a fixed address.
struct Core {
    ring: Ring,
    streams: Option<Streams>,
    control: Control,
    bulk_send: BulkSend,
    bulk_receive: BulkReceive,
    /// Watches the ring's eventfd for edges, and the proof lane while it isn't lost.
    epoll: Epoll,
    lost: [bool; 3],
    /// Completions that `flush` found, for the next `progress`.
    backlog: VecDeque<cqueue::Entry>,
    /// Chunks to report in the next `progress`.
    ready: VecDeque<Ready>,
    /// Ties grants to this link.
    pairing: u64,
    peer: SocketAddr,
}

enum Ready {
    Revoked(ChunkMut),
    Pushed(Chunk),
}

impl TcpLink {
    /// Takes three connections whose preambles are through, and the calling thread's ring.
    pub(super) fn new(
        ring: Ring,
        streams: Streams,
        pairing: PairingId,
        config: &TcpConfig,
    ) -> Result<TcpLink, TcpError> {
        let memory = |source| TcpError::io("mapping the link's buffers", source);
        let peer = streams
            .control
            .peer_addr()
            .map_err(|source| TcpError::io("getpeername", source))?;
        for stream in [&streams.control, &streams.bulk, &streams.proof] {
            // With O_NONBLOCK the ring would answer EAGAIN instead of waiting.
            stream
                .set_nonblocking(false)
                .and_then(|()| socket::set_options(stream, config))
                .map_err(|source| TcpError::io("setting socket options", source))?;
        }
        let control = Control::new(&ring)?;
        let bulk_send = BulkSend::new(config.zero_copy, &ring);
        let epoll = watch(&ring, &streams.proof)
            .map_err(|errno| TcpError::io("epoll_create1 or epoll_ctl", errno.into()))?;
        let mut core = Box::new(Core {
            ring,
            streams: Some(streams),
            control,
            bulk_send,
            bulk_receive: BulkReceive::new().map_err(memory)?,
            epoll,
            lost: [false; 3],
            backlog: VecDeque::with_capacity(BACKLOG_COMPLETIONS),
            ready: VecDeque::new(),
            pairing: u64::from_le_bytes(*pairing.0.first_chunk().expect("16 bytes hold 8")),
            peer,
        });
        core.start_receives()
            .and_then(|()| core.ring.submit())
            .map_err(|source| TcpError::io("starting to receive", source))?;
        Ok(TcpLink {
            core: ManuallyDrop::new(core),
            not_send: PhantomData,
        })
    }

    /// As [`TcpLink::new`], and writes `greeting` on each lane when nothing can fail any more.
    pub(super) fn greet(
        ring: Ring,
        streams: Streams,
        pairing: PairingId,
        config: &TcpConfig,
        greeting: &[u8],
    ) -> Result<TcpLink, TcpError> {
        let link = TcpLink::new(ring, streams, pairing, config)?;
        let streams = link.core.streams();
        // A fresh connection has room for a few bytes: this does not block.
        for mut stream in [&streams.control, &streams.bulk, &streams.proof] {
            stream
                .write_all(greeting)
                .map_err(|source| TcpError::io("answering a preamble", source))?;
        }
        Ok(link)
    }

    /// The peer's address on the control lane.
    pub fn peer(&self) -> SocketAddr {
        self.core.peer
    }

    /// The socket of one lane, for its statistics (TCP_INFO). Its bytes are the link's.
    pub fn lane_fd(&self, lane: Lane) -> BorrowedFd<'_> {
        self.core.streams().lane(lane).as_fd()
    }
}

impl Link for TcpLink {
    fn ready_fd(&self) -> BorrowedFd<'_> {
        self.core.epoll.0.as_fd()
    }

    fn proof_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.core.streams().proof.as_fd())
    }

    /// On a lost lane the message goes nowhere.
    fn send(&mut self, message: &[u8]) -> Result<(), LinkError> {
        if self.core.is_lost(Lane::Control) {
            return Ok(());
        }
        self.core.control.queue(message)
    }

    fn grant(&mut self, chunk: ChunkMut, slot: u8) -> Result<Grant, LinkError> {
        let core = &mut **self.core;
        let index = core
            .bulk_receive
            .grants
            .add(chunk, slot)
            .ok_or(LinkError::BadGrant)?;
        Ok(index.encode(core.pairing))
    }

    fn revoke(&mut self, slot: u8) -> Result<(), LinkError> {
        let core = &mut **self.core;
        let ready = &mut core.ready;
        core.bulk_receive
            .grants
            .revoke(slot, |chunk| ready.push_back(Ready::Revoked(chunk)));
        let cancel = core
            .bulk_receive
            .revoke_current(slot, |chunk| ready.push_back(Ready::Revoked(chunk)));
        if cancel {
            let entry = opcode::AsyncCancel::new(Token::BulkReceive as u64)
                .build()
                .user_data(Token::Cancel as u64);
            // SAFETY: the operation names no memory.
            unsafe { core.ring.push(&entry) }
                .and_then(|()| core.ring.submit())
                .map_err(|source| io_error("cancelling a receive", source))?;
        }
        core.wake_if_ready()
    }

    /// On a lost lane the chunk comes back as pushed.
    fn push(&mut self, chunk: Chunk, to: Grant, tag: u32) -> Result<(), LinkError> {
        let core = &mut **self.core;
        let grant = GrantIndex::decode(&to, core.pairing).ok_or(LinkError::BadGrant)?;
        if core.is_lost(Lane::Bulk) {
            core.ready.push_back(Ready::Pushed(chunk));
            return core.wake_if_ready();
        }
        core.bulk_send.queue(chunk, grant, tag);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        self.core
            .flush()
            .map_err(|source| io_error("io_uring_enter", source))
    }

    fn progress(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<(), LinkError> {
        self.core
            .progress(sink)
            .map_err(|source| io_error("io_uring_enter", source))
    }
}

impl std::fmt::Debug for TcpLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpLink")
            .field("peer", &self.core.peer)
            .field("lost", &self.core.lost)
            .field("ring", &self.core.ring)
            .finish_non_exhaustive()
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        let core = &mut **self.core;
        let quiet = core.ring.quiesce(CANCEL_PATIENCE) || {
            // What can't be cancelled is memory that waits for the peer's acknowledgement. A reset
            // throws the bytes away.
            socket::reset(&core.streams().bulk);
            core.ring.quiesce(RESET_PATIENCE)
        };
        if quiet {
            // SAFETY: `core` isn't used again: this is the end of the link.
            unsafe { ManuallyDrop::drop(&mut self.core) };
        } else {
            tracing::error!(
                peer = %self.core.peer,
                "the kernel holds on to a closed link's memory: it is leaked"
            );
            // The connections end all the same.
            self.core.streams = None;
        }
    }
}

impl Core {
    fn flush(&mut self) -> io::Result<()> {
        // A small message is sent at once, while it is submitted: its completion is taken here,
        // so that it doesn't wake the driver for nothing.
        self.ring.hush();
        self.start_sends()?;
        self.ring.submit()?;
        while let Some(completion) = self.ring.next() {
            if !self.complete_silently(&completion) {
                self.backlog.push_back(completion);
            }
        }
        self.ring.unhush(self.has_backlog())
    }

    fn progress(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> io::Result<()> {
        self.ring.hush();
        self.look_at_proof(sink)?;
        let mut budget = Budget::new();
        while let Some(ready) = self.ready.pop_front() {
            sink(ready.into());
        }
        while let Some(completion) = self.backlog.pop_front() {
            budget.spend(&completion);
            self.complete(&completion, sink);
        }
        loop {
            self.start_receives()?;
            self.start_sends()?;
            self.ring.submit()?;
            let mut idle = true;
            while !budget.is_spent()
                && let Some(completion) = self.ring.next()
            {
                idle = false;
                budget.spend(&completion);
                self.complete(&completion, sink);
            }
            if idle || budget.is_spent() {
                break;
            }
        }
        self.ring.unhush(budget.is_spent() || self.has_backlog())
    }

    fn has_backlog(&self) -> bool {
        !self.ready.is_empty() || !self.backlog.is_empty()
    }

    /// Handles a completion that has nothing to report. Returns whether it was one.
    fn complete_silently(&mut self, completion: &cqueue::Entry) -> bool {
        let sent = completion.user_data() == Token::ControlSend as u64 && completion.result() >= 0;
        sent && self.control.sent(completion.result()).is_ok()
    }

    /// Takes the epoll set's edges, and what has become of the proof lane if that is one of them.
    fn look_at_proof(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 2];
        let ready = match self.epoll.wait(&mut events, 0u8) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        if !events[..ready].iter().any(|it| it.data() == PROOF_KEY) {
            return Ok(());
        }
        let fd = self.streams().proof.as_raw_fd();
        let done = match recv(fd, &mut [0], MsgFlags::MSG_DONTWAIT) {
            Ok(0) => Err(LossKind::Fin),
            Ok(_) => Err(LossKind::Protocol(
                "bytes on the proof lane, which carries none".to_owned(),
            )),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(errno) => Err(LossKind::Error(io::Error::from(errno).to_string())),
        };
        if done.is_err() {
            // It would be ready for ever.
            self.epoll.delete(&self.streams().proof)?;
        }
        self.judge(Lane::Proof, done, sink);
        Ok(())
    }

    fn start_receives(&mut self) -> io::Result<()> {
        if !self.is_lost(Lane::Control) {
            let fd = self.streams().control.as_raw_fd();
            self.control.start_receive(&mut self.ring, fd)?;
        }
        if !self.is_lost(Lane::Bulk) {
            let fd = self.streams().bulk.as_raw_fd();
            self.bulk_receive.start(&mut self.ring, fd)?;
        }
        Ok(())
    }

    fn start_sends(&mut self) -> io::Result<()> {
        if !self.is_lost(Lane::Control) {
            let fd = self.streams().control.as_raw_fd();
            self.control.start_send(&mut self.ring, fd)?;
        }
        if !self.is_lost(Lane::Bulk) {
            let fd = self.streams().bulk.as_raw_fd();
            self.bulk_send.start(&mut self.ring, fd)?;
        }
        Ok(())
    }

    fn complete(&mut self, completion: &cqueue::Entry, sink: &mut dyn FnMut(Event<'_>)) {
        let result = completion.result();
        match Token::of(completion.user_data()) {
            Token::ControlReceive => {
                let done = self
                    .control
                    .received(completion, |message| sink(Event::Message(message)));
                self.judge(Lane::Control, done, sink);
            }
            Token::ControlSend => {
                let done = self.control.sent(result);
                self.judge(Lane::Control, done, sink);
            }
            Token::BulkReceiveHeader => {
                let done = self.bulk_receive.header_received(result);
                self.judge(Lane::Bulk, done, sink);
            }
            Token::BulkReceive => {
                let done = self
                    .bulk_receive
                    .received(result, |finished| sink(finished.into()));
                self.judge(Lane::Bulk, done, sink);
            }
            Token::BulkSend | Token::BulkHeader => {
                let done = self
                    .bulk_send
                    .sent(result, |chunk| sink(Event::Pushed(chunk)));
                self.judge(Lane::Bulk, done, sink);
                self.abandon_if_lost(sink);
            }
            Token::BulkBody => {
                let done = self
                    .bulk_send
                    .body_sent(completion, |chunk| sink(Event::Pushed(chunk)));
                self.judge(Lane::Bulk, done, sink);
                self.abandon_if_lost(sink);
            }
            Token::Cancel => {}
        }
    }

    /// Reports a lane's end, the first time.
    fn judge(&mut self, lane: Lane, done: Result<(), LossKind>, sink: &mut dyn FnMut(Event<'_>)) {
        let Err(mut kind) = done else { return };
        if !std::mem::replace(&mut self.lost[lane as usize - 1], true) {
            if kind == LossKind::Fin {
                kind = socket::end_of_file(self.streams().lane(lane));
            }
            sink(Event::Lost(Loss { lane, kind }));
            self.abandon_if_lost(sink);
        }
    }

    fn abandon_if_lost(&mut self, sink: &mut dyn FnMut(Event<'_>)) {
        if self.is_lost(Lane::Bulk) {
            self.bulk_send.abandon(|chunk| sink(Event::Pushed(chunk)));
        }
    }

    fn is_lost(&self, lane: Lane) -> bool {
        self.lost[lane as usize - 1]
    }

    fn streams(&self) -> &Streams {
        self.streams.as_ref().expect("only drop takes the streams")
    }

    fn wake_if_ready(&self) -> Result<(), LinkError> {
        if self.ready.is_empty() {
            return Ok(());
        }
        self.ring
            .wake()
            .map_err(|source| io_error("writing an eventfd", source))
    }
}

/// What is left for one call of `progress`.
struct Budget {
    completions: usize,
    bulk_bytes: usize,
}

impl Budget {
    fn new() -> Budget {
        Budget {
            completions: COMPLETIONS_PER_PROGRESS,
            bulk_bytes: BULK_BYTES_PER_PROGRESS,
        }
    }

    fn spend(&mut self, completion: &cqueue::Entry) {
        self.completions = self.completions.saturating_sub(1);
        if let Token::BulkReceive | Token::BulkSend | Token::BulkBody =
            Token::of(completion.user_data())
        {
            let bytes = completion.result().max(0) as usize;
            self.bulk_bytes = self.bulk_bytes.saturating_sub(bytes);
        }
    }

    fn is_spent(&self) -> bool {
        self.completions == 0 || self.bulk_bytes == 0
    }
}

impl From<Ready> for Event<'_> {
    fn from(ready: Ready) -> Self {
        match ready {
            Ready::Revoked(chunk) => Event::Revoked(chunk),
            Ready::Pushed(chunk) => Event::Pushed(chunk),
        }
    }
}

impl From<Finished> for Event<'_> {
    fn from(finished: Finished) -> Self {
        match finished {
            Finished::Arrived { chunk, tag } => Event::Arrived { chunk, tag },
            Finished::Revoked(chunk) => Event::Revoked(chunk),
        }
    }
}

fn watch(ring: &Ring, proof: &TcpStream) -> nix::Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let edges = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
    epoll.add(ring.event_fd(), EpollEvent::new(edges, RING_KEY))?;
    epoll.add(proof, EpollEvent::new(EpollFlags::EPOLLIN, PROOF_KEY))?;
    Ok(epoll)
}

fn io_error(operation: &'static str, source: io::Error) -> LinkError {
    LinkError::Io { operation, source }
}
