//! Which link two hosts use: agreed on over the TCP lanes before the link is handed out.
//!
//! The connecting side offers what it can, the accepting side answers with its choice, and with
//! RDMA the connecting side then confirms that the queue pair stands ([`message`]). Both sides can
//! say in one sentence what was chosen, and why.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::str::FromStr;

mod connect;
mod listen;
pub mod message;

pub use connect::TransportConnector;
pub use listen::{Incoming, TransportListener};

use crate::link::{Event, Link, LinkError};
use crate::tcp::{TcpConfig, TcpError, TcpLink};

/// What the operator wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// RDMA where both hosts have it, else TCP.
    #[default]
    Auto,
    Tcp,
    /// RDMA or nothing.
    Rdma,
}

/// How to pair.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TransportConfig {
    pub choice: TransportChoice,
    pub tcp: TcpConfig,
    #[cfg(feature = "rdma")]
    pub rdma: crate::rdma::RdmaConfig,
}

/// What carries the chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Rdma,
}

/// A link, and how it came to be of its kind.
pub struct Connected {
    pub link: Box<dyn Link>,
    pub transport: Transport,
    /// What was chosen and why, for the operator.
    pub sentence: String,
    pub peer: SocketAddr,
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error(transparent)]
    Tcp(#[from] TcpError),
    #[error("RDMA is demanded, but can't be used here: {0}")]
    NoRdma(String),
    #[error("RDMA is demanded, but no connection could be made: {0}")]
    RdmaFailed(String),
    #[error("refused by the peer: {0}")]
    Refused(String),
    #[error("the peer does not agree on a transport as curling-rdma does: {0}")]
    NotAPeer(#[from] message::MessageError),
    #[error("the peer was lost while agreeing on a transport: {0}")]
    Lost(String),
    #[error(transparent)]
    Link(#[from] LinkError),
}

impl fmt::Display for TransportChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TransportChoice::Auto => "auto",
            TransportChoice::Tcp => "tcp",
            TransportChoice::Rdma => "rdma",
        })
    }
}

impl FromStr for TransportChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<TransportChoice, String> {
        match text {
            "auto" => Ok(TransportChoice::Auto),
            "tcp" => Ok(TransportChoice::Tcp),
            "rdma" => Ok(TransportChoice::Rdma),
            _ => Err(format!("{text:?} is none of auto, tcp, rdma")),
        }
    }
}

impl fmt::Debug for Connected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connected")
            .field("transport", &self.transport)
            .field("sentence", &self.sentence)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl Connected {
    fn tcp(link: TcpLink, why: &str) -> Connected {
        Connected {
            peer: link.peer(),
            link: Box::new(link),
            transport: Transport::Tcp,
            sentence: format!("transport: TCP, because {why}"),
        }
    }

    #[cfg(feature = "rdma")]
    fn rdma(tcp: TcpLink, bulk: crate::rdma::Established) -> Result<Connected, TransportError> {
        let link = bulk
            .beside(tcp)
            .map_err(|error| TransportError::RdmaFailed(say(&error)))?;
        Ok(Connected {
            peer: link.peer(),
            transport: Transport::Rdma,
            sentence: format!("transport: RDMA on {}, as both hosts can", link.device()),
            link: Box::new(link),
        })
    }
}

/// Whether the way to `peer` begins at a device that can do RDMA, where that is demanded: said before
/// anything is started. Sends nothing.
///
/// # Errors
/// RDMA is demanded and can't be used, or there is no way to `peer`.
pub fn check_choice(peer: SocketAddr, config: &TransportConfig) -> Result<(), TransportError> {
    if config.choice != TransportChoice::Rdma {
        return Ok(());
    }
    let any: IpAddr = match peer {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Connecting a datagram socket only looks up the route.
    let local = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect(peer)?;
        socket.local_addr()
    });
    let local = local.map_err(|error| TcpError::io("looking up the way to the peer", error))?;
    rdma_at(local.ip(), config).map_err(TransportError::NoRdma)
}

/// Whether this host can use RDMA on its address `local`, or why not.
fn rdma_at(local: IpAddr, config: &TransportConfig) -> Result<(), String> {
    if config.choice == TransportChoice::Tcp {
        return Err("it is set to TCP".to_owned());
    }
    #[cfg(feature = "rdma")]
    {
        crate::rdma::memlock::check(config.rdma.lockable_bytes_min).map_err(|it| say(&it))?;
        crate::rdma::device::device_of(local).map_err(|it| say(&it))?;
        Ok(())
    }
    #[cfg(not(feature = "rdma"))]
    {
        let _ = local;
        Err(
            "this build has no RDMA: build it with libibverbs-dev, librdmacm-dev and the \
             feature \"rdma\""
                .to_owned(),
        )
    }
}

/// An error and what is behind it, in one line.
#[cfg(feature = "rdma")]
fn say(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Takes the next message of a pairing that is being agreed on; what comes behind it stays.
fn next_message(tcp: &mut TcpLink) -> Result<Option<Vec<u8>>, TransportError> {
    let mut messages = Vec::new();
    let mut lost = None;
    tcp.progress(&mut |event| match event {
        Event::Message(bytes) => messages.push(bytes.to_vec()),
        Event::Lost(loss) => lost = Some(format!("{:?} lane: {:?}", loss.lane, loss.kind)),
        _ => {}
    })?;
    if let Some(lost) = lost {
        return Err(TransportError::Lost(lost));
    }
    if messages.is_empty() {
        return Ok(None);
    }
    let behind = messages.split_off(1);
    tcp.give_back(behind)?;
    Ok(messages.pop())
}
