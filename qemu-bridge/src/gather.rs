//! Copying dirty pages out of a guest's RAM into chunks.
//!
//! It runs while the guest is paused: one copy per page, no system call per page where RAM is
//! mapped, nothing allocated once the list of runs has grown to its usual size.

use ft_core::image::ChunkBuilder;
use ft_core::types::PAGE_BYTES;
use ft_core::{DirtySet, PageRun};

use crate::guest_ram::{GuestRam, RamError};

/// Pages copied at a time while runs are uniform.
const BATCH_PAGES: usize = 64;
/// Runs that there is always room for: scattered dirt of 256 MiB of RAM.
const RUNS_READY: usize = 65_536;

/// Whether a chunk was filled to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The chunk is full; pages are left.
    Full,
    /// All pages are in chunks.
    Done,
}

/// What is still to be copied. Keeps its memory between epochs.
#[derive(Debug)]
pub struct Cursor {
    runs: Vec<PageRun>,
    next: usize,
    /// Look for holes of the RAM's file first. Dirty pages of a delta can't be holes, so this is
    /// for the first round and for full epochs.
    check_holes: bool,
    /// Zero pages are left out: they take no time later, and a chunk has no room for what they become.
    leave_zeros: bool,
    /// The data stretch that the hole look-up has found, so that it is asked once per stretch.
    known_data: Option<PageRun>,
    batch: usize,
}

impl Default for Cursor {
    fn default() -> Cursor {
        Cursor {
            runs: Vec::with_capacity(RUNS_READY),
            next: 0,
            check_holes: false,
            leave_zeros: false,
            known_data: None,
            batch: BATCH_PAGES,
        }
    }
}

impl Cursor {
    /// Starts over with the pages of `dirty`.
    pub fn load(&mut self, dirty: &DirtySet, check_holes: bool) {
        self.runs.clear();
        self.runs.extend(dirty.runs());
        self.next = 0;
        self.check_holes = check_holes;
        self.leave_zeros = false;
        self.known_data = None;
        self.batch = BATCH_PAGES;
    }

    /// Starts over with the pages of `dirty`, of a running guest, but for those that are zero.
    pub fn load_live(&mut self, dirty: &DirtySet) {
        self.load(dirty, false);
        self.leave_zeros = true;
    }

    fn current(&self) -> Option<PageRun> {
        self.runs.get(self.next).copied()
    }

    fn advance(&mut self, pages: u64) {
        let Some(run) = self.runs.get_mut(self.next) else {
            return;
        };
        run.first += pages;
        run.count -= pages;
        if run.count == 0 {
            self.next += 1;
        }
    }
}

/// Fills one chunk from where `cursor` stands.
///
/// # Errors
/// RAM can't be read: QEMU is gone, or a privilege is missing.
pub fn fill<M: AsMut<[u8]>>(
    ram: &GuestRam,
    builder: &mut ChunkBuilder<M>,
    cursor: &mut Cursor,
) -> Result<Progress, RamError> {
    while let Some(run) = cursor.current() {
        let run = if cursor.check_holes {
            let (holes, data) = split_holes(ram, cursor, run)?;
            if holes > 0 {
                if !builder.push_zero(PageRun {
                    count: holes,
                    ..run
                }) {
                    return Ok(Progress::Full);
                }
                cursor.advance(holes);
                continue;
            }
            data
        } else {
            run
        };
        let want = usize::try_from(run.count)
            .unwrap_or(usize::MAX)
            .min(cursor.batch);
        let Some(room) = builder.next_pages(want) else {
            return Ok(Progress::Full);
        };
        ram.copy_out(run.block, run.first, room)?;
        let pages = room.len() / PAGE_BYTES;
        let zero = |page: &&[u8]| is_zero(page);
        let filled = room
            .chunks_exact(PAGE_BYTES)
            .take_while(|page| !zero(page))
            .count();
        let zeros = room[filled * PAGE_BYTES..]
            .chunks_exact(PAGE_BYTES)
            .take_while(zero)
            .count();
        // Mixed pages are copied again from the next one on; small steps keep that cheap.
        cursor.batch = if filled == pages || zeros == pages {
            (cursor.batch * 2).min(BATCH_PAGES)
        } else {
            (filled + zeros).clamp(1, BATCH_PAGES)
        };
        if filled > 0 {
            builder.commit_data_run(run.block, run.first, filled);
            cursor.advance(filled as u64);
        }
        if zeros > 0 {
            let first = run.first + filled as u64;
            let zero_run = PageRun {
                block: run.block,
                first,
                count: zeros as u64,
            };
            if !cursor.leave_zeros && !builder.push_zero(zero_run) {
                return Ok(Progress::Full);
            }
            cursor.advance(zeros as u64);
        }
    }
    Ok(Progress::Done)
}

/// How many pages at the start of `run` are holes, and the data that follows them.
fn split_holes(
    ram: &GuestRam,
    cursor: &mut Cursor,
    run: PageRun,
) -> Result<(u64, PageRun), RamError> {
    let covers = |data: &PageRun| {
        data.block == run.block && data.first <= run.first && run.first < data.first + data.count
    };
    if cursor.known_data.as_ref().is_none_or(|data| !covers(data)) {
        cursor.known_data = ram.next_data(run)?;
    }
    let Some(data) = cursor.known_data else {
        return Ok((run.count, run));
    };
    if data.first > run.first {
        return Ok((data.first - run.first, run));
    }
    let count = (data.first + data.count - run.first).min(run.count);
    Ok((0, PageRun { count, ..run }))
}

/// Whether all bytes are zero; 64 at a time, which compiles to vector instructions.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    page.chunks(64)
        .all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}
