//! [`RdmaLink`]: a queue pair beside the lanes of a TCP pairing.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::RdmaError;
use super::bulk::Bulk;
use super::outbox::Outbox;
use super::window::RemoteWindow;
use crate::arena::{Chunk, ChunkMut};
use crate::grants::GrantIndex;
use crate::link::{Event, Grant, Lane, Link, LinkError, Loss, LossKind};
use crate::tcp::TcpLink;

/// A link whose chunks are written by the network card.
#[derive(Debug)]
pub struct RdmaLink {
    bulk: Bulk,
    bulk_is_lost: bool,
    tcp: TcpLink,
    outbox: Outbox,
    epoll: Epoll,
    /// Written when there is something to report that no other descriptor tells of.
    wake: EventFd,
    device: String,
    /// Ties grants to this link.
    pairing: u32,
}

impl RdmaLink {
    /// Puts an established connection beside the lanes that it was made for.
    pub(super) fn new(tcp: TcpLink, bulk: Bulk) -> Result<RdmaLink, RdmaError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let code = |operation| move |errno: nix::Error| RdmaError::code(operation, errno as i32);
        let wake = EventFd::from_flags(flags).map_err(code("eventfd"))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(code("epoll_create1"))?;
        let bulk_fds = bulk.ready_fds();
        let fds = [tcp.ready_fd(), wake.as_fd()];
        for fd in fds.into_iter().chain(bulk_fds.into_iter().flatten()) {
            epoll
                .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))
                .map_err(code("epoll_ctl"))?;
        }
        Ok(RdmaLink {
            device: bulk.device_name().unwrap_or_default(),
            pairing: (tcp.pairing() ^ tcp.pairing() >> 32) as u32,
            bulk,
            bulk_is_lost: false,
            tcp,
            outbox: Outbox::default(),
            epoll,
            wake,
        })
    }

    /// The peer's address on the control lane.
    pub fn peer(&self) -> SocketAddr {
        self.tcp.peer()
    }

    /// The RDMA device, as `rdma link` shows it.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The connections that are TCP.
    pub fn tcp(&self) -> &TcpLink {
        &self.tcp
    }

    /// Moves the queue pair to the error state: no write of the peer is carried out from here on,
    /// and the lane ends. To be called before the standby is activated.
    pub fn fail_bulk(&mut self) -> Result<(), RdmaError> {
        self.bulk.fail()
    }

    fn lose_bulk(&mut self, kind: LossKind, sink: &mut dyn FnMut(Event<'_>)) {
        if !std::mem::replace(&mut self.bulk_is_lost, true) {
            let lane = Lane::Bulk;
            sink(Event::Lost(Loss { lane, kind }));
            self.bulk.close(sink);
        }
    }

    fn wake(&self) {
        // Full is readable, too.
        let _ = self.wake.write(1);
    }

    fn encode(&self, index: GrantIndex, window: RemoteWindow) -> Grant {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&window.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&window.rkey.to_le_bytes());
        bytes[12..16].copy_from_slice(&index.index.to_le_bytes());
        bytes[16..20].copy_from_slice(&index.generation.to_le_bytes());
        bytes[20..].copy_from_slice(&self.pairing.to_le_bytes());
        Grant(bytes)
    }

    /// The peer chose the bytes: they are a claim that its device will judge.
    fn decode(&self, grant: &Grant) -> Option<(GrantIndex, RemoteWindow)> {
        let word = |at| u32::from_le_bytes(*grant.0[at..].first_chunk().expect("inside"));
        let index = GrantIndex {
            index: word(12),
            generation: word(16),
        };
        let window = RemoteWindow {
            address: u64::from(word(4)) << 32 | u64::from(word(0)),
            rkey: word(8),
        };
        (word(20) == self.pairing).then_some((index, window))
    }
}

impl Link for RdmaLink {
    fn ready_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    fn proof_fd(&self) -> Option<BorrowedFd<'_>> {
        self.tcp.proof_fd()
    }

    /// Waits for the windows of the grants before it: the message may be what tells of them.
    fn send(&mut self, message: &[u8]) -> Result<(), LinkError> {
        let (binds, done) = (self.bulk.binds_wanted, self.bulk.binds_done);
        self.outbox.send(&mut self.tcp, message, binds, done)
    }

    fn grant(&mut self, chunk: ChunkMut, slot: u8) -> Result<Grant, LinkError> {
        let granted = self
            .bulk
            .grant(chunk, slot)
            .map_err(io_error("registering a chunk"))?;
        let (index, window) = granted.ok_or(LinkError::BadGrant)?;
        Ok(self.encode(index, window))
    }

    /// A write of the peer that is under way to one of these chunks ends the lane.
    fn revoke(&mut self, slot: u8) -> Result<(), LinkError> {
        self.bulk.revoke(slot);
        if self.bulk.has_ready() {
            self.wake();
        }
        Ok(())
    }

    /// On a lost lane the chunk comes back as pushed.
    fn push(&mut self, chunk: Chunk, to: Grant, tag: u32) -> Result<(), LinkError> {
        let (index, window) = self.decode(&to).ok_or(LinkError::BadGrant)?;
        self.bulk
            .push(chunk, index, window, tag)
            .map_err(io_error("registering a chunk"))?;
        if self.bulk.has_ready() {
            self.wake();
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        self.bulk.post();
        if self.bulk.has_ready() {
            self.wake();
        }
        self.tcp.flush()
    }

    fn progress(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<(), LinkError> {
        // Nothing to read is as good as having read it.
        let _ = self.wake.read();
        let mut tcp_ended = None;
        self.tcp.progress(&mut |event| match event {
            Event::Lost(Loss {
                lane: Lane::Bulk,
                kind,
            }) => tcp_ended = Some(kind),
            other => sink(other),
        })?;
        match self.bulk.progress(sink, tcp_ended.is_some()) {
            Ok(true) => self.wake(),
            Ok(false) => {}
            Err(kind) => self.lose_bulk(kind, sink),
        }
        if let Some(kind) = tcp_ended {
            self.lose_bulk(kind, sink);
        }
        self.outbox.release(&mut self.tcp, self.bulk.binds_done)
    }
}

fn io_error(operation: &'static str) -> impl Fn(std::io::Error) -> LinkError {
    move |source| LinkError::Io { operation, source }
}
