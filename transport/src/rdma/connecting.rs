//! Connecting and accepting, one step at a time.
//!
//! The private data of a connection request is the pairing id of the TCP lanes: whoever doesn't
//! know it is rejected.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;
use std::rc::Rc;

use nix::sys::socket::{SockaddrLike, SockaddrStorage};

use super::bulk::Bulk;
use super::cm::{EventChannel, Identifier};
use super::completion::CompletionQueue;
use super::device::ProtectionDomain;
use super::ffi::{self, rdma_cm_event_type as kind};
use super::queue_pair::{Depth, QueuePair};
use super::{RdmaConfig, RdmaError, RdmaLink, memlock};
use crate::tcp::{PairingId, TcpLink};

/// How long one step of resolving an address may take.
const RESOLVE_MS: i32 = 2000;
/// Connection requests that may wait for [`CmListener::progress`].
const BACKLOG: i32 = 8;
/// A packet that isn't acknowledged for 4.096 µs × 2^this is sent again: 0.27 s. Silence is noticed
/// by heartbeats; this only has to be patient enough for soft-RoCE on an emulated CPU.
const ACK_TIMEOUT: u8 = 16;
/// How often: with [`ACK_TIMEOUT`], the queue pair gives up after about two seconds.
const RETRIES: u8 = 7;
/// A receiver without a buffer is asked again for ever: it is this side's flow control.
const RNR_RETRIES: u8 = 7;
/// Requests that a queue pair holds.
pub(super) const DEPTH: Depth = Depth {
    sends: 1024,
    receives: 1024,
};

/// A connection whose queue pair is made. Its parts go in this order.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) pair: QueuePair,
    pub(super) pd: Rc<ProtectionDomain>,
    pub(super) id: Rc<Identifier>,
}

impl Connection {
    fn prepare(id: &Rc<Identifier>, config: &RdmaConfig) -> Result<Connection, RdmaError> {
        memlock::check(config.lockable_bytes_min)?;
        let timeout = ACK_TIMEOUT;
        // SAFETY: the option is one byte, which lives during the call.
        let done = unsafe {
            ffi::rdma_set_option(
                id.as_ptr(),
                ffi::RDMA_OPTION_ID,
                ffi::RDMA_OPTION_ID_ACK_TIMEOUT,
                (&raw const timeout).cast_mut().cast(),
                1,
            )
        };
        if done != 0 {
            tracing::debug!("the device's own acknowledgement timeout is used");
        }
        let pd = ProtectionDomain::new(id)?;
        let cq = CompletionQueue::new(id, DEPTH.sends + DEPTH.receives)?;
        let pair = QueuePair::new(id, &pd, &cq, DEPTH)?;
        Ok(Connection {
            pair,
            pd,
            id: Rc::clone(id),
        })
    }
}

fn parameters(private: &[u8]) -> ffi::rdma_conn_param {
    // SAFETY: all-zero is valid: integers, and a pointer that may be null.
    let mut parameters: ffi::rdma_conn_param = unsafe { std::mem::zeroed() };
    parameters.private_data = private.as_ptr().cast();
    parameters.private_data_len = private.len() as u8;
    parameters.retry_count = RETRIES;
    parameters.rnr_retry_count = RNR_RETRIES;
    parameters
}

/// A connection that is being made, from either side.
#[derive(Debug)]
pub struct Connecting {
    id: Rc<Identifier>,
    connection: Option<Bulk>,
    /// What the connecting side sends with its request.
    pairing: PairingId,
    config: RdmaConfig,
}

impl Connecting {
    /// Starts connecting to `peer` from this host's address `from`.
    pub fn start(
        from: IpAddr,
        peer: SocketAddr,
        pairing: PairingId,
        config: &RdmaConfig,
    ) -> Result<Connecting, RdmaError> {
        let id = Identifier::new(EventChannel::new()?)?;
        let source = SockaddrStorage::from(SocketAddr::new(from, 0));
        let target = SockaddrStorage::from(peer);
        // SAFETY: the addresses are as long as their families say, and live during the call, which
        // doesn't write them.
        let done = unsafe {
            ffi::rdma_resolve_addr(
                id.as_ptr(),
                source.as_ptr().cast_mut(),
                target.as_ptr().cast_mut(),
                RESOLVE_MS,
            )
        };
        if done != 0 {
            return Err(match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENODEV) => {
                    RdmaError::NoDevice { address: from }
                }
                source => RdmaError::Io {
                    operation: "rdma_resolve_addr",
                    source,
                },
            });
        }
        Ok(Connecting {
            id,
            connection: None,
            pairing,
            config: config.clone(),
        })
    }

    /// Readable when [`Connecting::progress`] should be called.
    pub fn ready_fd(&self) -> BorrowedFd<'_> {
        self.id.channel().as_fd()
    }

    /// Goes on as far as it can. `Some` is the connection, and the end of this value's use.
    pub fn progress(&mut self) -> Result<Option<Established>, RdmaError> {
        while let Some(event) = self.id.channel().next()? {
            match event.kind {
                kind::RDMA_CM_EVENT_ADDR_RESOLVED => {
                    // SAFETY: the identifier is alive, and its address is resolved.
                    if unsafe { ffi::rdma_resolve_route(self.id.as_ptr(), RESOLVE_MS) } != 0 {
                        return Err(RdmaError::last("rdma_resolve_route"));
                    }
                }
                kind::RDMA_CM_EVENT_ROUTE_RESOLVED => self.connect()?,
                kind::RDMA_CM_EVENT_ESTABLISHED => {
                    let bulk = self.connection.take().expect("it was asked for before");
                    bulk.tune()?;
                    return Ok(Some(Established(bulk)));
                }
                _ => return Err(event.error("connecting")),
            }
        }
        Ok(None)
    }

    fn connect(&mut self) -> Result<(), RdmaError> {
        self.prepare()?;
        let mut parameters = parameters(&self.pairing.0);
        // SAFETY: the parameters and what they name live during the call.
        match unsafe { ffi::rdma_connect(self.id.as_ptr(), &raw mut parameters) } {
            0 => Ok(()),
            _ => Err(RdmaError::last("rdma_connect")),
        }
    }

    fn accept(&mut self) -> Result<(), RdmaError> {
        self.prepare()?;
        let mut parameters = parameters(&[]);
        // SAFETY: the parameters live during the call.
        match unsafe { ffi::rdma_accept(self.id.as_ptr(), &raw mut parameters) } {
            0 => Ok(()),
            _ => Err(RdmaError::last("rdma_accept")),
        }
    }

    fn prepare(&mut self) -> Result<(), RdmaError> {
        let connection = Connection::prepare(&self.id, &self.config)?;
        self.connection = Some(Bulk::new(connection, &self.config)?);
        Ok(())
    }
}

/// A connection that stands, and waits for its lanes.
#[derive(Debug)]
pub struct Established(Bulk);

impl Established {
    /// Makes the link.
    pub fn beside(self, tcp: TcpLink) -> Result<RdmaLink, RdmaError> {
        RdmaLink::new(tcp, self.0)
    }
}

/// Waits for connections of known pairings.
#[derive(Debug)]
pub struct CmListener {
    id: Rc<Identifier>,
    config: RdmaConfig,
}

impl CmListener {
    /// Listens where the TCP listener does.
    pub fn bind(address: SocketAddr, config: &RdmaConfig) -> Result<CmListener, RdmaError> {
        let id = Identifier::new(EventChannel::new()?)?;
        id.bind(address).map_err(|error| match error {
            RdmaError::Io { source, .. } if source.raw_os_error() == Some(libc::ENODEV) => {
                RdmaError::NoDevice {
                    address: address.ip(),
                }
            }
            other => other,
        })?;
        // SAFETY: the identifier is alive and bound.
        if unsafe { ffi::rdma_listen(id.as_ptr(), BACKLOG) } != 0 {
            return Err(RdmaError::last("rdma_listen"));
        }
        Ok(CmListener {
            id,
            config: config.clone(),
        })
    }

    /// Readable when [`CmListener::progress`] should be called.
    pub fn ready_fd(&self) -> BorrowedFd<'_> {
        self.id.channel().as_fd()
    }

    /// Accepts the next request whose pairing and address `expected` knows; rejects the others.
    pub fn progress(
        &self,
        expected: impl Fn(PairingId, IpAddr) -> bool,
    ) -> Result<Option<(PairingId, Connecting)>, RdmaError> {
        while let Some(event) = self.id.channel().next()? {
            let Some(new) = event.new else { continue };
            let id = Identifier::adopt(new)?;
            let peer = id.peer().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            // rdma_cm pads private data with zeros.
            let pairing = event.private.first_chunk().copied().map(PairingId);
            let Some(pairing) = pairing.filter(|&pairing| expected(pairing, peer)) else {
                tracing::warn!(%peer, "an RDMA connection of an unknown pairing is rejected");
                // SAFETY: the identifier is alive; there is no private data.
                unsafe { ffi::rdma_reject(id.as_ptr(), ptr::null(), 0) };
                continue;
            };
            let mut connecting = Connecting {
                id,
                connection: None,
                pairing,
                config: self.config.clone(),
            };
            connecting.accept()?;
            return Ok(Some((pairing, connecting)));
        }
        Ok(None)
    }
}
