//! The primary's loop.

mod image;
mod packing;
mod qemu;
mod work;
mod workshop;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use ft_core::primary::{Action, Command, End, GateState, Input, LinkDown, Primary, Report};
use ft_core::wire::Frame;
use ft_core::{Epoch, Micros};
use nix::poll::PollFlags;
use qemu_bridge::gate::Operation;
use transport::choice::{Connected, Transport};
use transport::tcp::PairingId;
use transport::{Chunk, Event, Grant, Link, LossKind, Spin, TransportConfig, TransportConnector};

pub(crate) use self::packing::Deltas;
pub(crate) use self::qemu::Qemu;
use self::qemu::QemuInput;
pub(crate) use self::work::PrimaryWorker;
use self::work::{Done, Job};
pub(crate) use self::workshop::Workshop;
use super::clock;
use super::poller::Poller;
use super::proof::{Proof, ProofLane};
use super::report::Facts;
use crate::control::{ControlServer, Request};
use crate::events::Events;
use crate::exit::Exit;
use crate::guard::Guard;
use crate::nursery::Nursery;
use crate::signals::Signals;
use crate::state_store::{State, StateStore};

/// Everything that the loop waits for.
#[derive(Clone, Copy, Debug)]
enum Source {
    Link,
    Connector,
    Proof,
    Qmp,
    Worker,
    Process,
    Output,
    Control,
    Signal,
}

/// What the loop is built from: a QEMU that is attached and a machine that knows its shape.
pub(crate) struct Parts {
    pub(crate) machine: Primary,
    pub(crate) frame: Frame,
    pub(crate) qemu: Qemu,
    pub(crate) workshop: Workshop,
    pub(crate) peer: SocketAddr,
    pub(crate) transport: TransportConfig,
    pub(crate) busy_poll: Duration,
    pub(crate) events: Events,
    pub(crate) facts: Facts,
    pub(crate) control: ControlServer,
    pub(crate) signals: Signals,
    pub(crate) store: StateStore,
    pub(crate) guard: Guard,
    /// Of a QEMU that we have started.
    pub(crate) nursery: Option<Nursery>,
}

/// Runs until the machine is finished.
///
/// # Errors
/// Something of our own failed: a poll, a thread, an eventfd. QEMU's and the peer's faults go to
/// the machine.
pub(crate) fn run(parts: Parts) -> anyhow::Result<Exit> {
    let spin = Spin::new(parts.busy_poll);
    let mut driver = Driver {
        parts,
        link: None,
        connector: None,
        arriving: None,
        proof: None,
        next_proof: None,
        chunks: HashMap::new(),
        results: Vec::new(),
        not_connected: None,
        transport: Transport::Tcp,
        spin,
        end: None,
    };
    driver.drain()?;
    while driver.end.is_none() {
        driver.turn()?;
    }
    let Driver { parts, end, .. } = driver;
    let Parts {
        qemu,
        workshop,
        mut guard,
        mut events,
        nursery,
        control,
        ..
    } = parts;
    let end = end.context("the loop ended without an end")?;
    let (exit, how, guest_stays) = outcome(&end);
    if guest_stays {
        // Whatever happens from here on, QEMU must not die with us.
        guard.set(false)?;
        if let Some(mut nursery) = nursery {
            nursery.keep_sockets();
        }
    }
    qemu.leave(workshop, guest_stays);
    events.ended(&how, exit as u8);
    control.end(&how, exit as u8);
    Ok(exit)
}

/// Exit code, a sentence, and whether the guest runs on here.
fn outcome(end: &End) -> (Exit, String, bool) {
    match end {
        End::Detached => (
            Exit::Clean,
            "detached: the guest runs on, unprotected".into(),
            true,
        ),
        End::PoweredOff => (Exit::Clean, "the guest has powered off".into(), false),
        End::SwitchedOver { term } => (
            Exit::Clean,
            format!("switched over: the backup runs the guest (term {term})"),
            false,
        ),
        End::FailedOver { term } => (
            Exit::FailedOver,
            format!("the backup runs the guest now (term {term})"),
            false,
        ),
        End::Lost(text) => (Exit::Lost, text.clone(), true),
        End::Unprotectable(text) => (
            Exit::Other,
            format!("the guest runs on, unprotected: {text}"),
            true,
        ),
        End::Refused { text, .. } => (
            Exit::Refused,
            format!("the backup refused: {text}; the guest runs on"),
            true,
        ),
    }
}

struct Driver {
    parts: Parts,
    link: Option<Box<dyn Link>>,
    connector: Option<TransportConnector>,
    /// Connected, but QEMU has no copy of its proof lane yet.
    arriving: Option<Box<dyn Link>>,
    /// Of the last link that both sides have agreed on, also after its other lanes broke.
    proof: Option<ProofLane>,
    /// Of the link that says hello: a backup that refuses us closes it, and isn't dead.
    next_proof: Option<ProofLane>,
    /// Filled and not yet pushed, by index.
    chunks: HashMap<u32, Chunk>,
    /// Of jobs that were done at once; empty, but keeps its memory.
    results: Vec<Done>,
    /// Why there is no link yet, as it was said.
    not_connected: Option<String>,
    /// What carries the chunks of the newest link.
    transport: Transport,
    spin: Spin,
    end: Option<End>,
}

impl Driver {
    /// Waits once and handles what has come. Inputs come before timers: a reply that waits in a
    /// socket is not silence.
    fn turn(&mut self) -> anyhow::Result<()> {
        let now = clock::now();
        let patience = clock::until(now, self.next_timeout());
        let mut poller = Poller::new();
        if let Some(link) = &self.link {
            poller.watch(Source::Link, link.ready_fd());
        }
        if let Some(connector) = &self.connector {
            poller.watch(Source::Connector, connector.ready_fd());
        }
        if let Some(proof) = &self.proof {
            poller.watch(Source::Proof, proof.fd());
        }
        let parts = &self.parts;
        if let Some(qmp) = parts.qemu.fd() {
            poller.watch_for(Source::Qmp, qmp, qmp_flags(&parts.qemu));
        }
        if let Some(process) = parts.qemu.process_fd() {
            poller.watch(Source::Process, process);
        }
        if let Some(output) = parts.qemu.output_fd() {
            poller.watch(Source::Output, output);
        }
        poller.watch(Source::Worker, parts.workshop.fd());
        poller.watch(Source::Signal, parts.signals.fd());
        for fd in parts.control.fds() {
            poller.watch(Source::Control, fd);
        }
        let ready = poller
            .wait(patience, &mut self.spin)
            .context("waiting for events failed")?;
        for source in ready {
            self.on_ready(source)?;
        }
        let now = clock::now();
        if self
            .parts
            .machine
            .poll_timeout()
            .is_some_and(|at| at <= now)
        {
            self.parts.machine.handle_timeout(now);
        }
        self.parts.qemu.on_time(now);
        self.greet_for_frozen();
        self.parts.events.on_time(now);
        if self
            .connector
            .as_ref()
            .is_some_and(|c| clock::from_instant(c.next_deadline()) <= now)
        {
            self.on_connector();
        }
        self.drain()
    }

    fn next_timeout(&self) -> Option<Micros> {
        [
            self.parts.machine.poll_timeout(),
            self.parts.qemu.next_timeout(),
            self.parts.events.next_timeout(),
            self.connector
                .as_ref()
                .map(|c| clock::from_instant(c.next_deadline())),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn on_ready(&mut self, source: Source) -> anyhow::Result<()> {
        match source {
            Source::Link => self.on_link(),
            Source::Connector => self.on_connector(),
            Source::Proof => self.on_proof(),
            Source::Qmp | Source::Process => self.on_qemu(),
            Source::Output => {
                if self.parts.qemu.notice_output() {
                    self.input(Input::OutputWaiting);
                }
            }
            Source::Worker => {
                // A `cont` of somebody else may wait in the socket: it ends the boundary, and
                // must be known before the harvest is.
                self.on_qemu();
                self.on_worker();
            }
            Source::Control => self.on_control(),
            Source::Signal => {
                while let Some(signal) = self.parts.signals.take() {
                    tracing::info!("{signal}: detaching");
                    self.input(Input::Command(Command::Detach));
                }
            }
        }
        self.drain()
    }

    fn input(&mut self, input: Input<'_>) {
        self.parts.machine.handle(clock::now(), input);
    }

    fn on_connector(&mut self) {
        let Some(connector) = &mut self.connector else {
            return;
        };
        match connector.progress() {
            Ok(None) => {}
            Ok(Some(Connected {
                link,
                sentence,
                transport,
                ..
            })) => {
                self.connector = None;
                self.transport = transport;
                self.not_connected = None;
                self.parts.events.note(&sentence);
                if let Err(error) = self.adopt(link) {
                    self.input(broken(format!("{error:#}")));
                }
            }
            Err(error) => {
                self.connector = None;
                self.not_connected(error.into());
            }
        }
    }

    /// It is tried again for as long as it takes; said once for each reason.
    fn not_connected(&mut self, error: anyhow::Error) {
        let why = format!("{error:#}");
        if self.not_connected.as_ref() != Some(&why) {
            let peer = self.parts.peer;
            let text = format!("no link to the backup at {peer} yet: {why}; trying again");
            self.parts.events.note(&text);
            self.not_connected = Some(why.clone());
        }
        self.input(broken(why));
    }

    /// Takes a connected link. QEMU gets its copy of the proof lane before anything is said:
    /// otherwise this daemon's death alone would look like the death of both.
    fn adopt(&mut self, link: Box<dyn Link>) -> anyhow::Result<()> {
        let lane = link.proof_fd().context("the link has no proof lane")?;
        self.next_proof = Some(ProofLane::new(lane).context("copying the proof lane")?);
        self.parts.qemu.hold_proof(lane)?;
        self.arriving = Some(link);
        self.greet_for_frozen();
        Ok(())
    }

    fn on_proof_held(&mut self, result: Result<(), String>) {
        match result {
            Ok(()) => self.greet(),
            Err(text) => {
                self.arriving = None;
                self.input(broken(format!("QEMU refused the proof lane: {text}")));
            }
        }
    }

    /// A QEMU that is frozen can't take its copy before it is thawed. It can't run its guest either,
    /// and the guardian ends it if we die; but only a hello can tell that the backup has taken over.
    fn greet_for_frozen(&mut self) {
        if self.parts.qemu.is_frozen() {
            self.greet();
        }
    }

    fn greet(&mut self) {
        if let Some(link) = self.arriving.take() {
            self.link = Some(link);
            self.input(Input::LinkUp);
        }
    }

    fn on_link(&mut self) {
        let Some(link) = &mut self.link else { return };
        let machine = &mut self.parts.machine;
        let mut lost = None;
        let result = link.progress(&mut |event| match event {
            Event::Message(bytes) => machine.handle(clock::now(), Input::Message(bytes)),
            Event::Pushed(chunk) => {
                drop(chunk);
                machine.handle(clock::now(), Input::ChunkPushed { index: 0 });
            }
            // A primary grants nothing.
            Event::Arrived { .. } | Event::Revoked(_) => {}
            // The driver reads the proof lane itself.
            Event::Lost(loss) if loss.lane == transport::Lane::Proof => {}
            Event::Lost(loss) => lost = Some(describe(&loss.kind)),
        });
        if let Err(error) = result {
            lost = Some(error.to_string());
        }
        if let Some(text) = lost {
            self.input(broken(text));
        }
    }

    fn on_proof(&mut self) {
        match self.proof.as_ref().map_or(Proof::Silent, ProofLane::read) {
            Proof::Silent => {}
            Proof::Dead => {
                self.proof = None;
                self.input(Input::LinkDown(LinkDown::PeerDead));
            }
            Proof::Broken(text) => {
                self.proof = None;
                self.input(broken(text));
            }
        }
    }

    fn on_qemu(&mut self) {
        let mut inputs = Vec::new();
        self.parts.qemu.progress(&mut inputs);
        self.feed(inputs);
    }

    fn gate(&mut self, operate: impl FnOnce(&mut Qemu, &mut Vec<QemuInput>)) {
        let mut inputs = Vec::new();
        operate(&mut self.parts.qemu, &mut inputs);
        self.feed(inputs);
    }

    fn feed(&mut self, inputs: Vec<QemuInput>) {
        for input in inputs {
            let input = match input {
                QemuInput::Paused => Input::Paused,
                QemuInput::Saved { bytes } => Input::Saved { bytes },
                QemuInput::Resumed => Input::Resumed,
                QemuInput::Failed { step, text } => Input::StepFailed { step, text },
                QemuInput::Event(event) => Input::Qemu(event),
                QemuInput::ShapeChanged(text) => Input::ShapeChanged(text),
                QemuInput::GateMoved => Input::GateMoved,
                QemuInput::Released(epoch) => Input::Released(epoch),
                QemuInput::ProofHeld(result) => {
                    self.on_proof_held(result);
                    continue;
                }
            };
            self.input(input);
        }
    }

    fn on_worker(&mut self) {
        while let Some(done) = self.parts.workshop.take() {
            self.on_done(done);
            // Pushing starts while the harvest fills the next chunk.
            if self.drain().is_err() {
                return;
            }
        }
    }

    fn on_done(&mut self, done: Done) {
        let input = match done {
            Done::AllArmed => Input::AllArmed,
            Done::RoundStarted { pages } => Input::RoundStarted { pages },
            Done::RoundFilled { done } => Input::RoundFilled { done },
            Done::Precopied => Input::Precopied,
            Done::Harvested(harvest) => Input::Harvested(harvest),
            Done::Failed { step, text } => Input::StepFailed { step, text },
            Done::Chunk { index, last, chunk } => {
                let bytes = chunk.bytes().len() as u64;
                self.chunks.insert(index, chunk);
                Input::ChunkReady { index, last, bytes }
            }
        };
        self.input(input);
    }

    fn on_control(&mut self) {
        let status = self.parts.machine.status();
        let dropped_packets = self.parts.qemu.dropped_packets();
        let detach_waits = self.parts.machine.detach_waits();
        let mut commands = Vec::new();
        self.parts.control.progress(&mut |request| {
            let command = match request {
                Request::Status => {
                    return self
                        .parts
                        .facts
                        .primary(&status, dropped_packets, clock::now());
                }
                Request::Detach => Command::Detach,
                Request::Switchover => Command::Switchover,
                Request::Continue => Command::Continue,
                Request::Rehearse => Command::Rehearse,
            };
            commands.push(command);
            match &detach_waits {
                Some(why) if command == Command::Detach => {
                    serde_json::json!({"accepted": true, "waits": why})
                }
                _ => serde_json::json!({"accepted": true}),
            }
        });
        for command in commands {
            self.input(Input::Command(command));
        }
    }

    /// Carries out what the machine wants, until it wants nothing more.
    fn drain(&mut self) -> anyhow::Result<()> {
        while let Some(action) = self.parts.machine.poll_action() {
            self.carry_out(action)?;
        }
        // All commands of one drain go to QEMU in one write, all chunks in one submission.
        self.parts.qemu.flush();
        if let Some(link) = &mut self.link
            && let Err(error) = link.flush()
        {
            let text = error.to_string();
            self.input(broken(text));
        }
        Ok(())
    }
}

impl Driver {
    fn carry_out(&mut self, action: Action) -> anyhow::Result<()> {
        match action {
            Action::Connect => self.connect(),
            Action::CloseLink => self.close_link(),
            Action::KeepProof => self.keep_proof(),
            Action::DropProof => {
                self.next_proof = None;
                self.parts.qemu.drop_newest_proof();
            }
            Action::Send(message) => self.send(&message),
            Action::Push { index, to, tag } => self.push(index, Grant(to.0), tag.pack()),

            Action::PauseVm => self.parts.qemu.pause(),
            Action::PauseAndSave => self.parts.qemu.pause_and_save(),
            Action::ResumeVm => self.parts.qemu.resume(),
            Action::FenceVm => self.parts.qemu.fence(clock::now()),
            Action::ThawVm => self.parts.qemu.thaw(),
            Action::EndVm => self.parts.qemu.end(),
            // The loop's end leaves it as it was.
            Action::LeaveVm => {}

            Action::MoveGate => {
                self.gate(|qemu, inputs| qemu.move_gate(Operation::Advance, inputs))
            }
            Action::Gate(GateState::Closed) => {
                self.gate(|qemu, inputs| qemu.move_gate(Operation::Close, inputs));
            }
            Action::Gate(GateState::Open) => self.gate(Qemu::open_gate),
            Action::Release(epoch) => self.gate(|qemu, inputs| qemu.release(epoch, inputs)),

            Action::ArmAll => self.work(Job::ArmAll),
            Action::StartRound { all } => self.work(Job::StartRound { all }),
            Action::FillRound {
                first_index,
                chunks,
            } => {
                let frame = Frame {
                    term: self.term(),
                    ..self.parts.frame
                };
                self.work(Job::FillRound {
                    frame,
                    first_index,
                    chunks,
                });
            }
            Action::Precopy { .. } if self.parts.qemu.has_direct_io() => {
                self.input(Input::Precopied); // of nothing
            }
            Action::Precopy { epoch } => {
                let (frame, pack) = (self.frame_of(epoch), self.packing_may_pay());
                self.work(Job::Precopy { frame, pack });
            }
            Action::Harvest { epoch, kind, audit } => {
                let (frame, pack) = (self.frame_of(epoch), self.packing_may_pay());
                self.work(Job::Harvest {
                    frame,
                    kind,
                    audit,
                    pack,
                });
            }
            Action::Seal {
                base, run_state, ..
            } => {
                let device_bytes = self.parts.qemu.saved_bytes();
                self.work(Job::Seal {
                    base,
                    run_state,
                    device_bytes,
                });
            }
            Action::DropDirt => {
                self.chunks.clear();
                self.work(Job::DropDirt);
            }
            Action::MergeDirt => {
                self.chunks.clear();
                self.work(Job::MergeDirt);
            }

            Action::Guardian { armed } => self.guardian(armed),
            Action::StoreTerm { term, protected } => {
                let state = State {
                    term,
                    protected,
                    activated: false,
                };
                if let Err(error) = self.parts.store.store(state) {
                    self.parts.events.error(&format!("{error:#}"));
                }
            }
            Action::Report(report) => self.report(&report),
            Action::Finish(end) => self.end = Some(end),
        }
        Ok(())
    }

    fn frame_of(&self, epoch: Epoch) -> Frame {
        Frame {
            epoch,
            term: self.term(),
            ..self.parts.frame
        }
    }

    fn packing_may_pay(&self) -> bool {
        self.transport == Transport::Tcp
    }

    fn term(&self) -> ft_core::Term {
        self.parts.machine.status().term
    }

    fn work(&mut self, job: Job) {
        // What the driver does itself must not delay the `cont` before it.
        self.parts.qemu.flush();
        let mut results = std::mem::take(&mut self.results);
        self.parts.workshop.submit(job, &mut results);
        if results
            .iter()
            .any(|done| matches!(done, Done::Harvested(_)))
        {
            // As in `on_ready`: a `cont` of somebody else must be known before.
            self.on_qemu();
        }
        results.drain(..).for_each(|done| self.on_done(done));
        self.results = results;
    }

    fn connect(&mut self) {
        let pairing = match crate::random::bytes() {
            Ok(bytes) => bytes,
            Err(error) => return self.input(broken(format!("drawing a random number: {error}"))),
        };
        let Parts {
            peer, transport, ..
        } = &self.parts;
        match TransportConnector::start(*peer, PairingId(pairing), transport) {
            Ok(connector) => self.connector = Some(connector),
            Err(error) => self.not_connected(error.into()),
        }
    }

    fn close_link(&mut self) {
        if let Some(mut link) = self.link.take() {
            // A farewell may be queued; a link that is broken has nothing to lose.
            let _ = link.flush();
        }
        self.arriving = None;
        self.connector = None;
        self.chunks.clear();
    }

    fn keep_proof(&mut self) {
        self.proof = self.next_proof.take();
        self.parts.qemu.drop_old_proofs();
    }

    fn send(&mut self, message: &[u8]) {
        if let Some(link) = &mut self.link
            && let Err(error) = link.send(message)
        {
            let text = error.to_string();
            self.input(broken(text));
        }
    }

    fn push(&mut self, index: u32, to: Grant, tag: u32) {
        let (Some(link), Some(chunk)) = (&mut self.link, self.chunks.remove(&index)) else {
            return; // let go with the link
        };
        if let Err(error) = link.push(chunk, to, tag) {
            let text = error.to_string();
            self.input(broken(text));
        }
    }

    fn guardian(&mut self, armed: bool) {
        if let Err(error) = self.parts.guard.set(armed) {
            self.parts.events.error(&format!("guardian: {error:#}"));
        }
    }

    fn report(&mut self, report: &Report) {
        match report {
            Report::Rehearsed { ok, text } => self.parts.facts.rehearsed(*ok, text),
            Report::Epoch(epoch) => self.parts.facts.paused(epoch.pause),
            _ => {}
        }
        self.parts.events.primary(report);
    }
}

fn broken(text: String) -> Input<'static> {
    Input::LinkDown(LinkDown::Broken(text))
}

fn describe(kind: &LossKind) -> String {
    match kind {
        LossKind::Fin => "the backup closed the connection".to_owned(),
        LossKind::Error(text) | LossKind::Protocol(text) => text.clone(),
    }
}

fn qmp_flags(qemu: &Qemu) -> PollFlags {
    if qemu.wants_write() {
        PollFlags::POLLIN | PollFlags::POLLOUT
    } else {
        PollFlags::POLLIN
    }
}
