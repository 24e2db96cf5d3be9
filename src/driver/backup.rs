//! The backup's loop.

mod rehearsal;
mod standby;
mod work;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ft_core::backup::{Action, Backup, Command, End, Input, LinkDown, LinkId, Report, State};
use ft_core::wire::ChunkTag;
use ft_core::{ChunkId, GrantToken, Micros, RunState, SlotId};
use nix::sys::signal::Signal;
use transport::choice::{Connected, Incoming};
use transport::{Arena, Chunk, Event, Lane, Link, LossKind, Spin, TransportListener};

use self::rehearsal::Rehearsal;
pub(crate) use self::standby::Standby;
use self::standby::StandbyInput;
pub(crate) use self::work::{BackupWorker, Done, Job};
use super::clock;
use super::poller::Poller;
use super::proof::{Proof, ProofLane};
use super::report::Facts;
use super::worker::Worker;
use crate::control::{ControlServer, Request};
use crate::events::Events;
use crate::exit::Exit;
use crate::guard::Guard;
use crate::nursery::{Newborn, Wish};
use crate::signals::Signals;
use crate::state_store::{self, StateStore};

/// Chunks that stay mapped for the next epoch; the rest goes back to the kernel.
const KEEP_FREE_CHUNKS: usize = 8;

#[derive(Clone, Copy, Debug)]
enum Source {
    Listener,
    Link(LinkId),
    Proof(LinkId),
    Standby,
    Rehearsal,
    Worker,
    Nursery,
    Control,
    Signal,
}

pub(crate) struct Parts {
    pub(crate) machine: Backup,
    pub(crate) listener: TransportListener,
    pub(crate) arena: Arena,
    pub(crate) standby: Standby,
    /// Starting a QEMU takes longer than a heartbeat may, so it has a thread of its own.
    pub(crate) nursery: Worker<Wish, Newborn>,
    pub(crate) worker: Worker<Job, Done>,
    pub(crate) events: Events,
    pub(crate) facts: Facts,
    pub(crate) control: ControlServer,
    pub(crate) signals: Signals,
    pub(crate) store: StateStore,
    pub(crate) guard: Guard,
    pub(crate) busy_poll: Duration,
}

/// One link of a primary, or of a stranger.
struct Connection {
    link: Box<dyn Link>,
    proof: Option<ProofLane>,
    /// Control and bulk are gone; the proof lane may still speak.
    broken: bool,
}

struct Driver {
    parts: Parts,
    links: BTreeMap<LinkId, Connection>,
    next_link: u32,
    current: Option<LinkId>,
    chunks: HashMap<ChunkId, Arc<Chunk>>,
    next_chunk: u32,
    /// The device state of the last applied epoch.
    device_state: Vec<u8>,
    run_state: RunState,
    rehearsal: Option<Rehearsal>,
    spin: Spin,
    end: Option<End>,
}

/// Runs until the machine is finished.
///
/// # Errors
/// Something of our own failed. The peer's and QEMU's faults go to the machine.
pub(crate) fn run(parts: Parts) -> anyhow::Result<Exit> {
    let spin = Spin::new(parts.busy_poll);
    let mut driver = Driver {
        parts,
        links: BTreeMap::new(),
        next_link: 0,
        current: None,
        chunks: HashMap::new(),
        next_chunk: 0,
        device_state: Vec::new(),
        run_state: RunState::Running,
        rehearsal: None,
        spin,
        end: None,
    };
    driver.drain();
    while driver.end.is_none() {
        driver.turn()?;
    }
    let Driver { parts, end, .. } = driver;
    let (exit, how) = match end.context("the loop ended without an end")? {
        End::StoodDown => (Exit::Clean, "stood down".to_owned()),
        End::PoweredOff => (Exit::Clean, "the guest has powered off".to_owned()),
        End::NoStandby(text) => {
            let heard = match parts.machine.status().silent_for {
                Some(silent) => format!(", which was heard {:.1} s ago", silent.as_secs_f64()),
                None => String::new(),
            };
            let how =
                format!("the standby is gone, the guest is the primary's alone{heard}: {text}");
            (Exit::Other, how)
        }
        End::Failed(text) => (Exit::Lost, text),
    };
    let Parts {
        mut standby,
        mut events,
        control,
        ..
    } = parts;
    standby.end();
    events.ended(&how, exit as u8);
    control.end(&how, exit as u8);
    Ok(exit)
}

impl Driver {
    fn turn(&mut self) -> anyhow::Result<()> {
        let patience = clock::until(clock::now(), self.next_timeout());
        let mut poller = Poller::new();
        poller.watch(Source::Listener, self.parts.listener.ready_fd());
        for (id, connection) in &self.links {
            if !connection.broken {
                poller.watch(Source::Link(*id), connection.link.ready_fd());
            }
            if let Some(proof) = &connection.proof {
                poller.watch(Source::Proof(*id), proof.fd());
            }
        }
        for fd in self.parts.standby.fds() {
            poller.watch(Source::Standby, fd);
        }
        for fd in self.rehearsal.iter().flat_map(Rehearsal::fds) {
            poller.watch(Source::Rehearsal, fd);
        }
        poller.watch(Source::Worker, self.parts.worker.fd());
        poller.watch(Source::Nursery, self.parts.nursery.fd());
        poller.watch(Source::Signal, self.parts.signals.fd());
        for fd in self.parts.control.fds() {
            poller.watch(Source::Control, fd);
        }
        for source in poller
            .wait(patience, &mut self.spin)
            .context("waiting for events failed")?
        {
            self.on_ready(source);
            self.drain();
        }
        self.on_time(clock::now());
        self.drain();
        Ok(())
    }
}

impl Driver {
    fn next_timeout(&self) -> Option<Micros> {
        [
            self.parts.machine.poll_timeout(),
            self.parts.standby.next_timeout(),
            self.rehearsal.as_ref().map(Rehearsal::next_timeout),
            self.parts.events.next_timeout(),
            self.parts.listener.next_deadline().map(clock::from_instant),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn on_time(&mut self, now: Micros) {
        if self
            .parts
            .machine
            .poll_timeout()
            .is_some_and(|at| at <= now)
        {
            self.parts.machine.handle_timeout(now);
        }
        self.parts.standby.on_time(now);
        self.parts.events.on_time(now);
        if self
            .parts
            .listener
            .next_deadline()
            .is_some_and(|at| clock::from_instant(at) <= now)
        {
            self.on_listener();
        }
        let result = self.rehearsal.as_ref().and_then(|r| r.on_time(now));
        self.end_rehearsal(result);
    }

    fn on_ready(&mut self, source: Source) {
        match source {
            Source::Listener => self.on_listener(),
            Source::Link(id) => self.on_link(id),
            Source::Proof(id) => self.on_proof(id),
            Source::Standby => self.on_standby(),
            Source::Rehearsal => {
                let result = self.rehearsal.as_mut().and_then(Rehearsal::progress);
                self.end_rehearsal(result);
            }
            Source::Worker => self.on_worker(),
            Source::Nursery => self.on_born(),
            Source::Control => self.on_control(),
            Source::Signal => {
                while let Some(signal) = self.parts.signals.take() {
                    self.on_signal(signal);
                }
            }
        }
    }

    fn input(&mut self, input: Input<'_>) {
        self.parts.machine.handle(clock::now(), input);
    }

    fn on_signal(&mut self, signal: Signal) {
        let state = self.parts.machine.status().state;
        match state {
            State::Active => {
                tracing::info!("{signal}: powering the guest down");
                self.parts.standby.power_down();
            }
            State::Activating => {
                tracing::info!("{signal}: the guest is being activated; again, please")
            }
            _ => {
                tracing::info!("{signal}: standing down");
                self.input(Input::Command(Command::StandDown));
            }
        }
    }

    fn on_listener(&mut self) {
        let mut links = Vec::new();
        let events = &mut self.parts.events;
        let result = self
            .parts
            .listener
            .progress(&mut |incoming| match incoming {
                Incoming::Link(connected) => links.push(connected),
                Incoming::Refused { peer, reason } => {
                    events.backup(&Report::Refused {
                        text: format!("connection from {peer}: {reason}"),
                    });
                }
            });
        if let Err(error) = result {
            self.parts.events.error(&format!("listening: {error}"));
        }
        for Connected { link, sentence, .. } in links {
            tracing::debug!("{sentence}");
            let id = LinkId(self.next_link);
            self.next_link += 1;
            let proof = link
                .proof_fd()
                .map(ProofLane::new)
                .transpose()
                .ok()
                .flatten();
            let connection = Connection {
                link,
                proof,
                broken: false,
            };
            self.links.insert(id, connection);
            self.input(Input::LinkUp(id));
            self.drain();
        }
    }

    fn on_link(&mut self, id: LinkId) {
        let Some(connection) = self.links.get_mut(&id) else {
            return;
        };
        let Driver {
            parts,
            chunks,
            next_chunk,
            current,
            ..
        } = self;
        let machine = &mut parts.machine;
        let is_current = *current == Some(id);
        let mut lost = None;
        let mut heard = false;
        let result = connection.link.progress(&mut |event| match event {
            Event::Message(bytes) => {
                heard = true;
                machine.handle(clock::now(), Input::Message(id, bytes));
            }
            Event::Arrived { chunk, tag } if is_current => {
                let number = ChunkId(*next_chunk);
                *next_chunk = next_chunk.wrapping_add(1);
                chunks.insert(number, Arc::new(chunk));
                let tag = ChunkTag::unpack(tag);
                machine.handle(clock::now(), Input::Arrived { chunk: number, tag });
            }
            // Of a link that is not the session's, or memory that comes back.
            Event::Arrived { .. } | Event::Revoked(_) | Event::Pushed(_) => {}
            // The driver reads the proof lane itself.
            Event::Lost(loss) if loss.lane == Lane::Proof => {}
            Event::Lost(loss) => lost = Some(describe(&loss.kind)),
        });
        if let Err(error) = result {
            lost = Some(error.to_string());
        }
        if heard && is_current {
            self.parts.standby.drop_old_proofs();
        }
        if let Some(text) = lost {
            self.break_link(id, text);
        }
    }

    fn break_link(&mut self, id: LinkId, text: String) {
        if let Some(connection) = self.links.get_mut(&id) {
            connection.broken = true;
            if self.current != Some(id) {
                self.links.remove(&id);
            }
        }
        self.input(Input::LinkDown(id, LinkDown::Broken(text)));
    }

    fn on_proof(&mut self, id: LinkId) {
        let Some(connection) = self.links.get_mut(&id) else {
            return;
        };
        let proof = connection
            .proof
            .as_ref()
            .map_or(Proof::Silent, ProofLane::read);
        if proof == Proof::Silent {
            return;
        }
        connection.proof = None;
        match proof {
            Proof::Dead => self.input(Input::LinkDown(id, LinkDown::PeerDead)),
            Proof::Broken(text) => self.break_link(id, text),
            Proof::Silent => {}
        }
    }

    fn on_standby(&mut self) {
        let mut inputs = Vec::new();
        self.parts.standby.progress(&mut inputs);
        for input in inputs {
            self.input(match input {
                StandbyInput::Activated => Input::Activated,
                StandbyInput::ActivationFailed(text) => Input::ActivationFailed { text },
                StandbyInput::Gone { clean, text } => Input::StandbyGone { clean, text },
            });
        }
    }

    fn on_worker(&mut self) {
        while let Some(done) = self.parts.worker.take() {
            let input = match done {
                Done::Checked { id, result } => Input::Checked { chunk: id, result },
                Done::SyncApplied(id) => Input::SyncApplied(id),
                Done::Applied {
                    epoch,
                    audit,
                    device_state,
                } => {
                    self.device_state = device_state;
                    self.parts.arena.shrink(KEEP_FREE_CHUNKS);
                    Input::Applied { epoch, audit }
                }
                Done::ApplyFailed(text) => Input::ApplyFailed { text },
                Done::Adopted(Ok(())) => {
                    self.activate();
                    continue;
                }
                Done::Adopted(Err(text)) => Input::ActivationFailed { text },
                Done::Poked(result) => {
                    self.load_rehearsal(result);
                    continue;
                }
            };
            self.input(input);
            self.drain();
        }
    }

    fn on_control(&mut self) {
        let status = self.parts.machine.status();
        let mut commands = Vec::new();
        self.parts.control.progress(&mut |request| {
            let command = match request {
                Request::Status => return self.parts.facts.backup(&status, clock::now()),
                Request::Detach => Command::StandDown,
                Request::Rehearse => Command::Rehearse,
                Request::Switchover | Request::Continue => {
                    return serde_json::json!({"error": "this is for the primary: ask its daemon"});
                }
            };
            commands.push(command);
            serde_json::json!({"accepted": true})
        });
        for command in commands {
            self.input(Input::Command(command));
        }
    }

    /// Carries out what the machine wants, until it wants nothing more.
    fn drain(&mut self) {
        while let Some(action) = self.parts.machine.poll_action() {
            self.carry_out(action);
        }
        let flush = |(id, c): (&LinkId, &mut Connection)| {
            let failed = (!c.broken).then(|| c.link.flush()).and_then(Result::err);
            failed.map(|error| (*id, error.to_string()))
        };
        let failed: Vec<_> = self.links.iter_mut().filter_map(flush).collect();
        for (id, text) in failed {
            self.break_link(id, text);
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Send(id, message) => self.send(id, &message),
            Action::CloseLink(id) => {
                if let Some(mut connection) = self.links.remove(&id) {
                    // A refusal may be queued.
                    let _ = connection.link.flush();
                }
            }
            Action::UseLink(id) => {
                // Links that are broken were kept for their proof: this one has its own.
                self.links
                    .retain(|other, connection| *other == id || !connection.broken);
                self.current = Some(id);
                if let Some(lane) = self.links.get(&id).and_then(|c| c.link.proof_fd()) {
                    self.parts.standby.hold_proof(lane);
                }
            }
            Action::Grant { slot, count } => self.grant(slot, count),
            Action::Revoke(slot) => {
                if let Some(connection) = self.current.and_then(|id| self.links.get_mut(&id))
                    && let Err(error) = connection.link.revoke(slot.0)
                {
                    tracing::warn!("revoking grants failed: {error}");
                }
                // On every link a grant is good for one chunk: what has arrived can't be written
                // any more.
                self.input(Input::Revoked(slot));
            }
            Action::Check { chunk, frame } => {
                self.with_chunk(chunk, |id, chunk| Job::Check { id, chunk, frame })
            }
            Action::ApplySync(chunk) => {
                self.with_chunk(chunk, |id, chunk| Job::ApplySync { id, chunk });
                self.chunks.remove(&chunk);
            }
            Action::Apply {
                epoch,
                chunks,
                audit,
            } => {
                let chunks = chunks
                    .iter()
                    .filter_map(|id| self.chunks.remove(id))
                    .collect();
                self.parts.worker.submit(Job::Apply {
                    epoch,
                    chunks,
                    audit,
                });
            }
            Action::Free(chunks) => {
                for chunk in chunks {
                    self.chunks.remove(&chunk);
                }
            }
            Action::StoreTerm { term, activated } => {
                let state = state_store::State {
                    term,
                    protected: false,
                    activated,
                };
                if let Err(error) = self.parts.store.store(state) {
                    self.parts.events.error(&format!("{error:#}"));
                }
                self.input(Input::TermStored);
            }
            Action::Activate { run_state, .. } => {
                self.run_state = run_state;
                self.activate();
            }
            Action::RespawnAndActivate { run_state, .. } => {
                self.run_state = run_state;
                // It may live on, refusing the state, with ports and taps that the next one needs.
                self.parts.standby.kill();
                self.parts.nursery.submit(Wish::Standby);
            }
            Action::ForgetImage => self.device_state.clear(),
            Action::PrepareRehearsal => self.parts.nursery.submit(Wish::Rehearsal),
            Action::Rehearse { run_state, .. } => self.rehearse(run_state),
            Action::CancelRehearsal => {
                if let Some(rehearsal) = self.rehearsal.take() {
                    rehearsal.end();
                }
            }
            Action::Guardian { armed } => {
                if let Err(error) = self.parts.guard.set(armed) {
                    self.parts.events.error(&format!("guardian: {error:#}"));
                }
            }
            Action::EndStandby => self.parts.standby.end(),
            Action::Report(report) => {
                if let Report::Rehearsed { ok, text } = &report {
                    self.parts.facts.rehearsed(*ok, text);
                }
                self.parts.events.backup(&report);
            }
            Action::Finish(end) => self.end = Some(end),
        }
    }

    fn send(&mut self, id: LinkId, message: &[u8]) {
        let Some(connection) = self.links.get_mut(&id).filter(|c| !c.broken) else {
            return;
        };
        if let Err(error) = connection.link.send(message) {
            let text = error.to_string();
            self.break_link(id, text);
        }
    }

    fn grant(&mut self, slot: SlotId, count: u32) {
        let Some(connection) = self.current.and_then(|id| self.links.get_mut(&id)) else {
            return;
        };
        let mut grants = Vec::new();
        for _ in 0..count {
            let Some(chunk) = self.parts.arena.alloc() else {
                break;
            };
            match connection.link.grant(chunk, slot.0) {
                Ok(grant) => grants.push(GrantToken(grant.0)),
                Err(error) => {
                    tracing::warn!("granting a chunk failed: {error}");
                    break;
                }
            }
        }
        self.input(Input::Granted { slot, grants });
    }

    fn with_chunk(&mut self, id: ChunkId, job: impl FnOnce(ChunkId, Arc<Chunk>) -> Job) {
        if let Some(chunk) = self.chunks.get(&id) {
            self.parts.worker.submit(job(id, Arc::clone(chunk)));
        }
    }

    fn activate(&mut self) {
        let activated = self
            .parts
            .standby
            .activate(&self.device_state, self.run_state);
        if let Err(error) = activated {
            self.input(Input::ActivationFailed {
                text: format!("{error:#}"),
            });
        }
    }

    /// What the nursery has made.
    fn on_born(&mut self) {
        while let Some(born) = self.parts.nursery.take() {
            match born {
                Newborn::Standby(Ok((standby, blocks))) => {
                    self.parts.worker.submit(Job::Adopt {
                        pid: standby.pid(),
                        blocks,
                    });
                    self.parts.standby = standby;
                }
                Newborn::Standby(Err(text)) => self.input(Input::ActivationFailed { text }),
                Newborn::Rehearsal(Ok((qemu, blocks))) => {
                    self.rehearsal = Some(Rehearsal::new(qemu, blocks));
                    self.input(Input::RehearsalReady);
                    // A failover may have come in between.
                    if matches!(
                        self.parts.machine.status().state,
                        State::Activating | State::Active
                    ) && let Some(rehearsal) = self.rehearsal.take()
                    {
                        rehearsal.end();
                    }
                }
                Newborn::Rehearsal(Err(text)) => self.input(Input::Rehearsed { ok: false, text }),
            }
            self.drain();
        }
    }

    fn rehearse(&mut self, run_state: RunState) {
        let Some(rehearsal) = &mut self.rehearsal else {
            return;
        };
        rehearsal.expect(run_state);
        if let Some(blocks) = rehearsal.blocks.take() {
            self.parts.worker.submit(Job::Poke {
                pid: rehearsal.pid(),
                blocks,
            });
        }
    }

    fn load_rehearsal(&mut self, poked: Result<(), String>) {
        let Some(rehearsal) = &mut self.rehearsal else {
            return;
        };
        let result = poked.and_then(|()| rehearsal.load(&self.device_state));
        if result.is_err() {
            self.end_rehearsal(Some(result));
        }
    }

    fn end_rehearsal(&mut self, result: Option<Result<(), String>>) {
        let Some(result) = result else { return };
        if let Some(rehearsal) = self.rehearsal.take() {
            rehearsal.end();
        }
        let ok = result.is_ok();
        let text = result
            .err()
            .unwrap_or_else(|| "the standby loads and runs".to_owned());
        self.input(Input::Rehearsed { ok, text });
    }
}

fn describe(kind: &LossKind) -> String {
    match kind {
        LossKind::Fin => "the primary closed the connection".to_owned(),
        LossKind::Error(text) | LossKind::Protocol(text) => text.clone(),
    }
}
