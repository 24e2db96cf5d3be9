//! The primary's worker: it owns the guest's RAM, the tracker and the dirty sets.
//!
//! Invariant 5 lives here: a page is armed before it is copied, because the tracker's `collect`
//! arms what it reports and only then the gather copies; and a harvested dirty set belongs to
//! its epoch (`inflight`) until the acknowledgement, or goes back to `pending`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use ft_core::image::{AuditDigest, ChunkBuilder, ChunkHead};
use ft_core::limits::DEVICE_STATE_BYTES_MAX;
use ft_core::primary::{Harvest, Step};
use ft_core::wire::Frame;
use ft_core::{DirtySet, Epoch, EpochKind, RunState};
use qemu_bridge::audit::hash_blocks;
use qemu_bridge::gather::{Cursor, Progress, fill};
use qemu_bridge::guest_ram::GuestRam;
use qemu_bridge::tracker::{Tracker, TrackerError};
use transport::{Arena, Chunk, ChunkMut};

use super::image::{Ending, EpochImage, room_for_end};
use crate::driver::worker::Desk;

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
    Harvest {
        frame: Frame,
        kind: EpochKind,
        audit: bool,
    },
    /// Only right after a harvest.
    Seal {
        base: Epoch,
        run_state: RunState,
        device_bytes: u64,
    },
    DropDirt,
    MergeDirt,
    /// Take the tracker out of QEMU: the last job.
    Leave,
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
    Harvested(Harvest),
    Failed {
        step: Step,
        text: String,
    },
    Left,
}

/// What the worker is made of.
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
    /// What the round or the epoch still has to copy.
    cursor: Cursor,
    /// Chunks that recent epochs took.
    usual_chunks: usize,
    device_buffer: Vec<u8>,
}

impl PrimaryWorker {
    pub(crate) fn new(
        ram: GuestRam,
        tracker: Box<dyn Tracker>,
        arena: Arena,
        device_state: File,
    ) -> PrimaryWorker {
        let pages = ram.pages_per_block();
        PrimaryWorker {
            pending: DirtySet::new(&pages),
            inflight: DirtySet::new(&pages),
            ram,
            tracker,
            arena,
            device_state,
            cursor: Cursor::default(),
            usual_chunks: 0,
            device_buffer: Vec::new(),
        }
    }

    /// Works until the driver is gone.
    pub(crate) fn run(mut self, desk: &Desk<Job, Done>) {
        let mut next = desk.next();
        while let Some(job) = next {
            next = match job {
                Job::Harvest { frame, kind, audit } => self.epoch(desk, frame, kind, audit),
                Job::Leave => {
                    // The kernel unregisters the guest's RAM when the tracker's descriptor closes.
                    drop(self);
                    return desk.report(Done::Left);
                }
                job => {
                    self.step(desk, job);
                    desk.next()
                }
            };
        }
    }

    fn step(&mut self, desk: &Desk<Job, Done>, job: Job) {
        match job {
            Job::ArmAll => {
                self.pending.clear();
                self.inflight.clear();
                desk.report(match self.tracker.arm_all(&self.ram) {
                    Ok(()) => Done::AllArmed,
                    Err(error) => failed(Step::Arm, &error),
                });
            }
            Job::StartRound { all } => desk.report(self.start_round(all)),
            Job::FillRound {
                frame,
                first_index,
                chunks,
            } => {
                let done = self.fill_round(desk, frame, first_index, chunks);
                desk.report(done);
            }
            Job::DropDirt => {
                self.inflight.clear();
                // Outside of the pause: have chunks ready for the next one.
                self.arena
                    .reserve(self.usual_chunks + self.usual_chunks / 2 + SPARE_CHUNKS);
                self.arena.shrink(2 * self.usual_chunks + SPARE_CHUNKS);
            }
            Job::MergeDirt => {
                self.pending
                    .merge(&self.inflight)
                    .expect("both sets are of the same RAM");
                self.inflight.clear();
            }
            Job::Seal { .. } => {
                let text = "its harvest had failed".to_owned();
                desk.report(Done::Failed {
                    step: Step::Seal,
                    text,
                });
            }
            Job::Harvest { .. } | Job::Leave => unreachable!("handled by the loop"),
        }
    }

    fn start_round(&mut self, all: bool) -> Done {
        self.inflight.clear();
        if all {
            self.inflight.set_all();
        } else if let Err(error) = self.tracker.collect(&self.ram, &mut self.inflight) {
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
        desk: &Desk<Job, Done>,
        frame: Frame,
        first_index: u32,
        chunks: u32,
    ) -> Done {
        for index in first_index..first_index.saturating_add(chunks) {
            let Some(mut memory) = self.arena.alloc() else {
                // All chunks are on the way; the next fill finds some.
                return Done::RoundFilled { done: false };
            };
            let head = ChunkHead {
                frame,
                kind: EpochKind::SyncRound,
                index,
            };
            let mut builder = ChunkBuilder::new(memory.as_mut_slice(), head);
            let progress = match fill(&self.ram, &mut builder, &mut self.cursor) {
                Ok(progress) => progress,
                Err(error) => return failed(Step::Round, &error),
            };
            if !builder.is_empty() {
                let sealed = builder.seal(false);
                let chunk = memory.freeze(sealed.used_bytes);
                desk.report(Done::Chunk {
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

    /// A harvest, and the seal that follows it. Returns the job after that.
    fn epoch(
        &mut self,
        desk: &Desk<Job, Done>,
        frame: Frame,
        kind: EpochKind,
        audit: bool,
    ) -> Option<Job> {
        match self.harvest(desk, frame, kind, audit) {
            Ok(next) => next,
            Err((step, text)) => {
                desk.report(Done::Failed { step, text });
                desk.next()
            }
        }
    }

    fn harvest(
        &mut self,
        desk: &Desk<Job, Done>,
        frame: Frame,
        kind: EpochKind,
        audit: bool,
    ) -> Result<Option<Job>, (Step, String)> {
        let failed = |error: &dyn std::error::Error| (Step::Harvest, describe(error));
        let began = Instant::now();
        self.take_dirt(kind).map_err(|e| failed(&e))?;
        let scan = began.elapsed();
        let mut image = EpochImage::new(frame, kind);
        loop {
            let mut memory = self.alloc().map_err(|text| (Step::Harvest, text))?;
            let mut builder = ChunkBuilder::new(memory.as_mut_slice(), image.head());
            let progress =
                fill(&self.ram, &mut builder, &mut self.cursor).map_err(|e| failed(&e))?;
            if progress == Progress::Full {
                let sealed = builder.seal(false);
                image.report(desk, memory, &sealed, false);
                continue;
            }
            let audit = audit
                .then(|| hash_blocks(&self.ram))
                .transpose()
                .map_err(|e| failed(&e))?;
            desk.report(Done::Harvested(Harvest {
                dirty_pages: self.inflight.count(),
                scan,
                copy: began.elapsed().saturating_sub(scan),
            }));
            // The guest runs again from here on; the last chunk has stayed open for the rest.
            let end = match desk.next() {
                Some(Job::Seal {
                    base,
                    run_state,
                    device_bytes,
                }) => {
                    self.read_device_state(device_bytes)
                        .map_err(|text| (Step::Seal, text))?;
                    Ending {
                        base,
                        run_state,
                        audit: audit.map(AuditDigest),
                    }
                }
                other => return Ok(other), // the boundary was aborted
            };
            if builder.device_room() >= room_for_end(self.device_buffer.len()) {
                builder.push_device(0, &self.device_buffer);
                let sealed = image.end(builder, &end, self.device_buffer.len());
                image.report(desk, memory, &sealed, true);
            } else {
                let sealed = builder.seal(false);
                image.report(desk, memory, &sealed, false);
                self.end_apart(desk, &mut image, &end)
                    .map_err(|text| (Step::Seal, text))?;
            }
            self.usual_chunks = image.chunks();
            return Ok(desk.next());
        }
    }

    /// Moves what is dirty into the epoch. When a tracker fails it may have armed pages that
    /// it did not report, so all of RAM goes into the next epoch.
    fn take_dirt(&mut self, kind: EpochKind) -> Result<(), TrackerError> {
        if let Err(error) = self.tracker.collect(&self.ram, &mut self.pending) {
            self.pending.set_all();
            return Err(error);
        }
        let full = kind == EpochKind::Full;
        if full {
            self.pending.set_all();
        }
        self.inflight.clear();
        self.inflight.swap(&mut self.pending);
        self.cursor.load(&self.inflight, full);
        Ok(())
    }

    /// Device state and trailer in chunks of their own: there was no room beside the pages.
    fn end_apart(
        &self,
        desk: &Desk<Job, Done>,
        image: &mut EpochImage,
        end: &Ending,
    ) -> Result<(), String> {
        let mut offset = 0;
        loop {
            let mut memory = self.alloc()?;
            let mut builder = ChunkBuilder::new(memory.as_mut_slice(), image.head());
            let rest = &self.device_buffer[offset..];
            let last = builder.device_room() >= room_for_end(rest.len());
            let piece = &rest[..rest.len().min(builder.device_room())];
            builder.push_device(offset as u64, piece);
            offset += piece.len();
            let sealed = match last {
                true => image.end(builder, end, self.device_buffer.len()),
                false => builder.seal(false),
            };
            image.report(desk, memory, &sealed, last);
            if last {
                return Ok(());
            }
        }
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
        self.arena
            .alloc()
            .ok_or_else(|| "an epoch larger than all of RAM".to_owned())
    }
}

fn failed(step: Step, error: &dyn std::error::Error) -> Done {
    Done::Failed {
        step,
        text: describe(error),
    }
}

/// An error with its sources, on one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
