//! Trying a failover before the bad day: a throw-away QEMU on a private copy of the standby's
//! RAM loads the last epoch and runs for a moment, without network.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use ft_core::{Micros, RunState};
use qemu_bridge::blocks::RamBlock;

use super::standby::{Standby, StandbyInput};
use crate::driver::clock;

/// How long the guest may run in a rehearsal: long enough to execute, too short to matter.
const RUN: Duration = Duration::from_millis(50);
/// Applies wait for a rehearsal, so it must not take for ever.
const PATIENCE: Duration = Duration::from_secs(10);

/// A rehearsal's QEMU and how far it is.
pub(super) struct Rehearsal {
    qemu: Standby,
    pub(super) blocks: Option<Vec<RamBlock>>,
    run_state: RunState,
    until: Micros,
    running: bool,
}

impl Rehearsal {
    pub(super) fn new(qemu: Standby, blocks: Vec<RamBlock>) -> Rehearsal {
        let until = clock::now() + PATIENCE;
        let run_state = RunState::Stopped;
        Rehearsal {
            qemu,
            blocks: Some(blocks),
            run_state,
            until,
            running: false,
        }
    }

    pub(super) fn pid(&self) -> i32 {
        self.qemu.pid()
    }

    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.qemu.fds()
    }

    pub(super) fn expect(&mut self, run_state: RunState) {
        self.run_state = run_state;
    }

    pub(super) fn load(&mut self, state: &[u8]) -> Result<(), String> {
        self.qemu
            .activate(state, self.run_state)
            .map_err(|error| format!("{error:#}"))
    }

    /// How it went, once that is known.
    pub(super) fn progress(&mut self) -> Option<Result<(), String>> {
        let mut inputs = Vec::new();
        self.qemu.progress(&mut inputs);
        for input in inputs {
            match input {
                StandbyInput::Activated => {
                    self.running = true;
                    self.until = clock::now() + RUN;
                }
                StandbyInput::ActivationFailed(text) => return Some(Err(text)),
                // The guest may power itself off in that moment: it ran.
                StandbyInput::Gone { clean: true, .. } if self.running => return Some(Ok(())),
                StandbyInput::Gone { text, .. } => return Some(Err(text)),
            }
        }
        None
    }

    pub(super) fn next_timeout(&self) -> Micros {
        self.until
    }

    pub(super) fn on_time(&self, now: Micros) -> Option<Result<(), String>> {
        (now >= self.until).then(|| match self.running {
            true => Ok(()),
            false => Err(format!("the rehearsal took longer than {PATIENCE:?}")),
        })
    }

    pub(super) fn end(mut self) {
        self.qemu.kill();
    }
}
