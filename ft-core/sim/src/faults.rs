//! What goes wrong, and when.

use ft_core::primary::{Command, Input};
use ft_core::{backup, primary};

use crate::backup_host::BackupIn;
use crate::net::{Delivery, Item, LANES, Lane, Side};
use crate::primary_host::PrimaryIn;
use crate::rng::Rng;
use crate::vm::QmpOut;
use crate::world::{Event, World};

macro_rules! named {
    ($name:ident { $($member:ident),* $(,)? }) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($member),* }
        impl $name {
            pub const ALL: &[$name] = &[$($name::$member),*];
        }
    };
}
pub(crate) use named;

named!(Fault {
    PrimaryDaemonKilled,
    PrimaryQemuKilled,
    PrimaryBothKilled,
    PrimaryHostLost,
    PrimaryDaemonStopped,
    BackupDaemonKilled,
    BackupQemuKilled,
    BackupBothKilled,
    BackupHostLost,
    BackupDaemonStopped,
    NetworkCut,
    CutToBackup,
    CutToPrimary,
    LinkReset,
    LaneReset,
    QmpError,
    WorkerError,
    ChunkCorrupted,
    ApplyFails,
    ApplySlow,
    ActivationFails,
    RehearsalFails,
    StandbyDamaged,
    BlockGrows,
    OperatorStop,
    OperatorCont,
    ContInBoundary,
    GuestReboots,
    PowerOff,
    Detach,
    Switchover,
    Continue,
    StandDown,
    Rehearse,
    ShapeChanged,
    Stranger,
    QmpSlow,
});

named!(Moment {
    None,
    Connect,
    KeepProof,
    Precopy,
    Pause,
    Save,
    Harvest,
    Gate,
    Resume,
    Seal,
    Push,
    PushLast,
    DropDirt,
    Release,
    MergeDirt,
    Fence,
    StoreTerm,
    UseLink,
    Revoke,
    Check,
    Apply,
    Flip,
    Decide,
    Activate,
    Rehearse,
});

impl Moment {
    pub fn of_primary(action: &primary::Action) -> Moment {
        use primary::Action;
        match action {
            Action::Connect => Moment::Connect,
            Action::KeepProof => Moment::KeepProof,
            Action::Precopy { .. } => Moment::Precopy,
            Action::PauseVm => Moment::Pause,
            Action::PauseAndSave => Moment::Save,
            Action::Harvest { .. } => Moment::Harvest,
            Action::MoveGate | Action::Gate(_) => Moment::Gate,
            Action::ResumeVm => Moment::Resume,
            Action::Seal { .. } => Moment::Seal,
            Action::Push { tag, .. } if tag.last => Moment::PushLast,
            Action::Push { .. } => Moment::Push,
            Action::DropDirt => Moment::DropDirt,
            Action::Release(_) => Moment::Release,
            Action::MergeDirt => Moment::MergeDirt,
            Action::FenceVm => Moment::Fence,
            Action::StoreTerm { .. } => Moment::StoreTerm,
            _ => Moment::None,
        }
    }

    pub fn of_backup(action: &backup::Action) -> Moment {
        use backup::{Action, Report};
        match action {
            Action::UseLink(_) => Moment::UseLink,
            Action::Revoke(_) => Moment::Revoke,
            Action::Check { .. } => Moment::Check,
            Action::Apply { .. } => Moment::Apply,
            Action::Report(Report::EpochFlipped { .. }) => Moment::Flip,
            Action::Report(Report::Activating { .. }) => Moment::Decide,
            Action::Activate { .. } => Moment::Activate,
            Action::Rehearse { .. } => Moment::Rehearse,
            _ => Moment::None,
        }
    }
}

/// When a fault happens.
#[derive(Clone, Copy, Debug)]
enum When {
    /// After so many events of the world.
    Step(u64),
    /// Right after an action of this kind, the so-many-th.
    Moment(Moment, u32),
}

/// The faults of one life.
#[derive(Debug)]
pub struct Plan {
    left: Vec<(When, Fault)>,
    seen: Vec<u32>,
    /// Faults that follow one that has happened, while the hosts still deal with that.
    followers: u32,
    due: u32,
}

impl Plan {
    pub fn new(rng: &mut Rng, steps: u64) -> Plan {
        let count = [0, 1, 1, 1, 2, 2, 3, 4, 6][rng.below(9) as usize];
        let mut draw = || {
            let when = if rng.chance(500) {
                When::Step(rng.below(steps))
            } else {
                let moment = rng.pick(&Moment::ALL[1..]);
                let rare = matches!(
                    moment,
                    Moment::Connect | Moment::KeepProof | Moment::UseLink
                );
                When::Moment(moment, if rare { 1 } else { 1 + rng.below(12) as u32 })
            };
            (when, rng.pick(Fault::ALL))
        };
        let left = (0..count).map(|_| draw()).collect();
        let followers = rng.pick(&[0, 0, 1, 3]);
        Plan {
            left,
            seen: vec![0; Moment::ALL.len()],
            followers,
            due: 0,
        }
    }

    /// A fault that follows another one is still to come.
    pub fn follower_due(&self) -> bool {
        self.due > 0
    }

    pub fn clear(&mut self) {
        self.left.clear();
        (self.followers, self.due) = (0, 0);
    }
}

impl World {
    pub fn fault_step(&mut self) {
        let steps = self.steps;
        self.fire(|when| matches!(when, When::Step(at) if *at <= steps));
    }

    pub fn fault_moment(&mut self, moment: Moment) {
        if moment == Moment::None || self.plan.left.is_empty() {
            return;
        }
        let seen = &mut self.plan.seen[moment as usize];
        *seen += 1;
        let nth = *seen;
        self.fire(|when| matches!(when, When::Moment(m, n) if *m == moment && *n == nth));
    }

    fn fire(&mut self, due: impl Fn(&When) -> bool) {
        while let Some(place) = self.plan.left.iter().position(|(when, _)| due(when)) {
            let (_, fault) = self.plan.left.swap_remove(place);
            self.inflict(fault);
            self.let_one_follow();
        }
    }

    fn let_one_follow(&mut self) {
        if self.plan.followers > 0 {
            self.plan.followers -= 1;
            self.plan.due += 1;
            let longest = self.rng.pick(&[100, 5_000, 100_000, 3_000_000]);
            let wait = self.rng.range(0..=longest);
            self.after(wait, Event::Follower);
        }
    }

    pub fn on_follower(&mut self) {
        if self.plan.due > 0 {
            self.plan.due -= 1;
            let fault = self.rng.pick(Fault::ALL);
            self.inflict(fault);
            self.let_one_follow();
        }
    }

    pub fn inflict(&mut self, fault: Fault) {
        if self.trace {
            println!("{:>10} FAULT {fault:?} in {:?}", self.now, self.phase());
        }
        let phase = self.phase();
        self.table.count(fault, phase);
        match fault {
            Fault::PrimaryDaemonKilled => self.kill_primary_daemon(),
            Fault::PrimaryQemuKilled => self.kill_primary_vm(),
            Fault::PrimaryBothKilled => self.kill_primary(),
            Fault::PrimaryHostLost => {
                self.primary.up = false;
                self.primary.daemon = None;
                self.primary.vm = None;
            }
            Fault::PrimaryDaemonStopped => {
                let wait = self.long_time();
                if let Some(daemon) = &mut self.primary.daemon {
                    daemon.stopped = true;
                    self.after(wait, Event::Continued(Side::Primary));
                }
            }
            Fault::BackupDaemonKilled => self.kill_backup_daemon(),
            Fault::BackupQemuKilled => {
                if self.backup.vm.is_some() {
                    self.kill_backup_vm();
                    let text = "killed".to_owned();
                    let gone = backup::Input::StandbyGone { clean: false, text };
                    self.to_backup(5, BackupIn::Other(gone));
                }
            }
            Fault::BackupBothKilled => {
                self.kill_backup_vm();
                self.kill_backup_daemon();
            }
            Fault::BackupHostLost => {
                self.backup.up = false;
                self.backup.daemon = None;
                self.backup.vm = None;
            }
            Fault::BackupDaemonStopped => {
                let wait = self.long_time();
                if let Some(daemon) = &mut self.backup.daemon {
                    daemon.stopped = true;
                    self.after(wait, Event::Continued(Side::Backup));
                }
            }
            Fault::NetworkCut => self.cut(&[Side::Primary, Side::Backup]),
            Fault::CutToBackup => self.cut(&[Side::Backup]),
            Fault::CutToPrimary => self.cut(&[Side::Primary]),
            Fault::LinkReset => LANES.into_iter().for_each(|lane| self.reset(lane)),
            Fault::LaneReset => {
                let lane = self.rng.pick(&LANES);
                self.reset(lane);
            }
            Fault::QmpError => self.primary.qmp_fails = true,
            Fault::WorkerError => {
                if let Some(daemon) = &mut self.primary.daemon {
                    daemon.worker.fail = true;
                }
            }
            Fault::ChunkCorrupted => self.corrupt_next_chunk = true,
            Fault::ApplyFails => self.backup.apply_fails = true,
            Fault::ApplySlow => self.backup.apply_slow = true,
            Fault::ActivationFails => self.backup.activation_fails = true,
            Fault::RehearsalFails => self.backup.rehearsal_fails = true,
            Fault::StandbyDamaged => {
                if let Some(vm) = self.backup.vm.as_mut().filter(|vm| !vm.running) {
                    self.checks.standby_damaged = true;
                    self.checks.damaged_once = true;
                    vm.ram[0][5] ^= 1;
                }
            }
            Fault::BlockGrows => {
                if let Some(vm) = &mut self.primary.vm {
                    vm.grow(70);
                    self.after(1_000_000, Event::ShapeSeen);
                }
            }
            Fault::OperatorStop => self.stop_guest(),
            Fault::OperatorCont | Fault::ContInBoundary => {
                if self
                    .primary
                    .vm
                    .as_ref()
                    .is_some_and(|vm| !vm.shut_down && !vm.frozen)
                {
                    self.operator_cont();
                }
            }
            Fault::GuestReboots => {
                let rng = &mut self.rng;
                if let Some(vm) = self.primary.vm.as_mut().filter(|vm| vm.running) {
                    vm.step(rng, 400, false);
                }
            }
            Fault::PowerOff => {
                if let Some(vm) = self
                    .primary
                    .vm
                    .as_mut()
                    .filter(|vm| vm.running && !vm.frozen)
                {
                    vm.shut_down = true;
                    self.stop_guest();
                    self.say(QmpOut::ShutdownEvent);
                }
            }
            Fault::Detach => self.command(Command::Detach),
            Fault::Switchover => self.command(Command::Switchover),
            Fault::Continue => {
                self.checks.declared = true;
                self.command(Command::Continue);
            }
            Fault::Rehearse => self.command(Command::Rehearse),
            Fault::StandDown => {
                let input = backup::Input::Command(backup::Command::StandDown);
                self.to_backup(5, BackupIn::Other(input));
            }
            Fault::ShapeChanged => self.shape_seen(),
            Fault::Stranger => self.stranger(),
            Fault::QmpSlow => {
                self.params.qmp_us = (500, 60_000);
            }
        }
    }

    pub fn kill_primary(&mut self) {
        if self.rng.chance(500) {
            self.kill_primary_daemon();
            self.kill_primary_vm();
        } else {
            self.kill_primary_vm();
            self.kill_primary_daemon();
        }
    }

    pub fn shape_seen(&mut self) {
        let text = "a device appeared".to_owned();
        self.to_primary(5, PrimaryIn::Other(Input::ShapeChanged(text)));
    }

    pub fn command(&mut self, command: Command) {
        self.to_primary(5, PrimaryIn::Other(Input::Command(command)));
    }

    /// From a hiccup to far beyond every patience.
    fn long_time(&mut self) -> u64 {
        let longest = self.rng.pick(&[5_000, 100_000, 1_000_000, 4_000_000]);
        self.rng.range(500..=longest)
    }

    fn cut(&mut self, receivers: &[Side]) {
        for side in receivers {
            self.net.cut(*side);
        }
        let wait = self.long_time();
        let resets = self.rng.chance(400);
        self.after(wait, Event::Heal { resets });
    }

    /// Both ends of the current link hear that a lane is broken.
    pub fn reset(&mut self, lane: Lane) {
        let Some(link) = self.primary.daemon.as_ref().and_then(|d| d.link) else {
            return;
        };
        for to in [Side::Primary, Side::Backup] {
            self.send_item(Delivery { link, lane, to }, Item::Reset);
        }
    }

    /// Somebody connects to the backup's port and sends what he likes.
    fn stranger(&mut self) {
        if self.backup.daemon.is_none() || !self.backup.up {
            return;
        }
        let link = self.net.connect([u32::MAX, self.backup.number]);
        self.backup_link_up(link);
        for _ in 0..self.rng.range(1..=4) {
            let overheard = self.checks.replays.len() as u64;
            let mut bytes = if overheard > 0 && self.rng.chance(700) {
                self.checks.replays[self.rng.below(overheard) as usize].clone()
            } else {
                (0..self.rng.range(0..=200))
                    .map(|_| self.rng.number() as u8)
                    .collect()
            };
            if !bytes.is_empty() && self.rng.chance(300) {
                let place = self.rng.below(bytes.len() as u64) as usize;
                bytes[place] ^= 1 << self.rng.below(8);
            }
            let to = Side::Backup;
            self.send_item(
                Delivery {
                    link,
                    lane: Lane::Control,
                    to,
                },
                Item::Message(bytes),
            );
        }
        for lane in LANES {
            self.send_item(
                Delivery {
                    link,
                    lane,
                    to: Side::Backup,
                },
                Item::Fin,
            );
        }
    }
}
