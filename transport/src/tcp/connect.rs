//! The connecting side of a pairing.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, getsockopt, socket, sockopt,
};

use crate::link::Lane;
use crate::tcp::lanes::Streams;
use crate::tcp::link::TcpLink;
use crate::tcp::preamble::{PREAMBLE_BYTES, Preamble, REASON_BYTES_MAX, REPLY_BYTES, Reply};
use crate::tcp::ring::Ring;
use crate::tcp::{PairingId, TcpConfig, TcpError};

const LANES: [Lane; 3] = [Lane::Control, Lane::Bulk, Lane::Proof];

/// Makes the three connections of one pairing without blocking.
#[derive(Debug)]
pub struct TcpConnector {
    epoll: Epoll,
    /// One per lane, in the order of `LANES`; none once they have become a link.
    attempts: Vec<Attempt>,
    pairing: PairingId,
    config: TcpConfig,
    deadline: Instant,
}

/// One connection on its way to become a lane.
#[derive(Debug)]
struct Attempt {
    stream: TcpStream,
    preamble: [u8; PREAMBLE_BYTES],
    /// Bytes of the preamble that are sent; none before the connection is made.
    sent: usize,
    answer: [u8; REPLY_BYTES + REASON_BYTES_MAX],
    /// Bytes of the answer that have arrived.
    received: usize,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Connecting,
    Sending,
    Waiting,
    Accepted,
}

impl TcpConnector {
    /// Starts connecting to `peer`. `pairing` is to be drawn at random for each attempt.
    pub fn start(
        peer: SocketAddr,
        pairing: PairingId,
        config: &TcpConfig,
    ) -> Result<TcpConnector, TcpError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|errno| TcpError::io("epoll_create1", errno.into()))?;
        let attempts = LANES
            .into_iter()
            .map(|lane| Attempt::start(peer, pairing, lane))
            .collect::<Result<Vec<_>, _>>()?;
        for (index, attempt) in attempts.iter().enumerate() {
            let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
            epoll
                .add(&attempt.stream, EpollEvent::new(interest, index as u64))
                .map_err(|errno| TcpError::io("epoll_ctl", errno.into()))?;
        }
        Ok(TcpConnector {
            epoll,
            attempts,
            pairing,
            config: config.clone(),
            deadline: Instant::now() + config.pairing_timeout,
        })
    }

    /// Readable when [`TcpConnector::progress`] should be called.
    pub fn ready_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// When [`TcpConnector::progress`] should be called at the latest.
    pub fn next_deadline(&self) -> Instant {
        self.deadline
    }

    /// Goes on as far as it can without blocking. `Some` is the link, and the end of this
    /// connector's use, as an error is.
    ///
    /// # Panics
    /// If the link was made before.
    pub fn progress(&mut self) -> Result<Option<TcpLink>, TcpError> {
        // Edge-triggered: the readiness is taken here, and every attempt goes as far as it can.
        let mut events = [EpollEvent::empty(); LANES.len()];
        match self.epoll.wait(&mut events, 0u8) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(TcpError::io("epoll_wait", errno.into())),
        }
        for attempt in &mut self.attempts {
            attempt.progress()?;
        }
        if self.attempts.iter().all(|it| it.stage == Stage::Accepted) {
            return self.finish().map(Some);
        }
        if Instant::now() >= self.deadline {
            return Err(TcpError::TimedOut(self.config.pairing_timeout));
        }
        Ok(None)
    }

    fn finish(&mut self) -> Result<TcpLink, TcpError> {
        let attempts: [Attempt; 3] = std::mem::take(&mut self.attempts)
            .try_into()
            .expect("a connector makes one link");
        let [control, bulk, proof] = attempts.map(|attempt| attempt.stream);
        let streams = Streams {
            control,
            bulk,
            proof,
        };
        TcpLink::new(Ring::new()?, streams, self.pairing, &self.config)
    }
}

impl Attempt {
    fn start(peer: SocketAddr, pairing: PairingId, lane: Lane) -> Result<Attempt, TcpError> {
        let family = match peer {
            SocketAddr::V4(_) => AddressFamily::Inet,
            SocketAddr::V6(_) => AddressFamily::Inet6,
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd: OwnedFd = socket(family, SockType::Stream, flags, None)
            .map_err(|errno| TcpError::io("socket", errno.into()))?;
        let stream = TcpStream::from(fd);
        match connect(stream.as_raw_fd(), &SockaddrStorage::from(peer)) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(errno) => return Err(TcpError::io("connect", errno.into())),
        }
        Ok(Attempt {
            stream,
            preamble: Preamble { pairing, lane }.encode(),
            sent: 0,
            answer: [0; _],
            received: 0,
            stage: Stage::Connecting,
        })
    }

    fn progress(&mut self) -> Result<(), TcpError> {
        if self.stage == Stage::Connecting && self.is_connected()? {
            self.stage = Stage::Sending;
        }
        if self.stage == Stage::Sending && self.send()? {
            self.stage = Stage::Waiting;
        }
        if self.stage == Stage::Waiting && self.receive()? {
            self.stage = Stage::Accepted;
        }
        Ok(())
    }

    fn is_connected(&self) -> Result<bool, TcpError> {
        let failure = getsockopt(&self.stream, sockopt::SocketError)
            .map_err(|errno| TcpError::io("getsockopt", errno.into()))?;
        if failure != 0 {
            let source = io::Error::from_raw_os_error(failure);
            return Err(TcpError::io("connect", source));
        }
        match self.stream.peer_addr() {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
            Err(source) => Err(TcpError::io("connect", source)),
        }
    }

    /// Returns whether the whole preamble is sent.
    fn send(&mut self) -> Result<bool, TcpError> {
        while self.sent < PREAMBLE_BYTES {
            match self.stream.write(&self.preamble[self.sent..]) {
                Ok(bytes) => self.sent += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TcpError::io("sending a preamble", source)),
            }
        }
        Ok(true)
    }

    /// Returns whether the connection is accepted. Reads no byte of what follows the answer.
    fn receive(&mut self) -> Result<bool, TcpError> {
        let mut wanted = REPLY_BYTES;
        loop {
            if self.received >= REPLY_BYTES {
                let head = self.answer.first_chunk().expect("the answer holds a head");
                match Reply::decode(head)? {
                    Reply::Accepted => return Ok(true),
                    Reply::Refused { reason_bytes } => wanted = REPLY_BYTES + reason_bytes,
                }
                if self.received == wanted {
                    let reason = String::from_utf8_lossy(&self.answer[REPLY_BYTES..wanted]);
                    return Err(TcpError::Refused {
                        reason: reason.escape_debug().to_string(),
                    });
                }
            }
            match self.stream.read(&mut self.answer[self.received..wanted]) {
                Ok(0) => return Err(TcpError::ClosedEarly),
                Ok(bytes) => self.received += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TcpError::io("reading the peer's answer", source)),
            }
        }
    }
}
