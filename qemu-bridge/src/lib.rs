//! Everything that talks to a QEMU process.

pub mod blocks;
pub mod device_state;
pub mod guardian;
pub mod qmp;
pub mod spawn;
pub mod standby;
