//! A link inside one process: for tests of what uses a link, and of the conformance suite.
//!
//! It behaves as the links between hosts do, down to the proof lane, which is a real descriptor
//! that the kernel closes. Each end can be driven by a thread of its own.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::arena::{Chunk, ChunkMut};
use crate::grants::{Claim, GrantIndex, Grants};
use crate::link::{
    CHUNK_BYTES, Event, Grant, Lane, Link, LinkError, Loss, LossKind, MESSAGE_BYTES_MAX,
};

/// Bytes of messages that one end may have under way.
const CONTROL_QUEUE_BYTES: usize = 4 * MESSAGE_BYTES_MAX;
/// Frames that one call of `progress` copies.
const FRAMES_PER_PROGRESS: usize = 8;

/// One end of a link inside this process.
#[derive(Debug)]
pub struct MemLink {
    wire: Arc<Wire>,
    side: usize,
    epoll: Epoll,
    proof: UnixStream,
    /// What `flush` will put on the wire.
    messages: VecDeque<Vec<u8>>,
    frames: VecDeque<Frame>,
    grants: Grants,
    lost: [bool; 3],
}

/// Two ends of a new link.
pub fn pair() -> io::Result<(MemLink, MemLink)> {
    static LINKS: AtomicU64 = AtomicU64::new(0);
    let event = || EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
    let wire = Arc::new(Wire {
        id: LINKS.fetch_add(1, Ordering::Relaxed),
        ready: [event()?, event()?],
        inboxes: Mutex::default(),
    });
    let (proof_a, proof_b) = UnixStream::pair()?;
    Ok((
        MemLink::new(Arc::clone(&wire), 0, proof_a)?,
        MemLink::new(wire, 1, proof_b)?,
    ))
}

/// What the two ends share.
#[derive(Debug)]
struct Wire {
    id: u64,
    /// Per side: there may be something in its inbox.
    ready: [EventFd; 2],
    /// Per side: what is on its way there.
    inboxes: Mutex<[Inbox; 2]>,
}

#[derive(Debug, Default)]
struct Inbox {
    messages: VecDeque<Vec<u8>>,
    message_bytes: usize,
    frames: VecDeque<Frame>,
    /// Own chunks that come back from the other side.
    pushed: VecDeque<Chunk>,
    revoked: VecDeque<ChunkMut>,
    /// How [`Lane::Control`] and [`Lane::Bulk`] ended, behind what is still in the inbox.
    ended: [Option<LossKind>; 3],
}

#[derive(Debug)]
struct Frame {
    chunk: Chunk,
    to: GrantIndex,
    tag: u32,
}

impl MemLink {
    fn new(wire: Arc<Wire>, side: usize, proof: UnixStream) -> io::Result<MemLink> {
        proof.set_nonblocking(true)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&wire.ready[side], EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        epoll.add(&proof, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
        Ok(MemLink {
            wire,
            side,
            epoll,
            proof,
            messages: VecDeque::new(),
            frames: VecDeque::new(),
            grants: Grants::default(),
            lost: [false; 3],
        })
    }

    /// Ends a lane as this end sees it. After [`LossKind::Fin`] what the other end had sent still
    /// arrives; otherwise it is gone. Nothing more is carried either way.
    pub fn cut(&mut self, lane: Lane, kind: LossKind) {
        let mut inboxes = self.wire.lock();
        let inbox = &mut inboxes[self.side];
        if kind != LossKind::Fin {
            match lane {
                Lane::Control => inbox.messages.clear(),
                Lane::Bulk => {
                    let frames = std::mem::take(&mut inbox.frames);
                    let back = frames.into_iter().map(|frame| frame.chunk);
                    inboxes[1 - self.side].pushed.extend(back);
                }
                Lane::Proof => {}
            }
        }
        inboxes[self.side].ended[index(lane)].get_or_insert(kind);
        drop(inboxes);
        self.wire.wake(self.side);
        self.wire.wake(1 - self.side);
    }

    fn is_ended(&self, lane: Lane) -> bool {
        self.wire.lock()[self.side].ended[index(lane)].is_some()
    }

    /// Copies a frame into the chunk that it was granted.
    fn receive(
        &mut self,
        frame: Frame,
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<Chunk, LossKind> {
        let Frame { chunk, to, tag } = frame;
        match self.grants.claim(to) {
            Claim::Granted(granted) => {
                let mut into = granted.chunk;
                let bytes = chunk.bytes();
                assert!(bytes.len() <= CHUNK_BYTES, "a chunk is never longer");
                into.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
                let chunk = into.freeze(bytes.len());
                sink(Event::Arrived { chunk, tag });
            }
            Claim::Revoked => {}
            Claim::Filled => return Err(LossKind::Protocol(format!("{to:?} was used before"))),
            Claim::Unknown => return Err(LossKind::Protocol(format!("{to:?} was never given"))),
        }
        Ok(chunk)
    }

    fn lose(&mut self, lane: Lane, kind: LossKind, sink: &mut dyn FnMut(Event<'_>)) {
        if std::mem::replace(&mut self.lost[index(lane)], true) {
            return;
        }
        sink(Event::Lost(Loss { lane, kind }));
        if lane == Lane::Bulk {
            // The sink runs without the lock: it may well use the other end.
            let on_the_wire = std::mem::take(&mut self.wire.lock()[1 - self.side].frames);
            let queued = std::mem::take(&mut self.frames);
            for frame in on_the_wire.into_iter().chain(queued) {
                sink(Event::Pushed(frame.chunk));
            }
        }
    }

    fn look_at_proof(&mut self, sink: &mut dyn FnMut(Event<'_>)) {
        if self.lost[index(Lane::Proof)] {
            return;
        }
        let ended = match self.proof.read(&mut [0]) {
            Ok(0) => LossKind::Fin,
            Ok(_) => LossKind::Protocol("bytes on the proof lane".to_owned()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                match self.wire.lock()[self.side].ended[index(Lane::Proof)].take() {
                    Some(kind) => kind,
                    None => return,
                }
            }
            Err(error) => LossKind::Error(error.to_string()),
        };
        // It would stay readable for ever.
        let _ = self.epoll.delete(&self.proof);
        self.lose(Lane::Proof, ended, sink);
    }
}

impl Link for MemLink {
    fn ready_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    fn proof_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.proof.as_fd())
    }

    fn send(&mut self, message: &[u8]) -> Result<(), LinkError> {
        let bytes = message.len();
        if bytes > MESSAGE_BYTES_MAX {
            return Err(LinkError::MessageTooLong { bytes });
        }
        if self.is_ended(Lane::Control) {
            return Ok(());
        }
        let under_way = &mut self.wire.lock()[1 - self.side].message_bytes;
        if *under_way + bytes > CONTROL_QUEUE_BYTES {
            return Err(LinkError::ControlQueueFull { queued: *under_way });
        }
        *under_way += bytes;
        self.messages.push_back(message.to_vec());
        Ok(())
    }

    fn grant(&mut self, chunk: ChunkMut, slot: u8) -> Result<Grant, LinkError> {
        let index = self.grants.add(chunk, slot).ok_or(LinkError::BadGrant)?;
        Ok(index.encode(self.wire.id))
    }

    fn revoke(&mut self, slot: u8) -> Result<(), LinkError> {
        let revoked = &mut self.wire.lock()[self.side].revoked;
        self.grants.revoke(slot, |chunk| revoked.push_back(chunk));
        self.wire.wake(self.side);
        Ok(())
    }

    fn push(&mut self, chunk: Chunk, to: Grant, tag: u32) -> Result<(), LinkError> {
        let to = GrantIndex::decode(&to, self.wire.id).ok_or(LinkError::BadGrant)?;
        if self.is_ended(Lane::Bulk) {
            self.wire.lock()[self.side].pushed.push_back(chunk);
            self.wire.wake(self.side);
        } else {
            self.frames.push_back(Frame { chunk, to, tag });
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        if self.messages.is_empty() && self.frames.is_empty() {
            return Ok(());
        }
        let inbox = &mut self.wire.lock()[1 - self.side];
        inbox.messages.append(&mut self.messages);
        inbox.frames.append(&mut self.frames);
        self.wire.wake(1 - self.side);
        Ok(())
    }

    fn progress(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<(), LinkError> {
        // Nothing to read is as good as having read it.
        let _ = self.wire.ready[self.side].read();
        let (messages, frames, pushed, revoked) = {
            let inbox = &mut self.wire.lock()[self.side];
            inbox.message_bytes -= inbox.messages.iter().map(Vec::len).sum::<usize>();
            let some = inbox.frames.len().min(FRAMES_PER_PROGRESS);
            (
                std::mem::take(&mut inbox.messages),
                inbox.frames.drain(..some).collect::<Vec<_>>(),
                std::mem::take(&mut inbox.pushed),
                std::mem::take(&mut inbox.revoked),
            )
        };
        messages.iter().for_each(|it| sink(Event::Message(it)));
        pushed.into_iter().for_each(|it| sink(Event::Pushed(it)));
        revoked.into_iter().for_each(|it| sink(Event::Revoked(it)));
        for frame in frames {
            if self.lost[index(Lane::Bulk)] {
                break;
            }
            match self.receive(frame, sink) {
                Ok(chunk) => {
                    self.wire.lock()[1 - self.side].pushed.push_back(chunk);
                    self.wire.wake(1 - self.side);
                }
                Err(kind) => self.lose(Lane::Bulk, kind, sink),
            }
        }
        self.look_at_proof(sink);
        for lane in [Lane::Control, Lane::Bulk] {
            let mut inboxes = self.wire.lock();
            let inbox = &mut inboxes[self.side];
            let drained = match lane {
                Lane::Control => inbox.messages.is_empty(),
                _ => inbox.frames.is_empty(),
            };
            if drained && let Some(kind) = inbox.ended[index(lane)].clone() {
                drop(inboxes);
                self.lose(lane, kind, sink);
            }
        }
        let inbox = &self.wire.lock()[self.side];
        if !inbox.frames.is_empty() || !inbox.messages.is_empty() {
            self.wire.wake(self.side);
        }
        Ok(())
    }
}

impl Drop for MemLink {
    fn drop(&mut self) {
        let mut inboxes = self.wire.lock();
        let frames = std::mem::take(&mut inboxes[self.side].frames);
        let other = &mut inboxes[1 - self.side];
        other.pushed.extend(frames.into_iter().map(|it| it.chunk));
        for lane in [Lane::Control, Lane::Bulk] {
            other.ended[index(lane)].get_or_insert(LossKind::Fin);
        }
        drop(inboxes);
        self.wire.wake(1 - self.side);
    }
}

impl Wire {
    fn lock(&self) -> MutexGuard<'_, [Inbox; 2]> {
        // A panic in one end's sink leaves the queues as they were between two steps.
        self.inboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, side: usize) {
        // Full is readable, too.
        let _ = self.ready[side].write(1);
    }
}

fn index(lane: Lane) -> usize {
    lane as usize - 1
}
