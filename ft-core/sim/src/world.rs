//! Two hosts, a network and one line of events in virtual time.
//!
//! A *life* is one guest, protected from its start until it has failed over or ended: first a
//! phase in which faults happen, then one without new faults in which everything must come to a
//! good end within bounded time, then, if the guest is still protected, its host's death.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use ft_core::backup::{Backup, BackupConfig, CheckWhen, State};
use ft_core::primary::{Input, OnBackupLoss, Primary, PrimaryConfig, PrimaryVm};
use ft_core::wire::Frame;
use ft_core::{Epoch, Session, Term, VmTag};

use crate::backup_host::{BackupHost, Later};
use crate::checkers::Checks;
use crate::clock::Clock;
use crate::faults::{Fault, Plan, named};
use crate::net::{Delivery, Item, LANES, Lane, Net, Side};
use crate::primary_host::{PrimaryHost, PrimaryIn};
use crate::rng::Rng;
use crate::table::Table;
use crate::vm::{Vm, shape};

/// Virtual time in which a world without new faults must come to a good end.
const LIVENESS_US: u64 = 90_000_000;
/// Events that a life may take: more is a loop that does not advance.
const EVENTS_MAX: u64 = 3_000_000;
const VM_TAG: VmTag = VmTag(0x1234);

named!(Phase {
    Connecting,
    Syncing,
    Boundary,
    Push,
    BeforeAck,
    Release,
    Idle,
    Fenced,
    Unprotected,
    Activating,
    Active,
    Gone,
});

#[derive(Clone, Debug)]
pub enum Event {
    WakePrimary(u64),
    WakeBackup(u64),
    Deliver(Delivery),
    Connected(u32),
    NotConnected,
    Pushed(u32, u32),
    Monitor,
    Said,
    FenceDue(u32),
    PrimaryWorker(u32),
    BackupWorker(u32),
    Later(u32, Later),
    Guest,
    GuardPrimary,
    GuardBackup(u32),
    PrimaryVmGone,
    Continued(Side),
    Heal { resets: bool },
    ShapeSeen,
    Follower,
    RestartBackup,
}

/// How long things take here, in microseconds: at least and at most.
#[derive(Clone, Debug)]
pub struct Params {
    pub qmp_us: (u64, u64),
    pub worker_us: (u64, u64),
    pub apply_us: (u64, u64),
    pub store_us: (u64, u64),
    guest_us: (u64, u64),
    writes: u64,
    packets_per_mille: u64,
}

#[derive(Debug)]
pub struct World {
    pub now: u64,
    queue: BinaryHeap<Reverse<(u64, u64, Queued)>>,
    serial: u64,
    pub steps: u64,
    pub rng: Rng,
    pub params: Params,
    pub net: Net,
    pub primary: PrimaryHost,
    pub backup: BackupHost,
    backup_config: BackupConfig,
    pub terms: [Term; 2],
    pub plan: Plan,
    pub checks: Checks,
    pub table: Table,
    pub corrupt_next_chunk: bool,
    pub said_at: u64,
    pub slots_at: u64,
    pub violation: Option<String>,
    pub trace: bool,
    restart_due: bool,
}

/// Ordered by time and number only.
#[derive(Debug)]
struct Queued(Event);

impl PartialEq for Queued {
    fn eq(&self, _: &Queued) -> bool {
        true
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Queued) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, _: &Queued) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

/// How a life ended.
#[derive(Clone, Debug)]
pub struct Life {
    pub epochs: u64,
    pub failovers: u64,
    pub late_writes: u64,
    pub table: Table,
    pub terms: [Term; 2],
    pub violation: Option<String>,
}

impl World {
    pub fn new(mut rng: Rng, terms: [Term; 2], quiet: bool, trace: bool) -> World {
        let rng = &mut rng;
        let net_us = rng.pick(&[(20, 80), (50, 500), (200, 3_000)]);
        let heartbeat = rng.range(5_000..=60_000);
        let lease = 4 * heartbeat + 4 * net_us.1 + rng.range(50_000..=800_000);
        let params = Params {
            qmp_us: rng.pick(&[(50, 300), (100, 2_000)]),
            worker_us: rng.pick(&[(20, 100), (50, 800)]),
            apply_us: rng.pick(&[(100, 1_000), (500, 20_000)]),
            store_us: rng.pick(&[(100, 2_000), (1_000, 50_000)]),
            guest_us: rng.pick(&[(200, 1_500), (500, 6_000)]),
            writes: rng.range(0..=12),
            packets_per_mille: rng.pick(&[100, 600]),
        };
        let vm_id = "simulated".to_owned();
        let session = Session(rng.number());
        let micros = Duration::from_micros;
        let config = PrimaryConfig {
            vm_id: vm_id.clone(),
            vm: VM_TAG,
            session,
            term: terms[0],
            epoch_interval: micros(rng.range(2_000..=40_000)),
            epoch_min: micros(rng.range(0..=5_000)),
            epoch_idle: micros(rng.range(2_000..=100_000)),
            heartbeat: micros(heartbeat),
            lease: micros(lease),
            on_backup_loss: if rng.chance(200) {
                OnBackupLoss::Continue
            } else {
                OnBackupLoss::Pause
            },
            max_unacked: micros(rng.range(20_000..=1_000_000)),
            audit_every: rng.pick(&[0, 0, 3, 10]),
            sync_chunks: rng.range(2..=16) as u32,
            precopy_pages_min: rng.pick(&[None, Some(1), Some(10)]),
            release_needs_guest: true,
        };
        let backup_config = BackupConfig {
            vm_id,
            vm: VM_TAG,
            term: terms[1],
            shape: shape(),
            check: rng.pick(&[CheckWhen::OnArrival, CheckWhen::AfterRevocation]),
        };
        // Two clocks that differ by at most one part in a thousand.
        let mut clock = || Clock {
            origin_us: rng.below(1 << 40),
            drift_ppm: rng.range(0..=1000) as i64 - 500,
        };
        let (clock_a, clock_b) = (clock(), clock());
        let mut vm = Vm::new(rng);
        vm.running = !rng.chance(50);
        let primary_vm = PrimaryVm {
            shape: shape(),
            running: vm.running,
        };
        let machine = Primary::new(config, primary_vm, clock_a.local(0));
        let frame = Frame {
            vm: VM_TAG,
            session,
            term: terms[0],
            epoch: Epoch::NONE,
        };
        let mut plan = Plan::new(rng, 12_000);
        if quiet {
            plan.clear();
        }
        let backup = Backup::new(backup_config.clone(), clock_b.local(0));
        World {
            now: 0,
            queue: BinaryHeap::new(),
            serial: 0,
            steps: 0,
            params,
            net: Net::new(net_us),
            primary: PrimaryHost::new(clock_a, machine, vm, frame),
            backup: BackupHost::new(clock_b, 1, backup),
            backup_config,
            terms,
            plan,
            checks: Checks::default(),
            table: Table::default(),
            corrupt_next_chunk: false,
            said_at: 0,
            slots_at: 0,
            violation: None,
            trace,
            restart_due: false,
            rng: rng.clone(),
        }
    }

    /// Runs a life of about `epochs` epochs.
    pub fn live(mut self, epochs: u64) -> Life {
        self.after(1, Event::Guest);
        self.run_primary();
        let until = 30_000_000;
        while self.now < until
            && (self.checks.acknowledged < epochs || self.plan.follower_due())
            && self.goes_on()
        {
            self.turn();
        }
        self.plan.clear();
        self.heal_all();
        let mut ended = self.converge();
        if !ended && self.violation.is_none() {
            // Still protected: now the host dies, and the backup must take over.
            let fault = self.rng.pick(&[
                Fault::PrimaryBothKilled,
                Fault::PrimaryQemuKilled,
                Fault::PrimaryDaemonKilled,
                Fault::PrimaryHostLost,
                Fault::Switchover,
            ]);
            let dies_at = self.now + self.rng.range(0..=100_000);
            while self.now < dies_at {
                self.turn();
            }
            self.inflict(fault);
            self.run_primary();
            ended = self.converge();
            let expected = self.checks.activated.is_some() || self.checks.damaged_once;
            if self.violation.is_none() && ended && !expected {
                self.violation("the host died under protection and the backup did not take over");
            }
        }
        Life {
            epochs: self.checks.acknowledged,
            failovers: self.checks.failovers,
            late_writes: self.checks.late_writes,
            table: self.table,
            terms: self.terms,
            violation: self.violation,
        }
    }

    fn goes_on(&self) -> bool {
        self.violation.is_none() && !self.ended()
    }

    /// Runs without new faults until the life has ended (true) or is protected (false).
    fn converge(&mut self) -> bool {
        let (began, acknowledged) = (self.now, self.checks.acknowledged);
        let tick = |world: &World| world.primary.vm.as_ref().map_or(0, |vm| vm.device.tick);
        let began_tick = tick(self);
        let dying = self.primary.daemon.is_none() || !self.primary.up;
        loop {
            if self.violation.is_some() || self.ended() {
                return true;
            }
            let epochs = self.checks.acknowledged - acknowledged;
            if !dying && self.protected() && epochs >= 3 && tick(self) > began_tick + 3 {
                return false;
            }
            if self.now > began + LIVENESS_US {
                let (phase, state) = (self.phase(), self.backup_state());
                let status = self.primary.daemon.as_ref().map(|d| d.machine.status());
                self.violation(format!(
                    "no good end after {LIVENESS_US} us without new faults: {phase:?}, backup \
                     {state:?}, primary {status:?}"
                ));
                return true;
            }
            self.turn();
        }
    }

    /// Nothing more is to be expected of this life.
    fn ended(&self) -> bool {
        let backup_busy = matches!(
            self.backup_state(),
            Some(State::Protecting | State::Activating)
        ) && !self.backup.stood_down;
        let primary_gone = self.primary.daemon.is_none();
        let vm_dies = self.primary.vm.is_some()
            && (self.primary.guardian || self.primary.end.is_some())
            && self.checks.activated.is_some()
            && !self.checks.declared;
        primary_gone && !backup_busy && !vm_dies
            || primary_gone && self.backup.daemon.is_none() && self.primary.end.is_some()
    }

    fn backup_state(&self) -> Option<State> {
        self.backup
            .daemon
            .as_ref()
            .map(|d| d.machine.status().state)
    }

    /// No fault lasts longer than the safety phase, except what died.
    fn heal_all(&mut self) {
        self.on_heal(false);
        self.on_continued(Side::Primary);
        self.on_continued(Side::Backup);
        self.primary.qmp_fails = false;
        self.backup.apply_fails = false;
        self.backup.apply_slow = false;
        self.corrupt_next_chunk = false;
        self.params.qmp_us = (100, 2_000);
        if let Some(daemon) = &mut self.primary.daemon {
            daemon.worker.fail = false;
        }
        let vm = self.primary.vm.as_ref();
        if vm.is_some_and(|vm| !vm.running && !vm.shut_down && !vm.frozen) {
            self.operator_cont(); // in case it was him who stopped it
        }
    }

    pub fn phase(&self) -> Phase {
        match self.backup_state() {
            Some(State::Activating) => return Phase::Activating,
            Some(State::Active) => return Phase::Active,
            _ => {}
        }
        let Some(daemon) = &self.primary.daemon else {
            return Phase::Gone;
        };
        let status = daemon.machine.status();
        if status.fenced {
            return Phase::Fenced;
        }
        if self.checks.backup_lost {
            return Phase::Unprotected;
        }
        self.primary.phase
    }

    fn turn(&mut self) {
        let Some(Reverse((at, _, Queued(event)))) = self.queue.pop() else {
            return self.violation("nothing will ever happen again");
        };
        self.now = at;
        self.steps += 1;
        if self.steps > EVENTS_MAX {
            return self.violation("too many events: something spins");
        }
        self.dispatch(event);
        self.fault_step();
        self.restart_backup_if_gone();
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::WakePrimary(at) => {
                if self
                    .primary
                    .daemon
                    .as_mut()
                    .is_some_and(|d| d.wake_at.take_if(|w| *w == at).is_some())
                {
                    self.run_primary();
                }
            }
            Event::WakeBackup(at) => {
                if self
                    .backup
                    .daemon
                    .as_mut()
                    .is_some_and(|d| d.wake_at.take_if(|w| *w == at).is_some())
                {
                    self.run_backup();
                }
            }
            Event::Deliver(delivery) => {
                if let Some(item) = self.net.arrive(delivery) {
                    match delivery.to {
                        Side::Primary => self.deliver_to_primary(delivery, item),
                        Side::Backup => self.deliver_to_backup(delivery, item),
                    }
                }
            }
            Event::Connected(link) => self.on_connected(link),
            Event::NotConnected => {
                self.to_primary(0, PrimaryIn::NotConnected("refused".to_owned()));
            }
            Event::Pushed(link, index) => self.to_primary(1, PrimaryIn::Pushed(link, index)),
            Event::Monitor => self.on_monitor(),
            Event::Said => self.on_said(),
            Event::FenceDue(number) => self.on_fence_due(number),
            Event::PrimaryWorker(number) => self.on_primary_worker(number),
            Event::BackupWorker(number) => self.on_backup_worker(number),
            Event::Later(number, later) => self.on_later(number, later),
            Event::Guest => self.on_guest(),
            Event::GuardPrimary => {
                if self.primary.daemon.is_none() && self.primary.guardian {
                    self.kill_primary_vm();
                }
            }
            Event::GuardBackup(number) => {
                if self.backup.number == number && self.backup.daemon.is_none() {
                    self.kill_backup_vm();
                }
            }
            Event::PrimaryVmGone => self.to_primary(3, PrimaryIn::QemuGone),
            Event::Continued(side) => self.on_continued(side),
            Event::Heal { resets } => self.on_heal(resets),
            Event::ShapeSeen => {
                // The driver looks every second, and finds it again.
                self.shape_seen();
                self.after(1_000_000, Event::ShapeSeen);
            }
            Event::Follower => self.on_follower(),
            Event::RestartBackup => self.restart_backup(),
        }
    }

    fn on_guest(&mut self) {
        let (writes, packet) = (
            self.params.writes,
            self.rng.chance(self.params.packets_per_mille),
        );
        if let Some(vm) = self
            .primary
            .vm
            .as_mut()
            .filter(|vm| vm.running && !vm.frozen)
        {
            let held = packet && vm.gate.closed;
            let passed = vm.step(&mut self.rng, writes, packet);
            self.packets_pass(passed.as_slice());
            if held {
                self.to_primary(5, PrimaryIn::Other(Input::OutputWaiting));
            }
        }
        if let Some(vm) = self.backup.vm.as_mut().filter(|vm| vm.running) {
            vm.step(&mut self.rng, writes, false);
        }
        let wait = self.duration(self.params.guest_us);
        self.after(wait, Event::Guest);
    }

    fn on_continued(&mut self, side: Side) {
        match side {
            Side::Primary => {
                let now = self.now;
                if let Some(daemon) = self.primary.daemon.as_mut().filter(|d| d.stopped) {
                    daemon.stopped = false;
                    daemon.last_continued = now;
                    self.run_primary();
                }
            }
            Side::Backup => {
                if let Some(daemon) = self.backup.daemon.as_mut().filter(|d| d.stopped) {
                    daemon.stopped = false;
                    self.run_backup();
                }
            }
        }
    }

    fn on_heal(&mut self, resets: bool) {
        if !self.net.is_cut() {
            return;
        }
        for (at, delivery) in self.net.heal(self.now, &mut self.rng) {
            self.at(at, Event::Deliver(delivery));
        }
        if resets {
            LANES.into_iter().for_each(|lane| self.reset(lane));
        }
    }

    /// The backup's supervisor starts it again, on a fresh standby.
    fn restart_backup_if_gone(&mut self) {
        let gone = self.backup.daemon.is_none();
        if gone && !self.restart_due && self.primary.daemon.is_some() {
            self.restart_due = true;
            let wait = self.rng.range(50_000..=2_000_000);
            self.after(wait, Event::RestartBackup);
        }
    }

    fn restart_backup(&mut self) {
        self.restart_due = false;
        self.kill_backup_vm();
        let config = BackupConfig {
            term: self.terms[1],
            ..self.backup_config.clone()
        };
        let clock = self.backup.clock;
        let machine = Backup::new(config, clock.local(self.now));
        self.backup = BackupHost::new(clock, self.backup.number + 1, machine);
    }

    pub fn duration(&mut self, range: (u64, u64)) -> u64 {
        self.rng.range(range.0..=range.1)
    }

    pub fn after(&mut self, wait: u64, event: Event) {
        self.at(self.now + wait, event);
    }

    pub fn at(&mut self, at: u64, event: Event) {
        self.serial += 1;
        self.queue.push(Reverse((at, self.serial, Queued(event))));
    }

    pub fn send(&mut self, link: u32, lane: Lane, to: Side, item: Item) {
        self.send_item(Delivery { link, lane, to }, item);
    }

    pub fn send_item(&mut self, delivery: Delivery, item: Item) {
        if let Some((at, delivery)) = self.net.send((self.now, &mut self.rng), delivery, item) {
            self.at(at, Event::Deliver(delivery));
        }
    }

    /// `side` lets go of control and bulk: the other one sees their FINs, in any order.
    pub fn close_lanes(&mut self, link: u32, side: Side) {
        self.send(link, Lane::Control, side.other(), Item::Fin);
        self.send(link, Lane::Bulk, side.other(), Item::Fin);
    }

    /// FIN on the proof lane, if neither daemon nor QEMU of `side` holds it any more.
    pub fn close_proof(&mut self, link: u32, side: Side) {
        let held = match side {
            Side::Primary => {
                self.primary
                    .daemon
                    .as_ref()
                    .is_some_and(|d| d.proofs.iter().any(|p| p.link == link))
                    || self
                        .primary
                        .vm
                        .as_ref()
                        .is_some_and(|vm| vm.proofs.contains(&link))
            }
            Side::Backup => {
                self.backup
                    .daemon
                    .as_ref()
                    .is_some_and(|d| d.holds_proof(link))
                    || self
                        .backup
                        .vm
                        .as_ref()
                        .is_some_and(|vm| vm.proofs.contains(&link))
            }
        };
        if !held {
            self.send(link, Lane::Proof, side.other(), Item::Fin);
        }
    }

    /// The receiving process is gone: its kernel answers with a reset.
    pub fn refuse_item(&mut self, delivery: Delivery, item: &Item) {
        if matches!(item, Item::Message(_) | Item::Chunk { .. }) {
            self.send_item(
                Delivery {
                    to: delivery.to.other(),
                    ..delivery
                },
                Item::Reset,
            );
        }
    }
}
