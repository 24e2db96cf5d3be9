//! Slots: one epoch is filled, the one before it is applied, and a complete one flips.
//!
//! Order, on every link: last chunk arrived → revoke → check → flip → acknowledge. The flip also
//! waits until the epoch before it is in the standby's RAM, because its slot is needed next.

use std::collections::{BTreeMap, BTreeSet};

use super::{Action, Backup, CheckWhen, LinkId, Phases, Report, State};
use crate::image::{CheckedChunk, Trailer, check_epoch};
use crate::limits::EPOCH_CHUNKS_MAX;
use crate::types::{ChunkId, Epoch, EpochKind, GrantToken, Micros, SlotId};
use crate::wire::{ChunkTag, GrantBatch, Message};

/// Chunks that a live round may have on the way or waiting to be applied.
const SYNC_WINDOW: u32 = 24;
/// Chunks granted ahead for an epoch: enough that an ordinary one never waits for a grant.
const WINDOW_MIN: u32 = 4;
const WINDOW_MAX: u32 = 24;

/// The epoch that the primary may push now.
#[derive(Debug)]
pub(super) struct Fill {
    epoch: Epoch,
    slot: SlotId,
    chunks: BTreeMap<u32, Slotted>,
    last: Option<u32>,
    outstanding: u32,
    stage: Stage,
    complete: Option<(EpochKind, Trailer)>,
    /// When the first chunk was here, the last one, and when all of them were checked.
    began: Option<Micros>,
    arrived: Option<Micros>,
    checked: Option<Micros>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Filling,
    Revoking,
    Revoked,
}

#[derive(Debug)]
struct Slotted {
    chunk: ChunkId,
    checked: Option<CheckedChunk>,
}

/// Live rounds of the first synchronisation.
#[derive(Debug)]
pub(super) struct SyncFill {
    next_index: u32,
    outstanding: u32,
    /// Arrived, and not yet in the standby's RAM.
    unapplied: BTreeMap<ChunkId, u32>,
    applying: BTreeSet<ChunkId>,
}

/// A request for grants.
#[derive(Debug)]
pub(super) struct Asked {
    slot: SlotId,
    epoch: Epoch,
    link: LinkId,
}

/// A flipped epoch that is about to be applied.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) epoch: Epoch,
    chunks: Vec<ChunkId>,
    audit: Option<Vec<u64>>,
}

fn slot_of(epoch: Epoch) -> SlotId {
    SlotId((epoch.0 & 1) as u8)
}

impl Backup {
    /// Opens the slots for a primary that starts from nothing.
    pub(super) fn open_sync(&mut self) {
        self.sync = Some(SyncFill {
            next_index: 0,
            outstanding: 0,
            unapplied: BTreeMap::new(),
            applying: BTreeSet::new(),
        });
        self.grant_sync();
        self.open_fill();
    }

    pub(super) fn open_fill(&mut self) {
        let epoch = self.last_flipped.next();
        self.fill = Some(Fill {
            epoch,
            slot: slot_of(epoch),
            chunks: BTreeMap::new(),
            last: None,
            outstanding: 0,
            stage: Stage::Filling,
            complete: None,
            began: None,
            arrived: None,
            checked: None,
        });
        self.grant_fill();
    }

    fn grant_sync(&mut self) {
        let Some(sync) = &mut self.sync else { return };
        let here = sync.applying.len() + sync.unapplied.len();
        let busy = sync.outstanding + u32::try_from(here).unwrap_or(u32::MAX);
        if busy <= SYNC_WINDOW / 2 {
            let count = SYNC_WINDOW - busy;
            sync.outstanding += count;
            self.ask(slot_of(Epoch::NONE), Epoch::NONE, count);
        }
    }

    fn grant_fill(&mut self) {
        let window =
            (self.recent_chunks + self.recent_chunks / 2 + 2).clamp(WINDOW_MIN, WINDOW_MAX);
        let Some(fill) = &mut self.fill else { return };
        if fill.last.is_some() || fill.outstanding > window / 2 {
            return;
        }
        let count = window - fill.outstanding;
        fill.outstanding += count;
        let (slot, epoch) = (fill.slot, fill.epoch);
        self.ask(slot, epoch, count);
    }

    fn ask(&mut self, slot: SlotId, epoch: Epoch, count: u32) {
        let Some(link) = self.peer.as_ref().and_then(|p| p.link) else {
            return;
        };
        self.asked.push_back(Asked { slot, epoch, link });
        self.act(Action::Grant { slot, count });
    }

    pub(super) fn on_granted(&mut self, slot: SlotId, grants: Vec<GrantToken>) {
        let Some(place) = self.asked.iter().position(|a| a.slot == slot) else {
            return;
        };
        let Some(Asked { epoch, link, .. }) = self.asked.remove(place) else {
            return;
        };
        let wanted = match epoch {
            Epoch::NONE => self.sync.is_some(),
            epoch => self.fill.as_ref().is_some_and(|f| f.epoch == epoch),
        };
        // Of a link that is gone, or of a slot that was revoked meanwhile: worth nothing.
        if wanted && self.peer.as_ref().and_then(|p| p.link) == Some(link) {
            self.send_to_peer(epoch, &Message::Grant(GrantBatch { grants }));
        }
    }

    pub(super) fn on_arrived(&mut self, chunk: ChunkId, tag: ChunkTag) {
        if self.activation.is_some() || self.peer.as_ref().is_none_or(|p| p.link.is_none()) {
            return self.act(Action::Free(vec![chunk]));
        }
        if self.fill.as_ref().is_some_and(|f| tag.matches(f.epoch)) {
            self.on_epoch_chunk(chunk, tag);
        } else if self.sync.is_some() && tag.matches(Epoch::NONE) && !tag.last {
            self.on_sync_chunk(chunk, tag);
        } else {
            self.act(Action::Free(vec![chunk]));
            self.break_peer("a chunk of another epoch".to_owned());
        }
    }

    fn on_sync_chunk(&mut self, chunk: ChunkId, tag: ChunkTag) {
        let Some(sync) = &mut self.sync else { return };
        // Counted up to the width of the tag: a mostly full guest of many TiB wraps.
        if tag.index != sync.next_index % EPOCH_CHUNKS_MAX {
            let expected = sync.next_index;
            self.act(Action::Free(vec![chunk]));
            return self.break_peer(format!("live chunk {} where {expected} is due", tag.index));
        }
        sync.unapplied.insert(chunk, sync.next_index);
        sync.next_index += 1;
        sync.outstanding = sync.outstanding.saturating_sub(1);
        let frame = self.frame(Epoch::NONE);
        self.act(Action::Check { chunk, frame });
    }

    pub(super) fn on_sync_applied(&mut self, chunk: ChunkId) {
        if let Some(sync) = &mut self.sync {
            sync.applying.remove(&chunk);
        }
        self.grant_sync();
    }

    fn on_epoch_chunk(&mut self, chunk: ChunkId, tag: ChunkTag) {
        let check = self.config.check;
        let limit = self.epoch_chunks_max();
        let Some(fill) = &mut self.fill else { return };
        let beyond = tag.index >= limit || fill.last.is_some_and(|last| tag.index > last);
        if beyond || fill.stage != Stage::Filling || fill.chunks.contains_key(&tag.index) {
            let index = tag.index;
            self.act(Action::Free(vec![chunk]));
            return self.break_peer(format!("chunk {index} is one too many"));
        }
        fill.chunks.insert(
            tag.index,
            Slotted {
                chunk,
                checked: None,
            },
        );
        fill.outstanding = fill.outstanding.saturating_sub(1);
        fill.began.get_or_insert(self.now);
        if tag.last {
            fill.last = Some(tag.index);
        }
        let arrived = u32::try_from(fill.chunks.len()).unwrap_or(u32::MAX);
        let (slot, epoch) = (fill.slot, fill.epoch);
        let complete = fill.last.is_some_and(|last| arrived == last + 1);
        if complete {
            fill.stage = Stage::Revoking;
            fill.arrived = Some(self.now);
        }
        if check == CheckWhen::OnArrival {
            let frame = self.frame(epoch);
            self.act(Action::Check { chunk, frame });
        }
        if complete {
            self.act(Action::Revoke(slot));
        } else {
            self.grant_fill();
        }
    }

    pub(super) fn on_revoked(&mut self, slot: SlotId) {
        let Some(fill) = self.fill.as_mut().filter(|f| f.slot == slot) else {
            return;
        };
        if fill.stage != Stage::Revoking {
            return;
        }
        fill.stage = Stage::Revoked;
        if self.config.check == CheckWhen::AfterRevocation {
            let chunks: Vec<_> = fill.chunks.values().map(|s| s.chunk).collect();
            let frame = self.frame(self.last_flipped.next());
            for chunk in chunks {
                self.act(Action::Check { chunk, frame });
            }
        }
    }

    pub(super) fn on_checked(&mut self, chunk: ChunkId, result: Result<CheckedChunk, String>) {
        let checked = match result {
            Ok(checked) => checked,
            Err(_) if !self.knows(chunk) => return, // of a link that is gone
            Err(text) => return self.break_peer(format!("corrupt chunk: {text}")),
        };
        if let Some(sync) = &mut self.sync
            && let Some(index) = sync.unapplied.remove(&chunk)
        {
            if checked.kind != EpochKind::SyncRound || checked.index != index {
                self.act(Action::Free(vec![chunk]));
                return self.break_peer("a live round's chunk that isn't one".to_owned());
            }
            sync.applying.insert(chunk);
            return self.act(Action::ApplySync(chunk));
        }
        let Some(fill) = &mut self.fill else { return };
        let Some((index, slotted)) = fill.chunks.iter_mut().find(|(_, s)| s.chunk == chunk) else {
            return;
        };
        if checked.index != *index || checked.kind == EpochKind::SyncRound {
            return self.break_peer("a chunk that contradicts its tag".to_owned());
        }
        slotted.checked = Some(checked);
    }

    fn knows(&self, chunk: ChunkId) -> bool {
        self.sync
            .as_ref()
            .is_some_and(|s| s.unapplied.contains_key(&chunk))
            || self
                .fill
                .as_ref()
                .is_some_and(|f| f.chunks.values().any(|s| s.chunk == chunk))
    }

    /// All chunks are here and hold: is the epoch as a whole what its trailer says?
    fn complete_fill(&mut self) {
        let Some(fill) = &mut self.fill else { return };
        let unchecked = fill.chunks.values().any(|s| s.checked.is_none());
        if fill.stage != Stage::Revoked || unchecked || fill.complete.is_some() {
            return;
        }
        let checked: Vec<CheckedChunk> = fill
            .chunks
            .values_mut()
            .filter_map(|s| s.checked.take())
            .collect();
        match check_epoch(&checked) {
            Ok(trailer) if trailer.base == self.last_flipped => {
                fill.complete = checked.first().map(|c| (c.kind, trailer));
                fill.checked = Some(self.now);
            }
            Ok(trailer) => {
                let (base, ours) = (trailer.base, self.last_flipped);
                self.break_peer(format!("an epoch that follows {base}, but {ours} is here"));
            }
            Err(error) => self.break_peer(format!("corrupt epoch: {error}")),
        }
    }

    pub(super) fn try_flip(&mut self) {
        self.complete_fill();
        let sync_done = self
            .sync
            .as_ref()
            .is_none_or(|s| s.unapplied.is_empty() && s.applying.is_empty());
        let free = self.applying.is_none() && self.held.is_none() && sync_done;
        if !free || self.activation.is_some() || self.standing_down.is_some() {
            return;
        }
        let Some(fill) = self.fill.take_if(|f| f.complete.is_some()) else {
            return;
        };
        let phases = self.phases(&fill);
        if let Some((kind, trailer)) = fill.complete {
            self.flip(fill.epoch, kind, &fill.chunks, trailer, phases);
        }
    }

    /// Of an epoch that flips now.
    fn phases(&self, fill: &Fill) -> Phases {
        let arrived = fill.arrived.unwrap_or(self.now);
        let checked = fill.checked.unwrap_or(self.now);
        Phases {
            arrive: arrived.since(fill.began.unwrap_or(arrived)),
            check: checked.since(arrived),
            flip: self.now.since(checked),
            apply_before: self.apply_took,
        }
    }

    /// From here on the epoch counts.
    fn flip(
        &mut self,
        epoch: Epoch,
        kind: EpochKind,
        chunks: &BTreeMap<u32, Slotted>,
        trailer: Trailer,
        phases: Phases,
    ) {
        self.last_flipped = epoch;
        self.run_state = trailer.run_state;
        self.send_to_peer(epoch, &Message::Ack);
        if self.sync.take().is_some() {
            self.act(Action::Revoke(slot_of(Epoch::NONE)));
        }
        let count = trailer.chunks;
        self.recent_chunks = count.max(self.recent_chunks - self.recent_chunks / 8);
        self.report(Report::EpochFlipped {
            epoch,
            kind,
            chunks: count,
            pages: trailer.data_pages + trailer.zero_pages,
            phases,
        });
        if self.state == State::Syncing || (self.state == State::Tainted && kind == EpochKind::Full)
        {
            self.set_state(State::Protecting);
            self.act(Action::Guardian { armed: true });
            self.report(Report::Protecting { epoch });
        }
        let chunks = chunks.values().map(|s| s.chunk).collect();
        self.held = Some(Pending {
            epoch,
            chunks,
            audit: trailer.audit.map(|a| a.0),
        });
        self.start_apply();
        self.open_fill();
    }

    /// Hands a flipped epoch to the worker, unless a rehearsal needs the RAM as it is.
    pub(super) fn start_apply(&mut self) {
        if self.applying.is_some() || self.rehearsal_runs() {
            return;
        }
        if let Some(Pending {
            epoch,
            chunks,
            audit,
        }) = self.held.take()
        {
            self.applying = Some(epoch);
            self.apply_began = self.now;
            self.act(Action::Apply {
                epoch,
                chunks,
                audit,
            });
        }
    }

    /// Drops a flipped epoch that a rehearsal has kept from being applied.
    pub(super) fn discard_held(&mut self) {
        if let Some(Pending { chunks, .. }) = self.held.take() {
            self.act(Action::Free(chunks));
        }
    }

    /// Drops what is incomplete, as if it never came.
    pub(super) fn discard_fill(&mut self) {
        let mut chunks: Vec<ChunkId> = Vec::new();
        if let Some(fill) = self.fill.take() {
            chunks.extend(fill.chunks.values().map(|s| s.chunk));
        }
        if let Some(sync) = self.sync.take() {
            chunks.extend(sync.unapplied.keys());
        }
        if !chunks.is_empty() {
            self.act(Action::Free(chunks));
        }
    }

    /// The most chunks that an honest epoch can have: all of RAM, each page in an entry of its
    /// own, and the device state.
    fn epoch_chunks_max(&self) -> u32 {
        let pages: u64 = self.config.shape.blocks.iter().map(|b| b.pages()).sum();
        let chunks = pages / 128 + 128;
        u32::try_from(chunks)
            .unwrap_or(u32::MAX)
            .min(EPOCH_CHUNKS_MAX)
    }
}
