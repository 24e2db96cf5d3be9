//! The connecting side.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::message::{Answer, Offer, Verdict};
use super::{Connected, TransportChoice, TransportConfig, TransportError, next_message, rdma_at};
use crate::link::Link;
use crate::tcp::{PairingId, TcpConnector, TcpError, TcpLink};

/// Makes a link of the kind that both sides agree on, without blocking.
#[derive(Debug)]
pub struct TransportConnector {
    stage: Stage,
    #[cfg(feature = "rdma")]
    peer: SocketAddr,
    pairing: PairingId,
    config: TransportConfig,
    deadline: Instant,
    epoll: Epoll,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one")]
enum Stage {
    Pairing(TcpConnector),
    Offered(TcpLink),
    #[cfg(feature = "rdma")]
    Connecting(TcpLink, crate::rdma::Connecting),
    Over,
}

impl TransportConnector {
    /// Starts connecting to `peer`. `pairing` is to be drawn at random for each attempt.
    pub fn start(
        peer: SocketAddr,
        pairing: PairingId,
        config: &TransportConfig,
    ) -> Result<TransportConnector, TransportError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|errno| TcpError::io("epoll_create1", errno.into()))?;
        let tcp = TcpConnector::start(peer, pairing, &config.tcp)?;
        let connector = TransportConnector {
            stage: Stage::Over,
            #[cfg(feature = "rdma")]
            peer,
            pairing,
            config: config.clone(),
            // One for the pairing, one for what is agreed on after it.
            deadline: Instant::now() + 2 * config.tcp.pairing_timeout,
            epoll,
        };
        connector.watch(tcp.ready_fd())?;
        Ok(TransportConnector {
            stage: Stage::Pairing(tcp),
            ..connector
        })
    }

    /// Readable when [`TransportConnector::progress`] should be called.
    pub fn ready_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// When [`TransportConnector::progress`] should be called at the latest.
    pub fn next_deadline(&self) -> Instant {
        match &self.stage {
            Stage::Pairing(tcp) => tcp.next_deadline(),
            _ => self.deadline,
        }
    }

    /// Goes on as far as it can without blocking. `Some` is the link, and the end of this
    /// connector's use, as an error is.
    ///
    /// # Panics
    /// If the link was made, or an error returned, before.
    pub fn progress(&mut self) -> Result<Option<Connected>, TransportError> {
        let (stage, connected) = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Pairing(tcp) => self.pair(tcp)?,
            Stage::Offered(tcp) => self.read_answer(tcp)?,
            #[cfg(feature = "rdma")]
            Stage::Connecting(tcp, rdma) => self.connect(tcp, rdma)?,
            Stage::Over => panic!("a connector makes one link"),
        };
        self.stage = stage;
        if connected.is_none() && Instant::now() >= self.deadline {
            return Err(TcpError::TimedOut(2 * self.config.tcp.pairing_timeout).into());
        }
        Ok(connected)
    }

    fn pair(&self, mut tcp: TcpConnector) -> Result<Next, TransportError> {
        let Some(mut link) = tcp.progress()? else {
            return Ok((Stage::Pairing(tcp), None));
        };
        let local = link
            .local_addr()
            .map_err(|source| TcpError::io("getsockname", source))?;
        let rdma = rdma_at(local.ip(), &self.config);
        if let (Err(why), TransportChoice::Rdma) = (&rdma, self.config.choice) {
            return Err(TransportError::NoRdma(why.clone()));
        }
        let offer = Offer {
            wants: self.config.choice,
            rdma,
            pairing: self.pairing,
        };
        link.send(&offer.encode())?;
        link.flush()?;
        self.watch(link.ready_fd())?;
        Ok((Stage::Offered(link), None))
    }

    fn read_answer(&self, mut tcp: TcpLink) -> Result<Next, TransportError> {
        let Some(message) = next_message(&mut tcp)? else {
            return Ok((Stage::Offered(tcp), None));
        };
        let answer = Answer::decode(&message)?;
        match answer.verdict {
            Verdict::Refused => Err(TransportError::Refused(answer.reason)),
            Verdict::Tcp => Ok((Stage::Over, Some(Connected::tcp(tcp, &answer.reason)))),
            Verdict::Rdma => self.begin_rdma(tcp),
        }
    }

    #[cfg(not(feature = "rdma"))]
    fn begin_rdma(&self, _: TcpLink) -> Result<Next, TransportError> {
        Err(TransportError::Refused(
            "it chose what was not offered".to_owned(),
        ))
    }

    #[cfg(feature = "rdma")]
    fn begin_rdma(&self, tcp: TcpLink) -> Result<Next, TransportError> {
        let local = tcp
            .local_addr()
            .map_err(|source| TcpError::io("getsockname", source))?;
        let started =
            crate::rdma::Connecting::start(local.ip(), self.peer, self.pairing, &self.config.rdma);
        match started {
            Ok(rdma) => {
                self.watch(rdma.ready_fd())?;
                Ok((Stage::Connecting(tcp, rdma), None))
            }
            Err(error) => self.without_rdma(tcp, &error),
        }
    }

    #[cfg(feature = "rdma")]
    fn connect(
        &self,
        mut tcp: TcpLink,
        mut rdma: crate::rdma::Connecting,
    ) -> Result<Next, TransportError> {
        match rdma.progress() {
            Ok(None) => Ok((Stage::Connecting(tcp, rdma), None)),
            Ok(Some(bulk)) => {
                confirm(&mut tcp, Verdict::Rdma, String::new())?;
                Ok((Stage::Over, Some(Connected::rdma(tcp, bulk)?)))
            }
            Err(error) => self.without_rdma(tcp, &error),
        }
    }

    /// Both sides have a device, and yet they don't come together.
    #[cfg(feature = "rdma")]
    fn without_rdma(
        &self,
        mut tcp: TcpLink,
        error: &crate::rdma::RdmaError,
    ) -> Result<Next, TransportError> {
        let why = super::say(error);
        if self.config.choice == TransportChoice::Rdma {
            return Err(TransportError::RdmaFailed(why));
        }
        let why = format!("no RDMA connection could be made: {why}");
        confirm(&mut tcp, Verdict::Tcp, why.clone())?;
        Ok((Stage::Over, Some(Connected::tcp(tcp, &why))))
    }

    fn watch(&self, fd: BorrowedFd<'_>) -> Result<(), TransportError> {
        self.epoll
            .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))
            .map_err(|errno| TcpError::io("epoll_ctl", errno.into()).into())
    }
}

type Next = (Stage, Option<Connected>);

#[cfg(feature = "rdma")]
fn confirm(tcp: &mut TcpLink, verdict: Verdict, reason: String) -> Result<(), TransportError> {
    tcp.send(&Answer { verdict, reason }.encode())?;
    Ok(tcp.flush()?)
}
