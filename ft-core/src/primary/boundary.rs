//! One boundary: move the gate, pause, save while scanning and harvesting, resume.
//!
//! The gate is moved first, so that the guest need not stand still for it: what it still sends until
//! it stops waits with the next epoch's output, longer than it must and never shorter. If the boundary
//! is aborted, what was moved leaves with the next acknowledgement, which covers it. Only before a
//! switchover, after which no such epoch comes, it is moved in the pause.
//!
//! The save and the harvest run at the same time, in QEMU and in the worker. Neither waits for the network.
//! When the harvest is done the guest may go on: QEMU, which does one thing after the other, ends its save
//! first. A step that fails ends the boundary: the guest goes on, the dirt goes back.

use super::closing::Closing;
use super::commands::Kind;
use super::push::Inflight;
use super::{Action, End, GateState, Harvest, Phases, Primary, Protection, Report, Step};
use crate::types::{Epoch, EpochKind, Micros, RunState};
use std::time::Duration;

/// After a failed boundary the next one waits, twice as long each time, up to a second.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// Failures in a row, a minute of them, after which nobody can say any more that the guest is protected; and
/// what it says would wait on.
const FAILURES_MAX: u32 = 64;
/// What a guest writes in a usual epoch in which it only waits: clocks, timers, a scheduler's tick.
const IDLE_PAGES_MAX: u64 = 64;
/// Work comes in bursts: one quiet epoch between two of them means nothing.
const IDLE_EPOCHS: u32 = 8;

#[derive(Debug)]
pub(super) struct Boundary {
    epoch: Epoch,
    kind: EpochKind,
    started: Micros,
    paused_at: Micros,
    resume_at: Micros,
    phases: Phases,
    run_state: RunState,
    /// The last one before a switchover: the guest stays where it is.
    stay_paused: bool,
    /// Completions that are still to come.
    pause: bool,
    save: bool,
    harvest: bool,
    gate: bool,
    resume: bool,
    resume_asked: bool,
    aborted: bool,
    /// By a step of its own.
    failed: bool,
}

impl Boundary {
    /// RAM and devices are taken; what the guest does from now on belongs to the next epoch.
    pub(super) fn is_taken(&self) -> bool {
        self.resume_asked && !self.save
    }

    pub(super) fn is_saving(&self) -> bool {
        self.save
    }

    fn resumes(&self) -> bool {
        self.run_state == RunState::Running && !self.stay_paused
    }

    /// A guest that stays where it is has its state saved before anything is concluded from that.
    fn may_go_on(&self) -> bool {
        !self.pause && !self.harvest && !self.gate && (self.resumes() || !self.save)
    }

    fn all_done(&self) -> bool {
        !self.pause && !self.save && !self.harvest && !self.gate && !self.resume
    }
}

impl Primary {
    /// Whether a boundary may be taken as soon as its time has come.
    pub(super) fn boundary_possible(&self) -> bool {
        let protecting = matches!(self.protection, Protection::Protected | Protection::Tainted);
        let first = self
            .sync
            .as_ref()
            .is_some_and(super::Sync::ready_for_first_epoch);
        let run_state = self.run_state();
        let worth = run_state == RunState::Running
            || first
            || self.next_kind == EpochKind::Full
            || self.run_state_sent != Some(run_state)
            || self.switchover_wanted();
        self.link.is_up()
            && (protecting || first)
            && worth
            && self.boundary.is_none()
            && self.inflight.is_none()
            && self.worker_jobs == 0
            && !self.held()
            && !self.hold_pending()
            && !(self.stopped_by_us && self.guest_running)
            && self.closing.as_ref().is_none_or(Closing::allows_boundary)
    }

    pub(super) fn run_state(&self) -> RunState {
        if self.guest_running {
            RunState::Running
        } else {
            RunState::Stopped
        }
    }

    pub(super) fn start_boundary(&mut self) {
        let run_state = self.run_state();
        let stay_paused = self.switchover_wanted();
        let epoch = self.acknowledged.next();
        let audit = self.config.audit_every > 0 && epoch.0.is_multiple_of(self.config.audit_every);
        let kind = std::mem::replace(&mut self.next_kind, EpochKind::Delta);
        self.next_boundary = self.now + self.config.epoch_interval;
        self.output_waiting = false;
        self.boundary = Some(Boundary {
            epoch,
            kind,
            started: self.now,
            paused_at: self.now,
            resume_at: self.now,
            phases: Phases::default(),
            run_state,
            stay_paused,
            pause: true,
            save: true,
            harvest: true,
            gate: true,
            resume: false,
            resume_asked: false,
            aborted: false,
            failed: false,
        });
        self.inflight = Some(Inflight {
            epoch,
            kind,
            audit,
            run_state,
            boundary_at: self.now,
            ran: self.now.since(self.resumed_at),
            resumed: None,
            phases: Phases::default(),
            dirty_pages: 0,
            precopied_pages: 0,
            bytes: 0,
            last_ready: false,
            sealed_at: self.now,
            last_pushed: false,
            acknowledged: None,
            released: false,
        });
        // Output of the epoch that starts now must wait for its acknowledgement, so the gate
        // closes at the first boundary and not only when that is acknowledged.
        let first = self.acknowledged == Epoch::NONE;
        let gate = if first {
            Action::Gate(GateState::Closed)
        } else {
            Action::MoveGate
        };
        // Also a guest that stands still is told to: it may have been resumed a moment ago.
        if stay_paused {
            // No epoch comes with which what it still sends until it stops could leave.
            self.stopping(Action::PauseAndSave);
            self.act(gate);
        } else {
            self.act(gate);
            self.stopping(Action::PauseAndSave);
        }
    }

    fn harvest(&mut self) {
        let Some(inflight) = &self.inflight else {
            return;
        };
        let (epoch, kind, audit) = (inflight.epoch, inflight.kind, inflight.audit);
        self.worker_jobs += 1;
        self.act(Action::Harvest { epoch, kind, audit });
    }

    pub(super) fn on_paused(&mut self) {
        let ran = self.commands.replied(Kind::Stop);
        if !self.found_stopped {
            self.stopped_by_us = ran;
            self.set_guest_running(ran);
        }
        if self.hold.pauses_pending > 0 {
            self.hold.pauses_pending -= 1;
            return;
        }
        if self.sync.as_mut().is_some_and(super::Sync::paused) {
            self.worker_jobs += 1;
            return self.act(Action::ArmAll);
        }
        let run_state = self.run_state();
        let Some(boundary) = &mut self.boundary else {
            return;
        };
        boundary.pause = false;
        boundary.paused_at = self.now;
        boundary.phases.stop = self.now.since(boundary.started);
        boundary.run_state = run_state;
        if let Some(inflight) = &mut self.inflight {
            inflight.run_state = run_state;
        }
        if boundary.aborted {
            boundary.harvest = false;
            return self.advance_boundary();
        }
        self.harvest();
    }

    pub(super) fn on_saved(&mut self, _bytes: u64) {
        if let Some(boundary) = &mut self.boundary {
            boundary.save = false;
            boundary.phases.save = self.now.since(boundary.paused_at);
            self.advance_boundary();
        }
    }

    pub(super) fn on_harvested(&mut self, harvest: Harvest) {
        self.worker_jobs -= 1;
        self.judge_precopy(&harvest);
        if let Some(inflight) = &mut self.inflight {
            inflight.dirty_pages = harvest.dirty_pages;
            inflight.precopied_pages = harvest.precopied_pages;
        }
        if let Some(boundary) = &mut self.boundary {
            boundary.harvest = false;
            boundary.phases.harvest = self.now.since(boundary.paused_at);
            boundary.phases.scan = harvest.scan;
            boundary.phases.copy = harvest.copy;
            self.advance_boundary();
        }
    }

    pub(super) fn on_gate_moved(&mut self) {
        if let Some(boundary) = &mut self.boundary {
            boundary.gate = false;
            boundary.phases.gate = self.now.since(boundary.started);
            self.advance_boundary();
        }
    }

    fn advance_boundary(&mut self) {
        let Some(boundary) = &mut self.boundary else {
            return;
        };
        if boundary.aborted {
            if boundary.all_done() {
                self.end_aborted();
            }
            return;
        }
        if boundary.may_go_on() && !boundary.resume_asked {
            boundary.resume_asked = true;
            boundary.resume_at = self.now;
            boundary.resume = boundary.resumes();
            if boundary.resume {
                return self.resume_vm();
            }
            self.hold.fenced |= boundary.stay_paused;
        }
        if boundary.resume_asked && boundary.all_done() {
            self.end_boundary();
        }
    }

    pub(super) fn on_resumed(&mut self) {
        self.commands.replied(Kind::Cont);
        self.set_guest_running(true);
        if self.hold.resumes_pending > 0 {
            self.hold.resumes_pending -= 1;
            return;
        }
        if self.sync.as_mut().is_some_and(super::Sync::resumed) {
            return;
        }
        let Some(boundary) = &mut self.boundary else {
            return;
        };
        boundary.resume = false;
        boundary.phases.cont = self.now.since(boundary.resume_at);
        self.advance_boundary();
    }

    fn end_boundary(&mut self) {
        let Some(boundary) = self.boundary.take() else {
            return;
        };
        if self.inflight.is_none() {
            return; // given up with the backup, while the guest was told to go on
        }
        self.resumed_at = self.now;
        if boundary.resumes()
            && let Some(inflight) = &mut self.inflight
        {
            inflight.phases = boundary.phases;
            inflight.resumed = Some((self.now, self.now.since(boundary.started)));
        }
        // Not before: QEMU would wait for a processor behind it, and the guest with it.
        self.worker_jobs += 1;
        self.act(Action::Seal {
            epoch: boundary.epoch,
            base: self.acknowledged,
            run_state: boundary.run_state,
        });
    }

    pub(super) fn on_step_failed(&mut self, step: Step, text: String) {
        let text = format!("{} failed: {text}", step.name());
        match step {
            Step::Arm | Step::Round => {
                self.worker_jobs -= 1;
                return self.on_sync_failed(text);
            }
            Step::Seal => {
                self.worker_jobs -= 1;
                self.report(Report::Error(text));
                self.back_off();
                return self.abandon_inflight();
            }
            Step::Precopy => {
                // All of RAM is dirty for the boundary that follows.
                self.report(Report::Error(text));
                return self.on_precopied();
            }
            Step::Pause => {
                self.commands.replied(Kind::Stop);
                self.stopped_by_us = self.found_stopped;
                if self.hold.pauses_pending > 0 {
                    self.hold.pauses_pending -= 1;
                    if !self.stopped_by_us && self.switchover_wanted() && self.hold.fenced {
                        self.give_up_switchover("QEMU does not stop the guest again");
                    }
                    return self.report(Report::Error(text));
                }
            }
            Step::Resume => {
                self.commands.replied(Kind::Cont);
                self.on_resume_failed();
                if self.hold.resumes_pending > 0 {
                    self.hold.resumes_pending -= 1;
                    return self.report(Report::Error(text));
                }
            }
            Step::Harvest => self.worker_jobs -= 1,
            Step::Save | Step::Gate => {}
        }
        if self.sync.as_ref().is_some_and(super::Sync::arming) {
            return self.on_sync_failed(text);
        }
        let Some(boundary) = &mut self.boundary else {
            return self.report(Report::Error(text));
        };
        match step {
            Step::Pause => {
                boundary.pause = false;
                boundary.harvest = false;
            }
            Step::Save => boundary.save = false,
            Step::Harvest => boundary.harvest = false,
            Step::Gate => boundary.gate = false,
            Step::Resume => {
                boundary.resume = false;
                if !boundary.aborted {
                    // No harm to the epoch; only the guest has to be resumed again.
                    self.report(Report::Error(text));
                    return self.advance_boundary();
                }
            }
            Step::Precopy | Step::Seal | Step::Arm | Step::Round => {}
        }
        boundary.failed = true;
        self.abort_boundary(text);
    }

    /// Lets the guest go on at once; the epoch's dirt goes back when its harvest has ended.
    pub(super) fn abort_boundary(&mut self, text: String) {
        self.report(Report::Error(format!("epoch aborted: {text}")));
        let Some(boundary) = &mut self.boundary else {
            return;
        };
        if !boundary.aborted {
            boundary.aborted = true;
            if boundary.kind == EpochKind::Full {
                self.next_kind = EpochKind::Full;
            }
            if !std::mem::replace(&mut boundary.resume_asked, true)
                && boundary.run_state == RunState::Running
                && !self.hold.fenced
                && self.guest_running
            {
                boundary.resume = true;
                self.resume_vm();
            }
        }
        self.advance_boundary();
    }

    fn end_aborted(&mut self) {
        let failed = self.boundary.take().is_some_and(|b| b.failed);
        if failed {
            self.back_off();
        } else {
            self.next_boundary = self.now + RETRY_MIN;
        }
        self.abandon_inflight();
    }

    /// An epoch has failed by itself.
    fn back_off(&mut self) {
        self.failures += 1;
        let backoff = RETRY_MIN
            .saturating_mul(1 << self.failures.min(8))
            .min(RETRY_MAX);
        self.next_boundary = self.now + backoff;
        // Of a guest that stands still nothing waits, and an operator's long command may be why.
        if self.guest_running && self.failures.is_multiple_of(FAILURES_MAX) {
            let text = format!("{FAILURES_MAX} epochs in a row have failed");
            self.report(Report::Error(text.clone()));
            self.begin_closing(Closing::detach(End::Unprotectable(text)));
        }
    }

    /// The guest has sent something that waits for an acknowledgement.
    pub(super) fn on_output_waiting(&mut self) {
        self.output_waiting = true;
        // A boundary that failed is not tried again sooner for it.
        if self.failures == 0 {
            let soonest = self.resumed_at + self.config.epoch_min;
            self.next_boundary = self.next_boundary.min(soonest);
        }
    }

    /// A guest that has done next to nothing for a while, and says nothing, has longer epochs.
    pub(super) fn rest_if_idle(&mut self, dirty_pages: u64, ran: Duration, boundary_at: Micros) {
        // In a longer epoch it may write as much more, or each one of those would end its rest.
        let usual_epochs = ran.as_micros() / self.config.epoch_interval.as_micros().max(1);
        let quiet = u128::from(dirty_pages) <= u128::from(IDLE_PAGES_MAX) * usual_epochs.max(1);
        let idle = quiet && !self.output_waiting;
        self.idle_epochs = if idle {
            self.idle_epochs.saturating_add(1)
        } else {
            0
        };
        if self.idle_epochs >= IDLE_EPOCHS {
            let later = boundary_at + self.config.epoch_idle;
            self.next_boundary = self.next_boundary.max(later);
        }
    }

    /// Gives up an epoch that was not acknowledged. If part of it may be on its way, the link
    /// goes with it: the next hello settles what the backup has.
    fn abandon_inflight(&mut self) {
        if self.inflight.as_ref().is_some_and(|i| i.last_ready) {
            // All of it may have arrived: whether it counts is the backup's to say.
            return self
                .break_link("whether the epoch counts is settled by a new hello".to_owned());
        }
        let Some(inflight) = self.inflight.take() else {
            return; // given up already, with the backup
        };
        if inflight.kind == EpochKind::Full {
            self.next_kind = EpochKind::Full;
        }
        self.act(Action::MergeDirt);
        if inflight.bytes > 0 {
            self.break_link(format!("epoch {} was given up", inflight.epoch));
        } else {
            // No acknowledgement will come that lets a guest go on, and none takes another boundary.
            self.set_throttled(false);
            if self.switchover_wanted() {
                // The epoch before is not what the guest was switched over with: it goes on to another one.
                self.hold.fenced = false;
            }
        }
    }
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Step::Precopy => "copying before the pause",
            Step::Pause => "stop",
            Step::Save => "saving the device state",
            Step::Harvest => "harvesting dirty pages",
            Step::Gate => "moving the output gate",
            Step::Seal => "sealing the epoch",
            Step::Resume => "cont",
            Step::Arm => "arming the tracker",
            Step::Round => "a live round",
        }
    }
}
