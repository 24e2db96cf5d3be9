//! The bulk lane: what is queued for the queue pair, what it has, and what became of it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::chunks::Chunks;
use super::completion::{Completion, Done};
use super::connecting::{Connection, DEPTH};
use super::ffi::rdma_cm_event_type as kind;
use super::receives::Receives;
use super::region::Piece;
use super::window::{Binding, RemoteWindow};
use super::{RdmaConfig, RdmaError};
use crate::arena::{Chunk, ChunkMut};
use crate::grants::{Claim, GrantIndex, Granted, Grants};
use crate::link::{Event, LossKind};
use crate::spin::Spin;
use crate::tcp::frame::FrameHeader;

/// Requests that one doorbell starts at most. The last one's completion stands for all of them.
const BATCH_REQUESTS: usize = 32;
/// Requests that a push takes.
const PUSH_REQUESTS: u64 = 2;
/// Completions that one call of `progress` handles: a peer that always has more to send must not
/// keep the driver from its other work.
const COMPLETIONS_PER_PROGRESS: usize = 16;
/// The bulk lane of one link. Without a connection, everything comes back at once.
#[derive(Debug)]
pub(super) struct Bulk {
    connection: Option<Connection>,
    chunks: Chunks,
    grants: Grants,
    /// What `flush` will post.
    queue: VecDeque<Job>,
    /// What the queue pair has, each with the id of its last request.
    posted: VecDeque<(u64, Job)>,
    /// Ids of send requests: given, and known to be done.
    next_id: u64,
    done_id: u64,
    /// How many windows were to be bound, and how many are.
    pub(super) binds_wanted: u64,
    pub(super) binds_done: u64,
    /// Chunks that were revoked, and how many bindings must be done before their windows can go.
    revoking: VecDeque<(u64, ChunkMut)>,
    /// Why the queue pair takes no more requests.
    broken: Option<LossKind>,
    /// To be reported by the next `progress`.
    ready: VecDeque<Ready>,
    receives: Receives,
    spin: Spin,
}

#[derive(Debug)]
enum Job {
    Push {
        chunk: Chunk,
        piece: Piece,
        to: RemoteWindow,
        header: FrameHeader,
    },
    Bind(Binding),
}

#[derive(Debug)]
pub(super) enum Ready {
    Revoked(ChunkMut),
    Pushed(Chunk),
}

impl Bulk {
    /// Gives the queue pair its receives, before it is connected.
    pub(super) fn new(connection: Connection, config: &RdmaConfig) -> Result<Bulk, RdmaError> {
        let mut connection = connection;
        let receives = Receives::new(&mut connection)?;
        Ok(Bulk {
            connection: Some(connection),
            chunks: Chunks::new(),
            grants: Grants::default(),
            queue: VecDeque::new(),
            posted: VecDeque::new(),
            next_id: 0,
            done_id: 0,
            binds_wanted: 0,
            binds_done: 0,
            revoking: VecDeque::new(),
            broken: None,
            ready: VecDeque::new(),
            receives,
            spin: Spin::new(config.busy_poll),
        })
    }

    pub(super) fn tune(&self) -> Result<(), RdmaError> {
        self.connection.as_ref().map_or(Ok(()), |it| it.pair.tune())
    }

    /// The descriptors that tell of completions and of the connection's end.
    pub(super) fn ready_fds(&self) -> Option<[BorrowedFd<'_>; 2]> {
        let connection = self.connection.as_ref()?;
        Some([
            connection.pair.completions().as_fd(),
            connection.id.channel().as_fd(),
        ])
    }

    /// The device's name.
    pub(super) fn device_name(&self) -> Option<String> {
        self.connection.as_ref()?.id.device_name()
    }

    /// Moves the queue pair to the error state, as the end of a device does.
    pub(super) fn fail(&self) -> Result<(), RdmaError> {
        self.connection.as_ref().map_or(Ok(()), |it| it.pair.fail())
    }

    /// Has something to report whose descriptor tells nobody.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty() || self.broken.is_some()
    }

    /// Queues the binding of a chunk's window. `None` if too many grants are out.
    pub(super) fn grant(
        &mut self,
        chunk: ChunkMut,
        slot: u8,
    ) -> io::Result<Option<(GrantIndex, RemoteWindow)>> {
        let (chunk, remote) = match &self.connection {
            Some(connection) => {
                let (chunk, binding, remote) = self.chunks.bind(&connection.pd, chunk)?;
                self.queue.push_back(Job::Bind(binding));
                self.binds_wanted += 1;
                (chunk, remote)
            }
            // Nobody will use it; it comes back when it is revoked.
            None => (
                chunk,
                RemoteWindow {
                    address: 0,
                    rkey: 0,
                },
            ),
        };
        Ok(self.grants.add(chunk, slot).map(|index| (index, remote)))
    }

    /// Takes back every chunk that was granted for `slot`, each when its window is gone: at once if
    /// no window is still to be bound.
    pub(super) fn revoke(&mut self, slot: u8) {
        let Bulk {
            grants, revoking, ..
        } = self;
        grants.revoke(slot, |chunk| revoking.push_back((self.binds_wanted, chunk)));
        self.post();
        self.drop_windows();
    }

    /// Ends the windows of revoked chunks. One that is being bound has to wait: binding a window
    /// that is gone would end the queue pair.
    fn drop_windows(&mut self) {
        while let Some((binds, _)) = self.revoking.front()
            && (*binds <= self.binds_done || self.connection.is_none())
        {
            let (_, chunk) = self.revoking.pop_front().expect("it was just seen");
            self.chunks.drop_window(&chunk);
            self.ready.push_back(Ready::Revoked(chunk));
        }
    }

    pub(super) fn push(
        &mut self,
        chunk: Chunk,
        grant: GrantIndex,
        to: RemoteWindow,
        tag: u32,
    ) -> io::Result<()> {
        let Some(connection) = &self.connection else {
            self.ready.push_back(Ready::Pushed(chunk));
            return Ok(());
        };
        let piece = self.chunks.piece(&connection.pd, &chunk)?;
        let header = FrameHeader {
            grant,
            length: chunk.bytes().len() as u32,
            tag,
        };
        self.queue.push_back(Job::Push {
            chunk,
            piece,
            to,
            header,
        });
        Ok(())
    }

    /// Gives the queue pair as much of the queue as it has room for, a batch per doorbell.
    /// If it refuses, the lane ends with the next `progress`.
    pub(super) fn post(&mut self) {
        loop {
            match self.post_batch() {
                Ok(true) => {}
                Ok(false) => return,
                Err(source) => {
                    self.broken = Some(LossKind::Error(format!("ibv_post_send: {source}")));
                    return;
                }
            }
        }
    }

    fn post_batch(&mut self) -> io::Result<bool> {
        let Some(connection) = &mut self.connection else {
            return Ok(false);
        };
        let mut batch = connection.pair.batch();
        while batch.len() < BATCH_REQUESTS
            && self.next_id - self.done_id + PUSH_REQUESTS <= u64::from(DEPTH.sends)
            && let Some(job) = self.queue.pop_front()
        {
            let mut id = || {
                self.next_id += 1;
                self.next_id
            };
            match &job {
                Job::Push {
                    piece, to, header, ..
                } => {
                    // SAFETY: the chunk stays in `posted`, where nobody writes it, until its header
                    // has completed or the queue pair is gone.
                    unsafe { batch.request(id()).write(*piece, *to) }.queue();
                    batch
                        .request(id())
                        .send_and_invalidate(header.encode(), to.rkey)
                        .queue();
                }
                // SAFETY: the window of a granted chunk goes when the binding has completed
                // (`drop_windows`), or after the queue pair has failed.
                Job::Bind(binding) => unsafe { batch.request(id()).bind(*binding) }.queue(),
            }
            self.posted.push_back((self.next_id, job));
        }
        if batch.is_empty() {
            return Ok(false);
        }
        batch.post()?;
        Ok(true)
    }

    /// Reports what has happened. Returns whether there may be more; an error ends the lane.
    pub(super) fn progress(
        &mut self,
        sink: &mut dyn FnMut(Event<'_>),
        all: bool,
    ) -> Result<bool, LossKind> {
        while let Some(ready) = self.ready.pop_front() {
            sink(ready.into());
        }
        let Some(connection) = &self.connection else {
            return Ok(false);
        };
        connection.pair.completions().take_events().map_err(error)?;
        let ended = self.look_at_connection();
        let all = all || ended.is_some();
        let mut handled = 0;
        while all || handled < COMPLETIONS_PER_PROGRESS {
            let connection = self.connection.as_ref().expect("it was there before");
            let expected = handled > 0 && !all && !self.posted.is_empty();
            let queue = connection.pair.completions();
            let next = match queue.poll() {
                Ok(None) if expected => self.spin.until(Duration::MAX, || queue.poll()),
                other => other,
            };
            let Some(completion) = next.map_err(error)? else {
                break;
            };
            handled += 1;
            match self.complete(completion, sink) {
                Ok(()) => {}
                Err(Some(kind)) => return Err(kind),
                // Whatever ended the connection also brought the requests back.
                Err(None) => return Err(ended.unwrap_or_else(flushed)),
            }
        }
        if let Some(kind) = ended {
            return Err(kind);
        }
        self.drop_windows();
        while let Some(ready) = self.ready.pop_front() {
            sink(ready.into());
        }
        self.post();
        if let Some(kind) = self.broken.take() {
            return Err(kind);
        }
        Ok(handled == COMPLETIONS_PER_PROGRESS)
    }

    /// Ends the lane: the queue pair goes, and with it the device's use of every chunk. Chunks that
    /// were to be pushed come back; granted ones when they are revoked.
    pub(super) fn close(&mut self, sink: &mut dyn FnMut(Event<'_>)) {
        if let Some(connection) = self.connection.take() {
            connection.id.disconnect();
            if let Err(error) = connection.pair.fail() {
                tracing::debug!(%error, "a queue pair is ended as it is");
            }
            // Bound windows hold on to the queue pair.
            self.chunks.drop_windows();
            drop(connection);
        }
        self.receives.end();
        self.chunks = Chunks::new();
        self.binds_done = self.binds_wanted;
        self.drop_windows();
        for ready in self.ready.drain(..) {
            sink(ready.into());
        }
        let posted = self.posted.drain(..).map(|(_, job)| job);
        for job in posted.chain(self.queue.drain(..)) {
            job.report(sink);
        }
    }

    /// What rdma_cm says about the end of the connection.
    fn look_at_connection(&self) -> Option<LossKind> {
        let connection = self.connection.as_ref()?;
        match connection.id.channel().next() {
            Ok(None) => None,
            Ok(Some(event)) => match event.kind {
                kind::RDMA_CM_EVENT_DISCONNECTED => Some(LossKind::Fin),
                // The end of a disconnected connection's quarantine.
                kind::RDMA_CM_EVENT_TIMEWAIT_EXIT => None,
                _ => Some(LossKind::Error(event.error("connected").to_string())),
            },
            Err(failure) => Some(LossKind::Error(failure.to_string())),
        }
    }

    /// Handles a completion. An error ends the lane; without a reason, it is that another request
    /// ended it.
    fn complete(
        &mut self,
        completion: Completion,
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Option<LossKind>> {
        let done = completion.result.map_err(|failure| {
            (!failure.is_flush()).then(|| LossKind::Error(failure.to_string()))
        })?;
        match done {
            Done::Requested => {
                self.done_id = completion.id;
                while self
                    .posted
                    .front()
                    .is_some_and(|(id, _)| *id <= completion.id)
                {
                    let (_, job) = self.posted.pop_front().expect("it was just seen");
                    self.binds_done += u64::from(matches!(job, Job::Bind(_)));
                    job.report(sink);
                }
                Ok(())
            }
            Done::Received {
                bytes,
                invalidated_rkey,
            } => {
                let buffer = Receives::buffer(completion.id);
                let arrived = self
                    .arrived(buffer, bytes as usize, invalidated_rkey)
                    .map_err(Some)?;
                let connection = self.connection.as_mut().expect("it was there before");
                self.receives
                    .again(connection, buffer)
                    .map_err(|it| Some(error(it)))?;
                if let Some((granted, header)) = arrived {
                    let chunk = granted.chunk.freeze(header.length as usize);
                    let tag = header.tag;
                    sink(Event::Arrived { chunk, tag });
                }
                Ok(())
            }
        }
    }

    /// Reads the message that says that a chunk is complete.
    fn arrived(
        &mut self,
        buffer: usize,
        bytes: usize,
        invalidated_rkey: Option<u32>,
    ) -> Result<Option<(Granted, FrameHeader)>, LossKind> {
        let protocol = |text: String| Err(LossKind::Protocol(text));
        let Some(message) = self.receives.message(buffer, bytes) else {
            return protocol(format!("message of {bytes} bytes on the bulk lane"));
        };
        let header = match FrameHeader::decode(message) {
            Ok(header) => header,
            Err(error) => return protocol(error.to_string()),
        };
        let GrantIndex { index, generation } = header.grant;
        match self.grants.claim(header.grant) {
            Claim::Granted(granted) => {
                if invalidated_rkey.is_none()
                    || invalidated_rkey != self.chunks.rkey(&granted.chunk)
                {
                    return protocol(format!(
                        "grant {index}.{generation} was said to be filled, but not given up: key {:?} instead of {:?}",
                        invalidated_rkey,
                        self.chunks.rkey(&granted.chunk)
                    ));
                }
                Ok(Some((granted, header)))
            }
            Claim::Revoked => Ok(None),
            Claim::Filled => protocol(format!("grant {index}.{generation} was used a second time")),
            Claim::Unknown => protocol(format!("grant {index}.{generation} was never given")),
        }
    }
}

impl Job {
    /// Tells the owner of a chunk that the queue pair is done with it.
    fn report(self, sink: &mut dyn FnMut(Event<'_>)) {
        match self {
            Job::Push { chunk, .. } => sink(Event::Pushed(chunk)),
            Job::Bind(_) => {}
        }
    }
}

impl From<Ready> for Event<'_> {
    fn from(ready: Ready) -> Self {
        match ready {
            Ready::Revoked(chunk) => Event::Revoked(chunk),
            Ready::Pushed(chunk) => Event::Pushed(chunk),
        }
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        self.close(&mut |event| std::mem::drop(event));
    }
}

fn error(source: io::Error) -> LossKind {
    LossKind::Error(source.to_string())
}

fn flushed() -> LossKind {
    LossKind::Error(
        "the queue pair is in the error state: a write of the peer was refused, or the device is \
         gone"
            .to_owned(),
    )
}
