//! The accepting side.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::message::{Answer, Offer, Verdict};
use super::{Connected, TransportChoice, TransportConfig, TransportError, next_message, rdma_at};
use crate::link::Link;
use crate::tcp::{self, TcpError, TcpLink, TcpListener};

/// Pairings that may be agreeing on a transport; one more ends the oldest.
const GREETINGS_MAX: usize = 8;

/// Accepts links of the kind that both sides agree on, without blocking.
#[derive(Debug)]
pub struct TransportListener {
    tcp: TcpListener,
    #[cfg(feature = "rdma")]
    rdma: Option<crate::rdma::CmListener>,
    greetings: Vec<Greeting>,
    config: TransportConfig,
    epoll: Epoll,
}

/// What [`TransportListener::progress`] has to report.
#[derive(Debug)]
pub enum Incoming {
    Link(Connected),
    /// A connection was closed, and told why if it would hear it.
    Refused {
        peer: SocketAddr,
        reason: String,
    },
}

/// A pairing whose transport isn't agreed on.
#[derive(Debug)]
struct Greeting {
    tcp: TcpLink,
    deadline: Instant,
    /// Why it is TCP, if it is.
    why: String,
    /// Why there is no link: the peer was told, and is to close its end first, as this end's close
    /// could overtake the reason.
    refused: Option<String>,
    /// What was answered with [`Verdict::Rdma`].
    #[cfg(feature = "rdma")]
    expected: Option<Expected>,
}

/// An RDMA connection that is to come.
#[cfg(feature = "rdma")]
#[derive(Debug)]
struct Expected {
    pairing: crate::tcp::PairingId,
    connecting: Option<crate::rdma::Connecting>,
    established: Option<crate::rdma::Established>,
    confirmed: bool,
}

impl TransportListener {
    /// # Errors
    /// The port is taken, or RDMA is demanded and can't be used at this address.
    pub fn bind(
        address: SocketAddr,
        config: &TransportConfig,
    ) -> Result<TransportListener, TransportError> {
        let tcp = TcpListener::bind(address, &config.tcp)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|errno| TcpError::io("epoll_create1", errno.into()))?;
        let listener = TransportListener {
            tcp,
            #[cfg(feature = "rdma")]
            rdma: None,
            greetings: Vec::new(),
            config: config.clone(),
            epoll,
        };
        listener.watch(listener.tcp.ready_fd())?;
        if config.choice == TransportChoice::Rdma && !address.ip().is_unspecified() {
            rdma_at(address.ip(), config).map_err(TransportError::NoRdma)?;
        }
        Ok(listener)
    }

    /// The address that was bound, with the port that the kernel chose if it was 0.
    pub fn local_addr(&self) -> Result<SocketAddr, TransportError> {
        Ok(self.tcp.local_addr()?)
    }

    /// Readable when [`TransportListener::progress`] should be called.
    pub fn ready_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// When [`TransportListener::progress`] should be called at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        let greetings = self.greetings.iter().map(|it| it.deadline);
        greetings.chain(self.tcp.next_deadline()).min()
    }

    /// Goes on as far as it can without blocking. Links are made in the calling thread, and belong
    /// to it.
    pub fn progress(&mut self, sink: &mut dyn FnMut(Incoming)) -> Result<(), TransportError> {
        let mut paired = Vec::new();
        self.tcp.progress(&mut |incoming| match incoming {
            tcp::Incoming::Link(link) => paired.push(link),
            tcp::Incoming::Refused { peer, reason } => sink(Incoming::Refused {
                peer,
                reason: reason.to_string(),
            }),
        })?;
        for tcp in paired {
            self.greet(tcp, sink)?;
        }
        #[cfg(feature = "rdma")]
        self.accept_rdma()?;
        for mut greeting in std::mem::take(&mut self.greetings) {
            let peer = greeting.tcp.peer();
            match self.advance(&mut greeting) {
                Ok(true) => match greeting.finish() {
                    Ok(connected) => sink(Incoming::Link(connected)),
                    Err(error) => refuse(peer, &error, sink),
                },
                Ok(false) => self.greetings.push(greeting),
                Err(error) => refuse(peer, &error, sink),
            }
        }
        let now = Instant::now();
        let timeout = self.config.tcp.pairing_timeout;
        for late in self.greetings.extract_if(.., |it| now >= it.deadline) {
            refuse(late.tcp.peer(), &TcpError::TimedOut(timeout).into(), sink);
        }
        Ok(())
    }

    fn greet(
        &mut self,
        tcp: TcpLink,
        sink: &mut dyn FnMut(Incoming),
    ) -> Result<(), TransportError> {
        if self.greetings.len() == GREETINGS_MAX {
            let oldest = self.greetings.remove(0);
            let crowded = TransportError::Refused("later pairings are waiting".to_owned());
            refuse(oldest.tcp.peer(), &crowded, sink);
        }
        self.watch(tcp.ready_fd())?;
        self.greetings.push(Greeting {
            tcp,
            deadline: Instant::now() + self.config.tcp.pairing_timeout,
            why: String::new(),
            refused: None,
            #[cfg(feature = "rdma")]
            expected: None,
        });
        Ok(())
    }

    /// Reads what the peer has to say. Returns whether the transport is agreed on.
    fn advance(&mut self, greeting: &mut Greeting) -> Result<bool, TransportError> {
        if let Some(reason) = &greeting.refused {
            return match next_message(&mut greeting.tcp) {
                Err(_) => Err(TransportError::Refused(reason.clone())),
                Ok(_) => Ok(false),
            };
        }
        #[cfg(feature = "rdma")]
        if let Some(expected) = &mut greeting.expected {
            if !expected.confirmed
                && let Some(message) = next_message(&mut greeting.tcp)?
            {
                expected.confirmed = true;
                let answer = Answer::decode(&message)?;
                if answer.verdict != Verdict::Rdma {
                    if self.config.choice == TransportChoice::Rdma {
                        return Err(TransportError::RdmaFailed(answer.reason));
                    }
                    greeting.expected = None;
                    greeting.why = answer.reason;
                    return Ok(true);
                }
            }
            if let Some(connecting) = &mut expected.connecting
                && let Some(established) = connecting
                    .progress()
                    .map_err(|error| TransportError::RdmaFailed(super::say(&error)))?
            {
                expected.established = Some(established);
                expected.connecting = None;
            }
            return Ok(expected.confirmed && expected.established.is_some());
        }
        let Some(message) = next_message(&mut greeting.tcp)? else {
            return Ok(false);
        };
        let offer = Offer::decode(&message)?;
        let local = greeting
            .tcp
            .local_addr()
            .map_err(|source| TcpError::io("getsockname", source))?;
        let here = rdma_at(local.ip(), &self.config).and_then(|()| self.listen_rdma());
        let answer = Answer::to(&offer, self.config.choice, &here);
        greeting.tcp.send(&answer.encode())?;
        greeting.tcp.flush()?;
        match answer.verdict {
            Verdict::Refused => {
                greeting.refused = Some(answer.reason);
                Ok(false)
            }
            Verdict::Tcp => {
                greeting.why = answer.reason;
                Ok(true)
            }
            Verdict::Rdma => {
                #[cfg(feature = "rdma")]
                {
                    greeting.expected = Some(Expected {
                        pairing: offer.pairing,
                        connecting: None,
                        established: None,
                        confirmed: false,
                    });
                }
                Ok(false)
            }
        }
    }

    /// Waits for RDMA connections where the TCP listener does, from the first pairing that may want
    /// one: a device can come later than this side.
    fn listen_rdma(&mut self) -> Result<(), String> {
        #[cfg(feature = "rdma")]
        if self.rdma.is_none() {
            let address = self.tcp.local_addr().map_err(|it| super::say(&it))?;
            let listener = crate::rdma::CmListener::bind(address, &self.config.rdma)
                .map_err(|it| super::say(&it))?;
            self.watch(listener.ready_fd())
                .map_err(|it| super::say(&it))?;
            self.rdma = Some(listener);
        }
        Ok(())
    }

    /// Takes the RDMA connections of pairings that wait for one.
    #[cfg(feature = "rdma")]
    fn accept_rdma(&mut self) -> Result<(), TransportError> {
        let Some(listener) = &self.rdma else {
            return Ok(());
        };
        loop {
            let greetings = &self.greetings;
            let waits = |greeting: &Greeting, pairing| {
                let expected = greeting.expected.as_ref();
                expected.is_some_and(|it| {
                    it.pairing == pairing && it.connecting.is_none() && it.established.is_none()
                })
            };
            let next = listener.progress(|pairing, peer| {
                greetings
                    .iter()
                    .any(|it| waits(it, pairing) && it.tcp.peer().ip() == peer)
            });
            match next {
                Ok(None) => return Ok(()),
                Ok(Some((pairing, connecting))) => {
                    self.epoll
                        .add(
                            connecting.ready_fd(),
                            EpollEvent::new(EpollFlags::EPOLLIN, 0),
                        )
                        .map_err(|errno| TcpError::io("epoll_ctl", errno.into()))?;
                    let greeting = self.greetings.iter_mut().find(|it| waits(it, pairing));
                    let expected = greeting.and_then(|it| it.expected.as_mut());
                    expected.expect("it was just found").connecting = Some(connecting);
                }
                // The connecting side sees that nothing comes of it, and says what it does then.
                Err(error) => {
                    tracing::warn!(error = super::say(&error), "an RDMA connection failed");
                    return Ok(());
                }
            }
        }
    }

    fn watch(&self, fd: BorrowedFd<'_>) -> Result<(), TransportError> {
        self.epoll
            .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))
            .map_err(|errno| TcpError::io("epoll_ctl", errno.into()).into())
    }
}

impl Greeting {
    /// Makes the link that was agreed on.
    fn finish(self) -> Result<Connected, TransportError> {
        #[cfg(feature = "rdma")]
        if let Some(established) = self.expected.and_then(|it| it.established) {
            return Connected::rdma(self.tcp, established);
        }
        Ok(Connected::tcp(self.tcp, &self.why))
    }
}

fn refuse(peer: SocketAddr, error: &TransportError, sink: &mut dyn FnMut(Incoming)) {
    sink(Incoming::Refused {
        peer,
        reason: error.to_string(),
    });
}
