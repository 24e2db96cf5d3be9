//! The first synchronisation: live rounds straight into the standby's RAM, the last one paused.
//!
//! All pages are armed once, while the guest is paused. Then the first round carries all of RAM
//! and each later one what was written meanwhile, until little is left or rounds stop helping.
//! The rest is epoch 1: an ordinary boundary.

use std::time::Duration;

use super::{Action, GateState, Primary, Protection, Report};
use crate::types::{Epoch, EpochKind, Micros, PAGE_BYTES};

/// A round that leaves no more than this is followed by the paused one: at memory speed it
/// costs the guest about as long as the boundary itself.
const FEW_PAGES: u64 = 2048;
/// A guest that writes faster than the link carries would otherwise never be protected.
const ROUNDS_MAX: u32 = 10;
const RETRY: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Sync {
    stage: Stage,
    began: Micros,
    rounds: u32,
    pages_total: u64,
    pages_sent: u64,
    pages_this_round: u64,
    next_index: u32,
    /// Chunks that were filled and not yet pushed.
    unpushed: u32,
    retry_at: Option<Micros>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Waits for the reply to `stop`, then for the worker.
    Pausing,
    Arming,
    Resuming,
    StartRound {
        all: bool,
    },
    Collecting,
    /// `asked`: the worker is filling.
    Filling {
        asked: bool,
        done: bool,
    },
    FirstEpoch,
    /// The link is gone; the arming is brought to its end so that the guest goes on.
    Abandoned,
}

impl Sync {
    pub(super) fn began(&self) -> Micros {
        self.began
    }

    pub(super) fn rounds(&self) -> u32 {
        self.rounds
    }

    pub(super) fn ready_for_first_epoch(&self) -> bool {
        self.stage == Stage::FirstEpoch
    }

    /// The guest is held for the arming, or about to be.
    pub(super) fn arming(&self) -> bool {
        matches!(self.stage, Stage::Pausing | Stage::Arming | Stage::Resuming)
    }

    pub(super) fn paused(&mut self) -> bool {
        let waiting = self.stage == Stage::Pausing;
        if waiting {
            self.stage = Stage::Arming;
        }
        waiting
    }

    pub(super) fn resumed(&mut self) -> bool {
        let waiting = self.stage == Stage::Resuming;
        if waiting {
            self.stage = Stage::StartRound { all: true };
        }
        waiting
    }
}

impl Primary {
    pub(super) fn begin_sync(&mut self) {
        if self.inflight.take().is_some() {
            self.act(Action::MergeDirt);
        }
        self.acknowledged = Epoch::NONE;
        self.acknowledged_boundary = None;
        self.run_state_sent = None;
        self.backup_may_activate = false;
        self.next_kind = EpochKind::Delta;
        if self.protection != Protection::Unprotected {
            self.act(Action::Guardian { armed: false });
            self.act(Action::Gate(GateState::Open));
        }
        self.set_protection(Protection::Syncing);
        // The backup has nothing, so it can't activate: no reason to hold the guest is left. If
        // it stands still for one, the arming uses that.
        self.set_throttled(false);
        self.unfence();
        let pause = !self.stopped_by_us;
        self.sync = Some(Sync {
            stage: if pause { Stage::Pausing } else { Stage::Arming },
            began: self.now,
            rounds: 0,
            pages_total: 0,
            pages_sent: 0,
            pages_this_round: 0,
            next_index: 0,
            unpushed: 0,
            retry_at: None,
        });
        if pause {
            self.pause_vm();
        } else {
            self.worker_jobs += 1;
            self.act(Action::ArmAll);
        }
    }

    pub(super) fn on_all_armed(&mut self) {
        self.worker_jobs -= 1;
        let Some(sync) = &mut self.sync else { return };
        if self.guest_running && !(self.hold.fenced || self.hold.throttled) {
            sync.stage = Stage::Resuming;
            self.resume_vm();
        } else {
            sync.stage = Stage::StartRound { all: true };
        }
    }

    pub(super) fn on_round_started(&mut self, pages: u64) {
        self.worker_jobs -= 1;
        let Some(sync) = &mut self.sync else { return };
        sync.rounds += 1;
        sync.pages_this_round = pages;
        sync.pages_total += pages;
        if sync.stage == Stage::Collecting {
            sync.stage = Stage::Filling {
                asked: false,
                done: false,
            };
        }
    }

    pub(super) fn on_round_filled(&mut self, done: bool) {
        self.worker_jobs -= 1;
        let Some(sync) = &mut self.sync else { return };
        if let Stage::Filling { .. } = sync.stage {
            sync.stage = Stage::Filling { asked: false, done };
        }
    }

    /// Called for each chunk that a live round has filled.
    pub(super) fn note_sync_chunk(&mut self, index: u32, bytes: u64) {
        if let Some(sync) = &mut self.sync {
            sync.next_index = index + 1;
            sync.unpushed += 1;
            sync.pages_sent += bytes / PAGE_BYTES as u64;
        }
    }

    pub(super) fn on_sync_chunk_pushed(&mut self) {
        if let Some(sync) = &mut self.sync {
            sync.unpushed = sync.unpushed.saturating_sub(1);
        }
    }

    pub(super) fn advance_sync(&mut self) {
        let link_up = self.link.is_up();
        let Some(sync) = &mut self.sync else { return };
        if sync.retry_at.is_some_and(|at| self.now < at) {
            return;
        }
        match sync.stage {
            Stage::StartRound { all } if link_up && self.worker_jobs == 0 => {
                sync.stage = Stage::Collecting;
                self.worker_jobs += 1;
                self.act(Action::StartRound { all });
            }
            Stage::Filling {
                asked: false,
                done: false,
            } if link_up && sync.unpushed <= self.config.sync_chunks / 2 => {
                sync.stage = Stage::Filling {
                    asked: true,
                    done: false,
                };
                let chunks = self.config.sync_chunks - sync.unpushed;
                let first_index = sync.next_index;
                self.worker_jobs += 1;
                self.act(Action::FillRound {
                    first_index,
                    chunks,
                });
            }
            Stage::Filling { done: true, .. } if sync.unpushed == 0 => self.end_round(),
            _ => {}
        }
    }

    fn end_round(&mut self) {
        let Some(sync) = &mut self.sync else { return };
        let few = sync.pages_this_round <= FEW_PAGES && sync.rounds > 1;
        if few || sync.rounds >= ROUNDS_MAX {
            sync.stage = Stage::FirstEpoch;
            self.next_boundary = self.now;
        } else {
            sync.stage = Stage::StartRound { all: false };
        }
        let report = Report::SyncProgress {
            round: sync.rounds,
            pages_sent: sync.pages_sent,
            pages_total: sync.pages_total,
        };
        self.report(report);
        self.advance_sync();
    }

    /// The link is gone. What the worker is doing ends by itself.
    pub(super) fn abandon_sync(&mut self) {
        match &mut self.sync {
            Some(sync) if sync.arming() => {}
            Some(sync) if sync.stage == Stage::FirstEpoch => self.sync = None,
            Some(sync) => sync.stage = Stage::Abandoned,
            None => {}
        }
    }

    pub(super) fn on_sync_failed(&mut self, text: String) {
        self.report(Report::Error(format!("synchronisation failed: {text}")));
        self.sync = None;
        self.break_link("synchronisation starts again".to_owned());
        self.link = super::session::LinkState::Down {
            retry_at: Some(self.now + RETRY),
        };
    }
}
