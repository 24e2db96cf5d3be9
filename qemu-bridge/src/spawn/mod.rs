//! Starting a QEMU with the options that protection needs, and holding on to its process.

mod process;

pub use process::{GuestOutput, ProcessError, QemuProcess, SpawnOptions};
