//! What the two sides say to each other on the control lane.

use crate::shape::VmShape;
use crate::types::{Epoch, EpochKind, GrantToken, RunState, Session, Term, VmTag};

/// The fields that every frame carries in its header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    pub vm: VmTag,
    pub session: Session,
    pub term: Term,
    /// The epoch that a message is about; `Epoch::NONE` where it is about none.
    pub epoch: Epoch,
}

/// What a side can do and what it has. Primary → backup, answered by the backup's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub role: Role,
    /// Oldest and newest protocol version that this side speaks.
    pub versions: (u16, u16),
    /// Bit set of [`features`].
    pub features: u64,
    /// `--vm-id`, in full: its hash is in every header.
    pub vm_id: String,
    /// Rises with each attempt of a session to connect, so that a replayed hello is refused.
    pub attempt: u32,
    /// The last epoch that this side has flipped (backup) or seen acknowledged (primary).
    pub last_epoch: Epoch,
    /// The backup has activated, in the frame's term.
    pub activated: bool,
    /// Microseconds: `--heartbeat-ms` and `--failover-after-ms`. The backup uses the primary's.
    pub heartbeat_us: u64,
    pub lease_us: u64,
    pub shape: VmShape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    Primary = 1,
    Backup = 2,
}

/// Bits of [`Hello::features`]. None is defined yet: both sides must name the same ones.
pub mod features {
    pub const SUPPORTED: u64 = 0;
}

/// Why a hello was refused. The number is on the wire; the text beside it is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RefusalCode {
    Version = 1,
    Features = 2,
    OtherVm = 3,
    Shape = 4,
    Busy = 5,
    Role = 6,
    Replay = 7,
    Malformed = 8,
    Other = 9,
}

/// Why a side ends the protection in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Farewell {
    /// Primary: the operator detached; the guest runs on, unprotected.
    Detach = 1,
    /// Primary: the guest powered off or an operator quit QEMU.
    PoweredOff = 2,
    /// Backup: it stands down and will not activate.
    StandDown = 3,
}

/// One slot's grants start to be usable by the primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantBatch {
    pub grants: Vec<GrantToken>,
}

/// Everything that travels on the control lane. The frame's epoch says which epoch it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    Hello(Hello),
    Refused {
        code: RefusalCode,
        text: String,
    },
    /// Backup: these chunks may be filled, for the frame's epoch or round.
    Grant(GrantBatch),
    /// Backup: the frame's epoch is flipped. From now on a failover resumes from it or later.
    Ack,
    /// Either: `sent_us` is the sender's clock and comes back in the reply unchanged.
    Heartbeat {
        sent_us: u64,
    },
    HeartbeatReply {
        sent_us: u64,
    },
    /// Backup: the frame's epoch was applied and hashed.
    AuditResult {
        mismatched_blocks: Vec<u16>,
    },
    /// Backup: it can't use what it has; the next epoch must be of this kind.
    Resync {
        kind: EpochKind,
        text: String,
    },
    /// Primary: QEMU is gone and this daemon will not start it again: activate now.
    QemuDied {
        text: String,
    },
    /// Primary: the frame's epoch is the last; activate from it.
    Switchover,
    /// Backup: it has activated in the frame's term, from the frame's epoch.
    Activated,
    Farewell {
        why: Farewell,
        run_state: RunState,
    },
    FarewellAck,
    /// Primary: rehearse now. Backup: how it went, for `status` and the event log.
    Rehearse,
    Rehearsed {
        ok: bool,
        text: String,
    },
}
