//! The primary's host: daemon, QEMU and what the driver does between them.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use ft_core::primary::{Action, GateState, Input, LinkDown, Primary, QemuEvent, Step};
use ft_core::wire::{ChunkTag, Frame};
use ft_core::{Epoch, GrantToken};

use crate::clock::Clock;
use crate::faults::Moment;
use crate::image::Chunk;
use crate::net::{Delivery, Item, Lane, Side};
use crate::tracking::{Done, Job, Tracking};
use crate::vm::{Qmp, QmpOut, Vm};
use crate::world::{Event, Phase, World};

/// When QEMU has not stopped by then, the driver freezes its process.
const FENCE_PATIENCE_US: u64 = 40_000;
/// Sources that a real driver polls: control, bulk, proof, QMP, worker and operator.
pub const SOURCES: usize = 6;

#[derive(Debug)]
pub enum PrimaryIn {
    Up(u32),
    Lost { link: u32, lane: Lane, fin: bool },
    NotConnected(String),
    Message(u32, Vec<u8>),
    Pushed(u32, u32),
    Qmp(QmpOut),
    QemuGone,
    Work(Done),
    Other(Input<'static>),
}

#[derive(Debug)]
pub struct PrimaryHost {
    pub up: bool,
    pub clock: Clock,
    pub daemon: Option<PrimaryDaemon>,
    /// Counts the daemons of this host.
    pub number: u32,
    pub vm: Option<Vm>,
    pub guardian: bool,
    pub phase: Phase,
    /// What QEMU has said and the daemon has not read.
    pub said: VecDeque<QmpOut>,
    pub monitor_busy: bool,
    /// The next command of the boundary fails.
    pub qmp_fails: bool,
    /// Inputs are being handled: more of them wait their turn.
    handling: bool,
    pub end: Option<ft_core::primary::End>,
}

#[derive(Debug)]
pub struct PrimaryDaemon {
    pub machine: Primary,
    pub stopped: bool,
    pub last_continued: u64,
    inbox: [VecDeque<PrimaryIn>; SOURCES],
    pub wake_at: Option<u64>,
    pub link: Option<u32>,
    connecting: bool,
    /// Proof lanes of links, oldest first.
    pub proofs: Vec<Proof>,
    chunks: BTreeMap<u32, Rc<Chunk>>,
    pub worker: Tracking,
    worker_busy: bool,
    pub fence_unanswered: bool,
    pub frame: Frame,
    /// The epoch whose release has not returned.
    releasing: Option<Epoch>,
}

#[derive(Clone, Copy, Debug)]
pub struct Proof {
    pub link: u32,
    /// Both sides go by it: it is watched.
    agreed: bool,
    /// How it ended, while nobody looked; true for a FIN.
    ended: Option<bool>,
}

impl PrimaryHost {
    pub fn new(clock: Clock, machine: Primary, vm: Vm, frame: Frame) -> PrimaryHost {
        PrimaryHost {
            up: true,
            clock,
            number: 1,
            daemon: Some(PrimaryDaemon {
                machine,
                stopped: false,
                last_continued: 0,
                inbox: Default::default(),
                wake_at: None,
                link: None,
                connecting: false,
                proofs: Vec::new(),
                chunks: BTreeMap::new(),
                worker: Tracking::default(),
                worker_busy: false,
                fence_unanswered: false,
                frame,
                releasing: None,
            }),
            vm: Some(vm),
            guardian: false,
            phase: Phase::Connecting,
            said: VecDeque::new(),
            monitor_busy: false,
            qmp_fails: false,
            handling: false,
            end: None,
        }
    }
}

impl World {
    /// Something has come in for the primary's daemon; it waits while the daemon is stopped.
    pub fn to_primary(&mut self, source: usize, input: PrimaryIn) {
        if let Some(daemon) = &mut self.primary.daemon {
            daemon.inbox[source].push_back(input);
            self.run_primary();
        }
    }

    /// The driver's loop: inputs first, then timers.
    pub fn run_primary(&mut self) {
        if std::mem::replace(&mut self.primary.handling, true) {
            return;
        }
        let mut spins = 0;
        self.drain_primary();
        while let Some(daemon) = self.primary.daemon.as_mut().filter(|d| !d.stopped) {
            let full: Vec<usize> = (0..SOURCES)
                .filter(|&s| !daemon.inbox[s].is_empty())
                .collect();
            if !full.is_empty() {
                let source = self.rng.pick(&full);
                let input = daemon.inbox[source].pop_front();
                self.primary_input(input);
            } else {
                let now = self.primary.clock.local(self.now);
                if daemon.machine.poll_timeout().is_none_or(|at| at > now) {
                    break;
                }
                spins += 1;
                if spins > 20 {
                    self.violation("the primary's timer does not advance");
                    break;
                }
                daemon.machine.handle_timeout(now);
            }
            self.drain_primary();
        }
        self.primary.handling = false;
        self.schedule_primary();
    }

    fn schedule_primary(&mut self) {
        let clock = self.primary.clock;
        let Some(daemon) = self.primary.daemon.as_mut().filter(|d| !d.stopped) else {
            return;
        };
        let Some(at) = daemon.machine.poll_timeout() else {
            return;
        };
        let at = clock.when(at).max(self.now + 1);
        if daemon
            .wake_at
            .is_none_or(|wake| at < wake || wake <= self.now)
        {
            daemon.wake_at = Some(at);
            self.at(at, Event::WakePrimary(at));
        }
    }

    fn primary_input(&mut self, input: Option<PrimaryIn>) {
        let now = self.primary.clock.local(self.now);
        let (Some(daemon), Some(input)) = (&mut self.primary.daemon, input) else {
            return;
        };
        if self.trace {
            println!("{:>10} P <- {input:?}", self.now);
        }
        let broken = |text: &str| Input::LinkDown(LinkDown::Broken(text.to_owned()));
        let input = match input {
            PrimaryIn::Up(link) => {
                if !std::mem::take(&mut daemon.connecting) {
                    return; // given up meanwhile
                }
                daemon.link = Some(link);
                daemon.proofs.push(Proof {
                    link,
                    agreed: false,
                    ended: None,
                });
                if let Some(vm) = &mut self.primary.vm {
                    vm.proofs.push(link);
                }
                Input::LinkUp
            }
            PrimaryIn::NotConnected(text) => {
                if !std::mem::take(&mut daemon.connecting) {
                    return;
                }
                broken(&text)
            }
            PrimaryIn::Message(link, bytes) => {
                if daemon.link == Some(link) {
                    daemon.machine.handle(now, Input::Message(&bytes));
                }
                return;
            }
            PrimaryIn::Lost {
                link,
                lane: Lane::Proof,
                fin,
            } => {
                let Some(proof) = daemon.proofs.iter_mut().find(|p| p.link == link) else {
                    return;
                };
                proof.ended = Some(fin);
                if !proof.agreed {
                    return; // not read before the hello is answered
                }
                daemon.proofs.retain(|p| p.link != link);
                Input::LinkDown(if fin {
                    LinkDown::PeerDead
                } else {
                    LinkDown::Broken("the proof lane ended".to_owned())
                })
            }
            PrimaryIn::Lost { link, .. } => {
                if daemon.link != Some(link) {
                    return;
                }
                broken("the connection ended")
            }
            PrimaryIn::Pushed(link, index) => {
                if daemon.link != Some(link) {
                    return;
                }
                Input::ChunkPushed { index }
            }
            PrimaryIn::Qmp(out) => match self.qmp_input(out) {
                Some(input) => input,
                None => return,
            },
            PrimaryIn::QemuGone => Input::Qemu(QemuEvent::Gone("killed".to_owned())),
            PrimaryIn::Work(done) => match done {
                Done::AllArmed => Input::AllArmed,
                Done::RoundStarted { pages } => Input::RoundStarted { pages },
                Done::RoundFilled { done } => Input::RoundFilled { done },
                Done::Precopied => Input::Precopied,
                Done::Harvested(harvest) => Input::Harvested(harvest),
                Done::Failed { step, text } => Input::StepFailed { step, text },
                Done::Chunk(chunk) => {
                    let (index, last) = (chunk.index, chunk.end.is_some());
                    let bytes = 4096 * (1 + chunk.pages.len() as u64);
                    daemon.chunks.insert(index, Rc::new(chunk));
                    Input::ChunkReady { index, last, bytes }
                }
            },
            PrimaryIn::Other(input) => input,
        };
        if let Some(daemon) = &mut self.primary.daemon {
            daemon.machine.handle(now, input);
        }
    }

    fn qmp_input(&mut self, out: QmpOut) -> Option<Input<'static>> {
        let daemon = self.primary.daemon.as_mut()?;
        let text = || "the simulator says so".to_owned();
        Some(match out {
            QmpOut::StopEvent => Input::Qemu(QemuEvent::Stopped),
            QmpOut::ResumeEvent => Input::Qemu(QemuEvent::Resumed),
            QmpOut::ShutdownEvent => Input::Qemu(QemuEvent::Shutdown),
            QmpOut::Done(Qmp::Stop) => Input::Paused,
            QmpOut::Done(Qmp::Save) => Input::Saved { bytes: 4000 },
            QmpOut::Done(Qmp::MoveGate | Qmp::CloseGate) => Input::GateMoved,
            QmpOut::Done(Qmp::Cont) => Input::Resumed,
            QmpOut::Done(Qmp::Release(epoch)) => {
                daemon.releasing = None;
                self.primary.phase = Phase::Idle;
                Input::Released(epoch)
            }
            QmpOut::Done(Qmp::FenceStop) => {
                daemon.fence_unanswered = false;
                return None;
            }
            QmpOut::Done(Qmp::OpenGate) | QmpOut::Failed(Qmp::OpenGate | Qmp::FenceStop) => {
                return None;
            }
            QmpOut::Failed(Qmp::Stop) => Input::StepFailed {
                step: Step::Pause,
                text: text(),
            },
            QmpOut::Failed(Qmp::Save) => Input::StepFailed {
                step: Step::Save,
                text: text(),
            },
            QmpOut::Failed(Qmp::MoveGate | Qmp::CloseGate | Qmp::Release(_)) => Input::StepFailed {
                step: Step::Gate,
                text: text(),
            },
            QmpOut::Failed(Qmp::Cont) => Input::StepFailed {
                step: Step::Resume,
                text: text(),
            },
        })
    }

    fn drain_primary(&mut self) {
        let mut actions = 0;
        while let Some(daemon) = self.primary.daemon.as_mut().filter(|d| !d.stopped) {
            let Some(action) = daemon.machine.poll_action() else {
                break;
            };
            actions += 1;
            if actions > 400 {
                return self.violation("the primary wants more than 400 things at once");
            }
            if self.trace {
                println!(
                    "{:>10} P -> {}",
                    self.now,
                    crate::trace::primary_action(&action)
                );
            }
            let moment = Moment::of_primary(&action);
            self.carry_out_primary(action);
            self.fault_moment(moment);
        }
    }

    fn carry_out_primary(&mut self, action: Action) {
        let Some(daemon) = &mut self.primary.daemon else {
            return;
        };
        let term = daemon.machine.status().term;
        match action {
            Action::Connect => {
                daemon.connecting = true;
                self.connect();
            }
            Action::CloseLink => {
                daemon.connecting = false;
                daemon.chunks.clear();
                if let Some(link) = daemon.link.take() {
                    self.close_lanes(link, Side::Primary);
                }
                self.primary.phase = Phase::Connecting;
            }
            Action::KeepProof => self.keep_primary_proof(),
            Action::DropProof => {
                if let Some(refused) = daemon.proofs.pop_if(|proof| !proof.agreed) {
                    if let Some(vm) = &mut self.primary.vm {
                        vm.proofs.retain(|link| *link != refused.link);
                    }
                    self.close_proof(refused.link, Side::Primary);
                }
            }
            Action::Send(bytes) => {
                if let Some(link) = daemon.link {
                    self.checks.replays.push(bytes.clone());
                    self.send(link, Lane::Control, Side::Backup, Item::Message(bytes));
                }
            }
            Action::PauseVm => self.qmp(Qmp::Stop),
            Action::PauseAndSave => {
                if let Some(unreleased) = daemon.releasing {
                    let text = format!("a boundary before the release of {unreleased} returned");
                    return self.violation(text);
                }
                self.primary.phase = Phase::Boundary;
                self.qmp(Qmp::Stop);
                self.qmp(Qmp::Save);
            }
            Action::Precopy { .. } => self.work(Job::Precopy),
            Action::Harvest { epoch, kind, audit } => {
                let frame = Frame {
                    epoch,
                    term,
                    ..daemon.frame
                };
                self.work(Job::Harvest { frame, kind, audit });
            }
            Action::Seal {
                base, run_state, ..
            } => {
                self.primary.phase = Phase::Push;
                self.work(Job::Seal { base, run_state });
            }
            Action::MoveGate => self.qmp(Qmp::MoveGate),
            Action::ResumeVm => {
                daemon.fence_unanswered = false;
                if let Some(vm) = &mut self.primary.vm {
                    vm.frozen = false;
                }
                self.qmp(Qmp::Cont);
            }
            Action::Release(epoch) => {
                self.primary.phase = Phase::Release;
                daemon.releasing = Some(epoch);
                self.qmp(Qmp::Release(epoch));
            }
            Action::Gate(GateState::Closed) => self.qmp(Qmp::CloseGate),
            Action::Gate(GateState::Open) => {
                self.check_gate_may_open();
                self.qmp(Qmp::OpenGate);
            }
            Action::ArmAll => {
                self.primary.phase = Phase::Syncing;
                self.work(Job::ArmAll);
            }
            Action::StartRound { all } => self.work(Job::StartRound { all }),
            Action::FillRound {
                first_index,
                chunks,
            } => {
                let frame = Frame {
                    epoch: Epoch::NONE,
                    term,
                    ..daemon.frame
                };
                self.work(Job::FillRound {
                    frame,
                    first_index,
                    chunks,
                });
            }
            Action::Push { index, to, tag } => self.push(index, to, tag),
            Action::DropDirt => {
                daemon.chunks.clear();
                self.work(Job::DropDirt);
            }
            Action::MergeDirt => {
                daemon.chunks.clear();
                self.work(Job::MergeDirt);
            }
            Action::Guardian { armed } => self.primary.guardian = armed,
            Action::StoreTerm { term, .. } => self.terms[0] = term,
            Action::FenceVm => {
                daemon.fence_unanswered = true;
                self.primary.phase = Phase::Fenced;
                self.qmp(Qmp::FenceStop);
                let number = self.primary.number;
                self.after(FENCE_PATIENCE_US, Event::FenceDue(number));
            }
            Action::ThawVm => {
                daemon.fence_unanswered = false;
                if let Some(vm) = &mut self.primary.vm {
                    vm.frozen = false;
                }
            }
            Action::EndVm => self.kill_primary_vm(),
            Action::LeaveVm => {
                if let Some(vm) = &mut self.primary.vm {
                    vm.proofs.clear();
                    vm.queue.clear();
                }
                self.check_gate_may_open();
                self.qmp(Qmp::OpenGate);
            }
            Action::Report(report) => self.primary_report(&report),
            Action::Finish(end) => {
                self.primary.end = Some(end);
                self.primary.guardian = false;
                self.kill_primary_daemon();
            }
        }
    }

    fn push(&mut self, index: u32, to: GrantToken, tag: ChunkTag) {
        let Some(daemon) = &mut self.primary.daemon else {
            return;
        };
        let (Some(link), Some(mut chunk)) = (daemon.link, daemon.chunks.remove(&index)) else {
            return;
        };
        let last = chunk.end.is_some();
        if std::mem::take(&mut self.corrupt_next_chunk) {
            chunk = Rc::new(Chunk {
                corrupt: true,
                ..(*chunk).clone()
            });
        }
        let (granted_on, serial) = crate::backup_host::read_token(to);
        if granted_on != link {
            return self.violation("a grant of another link was used");
        }
        self.send(
            link,
            Lane::Bulk,
            Side::Backup,
            Item::Chunk { chunk, serial, tag },
        );
        let wait = self.net.delay(&mut self.rng);
        self.after(wait, Event::Pushed(link, index));
        if last {
            self.primary.phase = Phase::BeforeAck;
        }
    }

    fn keep_primary_proof(&mut self) {
        let Some(daemon) = &mut self.primary.daemon else {
            return;
        };
        let Some(newest) = daemon.proofs.pop() else {
            return;
        };
        let kept = Proof {
            agreed: true,
            ended: None,
            ..newest
        };
        let old = std::mem::replace(&mut daemon.proofs, vec![kept]);
        if let Some(vm) = &mut self.primary.vm {
            vm.proofs.retain(|link| *link == newest.link);
        }
        for proof in old {
            self.close_proof(proof.link, Side::Primary);
        }
        if let Some(fin) = newest.ended {
            self.to_primary(
                2,
                PrimaryIn::Lost {
                    link: newest.link,
                    lane: Lane::Proof,
                    fin,
                },
            );
        }
    }

    fn work(&mut self, job: Job) {
        let Some(daemon) = &mut self.primary.daemon else {
            return;
        };
        daemon.worker.submit(job);
        if daemon.worker.queued() > 16 {
            return self.violation("more than 16 jobs wait for the primary's worker");
        }
        self.schedule_worker();
    }

    pub fn schedule_worker(&mut self) {
        let takes = self.duration(self.params.worker_us);
        let number = self.primary.number;
        let Some(daemon) = &mut self.primary.daemon else {
            return;
        };
        if !daemon.worker.idle() && !std::mem::replace(&mut daemon.worker_busy, true) {
            self.after(takes, Event::PrimaryWorker(number));
        }
    }

    pub fn on_primary_worker(&mut self, number: u32) {
        if self.primary.number != number {
            return;
        }
        let Some(daemon) = &mut self.primary.daemon else {
            return;
        };
        if daemon.stopped {
            return self.after(500, Event::PrimaryWorker(number));
        }
        daemon.worker_busy = false;
        let Some(vm) = &mut self.primary.vm else {
            return;
        };
        let done = daemon.worker.step(vm);
        if let Some(Done::Chunk(Chunk {
            frame,
            end: Some((device, trailer)),
            ..
        })) = &done
        {
            let saved = vm.saved.clone();
            self.checks
                .note_boundary(*frame, saved, *device, trailer.run_state);
        }
        self.schedule_worker();
        if let Some(done) = done {
            self.to_primary(4, PrimaryIn::Work(done));
        }
    }

    /// A link is being made, or refused.
    fn connect(&mut self) {
        let backup = self.backup.number;
        let owners = [self.primary.number, backup];
        let wait = 2 * self.net.delay(&mut self.rng);
        let outcome = if self.net.is_cut() || !self.backup.up {
            self.after(1_000_000, Event::NotConnected);
            return;
        } else if self.backup.daemon.is_none() {
            Event::NotConnected
        } else {
            Event::Connected(self.net.connect(owners))
        };
        self.after(wait, outcome);
    }

    pub fn on_connected(&mut self, link: u32) {
        let owners = [self.primary.number, self.backup.number];
        let same = self.net.owner(link, Side::Primary) == Some(owners[0])
            && self.net.owner(link, Side::Backup) == Some(owners[1]);
        let wanted = self.primary.daemon.as_ref().is_some_and(|d| d.connecting);
        if !same || !wanted || self.backup.daemon.is_none() || !self.backup.up {
            return self.to_primary(
                0,
                PrimaryIn::NotConnected("reset while connecting".to_owned()),
            );
        }
        self.backup_link_up(link);
        self.to_primary(0, PrimaryIn::Up(link));
    }

    pub fn deliver_to_primary(&mut self, delivery: Delivery, item: Item) {
        let Delivery { link, lane, .. } = delivery;
        if !self.primary.up {
            return;
        }
        if self.primary.daemon.is_none()
            || self.net.owner(link, Side::Primary) != Some(self.primary.number)
        {
            return self.refuse_item(delivery, &item);
        }
        let source = lane as usize;
        match item {
            Item::Message(bytes) => self.to_primary(source, PrimaryIn::Message(link, bytes)),
            Item::Fin => self.to_primary(
                source,
                PrimaryIn::Lost {
                    link,
                    lane,
                    fin: true,
                },
            ),
            Item::Reset => self.to_primary(
                source,
                PrimaryIn::Lost {
                    link,
                    lane,
                    fin: false,
                },
            ),
            Item::Chunk { .. } => self.violation("the backup pushed a chunk"),
        }
    }

    pub fn kill_primary_vm(&mut self) {
        let Some(vm) = self.primary.vm.take() else {
            return;
        };
        self.primary.said.clear();
        for link in vm.proofs {
            self.close_proof(link, Side::Primary);
        }
        let wait = self.rng.range(100..=3000);
        self.after(wait, Event::PrimaryVmGone);
    }

    pub fn kill_primary_daemon(&mut self) {
        let Some(daemon) = self.primary.daemon.take() else {
            return;
        };
        if self.primary.guardian {
            let wait = self.rng.range(1_000..=30_000);
            self.after(wait, Event::GuardPrimary);
        }
        if let Some(link) = daemon.link {
            self.close_lanes(link, Side::Primary);
        }
        for proof in daemon.proofs {
            self.close_proof(proof.link, Side::Primary);
        }
    }
}
