//! The backup: collects whole epochs, flips, acknowledges, and decides to activate.
//!
//! ```text
//! Waiting ──hello──► Syncing ──first flip──► Protecting ◄──► Tainted
//!                                                │
//!                      proof of death, silence, QEMU died, switchover
//!                                                ▼
//!                                           Activating ──► Active
//! ```
//!
//! Acknowledging and activating are decided by this one machine, one input at a time, and after
//! the decision to activate nothing is acknowledged any more: that is what "at most one" rests
//! on. How to drive it: as [`crate::primary::Primary`].

mod activate;
mod api;
mod fill;
mod session;

use std::collections::VecDeque;
use std::time::Duration;

pub use api::*;

use crate::types::{Epoch, Micros, RunState, Term};
use crate::wire::{self, Farewell, Frame, Message};
use activate::{Activation, Rehearsal};
use fill::{Asked, Fill, Pending, SyncFill};
use session::Peer;

/// See the module's documentation.
#[derive(Debug)]
pub struct Backup {
    config: BackupConfig,
    now: Micros,
    actions: VecDeque<Action>,
    state: State,
    since: Micros,
    term: Term,
    /// Connected, but no accepted hello yet.
    candidates: Vec<LinkId>,
    peer: Option<Peer>,

    last_flipped: Epoch,
    last_applied: Epoch,
    run_state: RunState,
    fill: Option<Fill>,
    sync: Option<SyncFill>,
    /// Grants that the driver was asked for and has not named yet, oldest first.
    asked: VecDeque<Asked>,
    /// The epoch that the worker is applying.
    applying: Option<Epoch>,
    apply_began: Micros,
    /// How long the last one took.
    apply_took: Duration,
    /// A flipped epoch whose apply a rehearsal holds up.
    held: Option<Pending>,
    /// Chunks of recent epochs: how many to grant in advance.
    recent_chunks: u32,

    activation: Option<Activation>,
    /// How the standby ended, while nobody could be told: an activation starts with a fresh one.
    standby_lost: Option<String>,
    rehearsal: Option<Rehearsal>,
    rehearsed: bool,
    standing_down: Option<Micros>,
    finished: bool,
}

impl Backup {
    pub fn new(config: BackupConfig, now: Micros) -> Backup {
        Backup {
            term: config.term,
            config,
            now,
            actions: VecDeque::new(),
            state: State::Waiting,
            since: now,
            candidates: Vec::new(),
            peer: None,
            last_flipped: Epoch::NONE,
            last_applied: Epoch::NONE,
            run_state: RunState::Running,
            fill: None,
            sync: None,
            asked: VecDeque::new(),
            applying: None,
            apply_began: now,
            apply_took: Duration::ZERO,
            held: None,
            recent_chunks: 0,
            activation: None,
            standby_lost: None,
            rehearsal: None,
            rehearsed: false,
            standing_down: None,
            finished: false,
        }
    }

    /// Tells the machine what has happened at `now`.
    pub fn handle(&mut self, now: Micros, input: Input<'_>) {
        if self.finished {
            return;
        }
        self.now = self.now.max(now);
        match input {
            Input::LinkUp(link) => self.on_link_up(link),
            Input::LinkDown(link, down) => self.on_link_down(link, &down),
            Input::Message(link, bytes) => self.on_bytes(link, bytes),
            Input::Granted { slot, grants } => self.on_granted(slot, grants),
            Input::Arrived { chunk, tag } => self.on_arrived(chunk, tag),
            Input::Revoked(slot) => self.on_revoked(slot),
            Input::Checked { chunk, result } => self.on_checked(chunk, result),
            Input::SyncApplied(chunk) => self.on_sync_applied(chunk),
            Input::Applied { epoch, audit } => self.on_applied(epoch, audit),
            Input::ApplyFailed { text } => self.on_apply_failed(text),
            Input::TermStored => self.on_term_stored(),
            Input::Activated => self.on_activated(),
            Input::ActivationFailed { text } => self.on_activation_failed(text),
            Input::StandbyGone { clean, text } => self.on_standby_gone(clean, text),
            Input::RehearsalReady => self.on_rehearsal_ready(),
            Input::Rehearsed { ok, text } => self.on_rehearsed(ok, text),
            Input::Command(Command::StandDown) => self.stand_down(),
            Input::Command(Command::Rehearse) => self.want_rehearsal(),
        }
        self.advance();
    }

    /// To be called when [`Backup::poll_timeout`] has come. The driver first hands over all
    /// that has arrived: a heartbeat that waits in a socket is not silence.
    pub fn handle_timeout(&mut self, now: Micros) {
        if self.finished {
            return;
        }
        self.now = self.now.max(now);
        if self.silence_ends().is_some_and(|at| self.now >= at) {
            self.decide(Reason::Silence);
        }
        if self.standing_down.is_some_and(|at| self.now >= at) {
            self.end_stand_down();
        }
        self.advance();
    }

    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Micros> {
        if self.finished {
            return None;
        }
        [self.silence_ends(), self.standing_down]
            .into_iter()
            .flatten()
            .min()
    }

    pub fn status(&self) -> Status {
        Status {
            state: self.state,
            since: self.since,
            link_up: self.has_link(),
            last_flipped: self.last_flipped,
            last_applied: self.last_applied,
            term: self.term,
            silent_for: self
                .peer
                .as_ref()
                .map(|p| self.now.since(p.silence.last_heard())),
        }
    }

    fn advance(&mut self) {
        self.try_flip();
        self.advance_rehearsal();
        self.advance_activation();
        self.end_without_standby();
    }

    /// What was kept for a fresh standby is not worth one any more.
    fn end_without_standby(&mut self) {
        let useless = self.state != State::Protecting && self.activation.is_none();
        if let Some(text) = self.standby_lost.take_if(|_| useless && !self.finished) {
            self.fail(format!(
                "the standby is gone, the guest may be lost: {text}"
            ));
        }
    }

    /// Silence means something only while there is an epoch to activate from, and a decision
    /// still to be made.
    fn silence_ends(&self) -> Option<Micros> {
        let matters = self.state == State::Protecting && self.standing_down.is_none();
        self.peer
            .as_ref()
            .filter(|_| matters)
            .map(|peer| peer.silence.ends())
    }

    fn on_applied(&mut self, epoch: Epoch, audit: Option<Vec<u16>>) {
        if self.applying.take_if(|e| *e == epoch).is_none() || epoch > self.last_flipped {
            return; // of a session that is over
        }
        self.last_applied = epoch;
        self.apply_took = self.now.since(self.apply_began);
        if let Some(mismatched_blocks) = audit {
            let clean = mismatched_blocks.is_empty();
            self.report(Report::Audit {
                epoch,
                mismatched_blocks: mismatched_blocks.clone(),
            });
            self.send_to_peer(epoch, &Message::AuditResult { mismatched_blocks });
            if !clean && self.state == State::Protecting {
                self.set_state(State::Tainted);
            }
        }
        if !self.rehearsed {
            self.want_rehearsal();
        }
    }

    fn on_apply_failed(&mut self, text: String) {
        self.applying = None;
        self.report(Report::Error(format!("applying an epoch failed: {text}")));
        if self.activation.is_some() {
            return self.fail(text);
        }
        if self.state == State::Syncing {
            // What is missing now would be missing for ever: from the beginning, on another link.
            return self.break_peer(text);
        }
        // Half of the epoch is in the standby's RAM: only a full one makes it whole.
        if self.state == State::Protecting {
            self.set_state(State::Tainted);
        }
        let kind = crate::types::EpochKind::Full;
        self.send_to_peer(self.last_flipped, &Message::Resync { kind, text });
    }

    fn stand_down(&mut self) {
        if self.standing_down.is_some() || self.activation.is_some() {
            return;
        }
        match self.peer.as_ref().and_then(|p| p.link) {
            Some(link) => {
                let why = Farewell::StandDown;
                let run_state = self.run_state;
                self.send(link, Epoch::NONE, &Message::Farewell { why, run_state });
                self.standing_down = Some(self.now + session::FAREWELL_PATIENCE);
            }
            None => self.end_stand_down(),
        }
    }

    fn end_stand_down(&mut self) {
        self.act(Action::EndStandby);
        self.finish(End::StoodDown);
    }

    fn on_standby_gone(&mut self, clean: bool, text: String) {
        if self.state == State::Active && clean {
            return self.finish(End::PoweredOff);
        }
        if self.state == State::Activating {
            return self.on_activation_failed(text);
        }
        if self.state == State::Active {
            return self.fail(text);
        }
        if self.state == State::Protecting && !self.has_link() && self.standing_down.is_none() {
            // Nobody can be told, and this may be all that is left of the guest: its RAM outlives
            // QEMU. Whether it is needed is decided as ever.
            self.report(Report::Error(format!(
                "the standby is gone, and the primary can't be told; a fresh one will take over if the \
                 primary stays silent: {text}"
            )));
            self.standby_lost = Some(text);
            return;
        }
        self.tell_of_lost_standby(text);
    }

    /// The primary can do without us, and must: nothing here can run its guest.
    fn tell_of_lost_standby(&mut self, text: String) {
        let (why, run_state) = (Farewell::StandDown, self.run_state);
        self.send_to_peer(Epoch::NONE, &Message::Farewell { why, run_state });
        self.finish(End::NoStandby(text));
    }

    fn has_link(&self) -> bool {
        self.peer.as_ref().is_some_and(|p| p.link.is_some())
    }

    fn fail(&mut self, text: String) {
        self.finish(End::Failed(text));
    }

    fn set_state(&mut self, state: State) {
        if self.state != state {
            self.state = state;
            self.since = self.now;
        }
    }

    fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    fn report(&mut self, report: Report) {
        self.act(Action::Report(report));
    }

    fn finish(&mut self, end: End) {
        self.act(Action::Finish(end));
        self.finished = true;
    }

    fn frame(&self, epoch: Epoch) -> Frame {
        let session = self.peer.as_ref().map(|p| p.session).unwrap_or_default();
        Frame {
            vm: self.config.vm,
            session,
            term: self.term,
            epoch,
        }
    }

    fn send(&mut self, link: LinkId, epoch: Epoch, message: &Message) {
        let bytes = wire::encode(self.frame(epoch), message);
        self.act(Action::Send(link, bytes));
    }

    fn send_to_peer(&mut self, epoch: Epoch, message: &Message) {
        if let Some(link) = self.peer.as_ref().and_then(|p| p.link) {
            self.send(link, epoch, message);
        }
    }
}
