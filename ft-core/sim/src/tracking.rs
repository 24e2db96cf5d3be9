//! The primary's worker: tracker, dirty sets and the filling of chunks, in the order of the
//! driver's worker. One call is one step, so that the guest can run in between.

use std::collections::{HashMap, VecDeque};

use ft_core::image::{EpochDigest, Trailer};
use ft_core::primary::{Harvest, Step};
use ft_core::wire::Frame;
use ft_core::{BlockId, DirtySet, Epoch, EpochKind, RunState};

use crate::image::{CHUNK_PAGES, Chunk, DEVICE_BYTES, audit};
use crate::vm::{BLOCK_PAGES, Value, Vm};

#[derive(Debug)]
pub enum Job {
    ArmAll,
    StartRound {
        all: bool,
    },
    FillRound {
        frame: Frame,
        first_index: u32,
        chunks: u32,
    },
    Precopy,
    Harvest {
        frame: Frame,
        kind: EpochKind,
        audit: bool,
    },
    Seal {
        base: Epoch,
        run_state: RunState,
    },
    DropDirt,
    MergeDirt,
}

#[derive(Debug)]
pub enum Done {
    AllArmed,
    RoundStarted { pages: u64 },
    RoundFilled { done: bool },
    Chunk(Chunk),
    Precopied,
    Harvested(Harvest),
    Failed { step: Step, text: String },
}

#[derive(Debug)]
pub struct Tracking {
    jobs: VecDeque<Job>,
    task: Option<Task>,
    /// Dirty pages that belong to no epoch yet, and those of the unacknowledged one.
    pending: DirtySet,
    inflight: DirtySet,
    /// Copies of a running guest's pages, for the harvest that follows.
    precopied: Copies,
    round: Cursor,
    open: Option<OpenEpoch>,
    /// The next job fails.
    pub fail: bool,
}

/// A job that takes more than one step.
#[derive(Debug)]
enum Task {
    Fill {
        frame: Frame,
        index: u32,
        left: u32,
    },
    /// So many pages of the round are copied while the guest runs.
    Precopy,
    Copy,
}

type Cursor = VecDeque<(BlockId, u64)>;
type Copies = HashMap<(BlockId, u64), Value>;

/// An epoch between its harvest and its seal.
#[derive(Debug)]
struct OpenEpoch {
    frame: Frame,
    kind: EpochKind,
    pages: Cursor,
    precopied: Copies,
    /// Copied, and waiting for the device state to follow in the last chunk.
    rest: Vec<(BlockId, u64, Value)>,
    dirty_pages: u64,
    audit: Option<ft_core::image::AuditDigest>,
    chunks: u32,
    data_pages: u64,
    zero_pages: u64,
    digest: EpochDigest,
}

impl Default for Tracking {
    fn default() -> Tracking {
        Tracking {
            jobs: VecDeque::new(),
            task: None,
            pending: DirtySet::new(&BLOCK_PAGES),
            inflight: DirtySet::new(&BLOCK_PAGES),
            precopied: Copies::new(),
            round: Cursor::new(),
            open: None,
            fail: false,
        }
    }
}

impl Tracking {
    pub fn submit(&mut self, job: Job) {
        self.jobs.push_back(job);
    }

    pub fn idle(&self) -> bool {
        self.jobs.is_empty() && self.task.is_none()
    }

    pub fn queued(&self) -> usize {
        self.jobs.len()
    }

    /// Does the next piece of work.
    pub fn step(&mut self, vm: &mut Vm) -> Option<Done> {
        match self.task.take() {
            Some(Task::Fill { frame, index, left }) => Some(self.fill(vm, frame, index, left)),
            Some(Task::Precopy) => self.precopy(vm),
            Some(Task::Copy) => Some(self.copy(vm)),
            None => {
                let job = self.jobs.pop_front()?;
                self.start(vm, job)
            }
        }
    }

    fn start(&mut self, vm: &mut Vm, job: Job) -> Option<Done> {
        match job {
            Job::ArmAll => {
                self.pending.clear();
                self.inflight.clear();
                self.precopied.clear();
                if let Some(failed) = self.fails(Step::Arm) {
                    return Some(failed);
                }
                vm.arm_all();
                Some(Done::AllArmed)
            }
            Job::StartRound { all } => Some(self.start_round(vm, all)),
            Job::FillRound {
                frame,
                first_index,
                chunks,
            } => Some(self.fill(vm, frame, first_index, chunks)),
            Job::Precopy => self.start_precopy(vm),
            Job::Harvest { frame, kind, audit } => Some(self.harvest(vm, frame, kind, audit)),
            Job::Seal { base, run_state } => Some(self.seal(vm, base, run_state)),
            Job::DropDirt => {
                self.inflight.clear();
                None
            }
            Job::MergeDirt => {
                self.pending
                    .merge(&self.inflight)
                    .expect("both sets are of the same RAM");
                self.inflight.clear();
                self.precopied.clear();
                None
            }
        }
    }

    fn fails(&mut self, step: Step) -> Option<Done> {
        let text = "the simulator says so".to_owned();
        std::mem::take(&mut self.fail).then_some(Done::Failed { step, text })
    }

    fn start_round(&mut self, vm: &mut Vm, all: bool) -> Done {
        self.precopied.clear();
        let mut pages = DirtySet::new(&BLOCK_PAGES);
        if all {
            pages.set_all();
        } else {
            let dirty = vm.scan();
            if let Err(error) = pages.merge(&dirty) {
                return Done::Failed {
                    step: Step::Round,
                    text: error.to_string(),
                };
            }
            vm.arm(&dirty);
        }
        if let Some(failed) = self.fails(Step::Round) {
            return failed;
        }
        self.round = pages_of(&pages);
        Done::RoundStarted {
            pages: pages.count(),
        }
    }

    fn fill(&mut self, vm: &Vm, frame: Frame, index: u32, left: u32) -> Done {
        if let Some(failed) = self.fails(Step::Round) {
            return failed;
        }
        if left == 0 || self.round.is_empty() {
            let done = self.round.is_empty();
            return Done::RoundFilled { done };
        }
        self.task = Some(Task::Fill {
            frame,
            index: index + 1,
            left: left - 1,
        });
        let pages = gather(vm, &Copies::new(), &mut self.round);
        let kind = EpochKind::SyncRound;
        Done::Chunk(Chunk {
            frame,
            kind,
            index,
            pages,
            end: None,
            corrupt: false,
        })
    }

    fn start_precopy(&mut self, vm: &mut Vm) -> Option<Done> {
        self.precopied.clear();
        let dirty = vm.scan();
        vm.arm(&dirty);
        let merged = self.pending.merge(&dirty).map_err(|e| e.to_string());
        let failed = self.fails(Step::Precopy);
        if failed.is_some() || merged.is_err() {
            self.pending.set_all();
        }
        if let Err(text) = merged {
            let step = Step::Precopy;
            return Some(Done::Failed { step, text });
        }
        if failed.is_some() {
            return failed;
        }
        self.round = pages_of(&dirty);
        self.precopy(vm)
    }

    /// A few pages at a time: the guest writes in between.
    fn precopy(&mut self, vm: &Vm) -> Option<Done> {
        let copied = gather(vm, &Copies::new(), &mut self.round);
        if copied.is_empty() {
            return Some(Done::Precopied);
        }
        let copies = copied
            .into_iter()
            .map(|(block, page, value)| ((block, page), value));
        self.precopied.extend(copies);
        self.task = Some(Task::Precopy);
        None
    }

    fn harvest(&mut self, vm: &mut Vm, frame: Frame, kind: EpochKind, audited: bool) -> Done {
        self.open = None;
        let dirty = vm.scan();
        if let Err(error) = self.pending.merge(&dirty) {
            return Done::Failed {
                step: Step::Harvest,
                text: error.to_string(),
            };
        }
        vm.arm(&dirty);
        if kind == EpochKind::Full {
            self.pending.set_all();
        }
        assert!(
            self.inflight.is_empty(),
            "a harvest while another epoch's dirt is in flight"
        );
        self.pending.swap(&mut self.inflight);
        let mut precopied = std::mem::take(&mut self.precopied);
        for page in pages_of(&dirty) {
            precopied.remove(&page);
        }
        if let Some(failed) = self.fails(Step::Harvest) {
            return failed;
        }
        self.open = Some(OpenEpoch {
            frame,
            kind,
            pages: pages_of(&self.inflight),
            precopied,
            rest: Vec::new(),
            dirty_pages: self.inflight.count(),
            audit: audited.then(|| audit(&vm.ram)),
            chunks: 0,
            data_pages: 0,
            zero_pages: 0,
            digest: EpochDigest::default(),
        });
        self.copy(vm)
    }

    /// Fills one chunk; what fits in the last one waits for the seal.
    fn copy(&mut self, vm: &Vm) -> Done {
        let Some(open) = &mut self.open else {
            unreachable!("a copy belongs to a harvest")
        };
        if open.pages.len() <= CHUNK_PAGES {
            open.rest = gather(vm, &open.precopied, &mut open.pages);
            return Done::Harvested(Harvest {
                dirty_pages: open.dirty_pages,
                precopied_pages: open.precopied.len() as u64,
                ..Harvest::default()
            });
        }
        self.task = Some(Task::Copy);
        let pages = gather(vm, &open.precopied, &mut open.pages);
        Done::Chunk(open.chunk(pages))
    }

    fn seal(&mut self, vm: &Vm, base: Epoch, run_state: RunState) -> Done {
        let failed = self.fails(Step::Seal);
        let (Some(mut open), Some(saved), None) = (self.open.take(), &vm.saved, failed) else {
            return Done::Failed {
                step: Step::Seal,
                text: "nothing to seal".to_owned(),
            };
        };
        let digest = open.digest.value();
        let rest = std::mem::take(&mut open.rest);
        let mut chunk = open.chunk(rest);
        let trailer = Trailer {
            chunks: open.chunks,
            data_pages: open.data_pages,
            zero_pages: open.zero_pages,
            device_bytes: DEVICE_BYTES.into(),
            run_state,
            base,
            digest,
            audit: open.audit,
        };
        chunk.end = Some((saved.device, trailer));
        Done::Chunk(chunk)
    }
}

impl OpenEpoch {
    fn chunk(&mut self, pages: Vec<(BlockId, u64, Value)>) -> Chunk {
        let (frame, kind, index) = (self.frame, self.kind, self.chunks);
        let chunk = Chunk {
            frame,
            kind,
            index,
            pages,
            end: None,
            corrupt: false,
        };
        self.chunks += 1;
        self.data_pages += chunk.data_pages();
        self.zero_pages += chunk.zero_pages();
        self.digest.push(chunk.crc());
        chunk
    }
}

fn pages_of(set: &DirtySet) -> Cursor {
    set.runs()
        .flat_map(|run| (run.first..run.first + run.count).map(move |p| (run.block, p)))
        .collect()
}

fn gather(vm: &Vm, copies: &Copies, cursor: &mut Cursor) -> Vec<(BlockId, u64, Value)> {
    let count = cursor.len().min(CHUNK_PAGES);
    let value = |(block, page): (BlockId, u64)| {
        let now = || vm.ram[usize::from(block.0)][page as usize];
        let value = copies.get(&(block, page)).copied().unwrap_or_else(now);
        (block, page, value)
    };
    cursor.drain(..count).map(value).collect()
}
