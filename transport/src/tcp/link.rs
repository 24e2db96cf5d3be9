//! [`TcpLink`]: the lanes behind the [`Link`] trait, and their orderly end.

use std::io::{self, Write};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::arena::{Chunk, ChunkMut};
use crate::grants::GrantIndex;
use crate::link::{Event, Grant, Lane, Link, LinkError};
use crate::tcp::lanes::{Lanes, Streams};
use crate::tcp::preamble::PairingId;
use crate::tcp::ring::Ring;
use crate::tcp::{TcpConfig, TcpError, socket};

/// How long a link that is dropped waits for its operations to end, and for what it sent without
/// copying to be acknowledged.
const CANCEL_PATIENCE: Duration = Duration::from_millis(50);
/// How long it then waits for the kernel to let go of its memory.
const RESET_PATIENCE: Duration = Duration::from_millis(500);
/// Three TCP connections to one peer, in the hands of the thread that made it.
pub struct TcpLink {
    lanes: ManuallyDrop<Box<Lanes>>,
    /// The ring is the property of one thread (IORING_SETUP_SINGLE_ISSUER).
    not_send: PhantomData<*const ()>,
}

impl TcpLink {
    /// Takes three connections whose preambles are through, and the calling thread's ring.
    pub(super) fn new(
        ring: Ring,
        streams: Streams,
        pairing: PairingId,
        config: &TcpConfig,
    ) -> Result<TcpLink, TcpError> {
        for stream in [&streams.control, &streams.bulk, &streams.proof] {
            // With O_NONBLOCK the ring would answer EAGAIN instead of waiting.
            stream
                .set_nonblocking(false)
                .and_then(|()| socket::set_options(stream, config))
                .map_err(|source| TcpError::io("setting socket options", source))?;
        }
        let lanes = Lanes::new(ring, streams, pairing, config)?;
        // From here on `drop` waits for the kernel.
        let mut link = TcpLink {
            lanes: ManuallyDrop::new(Box::new(lanes)),
            not_send: PhantomData,
        };
        link.lanes
            .start_receives()
            .and_then(|()| link.lanes.ring.submit())
            .map_err(|source| TcpError::io("starting to receive", source))?;
        Ok(link)
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
        let streams = link.lanes.streams();
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
        self.lanes.peer
    }

    /// Ties grants to this link: the pairing id's first eight bytes.
    #[cfg(feature = "rdma")]
    pub(crate) fn pairing(&self) -> u64 {
        self.lanes.pairing
    }

    /// Has messages that were taken by somebody before the link's user reported again. To be called
    /// between two calls of `progress`.
    pub(crate) fn give_back(&mut self, messages: Vec<Vec<u8>>) -> Result<(), LinkError> {
        for message in messages {
            self.lanes
                .give_back_message(message)
                .map_err(|source| io_error("writing an eventfd", source))?;
        }
        Ok(())
    }

    /// This host's address on the control lane.
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.lanes.streams().control.local_addr()
    }

    /// The socket of one lane, for its statistics (TCP_INFO). Its bytes are the link's.
    pub fn lane_fd(&self, lane: Lane) -> BorrowedFd<'_> {
        self.lanes.streams().lane(lane).as_fd()
    }
}

impl Link for TcpLink {
    fn ready_fd(&self) -> BorrowedFd<'_> {
        self.lanes.ready_fd()
    }

    fn proof_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.lanes.streams().proof.as_fd())
    }

    /// On a lost lane the message goes nowhere.
    fn send(&mut self, message: &[u8]) -> Result<(), LinkError> {
        if self.lanes.is_lost(Lane::Control) {
            return Ok(());
        }
        self.lanes.control.queue(message)
    }

    fn grant(&mut self, chunk: ChunkMut, slot: u8) -> Result<Grant, LinkError> {
        let lanes = &mut **self.lanes;
        let index = lanes
            .bulk_receive
            .grants
            .add(chunk, slot)
            .ok_or(LinkError::BadGrant)?;
        Ok(index.encode(lanes.pairing))
    }

    fn revoke(&mut self, slot: u8) -> Result<(), LinkError> {
        self.lanes
            .revoke(slot)
            .map_err(|source| io_error("cancelling a receive", source))
    }

    /// On a lost lane the chunk comes back as pushed.
    fn push(&mut self, chunk: Chunk, to: Grant, tag: u32) -> Result<(), LinkError> {
        let lanes = &mut **self.lanes;
        let grant = GrantIndex::decode(&to, lanes.pairing).ok_or(LinkError::BadGrant)?;
        if lanes.is_lost(Lane::Bulk) {
            return lanes
                .give_back(chunk)
                .map_err(|source| io_error("writing an eventfd", source));
        }
        lanes.bulk_send.queue(chunk, grant, tag);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        self.lanes
            .flush()
            .map_err(|source| io_error("io_uring_enter", source))
    }

    fn progress(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<(), LinkError> {
        self.lanes
            .progress(sink)
            .map_err(|source| io_error("io_uring_enter", source))
    }
}

impl std::fmt::Debug for TcpLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpLink")
            .field("peer", &self.lanes.peer)
            .field("lost", &self.lanes.lost)
            .field("ring", &self.lanes.ring)
            .finish_non_exhaustive()
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        let lanes = &mut **self.lanes;
        let quiet = lanes.ring.quiesce(CANCEL_PATIENCE) || {
            // What can't be cancelled is memory that waits for the peer's acknowledgement. A reset
            // throws the bytes away.
            socket::reset(&lanes.streams().bulk);
            lanes.ring.quiesce(RESET_PATIENCE)
        };
        if quiet {
            // SAFETY: `lanes` isn't used again: this is the end of the link.
            unsafe { ManuallyDrop::drop(&mut self.lanes) };
        } else {
            tracing::error!(
                peer = %self.lanes.peer,
                "the kernel holds on to a closed link's memory: it is leaked"
            );
            // The connections end all the same.
            self.lanes.streams = None;
        }
    }
}

fn io_error(operation: &'static str, source: io::Error) -> LinkError {
    LinkError::Io { operation, source }
}
