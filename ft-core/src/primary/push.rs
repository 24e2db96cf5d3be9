//! Chunks meet grants; an epoch is in flight until it is acknowledged *and* released.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Action, EpochReport, Phases, Primary, Protection, Report};
use crate::limits::EPOCH_CHUNKS_MAX;
use crate::types::{Epoch, EpochKind, GrantToken, Micros, RunState};
use crate::wire::{ChunkTag, GrantBatch, Message};

/// Grants that a peer may have outstanding: more than any window needs, and a bound.
const GRANTS_MAX: usize = 8192;

/// An epoch between its harvest and the return of its release.
#[derive(Debug)]
pub(super) struct Inflight {
    pub(super) epoch: Epoch,
    pub(super) kind: EpochKind,
    pub(super) audit: bool,
    pub(super) run_state: RunState,
    pub(super) boundary_at: Micros,
    /// How long the guest had run.
    pub(super) ran: Duration,
    /// When `cont` returned, and how long the guest had stood still.
    pub(super) resumed: Option<(Micros, Duration)>,
    pub(super) phases: Phases,
    pub(super) dirty_pages: u64,
    pub(super) precopied_pages: u64,
    pub(super) bytes: u64,
    pub(super) last_ready: bool,
    /// When it was.
    pub(super) sealed_at: Micros,
    pub(super) last_pushed: bool,
    pub(super) acknowledged: Option<Micros>,
    pub(super) released: bool,
}

#[derive(Debug, Default)]
pub(super) struct PushQueue {
    ready: VecDeque<(u32, bool)>,
    sync_grants: VecDeque<GrantToken>,
    epoch_grants: VecDeque<GrantToken>,
    /// The epoch that `epoch_grants` are for.
    granted_epoch: Epoch,
}

impl PushQueue {
    /// The link is gone, and everything that it promised.
    pub(super) fn reset(&mut self) {
        *self = PushQueue::default();
    }
}

impl Primary {
    pub(super) fn on_grant(&mut self, epoch: Epoch, batch: GrantBatch) {
        let queue = if epoch == Epoch::NONE {
            &mut self.push.sync_grants
        } else {
            if epoch < self.push.granted_epoch {
                return; // of an epoch that is over: its slot is revoked
            }
            if epoch > self.push.granted_epoch {
                self.push.granted_epoch = epoch;
                self.push.epoch_grants.clear();
            }
            &mut self.push.epoch_grants
        };
        if queue.len() + batch.grants.len() > GRANTS_MAX {
            return self.break_link(format!("backup granted more than {GRANTS_MAX} chunks"));
        }
        queue.extend(batch.grants);
    }

    pub(super) fn on_chunk_ready(&mut self, index: u32, last: bool, bytes: u64) {
        if last {
            self.worker_jobs -= 1; // the seal
        }
        match &mut self.inflight {
            Some(inflight) => {
                inflight.bytes += bytes;
                inflight.last_ready |= last;
                inflight.sealed_at = self.now;
            }
            None if last => return, // of an epoch that was given up
            None => self.note_sync_chunk(index, bytes),
        }
        // Without a link the driver has dropped the chunk; the hello decides what to send again.
        if self.link.is_up() {
            self.push.ready.push_back((index, last));
        }
    }

    /// Pairs what is ready with what is granted.
    pub(super) fn pump(&mut self) {
        if !self.link.is_up() {
            return;
        }
        let epoch = match (&self.sync, &self.inflight) {
            (_, Some(inflight)) => inflight.epoch,
            (Some(_), None) => Epoch::NONE,
            (None, None) => return,
        };
        let queue = &mut self.push;
        let grants = if epoch == Epoch::NONE {
            &mut queue.sync_grants
        } else if epoch == queue.granted_epoch {
            &mut queue.epoch_grants
        } else {
            return;
        };
        while !queue.ready.is_empty() && !grants.is_empty() {
            let (Some((index, last)), Some(to)) = (queue.ready.pop_front(), grants.pop_front())
            else {
                break;
            };
            // Live rounds number on beyond what a tag holds; the header has all of it.
            let tag = ChunkTag::new(epoch, index % EPOCH_CHUNKS_MAX, last);
            self.actions.push_back(Action::Push { index, to, tag });
            if last {
                // It may arrive whole even if this host dies now.
                self.backup_may_activate = true;
            }
        }
    }

    pub(super) fn on_chunk_pushed(&mut self, _index: u32) {
        if let Some(inflight) = &mut self.inflight {
            inflight.last_pushed = inflight.last_ready && self.push.ready.is_empty();
        } else {
            self.on_sync_chunk_pushed();
        }
    }

    pub(super) fn on_ack(&mut self, epoch: Epoch) {
        let Some(inflight) = &mut self.inflight else {
            return self.break_link(format!(
                "acknowledgement of epoch {epoch} that isn't pending"
            ));
        };
        if inflight.epoch != epoch || !inflight.last_ready || inflight.acknowledged.is_some() {
            let pending = inflight.epoch;
            return self.break_link(format!(
                "acknowledgement of epoch {epoch} while epoch {pending} is pending"
            ));
        }
        inflight.acknowledged = Some(self.now);
        let (kind, boundary_at, run_state) =
            (inflight.kind, inflight.boundary_at, inflight.run_state);
        self.failures = 0;
        self.acknowledged = epoch;
        self.acknowledged_boundary = Some(boundary_at);
        self.run_state_sent = Some(run_state);
        if kind == EpochKind::Full && self.protection == Protection::Tainted {
            self.set_protection(Protection::Protected);
            self.act(Action::Guardian { armed: true });
        }
        if self.protection == Protection::Syncing {
            self.on_first_ack(epoch);
        }
        self.act(Action::DropDirt);
        self.act(Action::Release(epoch));
        if self.hold.throttled {
            self.set_throttled(false);
        }
        self.last_output_waits = self.config.release_needs_guest
            && self.switchover_wanted()
            && self.hold.fenced
            && run_state == RunState::Running;
    }

    pub(super) fn on_released(&mut self, epoch: Epoch) {
        if let Some(inflight) = self.inflight.as_mut().filter(|i| i.epoch == epoch) {
            inflight.released = true;
        }
        self.close_epoch();
    }

    /// Ends the epoch when acknowledgement and release are both there.
    fn close_epoch(&mut self) {
        let Some(inflight) = &self.inflight else {
            return;
        };
        let (Some(acknowledged), true) = (inflight.acknowledged, inflight.released) else {
            return;
        };
        // A guest that an operator has stopped, or that is being switched over, has no `cont`.
        let (resumed_at, pause) = inflight.resumed.unwrap_or((acknowledged, Duration::ZERO));
        let phases = Phases {
            seal: inflight.sealed_at.since(resumed_at),
            push: acknowledged.since(inflight.sealed_at),
            release: self.now.since(acknowledged),
            ..inflight.phases
        };
        let report = EpochReport {
            epoch: inflight.epoch,
            kind: inflight.kind,
            pause,
            dirty_pages: inflight.dirty_pages,
            precopied_pages: inflight.precopied_pages,
            bytes: inflight.bytes,
            commit: acknowledged.since(resumed_at),
            phases,
        };
        let (ran, boundary_at) = (inflight.ran, inflight.boundary_at);
        self.report(Report::Epoch(report));
        self.inflight = None;
        if report.kind == EpochKind::Delta {
            self.rest_if_idle(report.dirty_pages, ran, boundary_at);
        }
    }

    pub(super) fn throttle_deadline(&self) -> Option<Micros> {
        let inflight = self.inflight.as_ref()?;
        let (resumed_at, _) = inflight.resumed?;
        let due = inflight.acknowledged.is_none() && !self.held() && self.guest_running;
        due.then(|| resumed_at + self.config.max_unacked)
    }

    pub(super) fn on_throttle_timeout(&mut self) {
        if self.throttle_deadline().is_some_and(|at| self.now >= at) {
            self.set_throttled(true);
        }
    }

    pub(super) fn on_audit_result(&mut self, epoch: Epoch, mismatched_blocks: Vec<u16>) {
        let clean = mismatched_blocks.is_empty();
        self.report(Report::Audit {
            epoch,
            mismatched_blocks,
        });
        if !clean {
            self.taint(
                format!("the audit of epoch {epoch} found a difference"),
                EpochKind::Full,
            );
        }
    }

    /// The backup's image is not to be trusted until a full epoch is acknowledged.
    pub(super) fn taint(&mut self, text: String, kind: EpochKind) {
        if !matches!(self.protection, Protection::Protected | Protection::Tainted) {
            return; // there is no image that could be wrong
        }
        if kind == EpochKind::Full {
            self.next_kind = EpochKind::Full;
        }
        if self.protection == Protection::Protected {
            // The backup would not take over.
            self.act(Action::Guardian { armed: false });
        }
        self.set_protection(Protection::Tainted);
        self.report(Report::Tainted(text));
    }

    pub(super) fn send_heartbeat(&mut self) {
        self.last_heartbeat_sent = self.now;
        let sent_us = self.now.0;
        self.send(Epoch::NONE, &Message::Heartbeat { sent_us });
    }
}
