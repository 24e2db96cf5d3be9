//! Everything that talks to a QEMU process.

pub mod audit;
pub mod blocks;
pub mod device_state;
pub mod gate;
pub mod gather;
pub mod guardian;
pub mod guest_ram;
pub mod page_diff;
pub mod qmp;
pub mod refusals;
pub mod shape;
pub mod spawn;
pub mod standby;
pub mod standby_ram;
pub mod tracker;
