//! Both machines with drivers that answer at once, on virtual time: after Quinn's `Pair`.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ft_core::backup::{self, Backup, BackupConfig, CheckWhen, LinkId};
use ft_core::image::{CheckedChunk, Trailer};
use ft_core::primary::{self, GateState, OnBackupLoss, Primary, PrimaryConfig, PrimaryVm};
use ft_core::wire::ChunkTag;
use ft_core::{
    ChunkId, Epoch, EpochKind, GrantToken, Micros, RunState, Session, SlotId, Term, VmShape, VmTag,
};

pub(crate) const LEASE: Duration = Duration::from_millis(400);
pub(crate) const MAX_UNACKED: Duration = Duration::from_millis(200);
pub(crate) const EPOCH: Duration = Duration::from_millis(20);

/// A chunk of an epoch, as far as the machines care.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) kind: EpochKind,
    pub(crate) base: Epoch,
    pub(crate) run_state: RunState,
}

pub(crate) struct PrimaryRig {
    pub(crate) machine: Primary,
    /// What the driver has to tell the machine, in order.
    pub(crate) answers: VecDeque<primary::Input<'static>>,
    pub(crate) done: Vec<primary::Action>,
    pub(crate) sent: VecDeque<Vec<u8>>,
    pub(crate) pushed: VecDeque<(GrantToken, ChunkTag, Image)>,
    pub(crate) vm_runs: bool,
    /// The next command of this kind fails.
    pub(crate) fails: Option<primary::Step>,
    /// All of them fail.
    pub(crate) fails_always: Option<primary::Step>,
    /// The next one after a release fails.
    pub(crate) fails_behind_release: Option<primary::Step>,
    /// The worker never ends a seal.
    pub(crate) seal_hangs: bool,
    /// Of every harvest.
    pub(crate) dirty_pages: u64,
    pub(crate) precopied_pages: u64,
    kind: EpochKind,
    image: Option<Image>,
}

pub(crate) struct BackupRig {
    pub(crate) machine: Backup,
    pub(crate) answers: VecDeque<backup::Input<'static>>,
    pub(crate) done: Vec<backup::Action>,
    pub(crate) sent: VecDeque<(LinkId, Vec<u8>)>,
    pub(crate) granted: BTreeMap<[u8; 24], SlotId>,
    pub(crate) images: BTreeMap<ChunkId, (ChunkTag, Image)>,
    pub(crate) audit_differs: bool,
    pub(crate) activation_fails: bool,
    next_token: u64,
    next_chunk: u32,
}

pub(crate) struct Pair {
    pub(crate) now: Micros,
    pub(crate) primary: PrimaryRig,
    pub(crate) backup: BackupRig,
    pub(crate) link: u32,
    pub(crate) connected: bool,
    /// Nothing gets through, and nobody is told.
    pub(crate) cut: bool,
    pub(crate) acks_held: bool,
}

pub(crate) fn primary_config() -> PrimaryConfig {
    PrimaryConfig {
        vm_id: "vm".to_owned(),
        vm: VmTag(1),
        session: Session(7),
        term: Term(1),
        epoch_interval: EPOCH,
        epoch_min: EPOCH / 10,
        epoch_idle: EPOCH,
        heartbeat: Duration::from_millis(50),
        lease: LEASE,
        on_backup_loss: OnBackupLoss::Pause,
        max_unacked: MAX_UNACKED,
        audit_every: 0,
        sync_chunks: 4,
        precopy_pages_min: None,
        release_needs_guest: true,
    }
}

pub(crate) fn backup_config() -> BackupConfig {
    BackupConfig {
        vm_id: "vm".to_owned(),
        vm: VmTag(1),
        term: Term(1),
        shape: VmShape::default(),
        check: CheckWhen::OnArrival,
    }
}

impl PrimaryRig {
    pub(crate) fn new(config: PrimaryConfig, now: Micros) -> PrimaryRig {
        let vm = PrimaryVm {
            shape: VmShape::default(),
            running: true,
        };
        PrimaryRig {
            machine: Primary::new(config, vm, now),
            answers: VecDeque::new(),
            done: Vec::new(),
            sent: VecDeque::new(),
            pushed: VecDeque::new(),
            vm_runs: true,
            fails: None,
            fails_always: None,
            fails_behind_release: None,
            seal_hangs: false,
            dirty_pages: 0,
            precopied_pages: 0,
            kind: EpochKind::Delta,
            image: None,
        }
    }

    /// Carries out what the machine wants; answers go to the queue. Whether there was anything.
    pub(crate) fn drain(&mut self) -> bool {
        use primary::{Action, Input, QemuEvent, Step};
        let mut any = 0;
        while let Some(action) = self.machine.poll_action() {
            any += 1;
            assert!(any < 300, "the machine does not come to rest");
            match &action {
                Action::Send(bytes) => self.sent.push_back(bytes.clone()),
                Action::PauseVm => self.stop(),
                Action::PauseAndSave => {
                    self.stop();
                    if !self.failing(Step::Save) {
                        self.answers.push_back(Input::Saved { bytes: 10 });
                    }
                }
                Action::FenceVm if std::mem::take(&mut self.vm_runs) => {
                    self.answers.push_back(Input::Qemu(QemuEvent::Stopped));
                }
                Action::ResumeVm if self.failing(Step::Resume) => {}
                Action::ResumeVm => {
                    if !std::mem::replace(&mut self.vm_runs, true) {
                        self.answers.push_back(Input::Qemu(QemuEvent::Resumed));
                    }
                    self.answers.push_back(Input::Resumed);
                }
                Action::Precopy { .. } if self.failing(Step::Precopy) => {}
                Action::Precopy { .. } => self.answers.push_back(Input::Precopied),
                Action::Harvest { kind, .. } => {
                    self.kind = *kind;
                    if !self.failing(Step::Harvest) {
                        self.answers.push_back(Input::Harvested(primary::Harvest {
                            dirty_pages: self.dirty_pages,
                            precopied_pages: self.precopied_pages,
                            ..Default::default()
                        }));
                    }
                }
                Action::Seal { .. } if self.seal_hangs || self.failing(Step::Seal) => {}
                Action::Seal {
                    base, run_state, ..
                } => {
                    let (kind, base, run_state) = (self.kind, *base, *run_state);
                    self.image = Some(Image {
                        kind,
                        base,
                        run_state,
                    });
                    let (index, last, bytes) = (0, true, 4096);
                    self.answers
                        .push_back(Input::ChunkReady { index, last, bytes });
                }
                Action::MoveGate | Action::Gate(GateState::Closed) => {
                    self.answers.push_back(Input::GateMoved);
                }
                Action::Release(epoch) => {
                    self.answers.push_back(Input::Released(*epoch));
                    self.fails = self.fails_behind_release.take().or(self.fails);
                }
                Action::ArmAll => self.answers.push_back(Input::AllArmed),
                Action::StartRound { .. } => {
                    self.answers.push_back(Input::RoundStarted { pages: 0 });
                }
                Action::FillRound { .. } => {
                    self.answers.push_back(Input::RoundFilled { done: true })
                }
                Action::Push { index, to, tag } => {
                    if let Some(image) = self.image.clone() {
                        self.pushed.push_back((*to, *tag, image));
                    }
                    self.answers.push_back(Input::ChunkPushed { index: *index });
                }
                Action::CloseLink => self.pushed.clear(),
                Action::EndVm => self.vm_runs = false,
                _ => {}
            }
            self.done.push(action);
        }
        any > 0
    }

    fn stop(&mut self) {
        use primary::{Input, QemuEvent, Step};
        if self.failing(Step::Pause) {
            return;
        }
        if std::mem::take(&mut self.vm_runs) {
            self.answers.push_back(Input::Qemu(QemuEvent::Stopped));
        }
        self.answers.push_back(Input::Paused);
    }

    fn failing(&mut self, step: primary::Step) -> bool {
        let text = "the test says so".to_owned();
        let once = self.fails.take_if(|s| *s == step).is_some();
        let fails = once || self.fails_always == Some(step);
        if fails {
            self.answers
                .push_back(primary::Input::StepFailed { step, text });
        }
        fails
    }

    pub(crate) fn has(&self, wanted: impl Fn(&primary::Action) -> bool) -> bool {
        self.done.iter().any(wanted)
    }

    pub(crate) fn end(&self) -> Option<&primary::End> {
        self.done.iter().find_map(|action| match action {
            primary::Action::Finish(end) => Some(end),
            _ => None,
        })
    }
}

impl BackupRig {
    pub(crate) fn new(config: BackupConfig) -> BackupRig {
        BackupRig {
            machine: Backup::new(config, Micros(0)),
            answers: VecDeque::new(),
            done: Vec::new(),
            sent: VecDeque::new(),
            granted: BTreeMap::new(),
            images: BTreeMap::new(),
            audit_differs: false,
            activation_fails: false,
            next_token: 0,
            next_chunk: 0,
        }
    }

    pub(crate) fn drain(&mut self) -> bool {
        use backup::{Action, Input};
        let mut any = 0;
        while let Some(action) = self.machine.poll_action() {
            any += 1;
            assert!(any < 300, "the machine does not come to rest");
            match &action {
                Action::Send(link, bytes) => self.sent.push_back((*link, bytes.clone())),
                Action::UseLink(_) => self.granted.clear(),
                Action::Grant { slot, count } => {
                    let grants = (0..*count).map(|_| self.token(*slot)).collect();
                    self.answers.push_back(Input::Granted {
                        slot: *slot,
                        grants,
                    });
                }
                Action::Revoke(slot) => {
                    self.granted.retain(|_, of| of != slot);
                    self.answers.push_back(Input::Revoked(*slot));
                }
                Action::Check { chunk, frame: _ } => {
                    let result = self
                        .images
                        .get(chunk)
                        .map(|(tag, image)| checked(*tag, image));
                    let result = result.ok_or("it is gone".to_owned());
                    self.answers.push_back(Input::Checked {
                        chunk: *chunk,
                        result,
                    });
                }
                Action::ApplySync(chunk) => {
                    self.images.remove(chunk);
                    self.answers.push_back(Input::SyncApplied(*chunk));
                }
                Action::Apply {
                    epoch,
                    chunks,
                    audit,
                } => {
                    self.images.retain(|id, _| !chunks.contains(id));
                    let differs = std::mem::take(&mut self.audit_differs);
                    let found = || if differs { vec![0] } else { Vec::new() };
                    let audit = (audit.is_some() || differs).then(found);
                    self.answers.push_back(Input::Applied {
                        epoch: *epoch,
                        audit,
                    });
                }
                Action::Free(chunks) => {
                    self.images.retain(|id, _| !chunks.contains(id));
                }
                Action::StoreTerm {
                    activated: true, ..
                } => {
                    self.answers.push_back(Input::TermStored);
                }
                Action::Activate { .. } | Action::RespawnAndActivate { .. }
                    if std::mem::take(&mut self.activation_fails) =>
                {
                    let text = "the test says so".to_owned();
                    self.answers.push_back(Input::ActivationFailed { text });
                }
                Action::Activate { .. } | Action::RespawnAndActivate { .. } => {
                    self.answers.push_back(Input::Activated);
                }
                Action::PrepareRehearsal => self.answers.push_back(Input::RehearsalReady),
                Action::Rehearse { .. } => {
                    self.answers.push_back(Input::Rehearsed {
                        ok: true,
                        text: String::new(),
                    });
                }
                _ => {}
            }
            self.done.push(action);
        }
        any > 0
    }

    fn token(&mut self, slot: SlotId) -> GrantToken {
        self.next_token += 1;
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.next_token.to_le_bytes());
        self.granted.insert(bytes, slot);
        GrantToken(bytes)
    }

    /// A push arrives, if its grant is still good.
    pub(crate) fn arrive(&mut self, now: Micros, to: GrantToken, tag: ChunkTag, image: Image) {
        if self.granted.remove(&to.0).is_some() {
            let chunk = ChunkId(self.next_chunk);
            self.next_chunk += 1;
            self.images.insert(chunk, (tag, image));
            self.machine
                .handle(now, backup::Input::Arrived { chunk, tag });
        }
    }

    pub(crate) fn has(&self, wanted: impl Fn(&backup::Action) -> bool) -> bool {
        self.done.iter().any(wanted)
    }

    pub(crate) fn activated(&self) -> Option<(Epoch, RunState)> {
        self.done.iter().find_map(|action| match action {
            backup::Action::Activate { epoch, run_state } => Some((*epoch, *run_state)),
            _ => None,
        })
    }
}

fn checked(tag: ChunkTag, image: &Image) -> CheckedChunk {
    CheckedChunk {
        index: tag.index,
        kind: image.kind,
        last: tag.last,
        body_crc: 1,
        data_pages: 0,
        zero_pages: 0,
        device_offset: 0,
        device_bytes: 10,
        trailer: tag.last.then_some(Trailer {
            chunks: 1,
            data_pages: 0,
            zero_pages: 0,
            device_bytes: 10,
            run_state: image.run_state,
            base: image.base,
            digest: 0,
            audit: None,
        }),
    }
}

impl Pair {
    pub(crate) fn new(config: PrimaryConfig) -> Pair {
        Pair {
            now: Micros(0),
            primary: PrimaryRig::new(config, Micros(0)),
            backup: BackupRig::new(backup_config()),
            link: 0,
            connected: false,
            cut: false,
            acks_held: false,
        }
    }

    /// Another daemon on the primary's host, with a guest of its own.
    pub(crate) fn start_primary(&mut self, config: PrimaryConfig) {
        self.lose_link();
        self.primary = PrimaryRig::new(config, self.now);
    }

    /// A pair that has acknowledged epochs.
    pub(crate) fn protected() -> Pair {
        Pair::protected_with(primary_config())
    }

    pub(crate) fn protected_with(config: PrimaryConfig) -> Pair {
        let mut pair = Pair::new(config);
        pair.pass(5 * EPOCH);
        assert_eq!(
            pair.primary.machine.status().state,
            primary::Protection::Protected
        );
        assert_eq!(
            pair.backup.machine.status().state,
            backup::State::Protecting
        );
        pair
    }

    /// Lets time pass, timer by timer.
    pub(crate) fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        self.settle();
        loop {
            let timers = [
                self.primary.machine.poll_timeout(),
                self.backup.machine.poll_timeout(),
            ];
            let Some(next) = timers.into_iter().flatten().min().filter(|at| *at <= until) else {
                break;
            };
            self.now = self.now.max(next);
            if timers[0].is_some_and(|at| at <= self.now) {
                self.primary.machine.handle_timeout(self.now);
            }
            if timers[1].is_some_and(|at| at <= self.now) {
                self.backup.machine.handle_timeout(self.now);
            }
            self.settle();
        }
        self.now = until;
    }

    /// Everything that is under way arrives; no time passes.
    pub(crate) fn settle(&mut self) {
        for _ in 0..100_000 {
            let mut any = self.primary.drain() | self.backup.drain();
            any |= self.step_network();
            if let Some(answer) = self.primary.answers.pop_front() {
                self.primary.machine.handle(self.now, answer);
                any = true;
            } else if let Some(answer) = self.backup.answers.pop_front() {
                self.backup.machine.handle(self.now, answer);
                any = true;
            }
            if !any {
                return;
            }
        }
        panic!("the pair does not come to rest");
    }

    fn step_network(&mut self) -> bool {
        let asked = self
            .primary
            .done
            .iter()
            .rposition(|a| *a == primary::Action::Connect);
        let closed = self
            .primary
            .done
            .iter()
            .rposition(|a| *a == primary::Action::CloseLink);
        let wants = asked.is_some() && asked > closed;
        if self.cut {
            self.primary.sent.clear();
            self.primary.pushed.clear();
            self.backup.sent.clear();
            return false;
        }
        if wants && !self.connected {
            self.connected = true;
            self.link += 1;
            self.primary.sent.clear();
            self.backup
                .machine
                .handle(self.now, backup::Input::LinkUp(LinkId(self.link)));
            self.primary
                .machine
                .handle(self.now, primary::Input::LinkUp);
            return true;
        }
        if let Some(bytes) = self.primary.sent.pop_front() {
            let input = backup::Input::Message(LinkId(self.link), &bytes);
            self.backup.machine.handle(self.now, input);
        } else if let Some((to, tag, image)) = self.primary.pushed.pop_front() {
            self.backup.arrive(self.now, to, tag, image);
        } else if let Some((link, bytes)) = self.backup.sent.pop_front() {
            let ack = ft_core::wire::decode(&bytes)
                .is_ok_and(|(_, message)| message == ft_core::wire::Message::Ack);
            if link.0 == self.link && !(ack && self.acks_held) {
                self.primary
                    .machine
                    .handle(self.now, primary::Input::Message(&bytes));
            }
        } else if self.connected && !wants {
            self.connected = false;
            let down = backup::LinkDown::Broken("closed".to_owned());
            self.backup
                .machine
                .handle(self.now, backup::Input::LinkDown(LinkId(self.link), down));
        } else {
            return false;
        }
        true
    }

    /// Both ends hear that the link is gone; what was under way is lost.
    pub(crate) fn lose_link(&mut self) {
        self.primary.sent.clear();
        self.primary.pushed.clear();
        self.backup.sent.clear();
        self.connected = false;
        let text = || "reset".to_owned();
        let down = backup::LinkDown::Broken(text());
        self.backup
            .machine
            .handle(self.now, backup::Input::LinkDown(LinkId(self.link), down));
        let down = primary::LinkDown::Broken(text());
        self.primary
            .machine
            .handle(self.now, primary::Input::LinkDown(down));
    }

    pub(crate) fn primary_dies(&mut self) {
        self.cut = true;
        let down = backup::LinkDown::PeerDead;
        self.backup
            .machine
            .handle(self.now, backup::Input::LinkDown(LinkId(self.link), down));
        self.settle_backup();
    }

    /// Only the backup goes on.
    pub(crate) fn settle_backup(&mut self) {
        while self.backup.drain() || !self.backup.answers.is_empty() {
            if let Some(answer) = self.backup.answers.pop_front() {
                self.backup.machine.handle(self.now, answer);
            }
        }
    }

    pub(crate) fn forget_actions(&mut self) {
        let connect = self
            .primary
            .done
            .iter()
            .rposition(|a| *a == primary::Action::Connect);
        let connect = connect.map(|place| self.primary.done.split_off(place));
        self.primary.done = connect.unwrap_or_default();
        self.primary.done.retain(|a| *a == primary::Action::Connect);
        self.backup.done.clear();
    }
}
