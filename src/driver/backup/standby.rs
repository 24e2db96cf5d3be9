//! The standby's QEMU as the backup's loop sees it.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use anyhow::Context;
use ft_core::{Micros, RunState};
use qemu_bridge::device_state::into_memory;
use qemu_bridge::qmp::{Command, Incoming, Qmp};
use qemu_bridge::spawn::QemuProcess;
use qemu_bridge::standby::{Activation, Progress};

use crate::driver::clock;
use crate::driver::proof::HeldProofs;

/// A guest that ignores its power button for this long is ended.
const POWER_DOWN_PATIENCE: Duration = Duration::from_secs(30);

/// What the standby has to say to the machine.
#[derive(Debug)]
pub(super) enum StandbyInput {
    Activated,
    ActivationFailed(String),
    Gone { clean: bool, text: String },
}

pub(crate) struct Standby {
    qmp: Qmp,
    process: QemuProcess,
    proofs: HeldProofs,
    activation: Option<Activation>,
    run_state: RunState,
    active: bool,
    shut_down: bool,
    gone: bool,
    power_down_until: Option<Micros>,
}

/// Tells the switches where the guest's addresses are now: at 0, 50, 100, … ms, once for each NIC
/// (RARP; the guest itself sends gratuitous ARP if its driver offers that).
fn announce() -> Command {
    Command::new("announce-self")
        .arg("initial", 50)
        .arg("max", 550)
        .arg("rounds", 10)
        .arg("step", 50)
}

impl Standby {
    /// `qmp` is connected to a standby that is prepared.
    pub(crate) fn new(qmp: Qmp, process: QemuProcess) -> Standby {
        Standby {
            qmp,
            process,
            proofs: HeldProofs::default(),
            activation: None,
            run_state: RunState::Running,
            active: false,
            shut_down: false,
            gone: false,
            power_down_until: None,
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.process.pid()
    }

    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let both = [self.qmp.fd(), self.process.pidfd()];
        both.into_iter().filter(|_| !self.gone)
    }

    /// QEMU holds a copy of its side's proof lane, so that its FIN tells the primary that daemon
    /// and standby are gone.
    pub(super) fn hold_proof(&mut self, lane: BorrowedFd<'_>) {
        if let Err(error) = self.proofs.hold(&mut self.qmp, lane) {
            tracing::warn!("handing the standby the proof lane failed: {error}");
        }
    }

    /// The primary has agreed on the newest link: copies of earlier proof lanes may go.
    pub(super) fn drop_old_proofs(&mut self) {
        let commands = self.proofs.drop_old();
        if !commands.is_empty() {
            self.submit(&commands);
        }
    }

    /// Begins to load a device state; [`StandbyInput::Activated`] when the guest runs, or stands
    /// still as it should.
    ///
    /// # Errors
    /// The standby is gone.
    pub(super) fn activate(&mut self, state: &[u8], run_state: RunState) -> anyhow::Result<()> {
        let memory = into_memory(state).context("keeping the device state")?;
        self.run_state = run_state;
        let activation = Activation::begin(&mut self.qmp, memory.as_fd());
        // Its end is told once.
        self.gone |= activation.is_err();
        self.activation = Some(activation?);
        Ok(())
    }

    pub(super) fn progress(&mut self, inputs: &mut Vec<StandbyInput>) {
        if self.gone {
            return;
        }
        let mut incoming = Vec::new();
        let result = self.qmp.progress(&mut |message| incoming.push(message));
        for message in &incoming {
            self.on_message(message, inputs);
        }
        let alive = self.process.is_alive().unwrap_or(false);
        if !self.gone && (!alive || result.is_err()) {
            self.gone = true;
            let said = self.process.stderr_tail();
            let text = match (alive, result) {
                (true, Err(error)) => format!("the standby's QMP connection is gone: {error}"),
                _ => format!("the standby's QEMU ended: {said}"),
            };
            // QEMU closes the connection a moment before it is gone.
            let clean = self.shut_down;
            inputs.push(StandbyInput::Gone { clean, text });
        }
    }

    fn on_message(&mut self, message: &Incoming, inputs: &mut Vec<StandbyInput>) {
        match message {
            Incoming::Event { name, .. } if name == "SHUTDOWN" => self.shut_down = true,
            Incoming::Reply {
                result: Err(error), ..
            } if self.activation.is_none() => {
                tracing::warn!("the standby refused a command: {error}");
            }
            _ => {}
        }
        let progress = self.activation.as_mut().and_then(|a| a.feed(message));
        match progress {
            Some(Progress::Loaded { .. }) if self.run_state == RunState::Running => {
                if let Some(activation) = &mut self.activation
                    && let Err(error) = activation.start(&mut self.qmp)
                {
                    self.gone = true;
                    inputs.push(StandbyInput::ActivationFailed(error.to_string()));
                }
            }
            Some(progress @ (Progress::Loaded { .. } | Progress::Running { .. })) => {
                self.active = true;
                inputs.push(StandbyInput::Activated);
                if matches!(progress, Progress::Running { .. }) {
                    self.submit(&[announce()]);
                }
            }
            Some(Progress::Failed { why }) => {
                // QEMU ends by itself; that isn't news any more. Before it says that a load failed, it
                // says why.
                self.gone = true;
                let said = self.process.stderr_tail();
                inputs.push(StandbyInput::ActivationFailed(match said.trim() {
                    "" => why,
                    said => format!("{why}: {said}"),
                }));
            }
            None => {}
        }
    }

    /// Presses the guest's power button; a second time, or without effect, ends QEMU.
    pub(super) fn power_down(&mut self) {
        let command = match self.power_down_until {
            None => "system_powerdown",
            Some(_) => "quit",
        };
        self.power_down_until = Some(clock::now() + POWER_DOWN_PATIENCE);
        self.submit(&[Command::new(command)]);
    }

    pub(super) fn next_timeout(&self) -> Option<Micros> {
        self.power_down_until.filter(|_| !self.gone)
    }

    pub(super) fn on_time(&mut self, now: Micros) {
        if self.next_timeout().is_some_and(|at| now >= at) {
            tracing::warn!("the guest ignores its power button: ending QEMU");
            self.power_down();
        }
    }

    /// Ends a rehearsal, however far it is, or what failed to be activated.
    pub(super) fn kill(&mut self) {
        self.active = false;
        self.gone = false;
        self.end();
        // Its end is no news: the next one must not be taken for dead by it.
        self.gone = true;
    }

    /// Ends a standby that never became active.
    pub(crate) fn end(&mut self) {
        if self.active || self.gone {
            return;
        }
        if let Err(error) = self.process.kill() {
            tracing::warn!("ending the standby failed: {error}");
        }
        let _ = self.process.wait(Duration::from_secs(2));
    }

    fn submit(&mut self, commands: &[Command]) {
        if let Err(error) = self.qmp.submit(commands) {
            tracing::warn!("sending to the standby failed: {error}");
        }
    }
}
