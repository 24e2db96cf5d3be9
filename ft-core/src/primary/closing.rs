//! Ending the protection: detach, power-off, switchover, and a QEMU that died.

use std::time::Duration;

use super::session::{LinkState, RETRY_FAST};
use super::{Action, End, GateState, OnBackupLoss, Primary, Report};
use crate::types::{Epoch, Micros};
use crate::wire::{Farewell, Message};

/// How long the backup may take to confirm an end in good order.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(2);
/// How long the backup may take to activate when it was told to.
const ACTIVATION_PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Closing {
    kind: Kind,
    /// The message is out, on this link.
    sent: bool,
    /// How long an answer, or a link to ask on, is waited for.
    until: Option<Micros>,
}

#[derive(Debug)]
enum Kind {
    /// The guest runs on.
    Detach(End),
    PoweredOff,
    Switchover,
    QemuDied(String),
}

impl Closing {
    pub(super) fn detach(end: End) -> Closing {
        Closing {
            kind: Kind::Detach(end),
            sent: false,
            until: None,
        }
    }

    pub(super) fn switchover() -> Closing {
        Closing {
            kind: Kind::Switchover,
            sent: false,
            until: None,
        }
    }

    pub(super) fn is_switchover(&self) -> bool {
        matches!(self.kind, Kind::Switchover)
    }

    pub(super) fn is_power_off(&self) -> bool {
        matches!(self.kind, Kind::PoweredOff)
    }

    pub(super) fn allows_boundary(&self) -> bool {
        self.is_switchover() && !self.sent
    }

    pub(super) fn deadline(&self) -> Option<Micros> {
        self.until
    }
}

impl Primary {
    pub(super) fn begin_closing(&mut self, closing: Closing) {
        // A switchover that is still preparing gives way: its last epoch may never come.
        if self.closing.as_ref().is_none_or(Closing::allows_boundary) {
            self.closing = Some(closing);
        }
    }

    /// What a detach would have to wait for now, and for how long: there is no link on which the
    /// backup could be asked.
    pub fn detach_waits(&self) -> Option<String> {
        if self.link.is_up() || !self.backup_may_activate {
            return None;
        }
        let left = self.lease.ends().since(self.now).as_secs_f64();
        let until = match self.config.on_backup_loss {
            _ if self.hold.fenced => {
                "the guest stands still and can't be left before it is heard".to_owned()
            }
            OnBackupLoss::Pause => {
                format!(
                    "without a limit, and the guest stops in {left:.1} s if it is not heard by then"
                )
            }
            OnBackupLoss::Continue => format!("for {left:.1} s at most"),
        };
        Some(format!(
            "the detach waits for the backup, which is not connected and may take over: {until}. If \
             you know that the backup doesn't run the guest, `curling-rdma continue` ends the wait"
        ))
    }

    pub(super) fn switchover_wanted(&self) -> bool {
        self.closing
            .as_ref()
            .is_some_and(|c| c.is_switchover() && !c.sent)
    }

    pub(super) fn on_shutdown(&mut self) {
        if self
            .closing
            .as_ref()
            .is_some_and(|c| c.is_switchover() && c.sent)
        {
            return; // in a moment that is forgotten: the backup's copy will power off itself
        }
        self.guest_running = false;
        self.closing = Some(Closing {
            kind: Kind::PoweredOff,
            sent: false,
            until: None,
        });
    }

    pub(super) fn on_qemu_gone(&mut self, text: String) {
        self.boundary = None;
        self.sync = None;
        // No reply comes any more.
        self.hold.pauses_pending = 0;
        self.hold.resumes_pending = 0;
        self.guest_running = false;
        if let Some(Closing {
            kind: Kind::PoweredOff,
            ..
        }) = self.closing
        {
            return; // it was told to quit; the farewell is on its way
        }
        if self.backup_may_activate {
            // It may only have lost its QMP connection, and the backup is about to hear that it died.
            self.act(Action::EndVm);
        }
        self.closing = Some(Closing {
            kind: Kind::QemuDied(text),
            sent: false,
            until: None,
        });
    }

    /// Sends the last word when nothing is under way that it could overtake.
    pub(super) fn advance_closing(&mut self) {
        let Some(closing) = &self.closing else { return };
        if closing.sent || self.finished {
            return;
        }
        let (up, backup_matters) = (self.link.is_up(), self.backup_may_activate);
        match &closing.kind {
            Kind::Detach(_) => {
                if self.boundary.is_some() || self.sync.as_ref().is_some_and(|s| s.arming()) {
                    return;
                }
                if up {
                    self.say_farewell(Farewell::Detach);
                } else if !backup_matters {
                    self.end_closing();
                }
                // Else: wait for the link, the proof or the operator. Leaving now would let
                // the backup start a second copy.
            }
            Kind::PoweredOff if up => self.say_farewell(Farewell::PoweredOff),
            Kind::PoweredOff if backup_matters => self.wait_until(FAREWELL_PATIENCE),
            Kind::PoweredOff => self.end_closing(),
            Kind::QemuDied(text) if up && backup_matters => {
                let text = text.clone();
                self.send(self.acknowledged, &Message::QemuDied { text });
                self.activation_ordered = true;
                self.sent(ACTIVATION_PATIENCE);
            }
            Kind::QemuDied(_) if backup_matters => {
                self.wait_until(self.config.lease + ACTIVATION_PATIENCE);
            }
            Kind::QemuDied(_) => self.end_closing(),
            Kind::Switchover => {
                // The last epoch leaves the guest fenced; its release ends it.
                let settled = self.boundary.is_none() && self.inflight.is_none();
                if !self.hold.fenced || !settled || self.hold_pending() || !up {
                    return;
                }
                if self.last_output_waits {
                    self.let_last_output_out();
                } else {
                    self.send(self.acknowledged, &Message::Switchover);
                    self.activation_ordered = true;
                    self.sent(ACTIVATION_PATIENCE);
                }
            }
        }
    }

    /// The guest runs for a moment, and never again. The gate holds what it says then, and the backup goes on
    /// from before it. Not after the lease, when the backup may run a copy already: an answer of
    /// the backup makes it good again.
    fn let_last_output_out(&mut self) {
        if self.now < self.lease.ends() {
            self.last_output_waits = false;
            self.hold.resumes_pending += 1;
            self.resume_vm();
            self.hold.pauses_pending += 1;
            self.pause_vm();
        }
    }

    fn say_farewell(&mut self, why: Farewell) {
        let run_state = self.run_state();
        self.send(Epoch::NONE, &Message::Farewell { why, run_state });
        self.sent(FAREWELL_PATIENCE);
    }

    fn sent(&mut self, patience: Duration) {
        let until = self.now + patience;
        if let Some(closing) = &mut self.closing {
            closing.sent = true;
            closing.until = Some(until);
        }
    }

    /// No link to ask on: gives up some time, if nothing else ends the wait.
    fn wait_until(&mut self, patience: Duration) {
        let until = self.now + patience;
        if let Some(closing) = &mut self.closing {
            closing.until.get_or_insert(until);
        }
    }

    /// The link is gone, and perhaps our last word with it: it is said again on the next one.
    pub(super) fn unsay_closing(&mut self) {
        if let Some(closing) = self.closing.as_mut().filter(|c| !c.is_switchover()) {
            closing.sent = false;
        }
    }

    pub(super) fn on_farewell_ack(&mut self) {
        if matches!(self.link, LinkState::Clearing { .. }) {
            return self.drop_link(RETRY_FAST);
        }
        let answered = |c: &Closing| c.sent && matches!(c.kind, Kind::Detach(_) | Kind::PoweredOff);
        if self.closing.as_ref().is_some_and(answered) {
            self.backup_may_activate = false;
            self.end_closing();
        }
    }

    pub(super) fn on_closing_timeout(&mut self) {
        let Some(closing) = &mut self.closing else {
            return;
        };
        if closing.until.is_none_or(|until| self.now < until) {
            return;
        }
        match &closing.kind {
            Kind::Detach(_) => {
                let text = "the backup did not confirm the end; it may take over, so the guest \
                            stays protected: try again, or say continue first";
                self.report(Report::Error(text.to_owned()));
                self.break_link("no answer to the farewell".to_owned());
                self.closing = None;
            }
            Kind::PoweredOff => {
                let text = "the backup did not confirm the power-off and may start the guest";
                self.report(Report::Error(text.to_owned()));
                self.end_closing();
            }
            Kind::QemuDied(_) => self.end_closing(),
            Kind::Switchover => {
                // It may have activated: only its hello or its death settles that.
                self.closing = None;
                self.break_link("the backup did not answer the switchover".to_owned());
            }
        }
    }

    fn end_closing(&mut self) {
        let Some(closing) = self.closing.take() else {
            return;
        };
        match closing.kind {
            Kind::Detach(end) => {
                self.set_throttled(false);
                self.unfence();
                if self.stopped_by_us && self.guest_running {
                    self.resume_vm(); // later nobody would
                }
                self.act(Action::Guardian { armed: false });
                self.act(Action::LeaveVm);
                self.store_unprotected();
                self.act(Action::CloseLink);
                self.finish(end);
            }
            Kind::PoweredOff => {
                self.act(Action::Guardian { armed: false });
                self.store_unprotected();
                if !self.backup_may_activate {
                    // What is held may leave. With filter-buffer it gets no further than QEMU's own
                    // queues, which stand still with the guest.
                    self.act(Action::Gate(GateState::Open));
                }
                self.act(Action::EndVm);
                self.act(Action::CloseLink);
                self.finish(End::PoweredOff);
            }
            Kind::QemuDied(text) => self.finish(End::Lost(text)),
            Kind::Switchover => {}
        }
    }

    fn store_unprotected(&mut self) {
        self.act(Action::StoreTerm {
            term: self.term,
            protected: false,
        });
    }
}
