//! What must hold, looked at from outside: no checker believes a machine.

use std::collections::BTreeMap;
use std::rc::Rc;

use ft_core::backup::{self, Reason, State};
use ft_core::primary::{self, Protection};
use ft_core::wire::Frame;
use ft_core::{Epoch, RunState};

use crate::vm::{Device, Snapshot, Value};
use crate::world::World;

/// Boundaries that may still be asked for.
const BOUNDARIES_KEPT: usize = 8;
/// The fence's own patience with QEMU, and the way there and back.
const OPERATOR_STOPPED_AFTER_US: u64 = 100_000;

#[derive(Debug, Default)]
pub struct Checks {
    /// RAM and device state at each boundary that was sealed.
    boundaries: BTreeMap<u64, Rc<Snapshot>>,
    /// The guest's tick at the last acknowledged boundary: what the survivor will remember.
    safe_tick: u64,
    /// The tick of the newest packet that has left the primary's host.
    outside_tick: u64,
    /// The tick from which the backup's copy went on.
    pub activated: Option<u64>,
    /// The operator has declared that he prefers availability.
    pub declared: bool,
    /// When the operator resumed the guest last.
    pub operator_cont_at: Option<u64>,
    /// The guest runs on without the backup that it had.
    pub backup_lost: bool,
    /// The standby's RAM is known to be damaged until a full epoch is applied.
    pub standby_damaged: bool,
    /// It was once: an image that is known to be wrong is not activated.
    pub damaged_once: bool,
    /// How often the image was forgotten: a later one has boundaries of its own.
    pub images: u64,
    pub acknowledged: u64,
    pub failovers: u64,
    pub late_writes: u64,
    /// Of the newest boundary.
    last_run_state: Option<(Epoch, RunState)>,
    /// QEMU has refused a command since: the last packets before a switchover may be lost by that.
    pub command_failed: bool,
    /// What a stranger may have overheard.
    pub replays: Vec<Vec<u8>>,
    reason: Option<Reason>,
}

impl Checks {
    /// Called when the last chunk of an epoch is filled.
    pub fn note_boundary(
        &mut self,
        frame: Frame,
        saved: Option<Rc<Snapshot>>,
        device: Device,
        run_state: RunState,
    ) {
        let Some(saved) = saved.filter(|s| s.device == device) else {
            return;
        };
        self.command_failed = false;
        self.last_run_state = Some((frame.epoch, run_state));
        self.boundaries.insert(frame.epoch.0, saved);
        while self.boundaries.len() > BOUNDARIES_KEPT {
            self.boundaries.pop_first();
        }
    }

    pub fn image_forgotten(&mut self) {
        self.boundaries.clear();
        self.images += 1;
        self.standby_damaged = false;
    }
}

impl World {
    pub fn violation(&mut self, text: impl Into<String>) {
        if self.violation.is_none() {
            let text = text.into();
            if self.trace {
                println!("{:>10} VIOLATION {text}", self.now);
            }
            self.violation = Some(text);
        }
    }

    /// Invariant 2 and 4: an acknowledgement is for a whole epoch, and never after a decision.
    pub fn check_ack(&mut self, frame: Frame) {
        let state = self
            .backup
            .daemon
            .as_ref()
            .map(|d| d.machine.status().state);
        if matches!(state, Some(State::Activating | State::Active)) {
            return self.violation("an acknowledgement after the decision to activate");
        }
        let chunks = self.arrived(frame);
        let whole = chunks.last().is_some_and(|last| {
            last.end.as_ref().is_some_and(|(_, trailer)| {
                trailer.chunks as usize == chunks.len() && last.index + 1 == trailer.chunks
            })
        });
        if !whole {
            return self.violation(format!(
                "epoch {} acknowledged, but not all here",
                frame.epoch
            ));
        }
        let Some(boundary) = self.checks.boundaries.get(&frame.epoch.0) else {
            return self.violation(format!("epoch {} has no boundary", frame.epoch));
        };
        self.checks.safe_tick = boundary.device.tick;
        self.checks.acknowledged += 1;
    }

    /// Invariant 2: what leaves with a release is remembered by the survivor.
    pub fn check_released(&mut self, packets: &[u64]) {
        let safe = self.checks.activated.unwrap_or(self.checks.safe_tick);
        if let Some(early) = packets.iter().find(|tick| **tick > safe)
            && !self.checks.declared
        {
            self.violation(format!(
                "packet {early} released, but only {safe} is acknowledged"
            ));
        }
    }

    /// Invariant 4: packets that nothing holds.
    pub fn packets_pass(&mut self, packets: &[u64]) {
        if !packets.is_empty() && self.checks.activated.is_some() && !self.checks.declared {
            self.violation("the primary's guest speaks although the backup has activated");
        }
        self.note_outside(packets);
    }

    pub fn note_outside(&mut self, packets: &[u64]) {
        let newest = packets.iter().copied().max().unwrap_or(0);
        self.checks.outside_tick = self.checks.outside_tick.max(newest);
    }

    /// Invariant 4: the gate opens without an acknowledgement only if the backup can't activate.
    pub fn check_gate_may_open(&mut self) {
        let possible = self.backup.can_activate() || self.checks.activated.is_some();
        if possible && !self.checks.declared {
            self.violation("the gate opens although the backup may activate, or has");
        }
    }

    /// Invariants 1 and 5: the standby's RAM is the boundary's, page by page.
    pub fn check_applied(&mut self, epoch: Epoch, device: Option<Device>, audit: Option<&[u16]>) {
        if self.checks.standby_damaged {
            return;
        }
        if audit.is_some_and(|blocks| !blocks.is_empty()) {
            return self.violation(format!("the audit of epoch {epoch} found a difference"));
        }
        let Some(boundary) = self.checks.boundaries.get(&epoch.0) else {
            return;
        };
        if device != Some(boundary.device) {
            return self.violation(format!("epoch {epoch} has another boundary's device state"));
        }
        self.check_standby(epoch, "an apply");
    }

    pub fn check_standby(&mut self, epoch: Epoch, when: &str) {
        if self.checks.standby_damaged {
            return;
        }
        let (Some(boundary), Some(vm)) = (self.checks.boundaries.get(&epoch.0), &self.backup.vm)
        else {
            return;
        };
        // A page past the end, which a block got meanwhile, counts as zero: nobody wrote it yet.
        let at = |block: &[Value], page: usize| block.get(page).copied().unwrap_or(0);
        let blocks = boundary.ram.iter().zip(&vm.ram).enumerate();
        let differing: Vec<(usize, usize)> = blocks
            .flat_map(|(b, (ours, theirs))| {
                let length = ours.len().max(theirs.len());
                (0..length)
                    .filter(|&p| at(ours, p) != at(theirs, p))
                    .map(move |p| (b, p))
            })
            .take(5)
            .collect();
        if differing.is_empty() {
            return;
        }
        self.violation(format!(
            "at {when}, the standby differs from boundary {epoch} in pages {differing:?} and more"
        ));
    }

    pub fn check_activation(&mut self, epoch: Epoch, run_state: RunState) {
        self.check_standby(epoch, "the activation");
        let Some(boundary) = self.checks.boundaries.get(&epoch.0) else {
            return self.violation(format!("activation from {epoch}, which has no boundary"));
        };
        let (device, tick) = (boundary.device, boundary.device.tick);
        let loaded = self.backup.daemon.as_ref().and_then(|d| d.device);
        if loaded != Some(device) {
            return self.violation("activation with another boundary's device state");
        }
        if tick < self.checks.safe_tick {
            let safe = self.checks.safe_tick;
            return self.violation(format!("activation at {tick}, but {safe} was acknowledged"));
        }
        let outside = self.checks.outside_tick;
        if tick < outside && !self.checks.declared {
            let text = format!("the survivor resumes at {tick}, but packet {outside} is outside");
            return self.violation(text);
        }
        if self.checks.reason == Some(Reason::Silence) && run_state == RunState::Running {
            self.check_lease();
        }
        self.checks.activated = Some(tick);
        self.checks.failovers += 1;
    }

    /// At the decision to take over by plan: what the survivor remembers to have sent has left, for it will
    /// not be sent again. A guest that an operator has stopped is left out: QEMU keeps its packets.
    fn check_all_said(&mut self, epoch: Epoch) {
        let Some(boundary) = self.checks.boundaries.get(&epoch.0) else {
            return; // told at the activation
        };
        let tick = boundary.device.tick;
        let ran = self.checks.last_run_state == Some((epoch, RunState::Running));
        let held = self.primary.vm.as_ref().and_then(|vm| vm.oldest_held());
        if let Some(held) = held.filter(|held| *held <= tick)
            && ran
            && !self.checks.command_failed
        {
            self.violation(format!(
                "switched over at {tick}, and packet {held} has not left"
            ));
        }
    }

    /// A primary whose daemon is well has stopped its guest before the backup starts its own. One that
    /// the operator has just resumed is stopped again as soon as QEMU does it; its gate stays closed.
    fn check_lease(&mut self) {
        let Some(daemon) = self.primary.daemon.as_ref().filter(|_| self.primary.up) else {
            return;
        };
        let well = !daemon.stopped && self.now > daemon.last_continued + 200_000;
        let runs = self
            .primary
            .vm
            .as_ref()
            .is_some_and(|vm| vm.running && !vm.frozen);
        if well && runs && !self.just_resumed_by_operator() && !self.checks.declared {
            self.violation(
                "the backup starts its copy while the primary's lease has not stopped it",
            );
        }
    }

    fn just_resumed_by_operator(&self) -> bool {
        let resumed = self.checks.operator_cont_at;
        resumed.is_some_and(|at| self.now < at + OPERATOR_STOPPED_AFTER_US)
    }

    pub fn backup_report(&mut self, report: &backup::Report) {
        let backup::Report::Activating { reason, epoch, .. } = report else {
            return;
        };
        self.checks.reason = Some(*reason);
        if *reason == Reason::Switchover {
            self.check_all_said(*epoch);
        }
        let alive = self.primary.up && self.primary.vm.is_some();
        let runs = alive && self.primary.vm.as_ref().is_some_and(|vm| vm.running);
        // Who goes on without the backup and leaves has taken two copies into account.
        let declared = self.checks.declared;
        match reason {
            Reason::ProofOfDeath if !declared && (alive || self.primary.daemon.is_some()) => {
                self.violation("proof of death, but daemon or QEMU lives");
            }
            Reason::QemuDied if alive => self.violation("activation for a QEMU that lives"),
            // With the daemon gone only its guardian is left to stop it; the gate stays closed.
            Reason::Switchover if runs && !self.just_resumed_by_operator() => {
                self.violation("switchover while the guest runs");
            }
            _ => {}
        }
    }

    pub fn primary_report(&mut self, report: &primary::Report) {
        match report {
            primary::Report::BackupLost { proven, .. } => {
                self.checks.backup_lost = true;
                self.checks.declared |= !proven;
            }
            primary::Report::Connected => self.checks.backup_lost = false,
            _ => {}
        }
    }

    /// The primary protects its guest, and says so.
    pub fn protected(&self) -> bool {
        self.primary.daemon.as_ref().is_some_and(|d| {
            let status = d.machine.status();
            status.state == Protection::Protected && status.link_up && !status.fenced
        })
    }
}
