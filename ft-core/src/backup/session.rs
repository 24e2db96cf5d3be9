//! Who may talk to this backup: the hello, replays, and what a lost link leaves behind.

use std::time::Duration;

use super::{Action, Backup, LinkDown, LinkId, Reason, Report, State};
use crate::detector::Silence;
use crate::types::{Epoch, EpochKind, Session, SlotId};
use crate::wire::{
    self, Farewell, Frame, Hello, Message, PROTOCOL_VERSION, RefusalCode, Role, WireError, features,
};

/// How long the primary may take to confirm that this side stands down.
pub(super) const FAREWELL_PATIENCE: Duration = Duration::from_secs(2);
/// Links that have not said hello yet; the oldest goes when there are more.
const CANDIDATES_MAX: usize = 8;
/// A lease that a peer may ask for.
const LEASE_MIN: Duration = Duration::from_millis(10);
const LEASE_MAX: Duration = Duration::from_secs(3600);

/// The primary that this backup serves.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) session: Session,
    pub(super) link: Option<LinkId>,
    /// The last link that was accepted: its proof lane counts even when its other lanes broke.
    proof: LinkId,
    attempt: u32,
    pub(super) silence: Silence,
}

impl Backup {
    pub(super) fn on_link_up(&mut self, link: LinkId) {
        if self.candidates.len() >= CANDIDATES_MAX {
            let oldest = self.candidates.remove(0);
            self.act(Action::CloseLink(oldest));
        }
        self.candidates.push(link);
    }

    pub(super) fn on_link_down(&mut self, link: LinkId, down: &LinkDown) {
        self.candidates.retain(|c| *c != link);
        let Some(peer) = self.peer.as_mut().filter(|p| p.is_on(link)) else {
            return;
        };
        let was_up = peer.link.is_some();
        match down {
            LinkDown::Broken(_) if !was_up => {}
            LinkDown::Broken(text) => {
                self.report(Report::LinkLost { text: text.clone() });
                self.lose_link();
            }
            LinkDown::PeerDead => {
                self.lose_link();
                self.decide(Reason::ProofOfDeath);
            }
        }
    }

    /// The session's link can't be used any more. Its proof lane stays watched.
    fn lose_link(&mut self) {
        if let Some(peer) = &mut self.peer {
            peer.link = None;
        }
        self.discard_fill();
        if self.standing_down.is_some() {
            self.end_stand_down();
        } else if self.state == State::Syncing {
            self.set_state(State::Waiting);
        }
    }

    /// Ends the link because the primary broke the protocol, or its bytes are damaged.
    pub(super) fn break_peer(&mut self, text: String) {
        if let Some(link) = self.peer.as_ref().and_then(|p| p.link) {
            self.report(Report::Error(format!("link closed: {text}")));
            self.act(Action::CloseLink(link));
            self.lose_link();
        }
    }

    pub(super) fn on_bytes(&mut self, link: LinkId, bytes: &[u8]) {
        let decoded = wire::decode(bytes);
        if self.peer.as_ref().is_some_and(|p| p.link == Some(link)) {
            match decoded {
                Ok((frame, message)) => self.on_message(link, frame, message),
                Err(error) => self.break_peer(format!("message from the primary: {error}")),
            }
        } else if self.candidates.contains(&link) {
            match decoded {
                Ok((frame, Message::Hello(hello))) => self.on_hello(link, frame, &hello),
                Ok(_) => {
                    let text = "a hello must come first".to_owned();
                    self.refuse(link, RefusalCode::Malformed, text);
                }
                Err(error) => {
                    let code = match error {
                        WireError::Version { .. } => RefusalCode::Version,
                        _ => RefusalCode::Malformed,
                    };
                    self.refuse(link, code, error.to_string());
                }
            }
        }
    }

    fn refuse(&mut self, link: LinkId, code: RefusalCode, text: String) {
        self.candidates.retain(|c| *c != link);
        self.report(Report::Refused { text: text.clone() });
        let message = Message::Refused { code, text };
        let frame = Frame {
            vm: self.config.vm,
            term: self.term,
            ..Frame::default()
        };
        self.act(Action::Send(link, wire::encode(frame, &message)));
        self.act(Action::CloseLink(link));
    }

    fn on_hello(&mut self, link: LinkId, frame: Frame, hello: &Hello) {
        if let Err((code, text)) = self.judge_hello(frame, hello) {
            return self.refuse(link, code, text);
        }
        self.candidates.retain(|c| *c != link);
        if self.activation.is_some() {
            // It may be the primary that was cut off: the answer's term ends its guest.
            let answer = self.our_hello(hello);
            let bytes = wire::encode(
                Frame {
                    session: frame.session,
                    ..self.frame(self.last_flipped)
                },
                &answer,
            );
            self.act(Action::Send(link, bytes));
            return self.act(Action::CloseLink(link));
        }
        if frame.term > self.term {
            self.term = frame.term;
            self.act(Action::StoreTerm {
                term: self.term,
                activated: false,
            });
        }
        let resumes = self
            .peer
            .as_ref()
            .is_some_and(|p| p.session == frame.session);
        if let Some(old) = self.peer.as_mut().and_then(|p| p.link.take()) {
            self.act(Action::CloseLink(old));
            self.discard_fill();
        }
        if !resumes {
            self.forget_image();
        }
        let lease = Duration::from_micros(hello.lease_us);
        self.peer = Some(Peer {
            session: frame.session,
            link: Some(link),
            proof: link,
            attempt: hello.attempt,
            silence: Silence::new(lease, self.now),
        });
        self.act(Action::UseLink(link));
        let answer = self.our_hello(hello);
        self.send(link, self.last_flipped, &answer);
        self.report(Report::Connected);
        if let Some(text) = self.standby_lost.take() {
            return self.tell_of_lost_standby(text);
        }
        // A fresh link may be of another kind of memory: both slots start empty.
        if self.state == State::Tainted {
            // It may have been said on a link that broke before it arrived.
            let kind = EpochKind::Full;
            let text = "an audit or an apply failed".to_owned();
            self.send(link, self.last_flipped, &Message::Resync { kind, text });
        }
        if self.last_flipped == Epoch::NONE {
            self.set_state(State::Syncing);
            self.report(Report::Syncing);
            self.open_sync();
        } else {
            self.open_fill();
        }
    }

    fn judge_hello(&self, frame: Frame, hello: &Hello) -> Result<(), (RefusalCode, String)> {
        let ours = &self.config.vm_id;
        if frame.vm != self.config.vm || hello.vm_id != *ours {
            let text = format!("this backup is for the VM {ours}, not for {}", hello.vm_id);
            return Err((RefusalCode::OtherVm, text));
        }
        if hello.role != Role::Primary {
            return Err((RefusalCode::Role, "both sides are backups".to_owned()));
        }
        if hello.features != features::SUPPORTED {
            let (theirs, ours) = (hello.features, features::SUPPORTED);
            let text = format!("features {theirs:#x} are asked for, this backup has {ours:#x}");
            return Err((RefusalCode::Features, text));
        }
        let lease = Duration::from_micros(hello.lease_us);
        if !(LEASE_MIN..=LEASE_MAX).contains(&lease) {
            let text =
                format!("a lease of {lease:?} is not between {LEASE_MIN:?} and {LEASE_MAX:?}");
            return Err((RefusalCode::Malformed, text));
        }
        if self.standing_down.is_some() {
            return Err((RefusalCode::Busy, "this backup is standing down".to_owned()));
        }
        if self.activation.is_some() {
            return Ok(());
        }
        if let Err(difference) = hello.shape.check_standby(&self.config.shape) {
            return Err((RefusalCode::Shape, difference.to_string()));
        }
        let Some(peer) = &self.peer else {
            return Ok(());
        };
        if peer.session == frame.session {
            let text = || format!("attempt {} was seen before: a replay", hello.attempt);
            return (hello.attempt > peer.attempt)
                .then_some(())
                .ok_or((RefusalCode::Replay, text()));
        }
        let free = match self.state {
            State::Waiting => self.applying.is_none(),
            State::Syncing => peer.link.is_none(),
            // Nobody would activate what it has.
            State::Tainted => peer.link.is_none() && self.applying.is_none(),
            _ => false,
        };
        let text = || {
            let epoch = self.last_flipped;
            format!(
                "this backup is {} another session (epoch {epoch})",
                self.state.as_str()
            )
        };
        free.then_some(()).ok_or((RefusalCode::Busy, text()))
    }

    fn our_hello(&self, theirs: &Hello) -> Message {
        Message::Hello(Hello {
            role: Role::Backup,
            versions: (PROTOCOL_VERSION, PROTOCOL_VERSION),
            features: features::SUPPORTED,
            vm_id: self.config.vm_id.clone(),
            attempt: theirs.attempt,
            last_epoch: self.last_flipped,
            activated: self.activation.is_some(),
            heartbeat_us: theirs.heartbeat_us,
            lease_us: theirs.lease_us,
            shape: self.config.shape.clone(),
        })
    }

    fn on_message(&mut self, link: LinkId, frame: Frame, message: Message) {
        if self.activation.is_some() {
            // Whoever still speaks to us must hear that its term is over.
            return self.send(link, self.last_flipped, &Message::Activated);
        }
        let expected = self.frame(frame.epoch);
        if frame != expected {
            let (theirs, ours) = (frame.term, expected.term);
            return self.break_peer(format!(
                "message of another VM, session or term (term {theirs}, here {ours})"
            ));
        }
        match message {
            Message::Heartbeat { sent_us } => {
                if let Some(peer) = &mut self.peer {
                    peer.silence.heard(self.now);
                }
                self.send(link, Epoch::NONE, &Message::HeartbeatReply { sent_us });
            }
            Message::QemuDied { text } => {
                self.report(Report::Note(format!("the primary's QEMU died: {text}")));
                self.decide(Reason::QemuDied);
            }
            Message::Switchover if frame.epoch == self.last_flipped => {
                self.decide(Reason::Switchover);
            }
            Message::Switchover => self.break_peer(format!(
                "switchover at epoch {}, but epoch {} is here",
                frame.epoch, self.last_flipped
            )),
            Message::Farewell { why, .. } => self.on_farewell(link, why),
            Message::FarewellAck => {
                if self.standing_down.is_some() {
                    self.end_stand_down();
                }
            }
            Message::Rehearse => self.want_rehearsal(),
            Message::HeartbeatReply { .. } => {}
            Message::Hello(_)
            | Message::Refused { .. }
            | Message::Grant(_)
            | Message::Ack
            | Message::AuditResult { .. }
            | Message::Resync { .. }
            | Message::Activated
            | Message::Rehearsed { .. } => {
                self.break_peer("message that a primary does not send".to_owned());
            }
        }
    }

    fn on_farewell(&mut self, link: LinkId, why: Farewell) {
        self.send(link, Epoch::NONE, &Message::FarewellAck);
        match why {
            Farewell::PoweredOff => {
                self.act(Action::EndStandby);
                self.finish(super::End::PoweredOff);
            }
            Farewell::Detach | Farewell::StandDown => {
                self.report(Report::PrimaryLeft);
                // The primary closes the link when it has read our answer: a FIN of ours on the
                // bulk lane could overtake that.
                self.on_link_up(link);
                self.lose_link();
                self.peer = None;
                self.forget_image();
            }
        }
    }

    /// What is in the standby's RAM is worth nothing from now on.
    pub(super) fn forget_image(&mut self) {
        self.last_flipped = Epoch::NONE;
        self.last_applied = Epoch::NONE;
        self.discard_held();
        self.rehearsed = false;
        self.set_state(State::Waiting);
        self.act(Action::ForgetImage);
    }

    pub(super) fn revoke_all(&mut self) {
        self.discard_fill();
        self.act(Action::Revoke(SlotId(0)));
        self.act(Action::Revoke(SlotId(1)));
    }
}

impl Peer {
    fn is_on(&self, link: LinkId) -> bool {
        self.proof == link
    }
}
