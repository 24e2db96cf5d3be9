//! Everything that talks to a QEMU process.

pub mod blocks;
pub mod qmp;
pub mod spawn;
