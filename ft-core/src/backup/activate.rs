//! The decision to activate, its steps, and the rehearsal of it.

use super::{Action, Backup, End, Reason, Report, State};
use crate::types::{Epoch, Micros};
use crate::wire::Message;

/// From the decision on: nothing is acknowledged any more.
#[derive(Debug)]
pub(super) struct Activation {
    decided: Micros,
    term_stored: bool,
    started: bool,
    /// The standby that waited is gone, or has refused the state.
    fresh: bool,
    /// A standby has failed that was asked.
    retried: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rehearsal {
    Preparing,
    /// The throw-away QEMU waits; applies are held as soon as none runs.
    Ready,
    Running,
}

impl Backup {
    /// Decides to activate, or says why not.
    pub(super) fn decide(&mut self, reason: Reason) {
        if self.activation.is_some() || self.standing_down.is_some() {
            return;
        }
        let cause = reason.as_str();
        let refusal = match self.state {
            State::Protecting => None,
            State::Tainted => Some("an audit or an apply failed and no full epoch came since"),
            _ => Some("no epoch is complete"),
        };
        if let Some(why) = refusal {
            self.report(Report::NotActivating(format!(
                "not activating ({cause}): {why}"
            )));
            // Whether it is dead or without a QEMU: this primary will not repair anything.
            self.discard_fill();
            self.peer = None;
            return self.forget_image();
        }
        let heard = self.peer.as_ref().map(|p| p.silence.last_heard());
        self.term = self.term.next();
        self.activation = Some(Activation {
            decided: self.now,
            term_stored: false,
            started: false,
            fresh: self.standby_lost.is_some(),
            retried: false,
        });
        self.set_state(State::Activating);
        self.act(Action::StoreTerm {
            term: self.term,
            activated: true,
        });
        self.report(Report::Activating {
            epoch: self.last_flipped,
            term: self.term,
            reason,
            detect: heard.map_or(std::time::Duration::ZERO, |at| self.now.since(at)),
        });
        self.send_to_peer(self.last_flipped, &Message::Activated);
        self.revoke_all();
        if self.rehearsal.take().is_some() {
            self.act(Action::CancelRehearsal);
        }
        self.start_apply();
    }

    pub(super) fn on_term_stored(&mut self) {
        if let Some(activation) = &mut self.activation {
            activation.term_stored = true;
        }
    }

    pub(super) fn advance_activation(&mut self) {
        let idle = self.applying.is_none() && self.held.is_none();
        let Some(activation) = &mut self.activation else {
            return;
        };
        if activation.term_stored && idle && !activation.started && !self.finished {
            activation.started = true;
            let fresh = activation.fresh;
            let (epoch, run_state) = (self.last_flipped, self.run_state);
            assert_eq!(
                epoch, self.last_applied,
                "activating from an epoch that isn't applied"
            );
            // From here on the standby may be the only copy.
            self.act(Action::Guardian { armed: false });
            self.act(if fresh {
                Action::RespawnAndActivate { epoch, run_state }
            } else {
                Action::Activate { epoch, run_state }
            });
        }
    }

    pub(super) fn on_activated(&mut self) {
        let Some(activation) = &self.activation else {
            return;
        };
        let took = self.now.since(activation.decided);
        self.set_state(State::Active);
        let (epoch, term) = (self.last_flipped, self.term);
        self.report(Report::Activated { epoch, term, took });
    }

    pub(super) fn on_activation_failed(&mut self, text: String) {
        let Some(activation) = &mut self.activation else {
            return;
        };
        if activation.retried {
            return self.finish(End::Failed(text));
        }
        // The standby may die before its time has come: while the term is stored.
        activation.retried = activation.started;
        activation.fresh = true;
        let started = activation.started;
        self.report(Report::Error(format!(
            "the standby did not load, trying a fresh one: {text}"
        )));
        if started {
            let (epoch, run_state) = (self.last_flipped, self.run_state);
            self.act(Action::RespawnAndActivate { epoch, run_state });
        }
    }

    pub(super) fn want_rehearsal(&mut self) {
        if self.rehearsal.is_some() || self.activation.is_some() {
            return;
        }
        if self.last_applied == Epoch::NONE {
            return self.on_rehearsed(false, "there is no complete epoch to rehearse".to_owned());
        }
        self.rehearsed = true;
        self.rehearsal = Some(Rehearsal::Preparing);
        self.act(Action::PrepareRehearsal);
    }

    pub(super) fn on_rehearsal_ready(&mut self) {
        if let Some(rehearsal) = &mut self.rehearsal {
            *rehearsal = Rehearsal::Ready;
        }
    }

    pub(super) fn rehearsal_runs(&self) -> bool {
        self.rehearsal == Some(Rehearsal::Running)
    }

    pub(super) fn advance_rehearsal(&mut self) {
        let idle = self.applying.is_none() && self.held.is_none();
        if self.rehearsal == Some(Rehearsal::Ready) && idle {
            self.rehearsal = Some(Rehearsal::Running);
            let (epoch, run_state) = (self.last_applied, self.run_state);
            self.act(Action::Rehearse { epoch, run_state });
        }
    }

    pub(super) fn on_rehearsed(&mut self, ok: bool, text: String) {
        self.rehearsal = None;
        self.report(Report::Rehearsed {
            ok,
            text: text.clone(),
        });
        if self.activation.is_none() {
            self.send_to_peer(self.last_applied, &Message::Rehearsed { ok, text });
        }
        self.start_apply();
    }
}
