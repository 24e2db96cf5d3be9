//! Copying dirty pages before the pause, as live migration does: in the pause only what was written
//! since has to be copied.
//!
//! It is work done twice for a page that is written again, so it must be worth it: the last epoch was
//! large, and most copies that were made before a pause were still good in it.

use super::{Action, Harvest, Primary, Protection};
use crate::types::{EpochKind, RunState};

/// After one that was in vain the next boundary does without it, then twice as many, up to so many.
const REST_MAX: u32 = 32;

#[derive(Debug, Default)]
pub(super) struct Precopy {
    /// For the boundary that is due.
    done: bool,
    /// Dirty pages of the last epoch.
    last_pages: u64,
    /// Boundaries that still do without it, and those that will after the next one in vain.
    rest: u32,
    next_rest: u32,
}

impl Primary {
    /// Whether there is something to do before the boundary that is due.
    pub(super) fn start_precopy(&mut self) -> bool {
        let enough = |min| self.precopy.last_pages >= min;
        let worth = self.config.precopy_pages_min.is_some_and(enough)
            && !self.precopy.done
            && self.precopy.rest == 0
            && self.protection == Protection::Protected
            && self.next_kind == EpochKind::Delta
            && self.run_state() == RunState::Running
            && !self.switchover_wanted();
        if worth {
            self.worker_jobs += 1;
            let epoch = self.acknowledged.next();
            self.act(Action::Precopy { epoch });
        }
        worth
    }

    pub(super) fn on_precopied(&mut self) {
        self.worker_jobs -= 1;
        self.precopy.done = true;
    }

    /// A boundary's harvest tells whether it was of use: for at least half of the pages.
    pub(super) fn judge_precopy(&mut self, harvest: &Harvest) {
        let precopy = &mut self.precopy;
        precopy.last_pages = harvest.dirty_pages;
        if !std::mem::take(&mut precopy.done) {
            precopy.rest = precopy.rest.saturating_sub(1);
        } else if harvest.precopied_pages * 2 >= harvest.dirty_pages {
            precopy.next_rest = 1;
        } else {
            precopy.rest = precopy.next_rest;
            precopy.next_rest = (precopy.next_rest * 2).clamp(1, REST_MAX);
        }
    }
}
