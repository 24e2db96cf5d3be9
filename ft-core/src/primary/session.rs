//! Connecting, the hello, and what both sides agree on after a loss of the link.

use std::time::Duration;

use super::{Action, End, GateState, LinkDown, Primary, Protection, Report};
use crate::types::{Epoch, EpochKind, Micros, Term};
use crate::wire::{self, Farewell, Hello, Message, PROTOCOL_VERSION, RefusalCode, Role, features};

pub(super) const RETRY_FAST: Duration = Duration::from_millis(100);
pub(super) const RETRY_SLOW: Duration = Duration::from_secs(1);
/// A backup that accepts a connection and then says nothing is not one.
const GREETING_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkState {
    Down {
        retry_at: Option<Micros>,
    },
    Connecting,
    Greeting {
        until: Micros,
    },
    /// The backup said what it has; we act on it when nothing of ours is under way.
    Settling {
        backup_has: Epoch,
    },
    /// The backup has an image that we don't go by any more; it was told to forget it.
    Clearing {
        until: Micros,
    },
    Up,
}

impl LinkState {
    pub(super) fn is_up(self) -> bool {
        self == LinkState::Up
    }

    /// The backup has answered our hello: heartbeats mean something.
    pub(super) fn is_heard(self) -> bool {
        matches!(self, LinkState::Settling { .. } | LinkState::Up)
    }

    fn is_connected(self) -> bool {
        !matches!(self, LinkState::Down { .. } | LinkState::Connecting)
    }
}

impl Primary {
    pub(super) fn connect(&mut self) {
        self.link = LinkState::Connecting;
        self.act(Action::Connect);
    }

    pub(super) fn connect_deadline(&self) -> Option<Micros> {
        match self.link {
            LinkState::Down { retry_at } => retry_at,
            LinkState::Greeting { until } | LinkState::Clearing { until } => Some(until),
            _ => None,
        }
    }

    pub(super) fn on_connect_timeout(&mut self) {
        if self.connect_deadline().is_none_or(|at| self.now < at) {
            return;
        }
        match self.link {
            LinkState::Down { .. } => self.connect(),
            _ => self.break_link("the backup did not answer".to_owned()),
        }
    }

    pub(super) fn on_link_up(&mut self) {
        self.link = LinkState::Greeting {
            until: self.now + GREETING_PATIENCE,
        };
        self.attempt += 1;
        self.last_heartbeat_sent = self.now;
        let hello = Message::Hello(Hello {
            role: Role::Primary,
            versions: (PROTOCOL_VERSION, PROTOCOL_VERSION),
            features: features::SUPPORTED,
            vm_id: self.config.vm_id.clone(),
            attempt: self.attempt,
            last_epoch: self.acknowledged,
            activated: false,
            heartbeat_us: micros(self.config.heartbeat),
            lease_us: micros(self.config.lease),
            shape: self.vm.shape.clone(),
        });
        self.send(self.acknowledged, &hello);
    }

    pub(super) fn on_bytes(&mut self, bytes: &[u8]) {
        if !self.link.is_connected() {
            return; // still in the pipe of a link that we have let go of
        }
        let (frame, message) = match wire::decode(bytes) {
            Ok(decoded) => decoded,
            Err(error) => return self.break_link(format!("message from the backup: {error}")),
        };
        let ours = (self.config.vm, self.config.session);
        if (frame.vm, frame.session) != ours && !matches!(message, Message::Refused { .. }) {
            return self.break_link("message of another VM or session".to_owned());
        }
        // A primary that was started once more after a failover has stored that term.
        let activated =
            frame.term >= self.term && matches!(&message, Message::Hello(hello) if hello.activated);
        if activated || frame.term > self.term && !matches!(message, Message::Refused { .. }) {
            let never_protected =
                self.acknowledged == Epoch::NONE && !self.backup_may_activate && !self.hold.fenced;
            match &message {
                // It activated some other time, and says that it does not run our guest.
                Message::Hello(hello) if never_protected && !hello.activated => {
                    self.term = frame.term;
                }
                _ => return self.superseded(frame.term, &message),
            }
        }
        match message {
            Message::Hello(hello) => self.on_hello(&hello),
            Message::Refused { code, text } => self.on_refused(code, text),
            Message::Grant(batch) => self.on_grant(frame.epoch, batch),
            Message::Ack => self.on_ack(frame.epoch),
            Message::Heartbeat { sent_us } => {
                self.send(Epoch::NONE, &Message::HeartbeatReply { sent_us });
            }
            Message::HeartbeatReply { sent_us } => self.on_heartbeat_reply(Micros(sent_us)),
            Message::AuditResult { mismatched_blocks } => {
                self.on_audit_result(frame.epoch, mismatched_blocks);
            }
            Message::Resync { kind, text } => self.taint(text, kind),
            Message::Farewell {
                why: Farewell::StandDown,
                ..
            } => self.on_stand_down(),
            Message::FarewellAck => self.on_farewell_ack(),
            Message::Rehearsed { ok, text } => self.report(Report::Rehearsed { ok, text }),
            // An activation without a higher term can't be: the backup is broken.
            Message::Activated
            | Message::QemuDied { .. }
            | Message::Switchover
            | Message::Rehearse
            | Message::Farewell { .. } => {
                self.break_link("message that a backup does not send".to_owned());
            }
        }
    }

    fn on_hello(&mut self, hello: &Hello) {
        if !matches!(self.link, LinkState::Greeting { .. }) {
            return self.break_link("a second hello".to_owned());
        }
        if hello.role != Role::Backup {
            let text = "the peer is a primary too; one side needs --mode backup".to_owned();
            return self.on_refused(RefusalCode::Role, text);
        }
        if let Err(difference) = self.vm.shape.check_standby(&hello.shape) {
            return self.on_refused(RefusalCode::Shape, difference.to_string());
        }
        self.act(Action::KeepProof);
        self.link_lost = None;
        self.report(Report::Connected);
        if self.hold.fenced {
            // What is settled next may wait for the replies of a frozen QEMU.
            self.act(Action::ThawVm);
        }
        self.link = LinkState::Settling {
            backup_has: hello.last_epoch,
        };
        self.push.reset();
        self.lease.renew(self.last_heartbeat_sent);
        self.next_heartbeat = self.now;
        self.on_heartbeat_timeout();
    }

    /// Acts on what the backup has, as soon as no boundary and no job of the worker is under
    /// way: their results belong to the time before.
    pub(super) fn settle_session(&mut self) {
        let LinkState::Settling { backup_has } = self.link else {
            return;
        };
        let arming = self.sync.as_ref().is_some_and(super::Sync::arming);
        if self.boundary.is_some() || self.worker_jobs > 0 || arming || self.hold_pending() {
            return;
        }
        self.activation_ordered = false;
        if self.closing.take_if(|c| c.is_switchover()).is_some() {
            let text = "switchover failed: the link was lost and the backup has not activated";
            self.report(Report::Error(text.to_owned()));
        }
        let pending = self.inflight.as_ref().map(|i| i.epoch);
        if backup_has == Epoch::NONE {
            self.link = LinkState::Up;
            if self.closing.is_none() {
                self.begin_sync();
            } else {
                self.backup_may_activate = false;
            }
        } else if Some(backup_has) == pending
            && self.inflight.as_ref().is_some_and(|i| i.last_ready)
        {
            self.link = LinkState::Up;
            if self
                .inflight
                .as_ref()
                .is_some_and(|i| i.acknowledged.is_none())
            {
                self.on_ack(backup_has);
            }
        } else if backup_has == self.acknowledged {
            self.link = LinkState::Up;
            if let Some(inflight) = self.inflight.take_if(|i| i.acknowledged.is_none()) {
                if inflight.kind == EpochKind::Full {
                    self.next_kind = EpochKind::Full;
                }
                self.act(Action::MergeDirt);
            }
            self.set_throttled(false);
        } else if self.acknowledged == Epoch::NONE {
            // We went on without it: its image is of a guest that never was.
            let (why, run_state) = (Farewell::Detach, self.run_state());
            self.send(Epoch::NONE, &Message::Farewell { why, run_state });
            self.link = LinkState::Clearing {
                until: self.now + GREETING_PATIENCE,
            };
            return;
        } else {
            let acknowledged = self.acknowledged;
            return self.break_link(format!(
                "the backup has epoch {backup_has}, but epoch {acknowledged} was acknowledged"
            ));
        }
        self.unfence();
    }

    pub(super) fn on_refused(&mut self, code: RefusalCode, text: String) {
        if matches!(self.link, LinkState::Greeting { .. }) {
            self.act(Action::DropProof);
        }
        let temporary = code == RefusalCode::Busy || self.backup_may_activate;
        if !temporary && self.acknowledged == Epoch::NONE {
            self.act(Action::CloseLink);
            return self.finish(End::Refused { code, text });
        }
        self.break_link(format!("the backup refused: {text}"));
        self.link = LinkState::Down {
            retry_at: Some(self.now + RETRY_SLOW),
        };
    }

    pub(super) fn on_link_down(&mut self, down: LinkDown) {
        match down {
            LinkDown::PeerDead => {
                let text = "the backup's daemon and its QEMU are dead (FIN on the proof lane)";
                self.drop_link(RETRY_SLOW);
                if self.may_have_activated() {
                    let text = format!(
                        "{text}, but it may have activated before: the guest stands still until \
                         a backup says otherwise, or an operator says continue"
                    );
                    return self.report(Report::Error(text));
                }
                self.go_unprotected(true, text.to_owned());
            }
            LinkDown::Broken(text) => {
                if self.link == LinkState::Connecting {
                    // Said once per attempt would fill a night's log.
                    self.link = LinkState::Down {
                        retry_at: Some(self.now + self.retry_delay()),
                    };
                    return;
                }
                if !matches!(self.link, LinkState::Down { .. }) {
                    self.report(Report::Note(format!("link lost: {text}")));
                    self.drop_link(RETRY_FAST);
                }
            }
        }
    }

    /// We end the link because the peer, or we, can't go on with it.
    pub(super) fn break_link(&mut self, text: String) {
        self.report(Report::Error(text));
        self.drop_link(RETRY_FAST);
    }

    pub(super) fn drop_link(&mut self, retry: Duration) {
        self.act(Action::CloseLink);
        if self.link.is_heard() {
            self.link_lost = Some(self.now);
            self.report(Report::LinkLost);
        }
        self.unsay_closing();
        self.link = LinkState::Down {
            retry_at: Some(self.now + retry),
        };
        self.push.reset();
        self.abandon_sync();
        if self.boundary.as_ref().is_some_and(|b| !b.is_taken()) {
            self.abort_boundary("the link was lost".to_owned());
        }
        if !self.backup_may_activate && self.protection != Protection::Unprotected {
            self.go_unprotected(true, "the link was lost before the first epoch".to_owned());
        }
    }

    fn retry_delay(&self) -> Duration {
        if self.backup_may_activate {
            RETRY_FAST
        } else {
            RETRY_SLOW
        }
    }

    pub(super) fn on_heartbeat_timeout(&mut self) {
        if self.link.is_heard() && self.now >= self.next_heartbeat {
            self.next_heartbeat = self.now + self.config.heartbeat;
            self.send_heartbeat();
        }
    }

    fn on_heartbeat_reply(&mut self, sent: Micros) {
        if sent <= self.last_heartbeat_sent {
            self.lease.renew(sent);
        }
    }

    /// The first acknowledgement of a synchronisation starts the protection.
    pub(super) fn on_first_ack(&mut self, epoch: Epoch) {
        self.set_protection(Protection::Protected);
        self.act(Action::StoreTerm {
            term: self.term,
            protected: true,
        });
        self.act(Action::Guardian { armed: true });
        // After a loss of the link the hello acknowledges it, and the rounds are forgotten.
        let sync = self.sync.take();
        let began = sync.as_ref().map_or(self.now, super::Sync::began);
        self.report(Report::Synced {
            epoch,
            rounds: sync.as_ref().map_or(0, super::Sync::rounds),
            took: self.now.since(began),
        });
    }

    /// The other copy of the VM is the real one: this one must end.
    fn superseded(&mut self, term: Term, message: &Message) {
        self.term = term;
        self.act(Action::FenceVm);
        let runs_there = !matches!(message, Message::Hello(hello) if !hello.activated);
        // Then it must not be started here again.
        self.act(Action::StoreTerm {
            term,
            protected: runs_there,
        });
        self.act(Action::EndVm);
        if !runs_there {
            let text = "the backup has a higher term, but does not run the guest".to_owned();
            return self.finish(End::Lost(text));
        }
        let wanted = self
            .closing
            .as_ref()
            .is_some_and(super::Closing::is_switchover);
        let end = if wanted {
            End::SwitchedOver { term }
        } else {
            End::FailedOver { term }
        };
        self.finish(end);
    }

    /// The backup is gone for good, or the operator says so: the guest runs alone.
    pub(super) fn go_unprotected(&mut self, proven: bool, text: String) {
        self.backup_may_activate = false;
        if self.protection != Protection::Unprotected {
            self.set_protection(Protection::Unprotected);
            self.report(Report::BackupLost { proven, text });
            self.act(Action::Guardian { armed: false });
            self.act(Action::StoreTerm {
                term: self.term,
                protected: false,
            });
            self.act(Action::Gate(GateState::Open));
        }
        self.acknowledged = Epoch::NONE;
        self.acknowledged_boundary = None;
        self.run_state_sent = None;
        self.next_kind = EpochKind::Delta;
        self.failures = 0;
        self.activation_ordered = false;
        if self.inflight.take().is_some() {
            self.act(Action::MergeDirt);
        }
        if self.closing.take_if(|c| c.is_switchover()).is_some() {
            self.report(Report::Error(
                "switchover failed: the backup is lost".to_owned(),
            ));
        }
        self.set_throttled(false);
        self.unfence();
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
