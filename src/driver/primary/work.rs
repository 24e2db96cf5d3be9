//! The primary's worker: it owns the guest's RAM, the tracker and the dirty sets.
//!
//! Invariant 5 lives here: a page is armed before it is copied, because the tracker's `collect`
//! arms what it reports and only then the gather copies; and a harvested dirty set belongs to
//! its epoch (`inflight`) until the acknowledgement, or goes back to `pending`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use ft_core::image::{AuditDigest, ChunkBuilder, ChunkHead, DATA_PAGES_MAX, pack_state};
use ft_core::limits::DEVICE_STATE_BYTES_MAX;
use ft_core::primary::{Harvest, Step};
use ft_core::wire::Frame;
use ft_core::{DirtySet, Epoch, EpochKind, PAGE_BYTES, RunState};
use qemu_bridge::audit::Auditor;
use qemu_bridge::gather::{Cursor, Progress, fill};
use qemu_bridge::guest_ram::GuestRam;
use qemu_bridge::tracker::{Tracker, TrackerError};
use transport::{Arena, Chunk, ChunkMut};

mod precopy;

use super::image::{Ending, EpochImage, room_for_end};
use super::packing::{Deltas, Packer, Sink};

/// Chunks that stay ready beyond what the last epochs needed, so that nothing is allocated
/// while the guest is paused.
const SPARE_CHUNKS: usize = 4;

#[derive(Debug)]
pub(crate) enum Job {
    ArmAll,
    StartRound {
        all: bool,
    },
    FillRound {
        frame: Frame,
        first_index: u32,
        chunks: u32,
    },
    /// Before the harvest of this epoch, while the guest runs.
    Precopy {
        frame: Frame,
        pack: bool,
    },
    Harvest {
        frame: Frame,
        kind: EpochKind,
        audit: bool,
        /// The link is one on which fewer bytes may be worth work.
        pack: bool,
    },
    /// What a harvest has left.
    CopyRest,
    /// Only after a harvest.
    Seal {
        base: Epoch,
        run_state: RunState,
        device_bytes: u64,
    },
    DropDirt,
    MergeDirt,
}

#[derive(Debug)]
pub(crate) enum Done {
    AllArmed,
    RoundStarted {
        pages: u64,
    },
    RoundFilled {
        done: bool,
    },
    Chunk {
        index: u32,
        last: bool,
        chunk: Chunk,
    },
    Precopied,
    Harvested(Harvest),
    Failed {
        step: Step,
        text: String,
    },
}

/// An epoch until its seal.
struct OpenEpoch {
    image: EpochImage,
    /// The link was one that may be worth packing for.
    pack: bool,
    /// Full, and not summed up yet: of a short harvest that is left for when the guest runs again.
    full: Vec<ChunkBuilder<ChunkMut>>,
    builder: ChunkBuilder<ChunkMut>,
    /// To be packed before it is sealed.
    packed: bool,
    /// So is its device state: that needs no decision by its cost.
    packed_state: bool,
    audit: bool,
    digest: Option<AuditDigest>,
    began: Instant,
    scan: Duration,
}

/// What the jobs are done with. When it is dropped, the kernel unregisters the guest's RAM from the
/// tracker.
pub(crate) struct PrimaryWorker {
    ram: GuestRam,
    tracker: Box<dyn Tracker>,
    arena: Arena,
    /// Where QEMU saves the device state.
    device_state: File,
    /// Dirty pages that belong to no epoch yet.
    pending: DirtySet,
    /// Dirty pages of the epoch that is not acknowledged yet.
    inflight: DirtySet,
    /// Pages in the open epoch's chunks that were copied before the pause.
    precopied: DirtySet,
    /// Found by the last collection; then those of them that have to be copied again.
    fresh: DirtySet,
    /// What is still to be copied apart from those.
    rest: DirtySet,
    /// What the round or the epoch still has to copy.
    cursor: Cursor,
    /// Chunks that recent epochs took.
    usual_chunks: usize,
    device_buffer: Vec<u8>,
    /// The same, packed.
    packed_state: Vec<u8>,
    /// An open epoch's `full` when there is none; empty, but keeps its memory.
    spare: Vec<ChunkBuilder<ChunkMut>>,
    packer: Packer,
    auditor: Auditor,
    open: Option<OpenEpoch>,
}

/// Packed chunks on their way to the link.
struct PackedImage<'a> {
    image: &'a mut EpochImage,
    builder: &'a mut ChunkBuilder<ChunkMut>,
    arena: &'a Arena,
    report: &'a mut dyn FnMut(Done),
}

impl PrimaryWorker {
    pub(crate) fn new(
        ram: GuestRam,
        tracker: Box<dyn Tracker>,
        arena: Arena,
        device_state: File,
        deltas: Deltas,
        delta_cache_bytes: usize,
    ) -> PrimaryWorker {
        let pages = ram.pages_per_block();
        PrimaryWorker {
            pending: DirtySet::new(&pages),
            inflight: DirtySet::new(&pages),
            precopied: DirtySet::new(&pages),
            fresh: DirtySet::new(&pages),
            rest: DirtySet::new(&pages),
            ram,
            tracker,
            arena,
            device_state,
            cursor: Cursor::default(),
            usual_chunks: 0,
            device_buffer: Vec::new(),
            packed_state: Vec::new(),
            spare: Vec::new(),
            packer: Packer::new(deltas, pages, delta_cache_bytes),
            auditor: Auditor::default(),
            open: None,
        }
    }

    /// Does a job, or as much of it as fills `budget` chunks: then the rest is returned, and must
    /// be the next job but for one that ends the epoch.
    pub(crate) fn handle(
        &mut self,
        job: Job,
        budget: usize,
        report: &mut dyn FnMut(Done),
    ) -> Option<Job> {
        let result = match job {
            Job::ArmAll => {
                report(self.arm_all());
                Ok(None)
            }
            Job::StartRound { all } => {
                report(self.start_round(all));
                Ok(None)
            }
            Job::FillRound {
                frame,
                first_index,
                chunks,
            } => {
                let done = self.fill_round(frame, first_index, chunks, report);
                report(done);
                Ok(None)
            }
            Job::Precopy { frame, pack } => self
                .precopy(frame, pack)
                .map(|()| {
                    report(Done::Precopied);
                    None
                })
                .map_err(|text| (Step::Precopy, text)),
            Job::Harvest {
                frame,
                kind,
                audit,
                pack,
            } => self
                .open_epoch(frame, kind, audit, pack)
                .and_then(|open| self.copy(open, budget, report))
                .map_err(|text| (Step::Harvest, text)),
            Job::CopyRest => match self.open.take() {
                Some(open) => self
                    .copy(open, budget, report)
                    .map_err(|text| (Step::Harvest, text)),
                None => Ok(None), // the epoch was given up
            },
            Job::Seal {
                base,
                run_state,
                device_bytes,
            } => self
                .seal(base, run_state, device_bytes, report)
                .map(|()| None)
                .map_err(|text| (Step::Seal, text)),
            Job::DropDirt => {
                self.packer.acknowledged();
                self.inflight.clear();
                // Outside of the pause: have chunks ready for the next one.
                self.arena
                    .reserve(self.usual_chunks + self.usual_chunks / 2 + SPARE_CHUNKS);
                self.arena.shrink(2 * self.usual_chunks + SPARE_CHUNKS);
                Ok(None)
            }
            Job::MergeDirt => {
                self.drop_open();
                self.packer.given_up(&self.inflight);
                self.pending
                    .merge(&self.inflight)
                    .expect("both sets are of the same RAM");
                self.inflight.clear();
                Ok(None)
            }
        };
        result.unwrap_or_else(|(step, text)| {
            report(Done::Failed { step, text });
            None
        })
    }

    /// Pages that the next seal packs.
    pub(crate) fn pages_to_pack(&self) -> u64 {
        match &self.open {
            Some(open) if open.packed => self.inflight.count(),
            _ => 0,
        }
    }

    fn arm_all(&mut self) -> Done {
        self.packer.forget();
        self.drop_open();
        self.pending.clear();
        self.inflight.clear();
        match self.tracker.arm_all(&self.ram) {
            Ok(()) => Done::AllArmed,
            Err(error) => failed(Step::Arm, &error),
        }
    }

    fn start_round(&mut self, all: bool) -> Done {
        // What a round collects isn't reported to the harvest that these were copied for.
        self.drop_open();
        self.inflight.clear();
        if all {
            self.inflight.set_all();
        } else if let Err(error) = self.tracker.collect_live(&self.ram, &mut self.inflight) {
            return failed(Step::Round, &error);
        }
        if !all {
            // A disk's DMA counts as a write when the page is pinned, not when the data arrives:
            // what was collected live may be copied too early, so the paused round takes it again.
            self.pending
                .merge(&self.inflight)
                .expect("both sets are of the same RAM");
        }
        self.cursor.load(&self.inflight, all);
        Done::RoundStarted {
            pages: self.inflight.count(),
        }
    }

    fn fill_round(
        &mut self,
        frame: Frame,
        first_index: u32,
        chunks: u32,
        report: &mut dyn FnMut(Done),
    ) -> Done {
        for index in first_index..first_index.saturating_add(chunks) {
            let Some(memory) = self.arena.alloc() else {
                // All chunks are on the way; the next fill finds some.
                return Done::RoundFilled { done: false };
            };
            let head = ChunkHead {
                frame,
                kind: EpochKind::SyncRound,
                index,
            };
            let mut builder = ChunkBuilder::new(memory, head);
            let progress = match fill(&self.ram, &mut builder, &mut self.cursor) {
                Ok(progress) => progress,
                Err(error) => return failed(Step::Round, &error),
            };
            builder.pieces().for_each(|it| self.tracker.copied(&it));
            if !builder.is_empty() {
                let (sealed, memory) = builder.finish(false);
                let chunk = memory.freeze(sealed.used_bytes);
                report(Done::Chunk {
                    index,
                    last: false,
                    chunk,
                });
            }
            if progress == Progress::Done {
                return Done::RoundFilled { done: true };
            }
        }
        Done::RoundFilled { done: false }
    }

    fn open_epoch(
        &mut self,
        frame: Frame,
        kind: EpochKind,
        audit: bool,
        pack: bool,
    ) -> Result<OpenEpoch, String> {
        let begun = self.open.take();
        let begun = begun.filter(|open| open.image.is_of(frame, kind) && open.pack == pack);
        if begun.is_none() {
            self.precopied.clear();
        }
        let began = Instant::now();
        self.take_dirt(kind).map_err(|error| describe(&error))?;
        let scan = began.elapsed();
        let open = match begun {
            Some(open) => open,
            None => self.new_epoch(frame, kind, pack)?,
        };
        Ok(OpenEpoch {
            audit,
            began,
            scan,
            ..open
        })
    }

    fn new_epoch(
        &mut self,
        frame: Frame,
        kind: EpochKind,
        pack: bool,
    ) -> Result<OpenEpoch, String> {
        let mut image = EpochImage::new(frame, kind);
        let builder = image.begin(self.alloc()?);
        Ok(OpenEpoch {
            image,
            pack,
            full: std::mem::take(&mut self.spare),
            builder,
            packed: kind == EpochKind::Delta && self.packer.packs(pack),
            packed_state: self.packer.packs_state(pack),
            audit: false,
            digest: None,
            began: Instant::now(),
            scan: Duration::ZERO,
        })
    }

    fn drop_open(&mut self) {
        self.open = None;
        self.precopied.clear();
    }

    /// Copies dirty pages, if that fills no more than `budget` chunks. The last chunk stays open for the
    /// device state. With a budget, also the others stay open; without one they are pushed while the
    /// next one is filled.
    fn copy(
        &mut self,
        mut open: OpenEpoch,
        budget: usize,
        report: &mut dyn FnMut(Done),
    ) -> Result<Option<Job>, String> {
        let describe = |error| describe(&error);
        let again = self.fresh.count();
        if self.rest.count() + again > budget.saturating_mul(DATA_PAGES_MAX) as u64 {
            self.open = Some(open);
            return Ok(Some(Job::CopyRest));
        }
        self.copy_again(&mut open)?;
        while fill(&self.ram, &mut open.builder, &mut self.cursor).map_err(describe)?
            == Progress::Full
        {
            open.next_chunk(self.alloc()?);
            if budget == usize::MAX && !open.packed {
                open.seal_full(report);
            }
        }
        if open.audit {
            let hashes = self.auditor.hash_blocks(&self.ram).map_err(describe)?;
            open.digest = Some(AuditDigest(hashes));
        }
        report(Done::Harvested(Harvest {
            dirty_pages: self.inflight.count(),
            precopied_pages: self.precopied.count() - again,
            scan: open.scan,
            copy: open.began.elapsed().saturating_sub(open.scan),
        }));
        self.open = Some(open);
        Ok(None)
    }

    /// Ends the epoch: the guest runs again.
    fn seal(
        &mut self,
        base: Epoch,
        run_state: RunState,
        device_bytes: u64,
        report: &mut dyn FnMut(Done),
    ) -> Result<(), String> {
        let mut open = self.open.take().ok_or("its harvest had failed")?;
        self.packer.begin(self.inflight.count(), open.packed);
        // Packed, they are fewer; but the next harvest takes as many as this one.
        let harvested = open.full.len() + 1;
        if open.packed {
            self.pack(&mut open, report)?;
        }
        open.seal_full(report);
        let OpenEpoch {
            mut image,
            full,
            mut builder,
            digest,
            packed_state,
            ..
        } = open;
        self.spare = full;
        self.read_device_state(device_bytes)?;
        let state_bytes = self.device_buffer.len();
        let packed_state = packed_state
            && pack_state(&self.device_buffer, &mut self.packed_state)
            && room_for_end(self.packed_state.len()) <= DATA_PAGES_MAX * PAGE_BYTES;
        let state = match packed_state {
            true => &self.packed_state,
            false => &self.device_buffer,
        };
        let end = Ending {
            base,
            run_state,
            audit: digest,
        };
        if builder.device_room() < room_for_end(state.len()) {
            report(image.seal(builder));
            builder = image.begin(self.alloc()?);
        }
        if packed_state {
            builder.push_packed_device(state_bytes, state);
        } else {
            let mut offset = 0;
            while builder.device_room() < room_for_end(state.len() - offset) {
                let rest = &state[offset..];
                let piece = &rest[..rest.len().min(builder.device_room())];
                builder.push_device(offset as u64, piece);
                offset += piece.len();
                report(image.seal(builder));
                builder = image.begin(self.alloc()?);
            }
            builder.push_device(offset as u64, &state[offset..]);
        }
        report(image.end(builder, &end, state_bytes));
        self.usual_chunks = image.chunks().max(harvested);
        Ok(())
    }

    /// Puts smaller chunks in the place of what was harvested.
    fn pack(&mut self, open: &mut OpenEpoch, report: &mut dyn FnMut(Done)) -> Result<(), String> {
        open.image = open.image.anew();
        let first = open.image.begin(self.alloc()?);
        let last_harvested = std::mem::replace(&mut open.builder, first);
        let mut packed = PackedImage {
            image: &mut open.image,
            builder: &mut open.builder,
            arena: &self.arena,
            report,
        };
        for chunk in open.full.drain(..).chain([last_harvested]) {
            self.packer.pack(chunk, &mut packed)?;
        }
        Ok(())
    }

    /// Moves what is dirty into the epoch.
    fn take_dirt(&mut self, kind: EpochKind) -> Result<(), TrackerError> {
        self.collect(false)?;
        let full = kind == EpochKind::Full;
        if full {
            self.pending.set_all();
        }
        self.inflight.clear();
        self.inflight.swap(&mut self.pending);
        self.fresh.intersect(&self.precopied);
        self.rest.copy_from(&self.inflight);
        self.rest.remove(&self.precopied);
        self.cursor.load(&self.rest, full);
        Ok(())
    }

    /// Finds what was written and arms it. When a tracker fails it may have armed pages that it did not
    /// report, so all of RAM goes into the next epoch.
    fn collect(&mut self, guest_runs: bool) -> Result<(), TrackerError> {
        self.fresh.clear();
        let collected = match guest_runs {
            true => self.tracker.collect_live(&self.ram, &mut self.fresh),
            false => self.tracker.collect(&self.ram, &mut self.fresh),
        };
        if let Err(error) = collected {
            self.pending.set_all();
            self.precopied.clear();
            return Err(error);
        }
        self.pending
            .merge(&self.fresh)
            .expect("both sets are of the same RAM");
        Ok(())
    }

    fn read_device_state(&mut self, bytes: u64) -> Result<(), String> {
        let length = usize::try_from(bytes)
            .ok()
            .filter(|n| *n <= DEVICE_STATE_BYTES_MAX);
        let length = length.ok_or_else(|| format!("{bytes} bytes of device state are too many"))?;
        self.device_buffer.resize(length, 0);
        let read = self.device_state.read_exact_at(&mut self.device_buffer, 0);
        read.map_err(|error| format!("reading the saved device state: {error}"))?;
        qemu_bridge::device_state::check(&self.device_buffer).map_err(|error| error.to_string())
    }

    fn alloc(&self) -> Result<ChunkMut, String> {
        alloc(&self.arena)
    }
}

fn alloc(arena: &Arena) -> Result<ChunkMut, String> {
    let chunk = arena.alloc();
    chunk.ok_or_else(|| "an epoch larger than all of RAM".to_owned())
}

impl Sink for PackedImage<'_> {
    fn chunk(&mut self) -> &mut ChunkBuilder<ChunkMut> {
        self.builder
    }

    fn next_chunk(&mut self) -> Result<(), String> {
        let next = self.image.begin(alloc(self.arena)?);
        let full = std::mem::replace(self.builder, next);
        (self.report)(self.image.seal(full));
        Ok(())
    }
}

impl OpenEpoch {
    fn next_chunk(&mut self, memory: ChunkMut) {
        let next = self.image.begin(memory);
        self.full.push(std::mem::replace(&mut self.builder, next));
    }

    fn seal_full(&mut self, report: &mut dyn FnMut(Done)) {
        for builder in self.full.drain(..) {
            report(self.image.seal(builder));
        }
    }
}

fn failed(step: Step, error: &dyn std::error::Error) -> Done {
    Done::Failed {
        step,
        text: describe(error),
    }
}

/// An error with its sources, on one line.
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
