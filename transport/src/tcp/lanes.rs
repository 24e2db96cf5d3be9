//! What the kernel may have a pointer into: the lanes' buffers and queues, on one ring, and the
//! proof lane beside it.
//!
//! A request that is pending when its process is killed holds on to its socket for 5 to 10 ms more
//! (Linux 6.18: the ring is torn down by a worker, and the cancelled request completed by a
//! delayed one), while a socket without one sends its FIN after 0.3 ms. So the proof lane, on which
//! a failover waits, is watched by epoll.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::{cqueue, opcode};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv};

use crate::arena::{Chunk, ChunkMut};
use crate::link::{Event, Lane, Loss, LossKind};
use crate::tcp::bulk_receive::{BulkReceive, Finished};
use crate::tcp::bulk_send::BulkSend;
use crate::tcp::control::Control;
use crate::tcp::operation::Token;
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
/// Names in the epoll set.
const RING_KEY: u64 = 0;
const PROOF_KEY: u64 = 1;

/// The inside of a link, at a fixed address. Not to be freed before [`Ring::quiesce`] says so.
pub(super) struct Lanes {
    pub(super) ring: Ring,
    pub(super) streams: Option<Streams>,
    pub(super) control: Control,
    pub(super) bulk_send: BulkSend,
    pub(super) bulk_receive: BulkReceive,
    /// Watches the ring's eventfd for edges, and the proof lane while it isn't lost.
    epoll: Epoll,
    pub(super) lost: [bool; 3],
    /// Completions that `flush` found, for the next `progress`.
    backlog: VecDeque<cqueue::Entry>,
    /// Chunks to report in the next `progress`.
    ready: VecDeque<Ready>,
    /// Ties grants to this link.
    pub(super) pairing: u64,
    pub(super) peer: SocketAddr,
}

enum Ready {
    Revoked(ChunkMut),
    Pushed(Chunk),
    /// A message that was taken too early.
    Message(Vec<u8>),
}

/// The connections of a pairing, by lane.
#[derive(Debug)]
pub(super) struct Streams {
    pub(super) control: TcpStream,
    pub(super) bulk: TcpStream,
    pub(super) proof: TcpStream,
}

impl Streams {
    pub(super) fn lane(&self, lane: Lane) -> &TcpStream {
        match lane {
            Lane::Control => &self.control,
            Lane::Bulk => &self.bulk,
            Lane::Proof => &self.proof,
        }
    }
}

impl Lanes {
    pub(super) fn new(
        ring: Ring,
        streams: Streams,
        pairing: PairingId,
        config: &TcpConfig,
    ) -> Result<Lanes, TcpError> {
        let peer = streams
            .control
            .peer_addr()
            .map_err(|source| TcpError::io("getpeername", source))?;
        let epoll = watch(&ring, &streams.proof)
            .map_err(|errno| TcpError::io("epoll_create1 or epoll_ctl", errno.into()))?;
        let control = Control::new(&ring)?;
        let bulk_send = BulkSend::new(config.zero_copy, &ring);
        let bulk_receive = BulkReceive::new()
            .map_err(|source| TcpError::io("mapping the link's buffers", source))?;
        Ok(Lanes {
            ring,
            streams: Some(streams),
            control,
            bulk_send,
            bulk_receive,
            epoll,
            lost: [false; 3],
            backlog: VecDeque::with_capacity(BACKLOG_COMPLETIONS),
            ready: VecDeque::new(),
            pairing: u64::from_le_bytes(*pairing.0.first_chunk().expect("16 bytes hold 8")),
            peer,
        })
    }

    /// Readable when [`Lanes::progress`] has something to do.
    pub(super) fn ready_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// Takes back every chunk that was granted for `slot`.
    pub(super) fn revoke(&mut self, slot: u8) -> io::Result<()> {
        let ready = &mut self.ready;
        let mut back = |chunk| ready.push_back(Ready::Revoked(chunk));
        self.bulk_receive.grants.revoke(slot, &mut back);
        if self.bulk_receive.revoke_current(slot, &mut back) {
            let entry = opcode::AsyncCancel::new(Token::BulkReceive as u64)
                .build()
                .user_data(Token::Cancel as u64);
            // SAFETY: the operation names no memory.
            unsafe { self.ring.push(&entry) }?;
            self.ring.submit()?;
        }
        self.wake_if_ready()
    }

    /// Has a chunk that can't be pushed reported as if it were.
    pub(super) fn give_back(&mut self, chunk: Chunk) -> io::Result<()> {
        self.ready.push_back(Ready::Pushed(chunk));
        self.wake_if_ready()
    }

    /// Has a message reported again.
    pub(super) fn give_back_message(&mut self, message: Vec<u8>) -> io::Result<()> {
        self.ready.push_back(Ready::Message(message));
        self.wake_if_ready()
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.bulk_send.has_queued() {
            // What becomes of chunks is to be reported: let the kernel wake the driver.
            self.start_sends()?;
            return self.ring.submit();
        }
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

    pub(super) fn progress(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> io::Result<()> {
        self.ring.hush();
        self.look_at_proof(sink)?;
        let mut budget = Budget::new();
        while let Some(ready) = self.ready.pop_front() {
            ready.report(sink);
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

    pub(super) fn start_receives(&mut self) -> io::Result<()> {
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
            // What a peer sends after its error is left in the buffers that it fills, till there is
            // none.
            Token::ControlReceive if self.is_lost(Lane::Control) => {}
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
                kind = socket::end_of_file(self.streams().lane(lane).as_fd());
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

    pub(super) fn is_lost(&self, lane: Lane) -> bool {
        self.lost[lane as usize - 1]
    }

    pub(super) fn streams(&self) -> &Streams {
        self.streams.as_ref().expect("only drop takes the streams")
    }

    fn wake_if_ready(&self) -> io::Result<()> {
        if self.ready.is_empty() {
            return Ok(());
        }
        self.ring.wake()
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

impl Ready {
    fn report(self, sink: &mut dyn FnMut(Event<'_>)) {
        match self {
            Ready::Revoked(chunk) => sink(Event::Revoked(chunk)),
            Ready::Pushed(chunk) => sink(Event::Pushed(chunk)),
            Ready::Message(bytes) => sink(Event::Message(&bytes)),
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
