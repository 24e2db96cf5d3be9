//! The accepting side of pairings.
//!
//! Anybody can connect here. So there is a bound on everything that a connection can hold before
//! its pairing is complete, and no way from here to a link that exists.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{self, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::link::Lane;
use crate::tcp::lanes::Streams;
use crate::tcp::link::TcpLink;
use crate::tcp::preamble::{PREAMBLE_BYTES, Preamble, PreambleError, Reply, encode_refusal};
use crate::tcp::ring::Ring;
use crate::tcp::{PairingId, TcpConfig, TcpError};

/// Connections that are not part of a complete pairing; one more ends the oldest.
const PENDING_MAX: usize = 64;
/// Connections that one call of `progress` accepts.
const ACCEPTS_PER_PROGRESS: usize = 64;
/// Pairings that are remembered, so that their preambles can't be used again.
const RECENT_PAIRINGS: usize = 64;
/// How long nothing is accepted after the process ran out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of a refused connection that are read and thrown away: unread ones would make the kernel
/// send a reset, which can overtake the reason.
const DISCARD_BYTES: usize = 4096;
const LISTENER_KEY: u64 = 0;

/// Accepts pairings on one port without blocking.
#[derive(Debug)]
pub struct TcpListener {
    epoll: Epoll,
    listener: net::TcpListener,
    /// Nothing is accepted before this.
    paused_until: Option<Instant>,
    pending: Vec<Pending>,
    next_key: u64,
    recent: VecDeque<PairingId>,
    config: TcpConfig,
}

/// What [`TcpListener::progress`] has to report.
#[derive(Debug)]
pub enum Incoming {
    /// All three lanes of a pairing are here.
    Link(TcpLink),
    /// A connection was closed, and told why if it would hear it.
    Refused { peer: SocketAddr, reason: Refusal },
}

/// Why a connection did not become a lane.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Preamble(#[from] PreambleError),
    #[error("no whole preamble within {} ms", .0.as_millis())]
    Slow(Duration),
    #[error("the other lanes of the pairing did not come within {} ms", .0.as_millis())]
    Incomplete(Duration),
    #[error("{PENDING_MAX} later connections are waiting")]
    Crowded,
    #[error("the pairing has this lane already")]
    Replayed,
    #[error("the pairing was complete before")]
    Used,
    #[error("bytes came before the connection was accepted")]
    SpokeEarly,
    #[error("closed by the peer")]
    Gone,
    #[error("the connection failed: {0}")]
    Failed(io::Error),
    #[error("no link can be made here: {0}")]
    NoLink(String),
}

/// A connection whose pairing is not complete.
#[derive(Debug)]
struct Pending {
    key: u64,
    stream: TcpStream,
    peer: SocketAddr,
    deadline: Instant,
    bytes: [u8; PREAMBLE_BYTES],
    received: usize,
    preamble: Option<Preamble>,
}

impl TcpListener {
    pub fn bind(address: SocketAddr, config: &TcpConfig) -> Result<TcpListener, TcpError> {
        let listener = net::TcpListener::bind(address)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|source| TcpError::io("listening", source))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|errno| TcpError::io("epoll_create1", errno.into()))?;
        epoll
            .add(
                &listener,
                EpollEvent::new(EpollFlags::EPOLLIN, LISTENER_KEY),
            )
            .map_err(|errno| TcpError::io("epoll_ctl", errno.into()))?;
        Ok(TcpListener {
            epoll,
            listener,
            paused_until: None,
            pending: Vec::with_capacity(PENDING_MAX),
            next_key: LISTENER_KEY + 1,
            recent: VecDeque::with_capacity(RECENT_PAIRINGS),
            config: config.clone(),
        })
    }

    /// The address that was bound, with the port that the kernel chose if it was 0.
    pub fn local_addr(&self) -> Result<SocketAddr, TcpError> {
        self.listener
            .local_addr()
            .map_err(|source| TcpError::io("getsockname", source))
    }

    /// Readable when [`TcpListener::progress`] should be called.
    pub fn ready_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// When [`TcpListener::progress`] should be called at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        let pending = self.pending.iter().map(|it| it.deadline);
        pending.chain(self.paused_until).min()
    }

    /// Goes on as far as it can without blocking. Links are made in the calling thread, and belong
    /// to it.
    pub fn progress(&mut self, sink: &mut dyn FnMut(Incoming)) -> Result<(), TcpError> {
        let now = Instant::now();
        if self.paused_until.is_some_and(|until| now >= until) {
            self.paused_until = None;
            self.watch_listener(EpollFlags::EPOLLIN)?;
        }
        let mut events = [EpollEvent::empty(); PENDING_MAX + 1];
        let ready = match self.epoll.wait(&mut events, 0u8) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(TcpError::io("epoll_wait", errno.into())),
        };
        for event in &events[..ready] {
            if event.data() != LISTENER_KEY {
                self.read(event.data(), sink);
            }
        }
        if events[..ready].iter().any(|it| it.data() == LISTENER_KEY) {
            self.accept(now, sink)?;
        }
        self.expire(now, sink);
        Ok(())
    }

    fn accept(&mut self, now: Instant, sink: &mut dyn FnMut(Incoming)) -> Result<(), TcpError> {
        for _ in 0..ACCEPTS_PER_PROGRESS {
            match self.listener.accept() {
                Ok((stream, peer)) => self.admit(stream, peer, now, sink),
                Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                    Errno::EAGAIN => return Ok(()),
                    // This one is gone; there may be others.
                    Errno::ECONNABORTED | Errno::EINTR | Errno::EPROTO => {}
                    // Trying again at once would only fail again, forever.
                    Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM => {
                        tracing::warn!(%error, "accepting is paused for {ACCEPT_PAUSE:?}");
                        self.paused_until = Some(now + ACCEPT_PAUSE);
                        return self.watch_listener(EpollFlags::empty());
                    }
                    _ => return Err(TcpError::io("accept", error)),
                },
            }
        }
        Ok(())
    }

    fn admit(
        &mut self,
        stream: TcpStream,
        peer: SocketAddr,
        now: Instant,
        sink: &mut dyn FnMut(Incoming),
    ) {
        if self.pending.len() == PENDING_MAX {
            // In order of arrival.
            let oldest = self.pending.remove(0);
            oldest.refuse(Refusal::Crowded, sink);
        }
        let key = self.next_key;
        self.next_key += 1;
        let pending = Pending {
            key,
            stream,
            peer,
            deadline: now + self.config.pairing_timeout,
            bytes: [0; PREAMBLE_BYTES],
            received: 0,
            preamble: None,
        };
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
        let watched = pending.stream.set_nonblocking(true).and_then(|()| {
            Ok(self
                .epoll
                .add(&pending.stream, EpollEvent::new(interest, key))?)
        });
        if let Err(error) = watched {
            pending.refuse(Refusal::Failed(error), sink);
            return;
        }
        self.pending.push(pending);
        // The preamble usually came with the connection.
        self.read(key, sink);
    }

    /// Takes what the connection `key` sent.
    fn read(&mut self, key: u64, sink: &mut dyn FnMut(Incoming)) {
        // Gone if an event before this one completed or refused it.
        let Some(index) = self.pending.iter().position(|it| it.key == key) else {
            return;
        };
        let new = match self.pending[index].read() {
            Ok(None) => return,
            Ok(Some(preamble)) => preamble,
            Err(reason) => return self.pending.remove(index).refuse(reason, sink),
        };
        if self.recent.contains(&new.pairing) {
            return self.pending.remove(index).refuse(Refusal::Used, sink);
        }
        if self.find(new, index).is_some() {
            return self.pending.remove(index).refuse(Refusal::Replayed, sink);
        }
        self.pending[index].preamble = Some(new);
        self.complete(index, sink);
    }

    /// Makes a link if the pairing of the connection at `index` has all of its lanes.
    fn complete(&mut self, index: usize, sink: &mut dyn FnMut(Incoming)) {
        let Some(Preamble { pairing, .. }) = self.pending[index].preamble else {
            return;
        };
        let ip = self.pending[index].peer.ip();
        let find = |lane| {
            self.pending.iter().position(|it| {
                it.preamble == Some(Preamble { pairing, lane }) && it.peer.ip() == ip
            })
        };
        let (Some(control), Some(bulk), Some(proof)) =
            (find(Lane::Control), find(Lane::Bulk), find(Lane::Proof))
        else {
            return;
        };
        let keys = [control, bulk, proof].map(|at| self.pending[at].key);
        let peer = self.pending[control].peer;
        let ring = match Ring::new() {
            Ok(ring) => ring,
            Err(error) => {
                for late in self.pending.extract_if(.., |it| keys.contains(&it.key)) {
                    late.refuse(Refusal::NoLink(error.to_string()), sink);
                }
                return;
            }
        };
        let [control, bulk, proof] = keys.map(|key| self.take(key));
        if self.recent.len() == RECENT_PAIRINGS {
            self.recent.pop_front();
        }
        self.recent.push_back(pairing);
        let streams = Streams {
            control,
            bulk,
            proof,
        };
        let accepted = Reply::Accepted.encode();
        match TcpLink::greet(ring, streams, pairing, &self.config, &accepted) {
            Ok(link) => sink(Incoming::Link(link)),
            Err(error) => sink(Incoming::Refused {
                peer,
                reason: Refusal::NoLink(error.to_string()),
            }),
        }
    }

    /// Takes a connection that is to become a lane.
    fn take(&mut self, key: u64) -> TcpStream {
        let index = self
            .pending
            .iter()
            .position(|it| it.key == key)
            .expect("the key was just read from it");
        let stream = self.pending.remove(index).stream;
        // The descriptor lives on, and so would its entry.
        if let Err(errno) = self.epoll.delete(&stream) {
            tracing::warn!(%errno, "a connection stays in the listener's epoll set");
        }
        stream
    }

    /// Another connection that claims the same lane of the same pairing.
    fn find(&self, preamble: Preamble, except: usize) -> Option<usize> {
        let ip = self.pending[except].peer.ip();
        self.pending.iter().enumerate().position(|(index, it)| {
            index != except && it.preamble == Some(preamble) && it.peer.ip() == ip
        })
    }

    fn expire(&mut self, now: Instant, sink: &mut dyn FnMut(Incoming)) {
        let timeout = self.config.pairing_timeout;
        for late in self.pending.extract_if(.., |it| now >= it.deadline) {
            let reason = match late.preamble {
                Some(_) => Refusal::Incomplete(timeout),
                None => Refusal::Slow(timeout),
            };
            late.refuse(reason, sink);
        }
    }

    fn watch_listener(&self, interest: EpollFlags) -> Result<(), TcpError> {
        self.epoll
            .modify(&self.listener, &mut EpollEvent::new(interest, LISTENER_KEY))
            .map_err(|errno| TcpError::io("epoll_ctl", errno.into()))
    }
}

impl Pending {
    /// Reads the rest of the preamble and returns it when it is whole. Once it is, anything else
    /// that happens on the connection ends it.
    fn read(&mut self) -> Result<Option<Preamble>, Refusal> {
        let mut early = [0];
        loop {
            let to = match self.preamble {
                Some(_) => &mut early[..],
                None => &mut self.bytes[self.received..],
            };
            match self.stream.read(to) {
                Ok(0) => return Err(Refusal::Gone),
                Ok(_) if self.preamble.is_some() => return Err(Refusal::SpokeEarly),
                Ok(bytes) => self.received += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Refusal::Failed(error)),
            }
            if self.received == PREAMBLE_BYTES {
                return Ok(Some(Preamble::decode(&self.bytes)?));
            }
        }
    }

    /// Tells the peer why, as far as that goes without waiting, and closes the connection.
    fn refuse(mut self, reason: Refusal, sink: &mut dyn FnMut(Incoming)) {
        // Whoever doesn't listen to the reason isn't owed one.
        let _ = self.stream.write(&encode_refusal(&reason.to_string()));
        let _ = self.stream.shutdown(Shutdown::Write);
        let _ = self.stream.read(&mut [0; DISCARD_BYTES]);
        sink(Incoming::Refused {
            peer: self.peer,
            reason,
        });
    }
}
