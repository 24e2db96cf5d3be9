//! Starting a QEMU with the options that protection needs, and holding on to its process.

mod collisions;
mod command;
mod cut_off;
mod options;
mod process;
mod version;

pub use collisions::find_collisions;
pub use command::{
    Added, CommandError, OLDEST_QEMU, Prepared, RamSource, Role, prepare, shell_quote,
};
pub use cut_off::{Purpose, cut_off};
pub use options::{Keys, QemuOption, parse_options};
pub(crate) use process::kill_by_pidfd;
pub use process::{GuestOutput, ProcessError, QemuProcess, SpawnOptions};
pub use version::QemuVersion;
