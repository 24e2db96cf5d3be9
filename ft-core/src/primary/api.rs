//! What goes into the primary's machine and what comes out of it.

use std::time::Duration;

use crate::shape::VmShape;
use crate::types::{Epoch, EpochKind, GrantToken, RunState, Session, Term, VmTag};
use crate::wire::{ChunkTag, RefusalCode};

/// Everything that the operator decides.
#[derive(Clone, Debug)]
pub struct PrimaryConfig {
    pub vm_id: String,
    pub vm: VmTag,
    pub session: Session,
    /// The highest term that this host has stored.
    pub term: Term,
    /// From one boundary to the next, unless output waits or the guest is idle.
    pub epoch_interval: Duration,
    /// From `cont` to the next boundary at least, when output waits.
    pub epoch_min: Duration,
    /// From one boundary to the next of a guest that is idle and says nothing.
    pub epoch_idle: Duration,
    pub heartbeat: Duration,
    /// T: without an answered heartbeat for this long, the guest is stopped.
    pub lease: Duration,
    pub on_backup_loss: OnBackupLoss,
    /// An epoch that is unacknowledged for this long pauses the guest until it is.
    pub max_unacked: Duration,
    /// Every Nth boundary hashes all of RAM; 0 for never.
    pub audit_every: u64,
    /// Chunks that a live round may have filled and not yet pushed.
    pub sync_chunks: u32,
    /// When the last epoch had at least so many dirty pages, those of the next one are copied before
    /// the pause, and in it only what was written since. `None` where a copy of a running guest's page
    /// can't be relied on.
    pub precopy_pages_min: Option<u64>,
    /// What the gate releases while the guest stands still stays in QEMU until the next `cont`, and
    /// nothing but the gate's output comes of letting the guest run for a moment that is forgotten.
    pub release_needs_guest: bool,
}

/// What to do when the backup falls silent, which proves nothing about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnBackupLoss {
    /// Stop the guest when the lease ends: at most one copy runs, whatever happened.
    Pause,
    /// Run on: the operator has chosen availability, and a cut-off backup may run too.
    Continue,
}

/// What happened outside.
#[derive(Debug)]
pub enum Input<'a> {
    /// All three lanes of a link to the backup are connected.
    LinkUp,
    LinkDown(LinkDown),
    Message(&'a [u8]),

    /// The guest is paused and its disks are drained.
    Paused,
    /// The device state is in the sink.
    Saved {
        bytes: u64,
    },
    /// Pages that were dirty are armed again and in chunks, as they were while the guest ran.
    Precopied,
    /// Dirty pages are armed again and all of them are in chunks.
    Harvested(Harvest),
    GateMoved,
    /// QEMU has been told to let the guest go on, and has done it.
    Resumed,
    /// A step of the boundary failed; QEMU or the kernel said why.
    StepFailed {
        step: Step,
        text: String,
    },
    Released(Epoch),
    /// The guest has sent something since the last boundary, and the gate holds it.
    OutputWaiting,
    /// A chunk of the epoch (or of the live round) can be pushed.
    ChunkReady {
        index: u32,
        last: bool,
        bytes: u64,
    },
    /// The link is done with a chunk.
    ChunkPushed {
        index: u32,
    },
    /// Every page of RAM is armed; the first live round may start.
    AllArmed,
    /// A live round has collected its dirty pages, and may be filled.
    RoundStarted {
        pages: u64,
    },
    /// A [`Action::FillRound`] has reported all its chunks.
    RoundFilled {
        done: bool,
    },

    Qemu(QemuEvent),
    Command(Command),
    /// The guest-visible shape changed, or something that blocks a save appeared.
    ShapeChanged(String),
}

/// The work of one boundary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Harvest {
    pub dirty_pages: u64,
    /// Of those, the ones whose copy from before the pause was good.
    pub precopied_pages: u64,
    /// Finding the dirty pages and arming them.
    pub scan: Duration,
    /// Copying them into chunks.
    pub copy: Duration,
}

/// How the link to the backup ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkDown {
    /// FIN on the proof lane: the backup's daemon and its QEMU are both gone.
    PeerDead,
    /// Anything else proves nothing.
    Broken(String),
}

/// The steps of a boundary that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Precopy,
    Pause,
    Save,
    Harvest,
    Gate,
    Seal,
    Resume,
    Arm,
    Round,
}

/// What QEMU says by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QemuEvent {
    Stopped,
    Resumed,
    /// The guest powered off, or somebody told QEMU to quit.
    Shutdown,
    /// The process or its monitor is gone.
    Gone(String),
}

/// What an operator asks of a running primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Detach,
    Switchover,
    /// Run on without the backup, although it may be alive.
    Continue,
    Rehearse,
}

/// What the driver has to do. In order; the driver reports completions as [`Input`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Connect to the backup; then [`Input::LinkUp`] or [`Input::LinkDown`].
    Connect,
    /// Let go of control and bulk, after what is queued was given to the kernel, and drop all
    /// chunks that were not pushed. The proof lane stays watched until [`Action::KeepProof`]:
    /// its FIN may be on its way.
    CloseLink,
    /// Backup and primary have agreed on this link: the proof lanes of earlier ones mean
    /// nothing now, and QEMU may close its copies. Not sooner, or the backup takes that for
    /// our death.
    KeepProof,
    /// The backup has refused the newest link, so its proof lane proves nothing: QEMU may close its
    /// copy of that one.
    DropProof,
    Send(Vec<u8>),

    /// Copy what is dirty while the guest runs, for the harvest that follows. → [`Input::Precopied`]
    Precopy {
        epoch: Epoch,
    },
    /// → [`Input::Paused`]
    PauseVm,
    /// Stop the guest and save its devices, in one write. → [`Input::Paused`] and [`Input::Saved`]
    PauseAndSave,
    /// Take the dirty set into the epoch and copy it. → [`Input::ChunkReady`] as chunks fill,
    /// then [`Input::Harvested`]
    Harvest {
        epoch: Epoch,
        kind: EpochKind,
        audit: bool,
    },
    /// Append device state and trailer to the last chunk. → [`Input::ChunkReady`] with `last`
    Seal {
        epoch: Epoch,
        base: Epoch,
        run_state: RunState,
    },
    /// Keep what the guest sends from now on apart from what is held. → [`Input::GateMoved`]
    MoveGate,
    /// As soon as the device state is saved. → [`Input::Resumed`]
    ResumeVm,
    /// The epoch's output may leave. → [`Input::Released`]
    Release(Epoch),
    /// Hold the guest's output from now on, or let it pass.
    Gate(GateState),

    /// Arm all pages while the guest is paused. → [`Input::AllArmed`]
    ArmAll,
    /// Collect the dirty pages (`all`: every page) of a live round. → [`Input::RoundStarted`]
    StartRound {
        all: bool,
    },
    /// Fill at most `chunks` chunks, numbered from `first_index`. → [`Input::ChunkReady`]s and
    /// [`Input::RoundFilled`]
    FillRound {
        first_index: u32,
        chunks: u32,
    },
    Push {
        index: u32,
        to: GrantToken,
        tag: ChunkTag,
    },
    /// The epoch is acknowledged: its dirty set and chunks are not needed any more.
    DropDirt,
    /// The epoch is aborted: its dirty set goes back, its chunks are freed.
    MergeDirt,

    Guardian {
        armed: bool,
    },
    StoreTerm {
        term: Term,
        protected: bool,
    },
    /// Stop the guest and keep it stopped: the lease is over.
    FenceVm,
    /// The fence is being lifted: a QEMU that was frozen because it did not stop in time may
    /// carry out its commands again. The fence's `stop` is among them.
    ThawVm,
    /// End QEMU: the other copy is the real one, or the guest is done.
    EndVm,
    /// Leave QEMU running as it was before the attach: no tracker, no gate, no descriptor.
    LeaveVm,
    Report(Report),
    /// Nothing more will come.
    Finish(End),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateState {
    Open,
    Closed,
}

/// How a primary ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest runs on, unprotected.
    Detached,
    PoweredOff,
    /// The backup runs the guest now, because the operator wanted it.
    SwitchedOver {
        term: Term,
    },
    /// The backup runs the guest now.
    FailedOver {
        term: Term,
    },
    /// The backup can't take over and QEMU is gone.
    Lost(String),
    /// The VM is no longer one that can be protected. The guest runs on.
    Unprotectable(String),
    /// The backup refused us, for good.
    Refused {
        code: RefusalCode,
        text: String,
    },
}

/// For people and logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    Connected,
    /// Why is in the note or the error before.
    LinkLost,
    SyncProgress {
        round: u32,
        pages_sent: u64,
        pages_total: u64,
    },
    /// The backup holds a complete epoch: protection begins.
    Synced {
        epoch: Epoch,
        rounds: u32,
        took: Duration,
    },
    Epoch(EpochReport),
    Audit {
        epoch: Epoch,
        mismatched_blocks: Vec<u16>,
    },
    /// Protection is off until a full epoch is acknowledged.
    Tainted(String),
    BackupLost {
        proven: bool,
        text: String,
    },
    /// The lease is over; the guest is stopped.
    Fenced,
    Unfenced,
    /// The guest is paused because the backup is slow (`true`), or goes on (`false`).
    Throttled(bool),
    GuestStopped,
    GuestResumed,
    Rehearsed {
        ok: bool,
        text: String,
    },
    Error(String),
    Note(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochReport {
    pub epoch: Epoch,
    pub kind: EpochKind,
    /// `stop` submitted → the guest is known to go on.
    pub pause: Duration,
    pub dirty_pages: u64,
    /// Of those, the ones that were copied before the pause.
    pub precopied_pages: u64,
    /// Bytes pushed.
    pub bytes: u64,
    /// The guest is known to go on → acknowledgement.
    pub commit: Duration,
    pub phases: Phases,
}

/// Where an epoch's time went. Save and harvest run at the same time, and what is left of the save when the
/// harvest ends is in `cont` as well; a commit is `seal` and `push`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phases {
    /// `stop` submitted → the guest is known to be paused.
    pub stop: Duration,
    /// From there → the save is known to be done.
    pub save: Duration,
    /// From there → the harvest is known to be done; `scan` and `copy` are in it.
    pub harvest: Duration,
    pub scan: Duration,
    pub copy: Duration,
    /// The guest may go on → it is known to.
    pub cont: Duration,
    /// `stop` submitted → the gate is moved, which is not part of the pause.
    pub gate: Duration,
    /// The guest is known to go on → the last chunk is ready: what is packed is packed by then.
    pub seal: Duration,
    /// The last chunk is ready → acknowledgement: push, check, flip, and the way back.
    pub push: Duration,
    /// Acknowledgement → the epoch's output has left.
    pub release: Duration,
}

/// For `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub state: Protection,
    pub since: crate::types::Micros,
    pub link_up: bool,
    /// When it was lost, if it was there before.
    pub link_lost: Option<crate::types::Micros>,
    pub last_acknowledged: Epoch,
    pub term: Term,
    pub guest_running: bool,
    pub fenced: bool,
    /// Age of the last acknowledged boundary.
    pub behind: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    Unprotected,
    Syncing,
    Protected,
    /// An audit failed; a full epoch is on its way.
    Tainted,
}

/// What the machine needs to know of the VM.
#[derive(Clone, Debug)]
pub struct PrimaryVm {
    pub shape: VmShape,
    pub running: bool,
}
