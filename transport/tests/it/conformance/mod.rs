//! What every link must do, whatever carries it: one suite, run against each.
//!
//! A link's test file implements [`Network`] and calls [`conformance!`], which makes one test of
//! each function in [`suite`].

#![allow(
    unreachable_pub,
    reason = "each test file is a crate that includes this module"
)]

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use transport::link::CHUNK_BYTES;
use transport::{Arena, Chunk, ChunkMut, Event, Grant, Lane, Link, Loss, LossKind};

pub(crate) mod suite;

/// When a test that waits for something gives up. Not a measure of speed: nothing is asserted
/// about how long anything takes.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(30);

/// Makes pairs of links of one kind.
pub(crate) trait Network {
    type Link: Link;
    /// Two ends of a new link, to be driven by the calling thread.
    fn pair() -> (Self::Link, Self::Link);
    /// Ends one lane of `link`'s peer as its kernel does when the process dies (`Fin`) or when the
    /// connection is torn (`Error`). The peer itself is `peer`.
    fn cut(link: &mut Self::Link, peer: &mut Self::Link, lane: Lane, how: Cut);
    /// Does what a message with `b`'s grants would do, on a link where it does more than to carry
    /// them: `a` is about to use them.
    fn tell_grants(_a: &mut End<Self::Link>, _b: &mut End<Self::Link>) {}
}

/// How a test ends a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    Fin,
    Reset,
}

/// An [`Event`] that can be kept.
#[derive(Debug)]
pub(crate) enum Seen {
    Message(Vec<u8>),
    Pushed(Chunk),
    Arrived { chunk: Chunk, tag: u32 },
    Revoked(ChunkMut),
    Lost(Loss),
}

impl From<Event<'_>> for Seen {
    fn from(event: Event<'_>) -> Seen {
        match event {
            Event::Message(bytes) => Seen::Message(bytes.to_vec()),
            Event::Pushed(chunk) => Seen::Pushed(chunk),
            Event::Arrived { chunk, tag } => Seen::Arrived { chunk, tag },
            Event::Revoked(chunk) => Seen::Revoked(chunk),
            Event::Lost(loss) => Seen::Lost(loss),
        }
    }
}

/// One end of a link and what it reported.
pub(crate) struct End<L> {
    pub(crate) link: L,
    pub(crate) seen: VecDeque<Seen>,
}

impl<L: Link> End<L> {
    pub(crate) fn new(link: L) -> End<L> {
        End {
            link,
            seen: VecDeque::new(),
        }
    }

    pub(crate) fn progress(&mut self) {
        let seen = &mut self.seen;
        self.link
            .progress(&mut |event| seen.push_back(event.into()))
            .expect("progress");
    }

    pub(crate) fn send(&mut self, message: &[u8]) {
        self.link.send(message).expect("send");
        self.link.flush().expect("flush");
    }

    pub(crate) fn push(&mut self, chunk: Chunk, to: Grant, tag: u32) {
        self.link.push(chunk, to, tag).expect("push");
    }

    pub(crate) fn flush(&mut self) {
        self.link.flush().expect("flush");
    }

    /// Whether the ready descriptor is readable now.
    pub(crate) fn is_ready(&self) -> bool {
        wait_readable(&[self.link.ready_fd().as_fd()], Duration::ZERO)[0]
    }

    /// Takes every seen event that `pick` wants, in order.
    pub(crate) fn take<T>(&mut self, pick: impl Fn(Seen) -> Result<T, Seen>) -> Vec<T> {
        let mut taken = Vec::new();
        let mut kept = VecDeque::new();
        for seen in self.seen.drain(..) {
            match pick(seen) {
                Ok(it) => taken.push(it),
                Err(seen) => kept.push_back(seen),
            }
        }
        self.seen = kept;
        taken
    }

    pub(crate) fn take_messages(&mut self) -> Vec<Vec<u8>> {
        self.take(|seen| match seen {
            Seen::Message(bytes) => Ok(bytes),
            other => Err(other),
        })
    }

    pub(crate) fn take_pushed(&mut self) -> Vec<Chunk> {
        self.take(|seen| match seen {
            Seen::Pushed(chunk) => Ok(chunk),
            other => Err(other),
        })
    }

    pub(crate) fn take_arrived(&mut self) -> Vec<(Chunk, u32)> {
        self.take(|seen| match seen {
            Seen::Arrived { chunk, tag } => Ok((chunk, tag)),
            other => Err(other),
        })
    }

    pub(crate) fn take_revoked(&mut self) -> Vec<ChunkMut> {
        self.take(|seen| match seen {
            Seen::Revoked(chunk) => Ok(chunk),
            other => Err(other),
        })
    }

    pub(crate) fn take_losses(&mut self) -> Vec<Loss> {
        self.take(|seen| match seen {
            Seen::Lost(loss) => Ok(loss),
            other => Err(other),
        })
    }

    pub(crate) fn count(&self, pick: impl Fn(&Seen) -> bool) -> usize {
        self.seen.iter().filter(|seen| pick(seen)).count()
    }
}

/// Drives both ends, each only when its descriptor says so, until `done`.
pub(crate) fn drive<L: Link>(
    a: &mut End<L>,
    b: &mut End<L>,
    mut done: impl FnMut(&mut End<L>, &mut End<L>) -> bool,
) {
    let deadline = Instant::now() + WATCHDOG;
    while !done(a, b) {
        let left = deadline.saturating_duration_since(Instant::now());
        let ready = wait_readable(
            &[a.link.ready_fd().as_fd(), b.link.ready_fd().as_fd()],
            left,
        );
        assert!(
            ready.contains(&true),
            "nothing happened for {WATCHDOG:?}; seen: {:?} and {:?}",
            a.seen,
            b.seen
        );
        if ready[0] {
            a.progress();
        }
        if ready[1] {
            b.progress();
        }
    }
}

/// Drives one end until `done`.
pub(crate) fn drive_one<L: Link>(end: &mut End<L>, mut done: impl FnMut(&mut End<L>) -> bool) {
    let deadline = Instant::now() + WATCHDOG;
    while !done(end) {
        let left = deadline.saturating_duration_since(Instant::now());
        let ready = wait_readable(&[end.link.ready_fd().as_fd()], left);
        assert!(ready[0], "nothing happened; seen: {:?}", end.seen);
        end.progress();
    }
}

/// Drives both ends until neither has had anything to do for a while: for tests of what must
/// *not* happen.
pub(crate) fn settle<L: Link>(a: &mut End<L>, b: &mut End<L>) {
    loop {
        let ready = wait_readable(
            &[a.link.ready_fd().as_fd(), b.link.ready_fd().as_fd()],
            Duration::from_millis(50),
        );
        if !ready.contains(&true) {
            return;
        }
        a.progress();
        b.progress();
    }
}

pub(crate) fn wait_readable(fds: &[std::os::fd::BorrowedFd<'_>], timeout: Duration) -> Vec<bool> {
    let mut fds: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    loop {
        match poll(&mut fds, PollTimeout::try_from(timeout).expect("short")) {
            Err(Errno::EINTR) => {}
            done => {
                done.expect("poll");
                return fds.iter().map(|fd| fd.any() == Some(true)).collect();
            }
        }
    }
}

/// A chunk of `bytes` bytes that differ with `seed`.
pub(crate) fn filled(arena: &Arena, bytes: usize, seed: u32) -> Chunk {
    let mut chunk = arena.alloc().expect("the arena is large enough");
    chunk.as_mut_slice()[..bytes].copy_from_slice(&pattern(bytes, seed));
    chunk.freeze(bytes)
}

pub(crate) fn pattern(bytes: usize, seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(bytes);
    out
}

pub(crate) fn small(arena: &Arena, seed: u32) -> Chunk {
    filled(arena, 64, seed)
}

pub(crate) fn is_error(loss: &Loss) -> bool {
    matches!(loss.kind, LossKind::Error(_))
}

/// More than one link's worth of chunks.
pub(crate) fn arena() -> Arena {
    Arena::new(256)
}

pub(crate) const WHOLE: usize = CHUNK_BYTES;

/// Makes a test of every function of the suite for one [`Network`].
macro_rules! conformance {
    ($network:ty: $($test:ident),* $(,)?) => {
        $(
            #[test]
            fn $test() {
                $crate::conformance::suite::$test::<$network>();
            }
        )*
    };
    ($network:ty) => {
        $crate::conformance::conformance!($network:
            messages_arrive_whole_and_in_order,
            message_length_and_queue_are_bounded,
            chunks_of_every_size_arrive_with_their_bytes,
            grants_can_be_used_out_of_order,
            many_chunks_and_messages_at_once,
            messages_are_not_delayed_by_chunks,
            a_foreign_grant_is_refused,
            a_grant_that_is_used_twice_ends_the_lane,
            pushes_wait_for_a_slow_receiver,
            revoked_chunks_come_back_and_late_writes_are_dropped,
            revoking_in_mid_chunk_takes_the_chunk_back,
            each_lane_ends_alone_and_says_how,
            a_lost_bulk_lane_gives_chunks_back,
            the_proof_lane_ends_with_its_last_copy,
            dropping_a_busy_link_returns_every_chunk,
            an_idle_link_is_not_ready,
        );
    };
}

pub(crate) use conformance;
