//! The guest's QEMU as the primary's loop sees it: commands go out, replies become inputs.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use anyhow::Context;
use ft_core::primary::{QemuEvent, Step};
use ft_core::{Epoch, Micros};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use qemu_bridge::device_state::StateSink;
use qemu_bridge::gate::{Gate, Operation};
use qemu_bridge::qmp::{Command, Incoming, Qmp, RequestId};
use qemu_bridge::shape::{Finding, ShapeWatch};
use qemu_bridge::spawn::QemuProcess;
use serde_json::Value;

use super::work::describe;
use super::workshop::Workshop;
use crate::driver::clock;
use crate::driver::proof::HeldProofs;

/// How often shape, run state and migration blockers are looked at.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// A QEMU that has not stopped by then is frozen by the kernel: the backup counts on it.
const FENCE_PATIENCE: Duration = Duration::from_millis(40);
/// For a guest's last output when it has powered off.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// For the last commands, when the loop is over.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);

/// What QEMU has to say to the machine.
#[derive(Debug)]
pub(super) enum QemuInput {
    Paused,
    Saved { bytes: u64 },
    Resumed,
    Failed { step: Step, text: String },
    Event(QemuEvent),
    ShapeChanged(String),
    GateMoved,
    Released(Epoch),
    ProofHeld(Result<(), String>),
}

/// What a reply belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Pause,
    Save,
    Resume,
    Fence,
    HoldProof,
    /// An operation of the gate that needs more commands after this one, or tells nobody.
    GateStep,
    MoveGate,
    Release(Epoch),
    /// See [`long_question`].
    Cover,
    /// Its failure is worth a line, nothing more.
    Other(&'static str),
}

pub(crate) struct Qemu {
    qmp: Qmp,
    process: QemuProcess,
    sink: StateSink,
    watch: ShapeWatch,
    gate: Box<dyn Gate>,
    /// To be carried out when the guest has stopped, by a gate that acts at once.
    gate_waits: Option<Operation>,
    /// It can't be relied on: nothing is released any more.
    gate_broken: bool,
    /// Its opening may be on the way.
    gate_opening: bool,
    /// How the VM is no longer the one that was attached to.
    changed: Option<String>,
    batch: Vec<(Command, Purpose)>,
    pending: HashMap<RequestId, Purpose>,
    saved_bytes: u64,
    proofs: HeldProofs,
    next_watch: Micros,
    fence_until: Option<Micros>,
    frozen: bool,
    shut_down: bool,
    gone: bool,
    /// Do not leave the guest to itself at the end: it has ended, or must.
    ended: bool,
}

impl Qemu {
    pub(crate) fn new(
        qmp: Qmp,
        process: QemuProcess,
        sink: StateSink,
        watch: ShapeWatch,
        gate: Box<dyn Gate>,
    ) -> Qemu {
        Qemu {
            qmp,
            process,
            sink,
            watch,
            gate,
            gate_waits: None,
            gate_broken: false,
            gate_opening: false,
            changed: None,
            batch: Vec::new(),
            pending: HashMap::new(),
            saved_bytes: 0,
            proofs: HeldProofs::default(),
            next_watch: clock::now() + WATCH_EVERY,
            fence_until: None,
            frozen: false,
            shut_down: false,
            gone: false,
            ended: false,
        }
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        (!self.gone).then(|| self.qmp.fd())
    }

    pub(super) fn process_fd(&self) -> Option<BorrowedFd<'_>> {
        (!self.gone).then(|| self.process.pidfd())
    }

    pub(super) fn wants_write(&self) -> bool {
        self.qmp.wants_write()
    }

    /// A page may change after it was found written, without being found again while the guest runs.
    pub(super) fn has_direct_io(&self) -> bool {
        self.watch.direct_io()
    }

    pub(super) fn saved_bytes(&self) -> u64 {
        self.saved_bytes
    }

    pub(super) fn pause(&mut self) {
        // Epochs may follow each other without a gap. QEMU answers these while the guest still runs.
        if !self.frozen && !self.gone {
            self.look(clock::now());
        }
        self.batch.push((Command::new("stop"), Purpose::Pause));
    }

    pub(super) fn pause_and_save(&mut self) {
        if self.batch.is_empty() {
            self.batch.push((long_question(), Purpose::Cover));
        }
        self.pause();
        self.batch.push((self.sink.save_command(), Purpose::Save));
    }

    pub(super) fn resume(&mut self) {
        self.thaw();
        self.batch.push((Command::new("cont"), Purpose::Resume));
    }

    /// Closes the gate, or keeps what comes apart from what it holds, before or in the pause that follows.
    /// → [`QemuInput::GateMoved`]
    pub(super) fn move_gate(&mut self, operation: Operation, inputs: &mut Vec<QemuInput>) {
        self.gate_opening = false;
        if self.gate.acts_at_once() {
            self.gate_waits = Some(operation);
        } else if self.operate(operation, Purpose::MoveGate, inputs) {
            inputs.push(QemuInput::GateMoved);
        }
    }

    /// Whether a `stop` has no answer yet.
    fn is_stopping(&self) -> bool {
        let asked = self.batch.iter().map(|(_, purpose)| purpose);
        asked
            .chain(self.pending.values())
            .any(|purpose| *purpose == Purpose::Pause)
    }

    /// Lets the acknowledged epoch's output out. → [`QemuInput::Released`]
    pub(super) fn release(&mut self, epoch: Epoch, inputs: &mut Vec<QemuInput>) {
        if self.gate_broken {
            return; // what is held stays, until the end of the protection that is on its way
        }
        if self.operate(Operation::Release, Purpose::Release(epoch), inputs) {
            inputs.push(QemuInput::Released(epoch));
        }
    }

    pub(super) fn open_gate(&mut self, inputs: &mut Vec<QemuInput>) {
        self.gate_opening = true;
        if self.gate_waits.take().is_some() {
            inputs.push(QemuInput::GateMoved); // and at once open again
        }
        self.operate(Operation::Open, Purpose::GateStep, inputs);
    }

    /// Whether it is done already.
    fn operate(
        &mut self,
        operation: Operation,
        purpose: Purpose,
        inputs: &mut Vec<QemuInput>,
    ) -> bool {
        let commands = match self.gate.perform(operation) {
            Ok(commands) => commands,
            Err(error) => {
                self.fail_gate(purpose, describe(&error), inputs);
                return false;
            }
        };
        let steps = commands.len();
        let purposes = (1..=steps).map(|n| {
            if n < steps {
                Purpose::GateStep
            } else {
                purpose
            }
        });
        self.batch.extend(commands.into_iter().zip(purposes));
        steps == 0
    }

    fn fail_gate(&mut self, purpose: Purpose, text: String, inputs: &mut Vec<QemuInput>) {
        self.gate_broken = true;
        let what = format!("the output gate can't be relied on any more: {text}");
        self.changed = Some(what.clone());
        inputs.push(QemuInput::ShapeChanged(what));
        if purpose == Purpose::MoveGate {
            let step = Step::Gate;
            inputs.push(QemuInput::Failed { step, text });
        }
    }

    /// Readable when the guest has sent something.
    pub(super) fn output_fd(&self) -> Option<BorrowedFd<'_>> {
        self.gate.waiting_fd().filter(|_| !self.gone)
    }

    pub(super) fn dropped_packets(&self) -> u64 {
        self.gate.dropped_packets()
    }

    /// Whether there is output that was not there before.
    pub(super) fn notice_output(&mut self) -> bool {
        self.gate.drain()
    }

    /// Stops the guest whatever else is going on. If QEMU does not answer, the kernel stops it.
    pub(super) fn fence(&mut self, now: Micros) {
        self.batch.push((Command::new("stop"), Purpose::Fence));
        self.fence_until = Some(now + FENCE_PATIENCE);
        self.flush();
    }

    /// Ends QEMU at once: the other host runs the guest, or the guest is done.
    pub(super) fn end(&mut self) {
        self.ended = true;
        if std::mem::take(&mut self.gate_opening) {
            // The guest's last words are on their way out: QEMU answers in order.
            self.flush();
            let _ = self.qmp.call(Command::new("query-status"), LAST_WORDS);
        }
        if let Err(error) = self.process.kill() {
            tracing::warn!("ending QEMU failed: {error}");
        }
    }

    fn signal(&self, signal: Signal) -> nix::Result<()> {
        // Our pidfd was open before: the number means the same process, or none.
        kill(Pid::from_raw(self.process.pid()), signal)
    }

    /// A fence had to freeze the process.
    pub(super) fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Lets a QEMU that a fence has frozen carry out its commands again.
    pub(super) fn thaw(&mut self) {
        self.fence_until = None;
        if self.frozen {
            self.frozen = false;
            if let Err(error) = self.signal(Signal::SIGCONT) {
                tracing::warn!("thawing QEMU failed: {error}");
            }
        }
    }

    /// Gives QEMU a copy of the proof lane, so that it ends only when QEMU has ended as well.
    /// → [`QemuInput::ProofHeld`]
    ///
    /// # Errors
    /// The descriptor can't be sent.
    pub(super) fn hold_proof(&mut self, lane: BorrowedFd<'_>) -> anyhow::Result<()> {
        let id = self
            .proofs
            .hold(&mut self.qmp, lane)
            .context("handing QEMU the proof lane")?;
        self.pending.insert(id, Purpose::HoldProof);
        Ok(())
    }

    pub(super) fn drop_old_proofs(&mut self) {
        let commands = self.proofs.drop_old();
        self.close_proofs(commands);
    }

    pub(super) fn drop_newest_proof(&mut self) {
        let command = self.proofs.drop_newest();
        self.close_proofs(command);
    }

    fn close_proofs(&mut self, commands: impl IntoIterator<Item = Command>) {
        let close = |command| (command, Purpose::Other("closefd"));
        self.batch.extend(commands.into_iter().map(close));
    }

    pub(super) fn next_timeout(&self) -> Option<Micros> {
        if self.gone {
            return None;
        }
        let watch = self.may_watch().then_some(self.next_watch);
        self.fence_until.into_iter().chain(watch).min()
    }

    /// Not inside of a boundary, or the guest would stand still for the answers.
    fn may_watch(&self) -> bool {
        self.pending.is_empty() && !self.frozen
    }

    pub(super) fn on_time(&mut self, now: Micros) {
        if self.gone {
            return;
        }
        if self.fence_until.is_some_and(|at| now >= at) {
            self.fence_until = None;
            self.frozen = true;
            tracing::warn!("QEMU did not stop in time: freezing its process");
            if let Err(error) = self.signal(Signal::SIGSTOP) {
                tracing::error!("freezing QEMU failed: {error}");
            }
        }
        if self.may_watch() {
            self.look(now);
        }
    }

    /// Asks what the VM is like now, if it is time.
    fn look(&mut self, now: Micros) {
        if now < self.next_watch {
            return;
        }
        self.next_watch = now + WATCH_EVERY;
        if let Err(error) = self.watch.ask(&mut self.qmp) {
            tracing::warn!("looking at the VM again failed: {error}");
        }
    }

    /// Sends everything that has gathered, in one write.
    pub(super) fn flush(&mut self) {
        if self.batch.is_empty() || self.gone {
            return;
        }
        if self
            .batch
            .iter()
            .any(|(_, purpose)| *purpose == Purpose::Save)
            && let Err(error) = self.sink.rewind()
        {
            tracing::error!("rewinding the device state's sink failed: {error}");
        }
        let (commands, purposes): (Vec<_>, Vec<_>) = self.batch.drain(..).unzip();
        match self.qmp.submit(&commands) {
            Ok(ids) => self.pending.extend(ids.into_iter().zip(purposes)),
            // A closed connection is found, and said, by the next read.
            Err(error) => tracing::warn!("sending to QEMU failed: {error}"),
        }
    }

    pub(super) fn progress(&mut self, inputs: &mut Vec<QemuInput>) {
        if self.gone {
            return;
        }
        let mut incoming = Vec::new();
        let result = self.qmp.progress(&mut |message| incoming.push(message));
        for message in incoming {
            match self.watch.feed(&message) {
                Some(Finding::Changed { what }) => {
                    self.changed = Some(what.clone());
                    inputs.push(QemuInput::ShapeChanged(what));
                }
                // Once a second: a change lasts, and a detach that failed is to be tried again.
                Some(Finding::RunState(_)) => {
                    inputs.extend(self.changed.clone().map(QemuInput::ShapeChanged));
                }
                None => {}
            }
            match message {
                Incoming::Reply { id, result } => {
                    let result = result.map_err(|failure| failure.to_string());
                    self.on_reply(id, result, inputs);
                }
                Incoming::Event { name, data, .. } => self.on_event(&name, &data, inputs),
            }
        }
        let alive = self.process.is_alive().unwrap_or(false);
        if !alive || result.is_err() {
            self.gone = true;
            if !self.shut_down {
                let said = self.process.stderr_tail();
                let why = match (alive, result) {
                    (true, Err(error)) => format!("its QMP connection is gone ({error})"),
                    _ => format!(
                        "the process ended{}{said}",
                        if said.is_empty() { "" } else { ": " }
                    ),
                };
                inputs.push(QemuInput::Event(QemuEvent::Gone(why)));
            }
        }
    }

    fn on_reply(
        &mut self,
        id: RequestId,
        result: Result<Value, String>,
        inputs: &mut Vec<QemuInput>,
    ) {
        let Some(purpose) = self.pending.remove(&id) else {
            return;
        };
        let step = match purpose {
            Purpose::Pause => Step::Pause,
            Purpose::Save => Step::Save,
            Purpose::Resume => Step::Resume,
            Purpose::Fence => {
                if result.is_ok() {
                    self.fence_until = None;
                }
                return;
            }
            Purpose::HoldProof => {
                return inputs.push(QemuInput::ProofHeld(result.map(drop)));
            }
            Purpose::GateStep | Purpose::MoveGate | Purpose::Release(_) => {
                match (result, purpose) {
                    (Ok(_), Purpose::MoveGate) => inputs.push(QemuInput::GateMoved),
                    (Ok(_), Purpose::Release(epoch)) => inputs.push(QemuInput::Released(epoch)),
                    (Ok(_), _) => {}
                    (Err(text), purpose) => self.fail_gate(purpose, text, inputs),
                }
                return;
            }
            Purpose::Cover => return,
            Purpose::Other(what) => {
                if let Err(text) = result {
                    tracing::warn!("{what} failed: {text}");
                }
                return;
            }
        };
        let input = match (result, step) {
            (Err(text), step) => QemuInput::Failed { step, text },
            (Ok(_), Step::Pause) => QemuInput::Paused,
            (Ok(_), Step::Resume) => QemuInput::Resumed,
            (Ok(_), _) => match self.sink.saved_bytes() {
                Ok(bytes) => {
                    self.saved_bytes = bytes as u64;
                    QemuInput::Saved {
                        bytes: bytes as u64,
                    }
                }
                Err(error) => QemuInput::Failed {
                    step: Step::Save,
                    text: error.to_string(),
                },
            },
        };
        inputs.push(input);
        // Also of a `stop` that failed: the machine waits for the gate's answer.
        if purpose == Purpose::Pause
            && !self.is_stopping()
            && let Some(operation) = self.gate_waits.take()
            && self.operate(operation, Purpose::MoveGate, inputs)
        {
            inputs.push(QemuInput::GateMoved);
        }
    }

    fn on_event(&mut self, name: &str, _data: &Value, inputs: &mut Vec<QemuInput>) {
        let event = match name {
            "STOP" => QemuEvent::Stopped,
            "RESUME" => QemuEvent::Resumed,
            "SHUTDOWN" => {
                self.shut_down = true;
                QemuEvent::Shutdown
            }
            _ => return,
        };
        inputs.push(QemuInput::Event(event));
    }

    /// Takes the tracker out. A guest that stays is left as it was found: no descriptor of ours,
    /// and free to power off.
    pub(super) fn leave(mut self, workshop: Workshop, guest_stays: bool) {
        workshop.leave();
        self.flush(); // a last `cont`
        if self.gone || self.ended || !guest_stays {
            // Not before QEMU has ended: a gate that is away holds nothing.
            let patience = if self.ended {
                LEAVE_PATIENCE
            } else {
                Duration::ZERO
            };
            if matches!(self.process.wait(patience), Ok(true)) {
                self.gate.discard();
            }
            return;
        }
        let mut last = self.gate.remove();
        last.extend(self.proofs.drop_all());
        last.push(self.sink.remove_command());
        last.push(Command::new("set-action").arg("shutdown", "poweroff"));
        for command in last {
            let name = command.name().to_owned();
            if let Err(error) = self.qmp.call(command, LEAVE_PATIENCE) {
                tracing::warn!("leaving QEMU: {name} failed: {error}");
            }
        }
    }
}

/// A question that takes QEMU a moment and changes nothing: there is no such object, and a name without a
/// slash is looked for in all of its tree (qom/object.c, `object_resolve_partial_path`).
///
/// QEMU reads commands byte by byte, and stops the guest as soon as it has read `stop`: the guest would stand
/// still while the much longer command that saves is read. With this before it, QEMU is busy
/// when it reads `stop`, and has read the rest when it comes to it. The commands of a gate do the same.
fn long_question() -> Command {
    Command::new("qom-list").arg("path", "-")
}
