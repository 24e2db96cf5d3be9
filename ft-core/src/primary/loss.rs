//! The lease, the fence, and the end of a QEMU.

use super::closing::Closing;
use super::commands::Kind;
use super::session::RETRY_SLOW;
use super::{Action, Command, End, OnBackupLoss, Primary, Report};
use crate::types::{Epoch, Micros};
use crate::wire::Message;

impl Primary {
    pub(super) fn lease_deadline(&self) -> Option<Micros> {
        (self.backup_may_activate && !self.hold.fenced).then(|| self.lease.ends())
    }

    pub(super) fn on_lease_timeout(&mut self) {
        if self.lease_deadline().is_none_or(|at| self.now < at) {
            return;
        }
        match self.config.on_backup_loss {
            OnBackupLoss::Pause => self.fence(),
            OnBackupLoss::Continue => {
                let text = "no sign of the backup; running on without it, as --on-backup-loss \
                            continue says: it may have activated";
                self.break_link("the lease is over".to_owned());
                self.go_unprotected(false, text.to_owned());
            }
        }
    }

    fn fence(&mut self) {
        // First of all: what comes after may take time.
        self.fence_vm();
        self.hold.fenced = true;
        self.report(Report::Fenced);
        if self.link.is_heard() {
            self.break_link("the lease is over".to_owned());
        }
    }

    /// The backup was heard again and has not activated, or can't: the guest may run.
    pub(super) fn unfence(&mut self) {
        if self.hold.fenced {
            self.hold.fenced = false;
            self.act(Action::ThawVm);
            self.report(Report::Unfenced);
        }
    }

    pub(super) fn fence_vm(&mut self) {
        self.stopped_by_us |= self.guest_running;
        self.commands.sent(Kind::Fence);
        self.act(Action::FenceVm);
    }

    /// Whether a backup that is dead now can have activated before, and spoken to the world: a
    /// lease that has run out, or an order of ours, allowed it to.
    pub(super) fn may_have_activated(&self) -> bool {
        self.backup_may_activate && (self.activation_ordered || self.now >= self.lease.ends())
    }

    pub(super) fn on_command(&mut self, command: Command) {
        match command {
            Command::Detach => {
                if let Some(text) = self.detach_waits() {
                    self.report(Report::Note(text));
                }
                self.begin_closing(Closing::detach(End::Detached));
            }
            Command::Switchover => {
                if self.link.is_up() && self.acknowledged != Epoch::NONE {
                    self.begin_closing(Closing::switchover());
                } else {
                    let text = "switchover refused: the backup has no complete epoch";
                    self.report(Report::Error(text.to_owned()));
                }
            }
            Command::Continue if self.link.is_up() && !self.hold.fenced => {
                let text = "continue refused: the backup is there, and protects the guest";
                self.report(Report::Error(text.to_owned()));
            }
            Command::Continue => {
                let text = "the operator said continue: the backup may have activated";
                self.break_link("the operator said continue".to_owned());
                self.go_unprotected(false, text.to_owned());
            }
            Command::Rehearse => {
                if self.link.is_up() {
                    self.send(Epoch::NONE, &Message::Rehearse);
                } else {
                    let text = "rehearsal refused: no link to the backup";
                    self.report(Report::Error(text.to_owned()));
                }
            }
        }
    }

    pub(super) fn on_stand_down(&mut self) {
        self.send(Epoch::NONE, &Message::FarewellAck);
        self.drop_link(RETRY_SLOW);
        self.go_unprotected(true, "the backup stood down".to_owned());
    }

    pub(super) fn on_shape_changed(&mut self, text: String) {
        self.report(Report::Error(text.clone()));
        self.begin_closing(Closing::detach(End::Unprotectable(text)));
    }
}
