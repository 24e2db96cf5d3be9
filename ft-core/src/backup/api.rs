//! What goes into the backup's machine and what comes out of it.

use std::time::Duration;

use crate::image::CheckedChunk;
use crate::shape::VmShape;
use crate::types::{ChunkId, Epoch, EpochKind, GrantToken, RunState, SlotId, Term, VmTag};
use crate::wire::{ChunkTag, Frame};

/// What the backup knows before anybody calls.
#[derive(Clone, Debug)]
pub struct BackupConfig {
    pub vm_id: String,
    pub vm: VmTag,
    /// The highest term that this host has stored.
    pub term: Term,
    pub shape: VmShape,
    /// When a chunk may be checked.
    pub check: CheckWhen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckWhen {
    /// The link promises that an arrived chunk can't be written again.
    OnArrival,
    /// Only after the slot was revoked: on a link without that promise, the peer can write until then.
    AfterRevocation,
}

/// Links come and go, and strangers knock: each has a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u32);

/// What happened outside.
#[derive(Debug)]
pub enum Input<'a> {
    LinkUp(LinkId),
    LinkDown(LinkId, LinkDown),
    Message(LinkId, &'a [u8]),
    /// The answer to [`Action::Grant`].
    Granted {
        slot: SlotId,
        grants: Vec<GrantToken>,
    },
    /// A granted chunk was filled; the driver numbers it now, and never uses a number twice.
    Arrived {
        chunk: ChunkId,
        tag: ChunkTag,
    },
    /// No chunk of the slot can be written any more; those that were not filled are free.
    Revoked(SlotId),
    Checked {
        chunk: ChunkId,
        result: Result<CheckedChunk, String>,
    },
    /// A chunk of a live round is in the standby's RAM.
    SyncApplied(ChunkId),
    /// The epoch is in the standby's RAM. With the blocks whose audit failed, if it had one.
    Applied {
        epoch: Epoch,
        audit: Option<Vec<u16>>,
    },
    ApplyFailed {
        text: String,
    },
    TermStored,
    Activated,
    ActivationFailed {
        text: String,
    },
    /// The standby's QEMU has ended. `clean`: the guest powered off, or QEMU was told to quit.
    StandbyGone {
        clean: bool,
        text: String,
    },
    RehearsalReady,
    Rehearsed {
        ok: bool,
        text: String,
    },
    Command(Command),
}

/// How a link ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkDown {
    /// FIN on the proof lane: the primary's daemon and its QEMU are both gone.
    PeerDead,
    Broken(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// End in good order: the primary is told that this backup will not activate.
    StandDown,
    Rehearse,
}

/// What the driver has to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Send(LinkId, Vec<u8>),
    CloseLink(LinkId),
    /// The session has this link now; the lanes of any other may not write slots.
    UseLink(LinkId),
    /// Let the peer fill `count` fresh chunks. → [`Input::Granted`]
    Grant {
        slot: SlotId,
        count: u32,
    },
    /// → [`Input::Revoked`]
    Revoke(SlotId),
    /// → [`Input::Checked`]
    Check {
        chunk: ChunkId,
        frame: Frame,
    },
    /// → [`Input::SyncApplied`], and the chunk is free
    ApplySync(ChunkId),
    /// Chunks in index order. → [`Input::Applied`], and the chunks are free
    Apply {
        epoch: Epoch,
        chunks: Vec<ChunkId>,
        audit: Option<Vec<u64>>,
    },
    Free(Vec<ChunkId>),
    /// → [`Input::TermStored`], also when the disk is full: availability goes first then, and
    /// the driver says so.
    StoreTerm {
        term: Term,
        activated: bool,
    },
    /// Load the last applied epoch's device state, and start the guest if it was running.
    /// → [`Input::Activated`] or [`Input::ActivationFailed`]
    Activate {
        epoch: Epoch,
        run_state: RunState,
    },
    /// The standby could not load: a fresh one on the same RAM, then activate it.
    RespawnAndActivate {
        epoch: Epoch,
        run_state: RunState,
    },
    /// The standby is stale: forget everything, a fresh synchronisation comes.
    ForgetImage,
    /// Start a throw-away QEMU. → [`Input::RehearsalReady`] or [`Input::Rehearsed`]
    PrepareRehearsal,
    /// → [`Input::Rehearsed`]. No apply runs now and none starts before [`Input::Rehearsed`].
    Rehearse {
        epoch: Epoch,
        run_state: RunState,
    },
    CancelRehearsal,
    /// The standby may be killed when this daemon dies, or must survive it.
    Guardian {
        armed: bool,
    },
    /// End the standby QEMU.
    EndStandby,
    Report(Report),
    Finish(End),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    StoodDown,
    /// The guest powered off on the primary.
    PoweredOff,
    /// The standby's QEMU ended while it waited: the guest is the primary's.
    NoStandby(String),
    /// The standby could not be activated, or its guest has ended here.
    Failed(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    Connected,
    Refused {
        text: String,
    },
    Syncing,
    Protecting {
        epoch: Epoch,
    },
    EpochFlipped {
        epoch: Epoch,
        kind: EpochKind,
        chunks: u32,
        pages: u64,
        phases: Phases,
    },
    Audit {
        epoch: Epoch,
        mismatched_blocks: Vec<u16>,
    },
    LinkLost {
        text: String,
    },
    /// The decision to activate, and what led to it.
    Activating {
        epoch: Epoch,
        term: Term,
        reason: Reason,
        detect: Duration,
    },
    Activated {
        epoch: Epoch,
        term: Term,
        took: Duration,
    },
    NotActivating(String),
    /// It has detached; this one waits for another.
    PrimaryLeft,
    Rehearsed {
        ok: bool,
        text: String,
    },
    Error(String),
    Note(String),
}

/// Where an epoch's time went on this side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phases {
    /// The first chunk is here → the last one.
    pub arrive: Duration,
    /// The last one is here → all of them are checked.
    pub check: Duration,
    /// All are checked → flip, which waits until the epoch before is applied.
    pub flip: Duration,
    /// How long it took to write the epoch before to the standby's RAM.
    pub apply_before: Duration,
}

/// Why a backup activates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// FIN on the proof lane.
    ProofOfDeath,
    /// The primary's daemon said that its QEMU died.
    QemuDied,
    /// Nothing was heard for longer than the lease allows.
    Silence,
    Switchover,
}

impl Reason {
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::ProofOfDeath => "proof-of-death",
            Reason::QemuDied => "qemu-died",
            Reason::Silence => "silence",
            Reason::Switchover => "switchover",
        }
    }
}

/// For `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub state: State,
    pub since: crate::types::Micros,
    pub link_up: bool,
    pub last_flipped: Epoch,
    pub last_applied: Epoch,
    pub term: Term,
    pub silent_for: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No primary has called.
    Waiting,
    /// No complete epoch yet: would not activate.
    Syncing,
    /// Would activate.
    Protecting,
    /// An audit failed: would not activate until a full epoch is here.
    Tainted,
    Activating,
    /// This host runs the guest.
    Active,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::Waiting => "waiting",
            State::Syncing => "syncing",
            State::Protecting => "protecting",
            State::Tainted => "tainted",
            State::Activating => "activating",
            State::Active => "active",
        }
    }
}
