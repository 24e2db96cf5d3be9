//! The primary: takes boundaries, pushes epochs, and knows when its guest must stand still.
//!
//! ```text
//! Unprotected ──hello──► Syncing ──first ack──► Protected ◄──► Tainted
//!      ▲                    │                       │
//!      └──── proof of the backup's death, or the operator's word ────┘
//! ```
//!
//! How to drive it: hand every occurrence to [`Primary::handle`] and every expired timer to
//! [`Primary::handle_timeout`], both with the time; then drain [`Primary::poll_action`], carry
//! the actions out in order, and read [`Primary::poll_timeout`] again. Nothing here fails: a
//! peer or a QEMU that misbehaves becomes an action.

mod api;
mod boundary;
mod closing;
mod commands;
mod loss;
mod precopy;
mod push;
mod session;
mod sync;

use std::collections::VecDeque;
use std::time::Duration;

pub use api::*;

use crate::detector::Lease;
use crate::types::{Epoch, EpochKind, Micros, RunState, Term};
use crate::wire::{self, Frame, Message};
use boundary::Boundary;
use closing::Closing;
use commands::Commands;
use precopy::Precopy;
use push::{Inflight, PushQueue};
use session::LinkState;
use sync::Sync;

/// See the module's documentation for how to drive it.
#[derive(Debug)]
pub struct Primary {
    config: PrimaryConfig,
    vm: PrimaryVm,
    now: Micros,
    actions: VecDeque<Action>,

    link: LinkState,
    /// It was agreed on, broke, and is not back.
    link_lost: Option<Micros>,
    attempt: u32,
    term: Term,
    lease: Lease,
    next_heartbeat: Micros,
    last_heartbeat_sent: Micros,

    protection: Protection,
    since: Micros,
    /// The last chunk of an epoch has left: from here on only a proof says that the backup
    /// can't activate.
    backup_may_activate: bool,
    /// It was told to activate, and has not said since that it did not.
    activation_ordered: bool,
    acknowledged: Epoch,
    acknowledged_boundary: Option<Micros>,
    /// What the next epoch must carry.
    next_kind: EpochKind,
    next_boundary: Micros,
    /// Of the last boundary.
    resumed_at: Micros,
    output_waiting: bool,
    /// In a row.
    idle_epochs: u32,
    precopy: Precopy,

    boundary: Option<Boundary>,
    inflight: Option<Inflight>,
    sync: Option<Sync>,
    push: PushQueue,
    /// Jobs of the worker that have not reported their end.
    worker_jobs: u32,
    closing: Option<Closing>,
    /// The last epoch before a switchover is released, and QEMU keeps that until its guest runs.
    last_output_waits: bool,
    finished: bool,

    /// The guest would run if we did not hold it.
    guest_running: bool,
    /// The run state that the backup's last epoch has; a difference is worth an epoch.
    run_state_sent: Option<RunState>,
    hold: Hold,
    /// Our last command to QEMU was to stop; whoever has no reason left to hold it resumes it.
    stopped_by_us: bool,
    /// The guest was stopped by us already when the last `stop` was sent.
    found_stopped: bool,
    /// `cont` has failed: when to try again.
    resume_retry: Option<Micros>,
    commands: Commands,
    failures: u32,
}

/// Why the guest is held outside of a boundary.
#[derive(Clone, Copy, Debug, Default)]
struct Hold {
    /// The lease is over, or a switchover waits for its answer.
    fenced: bool,
    throttled: bool,
    /// Replies to `stop` and `cont` that belong to the hold.
    pauses_pending: u32,
    resumes_pending: u32,
}

/// A guest whose `cont` has failed stands still until another one works.
const RESUME_RETRY: Duration = Duration::from_millis(200);

impl Primary {
    pub fn new(config: PrimaryConfig, vm: PrimaryVm, now: Micros) -> Primary {
        let mut primary = Primary {
            link: LinkState::Down { retry_at: None },
            link_lost: None,
            attempt: 0,
            term: config.term,
            lease: Lease::new(config.lease, now),
            next_heartbeat: now,
            last_heartbeat_sent: now,
            protection: Protection::Unprotected,
            since: now,
            backup_may_activate: false,
            acknowledged: Epoch::NONE,
            acknowledged_boundary: None,
            next_kind: EpochKind::Delta,
            next_boundary: now,
            resumed_at: now,
            output_waiting: false,
            idle_epochs: 0,
            precopy: Precopy::default(),
            boundary: None,
            inflight: None,
            sync: None,
            push: PushQueue::default(),
            worker_jobs: 0,
            closing: None,
            last_output_waits: false,
            finished: false,
            guest_running: vm.running,
            run_state_sent: None,
            hold: Hold::default(),
            stopped_by_us: false,
            found_stopped: false,
            resume_retry: None,
            commands: Commands::default(),
            activation_ordered: false,
            failures: 0,
            actions: VecDeque::new(),
            now,
            config,
            vm,
        };
        primary.connect();
        primary
    }

    /// Tells the machine what has happened at `now`.
    pub fn handle(&mut self, now: Micros, input: Input<'_>) {
        if self.finished {
            return;
        }
        self.now = self.now.max(now);
        match input {
            Input::LinkUp => self.on_link_up(),
            Input::LinkDown(down) => self.on_link_down(down),
            Input::Message(bytes) => self.on_bytes(bytes),
            Input::Paused => self.on_paused(),
            Input::Saved { bytes } => self.on_saved(bytes),
            Input::Precopied => self.on_precopied(),
            Input::Harvested(harvest) => self.on_harvested(harvest),
            Input::GateMoved => self.on_gate_moved(),
            Input::Resumed => self.on_resumed(),
            Input::StepFailed { step, text } => self.on_step_failed(step, text),
            Input::Released(epoch) => self.on_released(epoch),
            Input::OutputWaiting => self.on_output_waiting(),
            Input::ChunkReady { index, last, bytes } => self.on_chunk_ready(index, last, bytes),
            Input::ChunkPushed { index } => self.on_chunk_pushed(index),
            Input::AllArmed => self.on_all_armed(),
            Input::RoundStarted { pages } => self.on_round_started(pages),
            Input::RoundFilled { done } => self.on_round_filled(done),
            Input::Qemu(event) => self.on_qemu(event),
            Input::Command(command) => self.on_command(command),
            Input::ShapeChanged(text) => self.on_shape_changed(text),
        }
        self.advance();
    }

    /// To be called when [`Primary::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Micros) {
        if self.finished {
            return;
        }
        self.now = self.now.max(now);
        self.on_lease_timeout();
        self.on_connect_timeout();
        self.on_heartbeat_timeout();
        self.on_throttle_timeout();
        self.on_closing_timeout();
        self.advance();
    }

    /// The next thing to do. To be drained after every `handle` and `handle_timeout`.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Primary::handle_timeout`]; `None` if only an input can change anything.
    pub fn poll_timeout(&self) -> Option<Micros> {
        if self.finished {
            return None;
        }
        [
            self.lease_deadline(),
            self.connect_deadline(),
            self.link.is_heard().then_some(self.next_heartbeat),
            self.throttle_deadline(),
            self.closing.as_ref().and_then(Closing::deadline),
            self.boundary_possible().then_some(self.next_boundary),
            self.resume_retry.filter(|_| self.resume_wanted()),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    pub fn status(&self) -> Status {
        Status {
            state: self.protection,
            since: self.since,
            link_up: self.link.is_up(),
            link_lost: self.link_lost,
            last_acknowledged: self.acknowledged,
            term: self.term,
            guest_running: self.guest_running,
            fenced: self.hold.fenced,
            behind: self.acknowledged_boundary.map(|at| self.now.since(at)),
        }
    }

    /// Does what has become possible. Every input ends here.
    fn advance(&mut self) {
        self.settle_session();
        self.pump();
        self.advance_closing();
        self.advance_sync();
        self.resume_if_free();
        // After the end nobody would resume the guest that a boundary has paused.
        if !self.finished
            && self.boundary_possible()
            && self.now >= self.next_boundary
            && !self.start_precopy()
        {
            self.start_boundary();
        }
    }

    fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    fn report(&mut self, report: Report) {
        self.act(Action::Report(report));
    }

    fn send(&mut self, epoch: Epoch, message: &Message) {
        let frame = Frame {
            epoch,
            ..self.frame()
        };
        let bytes = wire::encode(frame, message);
        self.act(Action::Send(bytes));
    }

    fn frame(&self) -> Frame {
        Frame {
            vm: self.config.vm,
            session: self.config.session,
            term: self.term,
            epoch: Epoch::NONE,
        }
    }

    fn set_protection(&mut self, protection: Protection) {
        if self.protection != protection {
            self.protection = protection;
            self.since = self.now;
        }
    }

    fn finish(&mut self, end: End) {
        self.act(Action::Finish(end));
        self.finished = true;
    }

    fn pause_vm(&mut self) {
        self.stopping(Action::PauseVm);
    }

    /// Carries out what stops the guest.
    fn stopping(&mut self, action: Action) {
        self.found_stopped = self.stopped_by_us;
        self.stopped_by_us = true;
        self.commands.sent(commands::Kind::Stop);
        self.act(action);
    }

    fn resume_vm(&mut self) {
        self.stopped_by_us = false;
        self.commands.sent(commands::Kind::Cont);
        self.act(Action::ResumeVm);
    }

    /// The guest stands still for a reason that is not a boundary.
    fn held(&self) -> bool {
        self.hold.fenced || self.hold.throttled
    }

    fn hold_pending(&self) -> bool {
        self.hold.pauses_pending > 0 || self.hold.resumes_pending > 0
    }

    fn set_throttled(&mut self, throttled: bool) {
        if self.hold.throttled == throttled {
            return;
        }
        self.hold.throttled = throttled;
        self.report(Report::Throttled(throttled));
        if throttled {
            self.hold.pauses_pending += 1;
            self.pause_vm();
        }
    }

    /// We have stopped the guest, and nothing of ours holds it any more.
    fn resume_wanted(&self) -> bool {
        let arming = self.sync.as_ref().is_some_and(Sync::arming);
        self.stopped_by_us
            && self.guest_running
            && !self.held()
            && !self.hold_pending()
            && self.boundary.is_none()
            && !arming
    }

    /// Lets the guest run again if nothing holds it.
    fn resume_if_free(&mut self) {
        let due = self.resume_retry.is_none_or(|at| self.now >= at);
        if due && !self.finished && self.resume_wanted() {
            self.resume_retry = None;
            self.hold.resumes_pending += 1;
            self.resume_vm();
        }
    }

    fn on_resume_failed(&mut self) {
        self.stopped_by_us = true;
        self.found_stopped = true; // by a `stop` behind it
        self.resume_retry = Some(self.now + RESUME_RETRY);
    }

    fn on_qemu(&mut self, event: QemuEvent) {
        match event {
            QemuEvent::Stopped => {
                if self.commands.stopped() {
                    // Only a running guest can be stopped, whatever we thought.
                    self.set_guest_running(true);
                    self.stopped_by_us = true;
                } else if !self.hold.fenced {
                    self.set_guest_running(false);
                }
            }
            QemuEvent::Resumed => {
                let saving = self.boundary.as_ref().is_some_and(Boundary::is_saving);
                if !self.commands.resumed(saving) {
                    self.on_foreign_resume();
                }
            }
            QemuEvent::Shutdown => self.on_shutdown(),
            QemuEvent::Gone(text) => self.on_qemu_gone(text),
        }
    }

    /// What the guest would be doing if we did not hold it. Events of somebody else's commands
    /// can't always be told from those of ours, so each of our own commands corrects it.
    fn set_guest_running(&mut self, running: bool) {
        let over = self.closing.as_ref().is_some_and(Closing::is_power_off);
        if self.guest_running == running || over {
            return;
        }
        self.guest_running = running;
        self.report(if running {
            Report::GuestResumed
        } else {
            Report::GuestStopped
        });
    }

    /// Before the backup is told: the guest runs here.
    fn give_up_switchover(&mut self, why: &str) {
        self.closing = None;
        self.hold.fenced = false;
        self.report(Report::Error(format!("switchover given up: {why}")));
    }

    /// Somebody else has sent `cont`.
    fn on_foreign_resume(&mut self) {
        self.set_guest_running(true);
        if self.switchover_wanted() && self.hold.fenced {
            self.give_up_switchover("somebody else has resumed the guest");
        } else if self.hold.fenced {
            self.fence_vm();
        } else if self.hold.throttled {
            self.hold.pauses_pending += 1;
            self.pause_vm();
        }
        if self.boundary.as_ref().is_some_and(|b| !b.is_taken()) {
            self.abort_boundary("somebody else resumed the guest during a boundary".to_owned());
        }
    }
}
