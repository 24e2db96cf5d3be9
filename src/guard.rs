//! The guardian of our QEMU, started again if it is gone.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::Context;
use qemu_bridge::guardian::{self, Guardian};

#[derive(Debug)]
pub(crate) struct Guard {
    guardian: Guardian,
    qemu: OwnedFd,
}

impl Guard {
    /// Starts a disarmed guardian over the process behind `qemu`, a pidfd.
    ///
    /// # Errors
    /// It doesn't start.
    pub(crate) fn start(qemu: BorrowedFd<'_>) -> anyhow::Result<Guard> {
        let qemu = qemu.try_clone_to_owned().context("copying QEMU's pidfd")?;
        Ok(Guard {
            guardian: spawn(&qemu)?,
            qemu,
        })
    }

    /// # Errors
    /// There is no guardian, and another one doesn't start either.
    pub(crate) fn set(&mut self, armed: bool) -> anyhow::Result<()> {
        let command = |g: &mut Guardian| if armed { g.arm() } else { g.disarm() };
        if command(&mut self.guardian).is_ok() {
            return Ok(());
        }
        self.guardian = spawn(&self.qemu)?;
        command(&mut self.guardian).context("commanding the guardian")
    }
}

fn spawn(qemu: &OwnedFd) -> anyhow::Result<Guardian> {
    Guardian::spawn(
        Path::new("/proc/self/exe"),
        &[guardian::ARGUMENT],
        qemu.as_fd(),
    )
    .context("starting the guardian")
}
