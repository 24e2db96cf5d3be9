//! The words of the protocol as types.

use std::fmt;
use std::time::Duration;

/// Bytes in a page: the unit of tracking, of an entry in an epoch image and of a copy.
pub const PAGE_BYTES: usize = 4096;

/// A point on the driver's clock, in microseconds since an origin that only this process knows.
///
/// The driver reads `CLOCK_BOOTTIME`, which goes on while a host is suspended: a lease that
/// stopped counting then would outlive the backup's patience.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Micros(pub u64);

impl Micros {
    /// The time that has passed since `earlier`; zero if `earlier` is later.
    pub fn since(self, earlier: Micros) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl std::ops::Add<Duration> for Micros {
    type Output = Micros;
    fn add(self, rhs: Duration) -> Micros {
        Micros(
            self.0
                .saturating_add(u64::try_from(rhs.as_micros()).unwrap_or(u64::MAX)),
        )
    }
}

/// The number of an epoch. The first one that can be activated is 1; 0 means "none yet".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl Epoch {
    pub const NONE: Epoch = Epoch(0);

    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Rises with every activation; the copy of the VM that has the higher one is the real one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Term(pub u64);

impl Term {
    pub fn next(self) -> Term {
        Term(self.0 + 1)
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A random number that the primary draws when it starts; ties every frame to one pairing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Session(pub u64);

/// Which VM: the first eight bytes of a hash of `--vm-id`, so that it fits in every header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VmTag(pub u64);

/// A RAM block's index in [`crate::VmShape::blocks`]: the same on both sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u16);

/// `count` pages of `block` from page `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRun {
    pub block: BlockId,
    pub first: u64,
    pub count: u64,
}

/// What the guest was doing at a boundary, and so what it does after an activation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RunState {
    #[default]
    Running = 1,
    /// Stopped by an operator, an I/O error, a panic or a suspend: it stays stopped.
    Stopped = 2,
}

/// What an epoch image contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EpochKind {
    /// A live round of the first synchronisation: applied as it arrives, worth nothing alone.
    SyncRound = 1,
    /// The pages that changed since the epoch before it, and the device state.
    Delta = 2,
    /// All of RAM and the device state.
    Full = 3,
}

/// One of the receiver's two slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlotId(pub u8);

impl SlotId {
    pub fn other(self) -> SlotId {
        SlotId(1 - self.0)
    }
}

/// A chunk of the receiver's slot memory, as the driver numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub u32);

/// Where the primary may push one chunk: the link's business, carried by the protocol.
///
/// On TCP an index, on RDMA an address and a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GrantToken(pub [u8; 24]);
