//! Slot memory: chunks of [`CHUNK_BYTES`] that have one writer or none.
//!
//! Each chunk is its own anonymous mapping, so that an epoch as large as all of RAM can be given
//! back to the system piece by piece ([`Arena::shrink`]), and a chunk that comes back is handed
//! out again with its pages in place. A chunk lives in its handle ([`ChunkMut`] or [`Chunk`]),
//! not in the arena: whoever has the handle is the only one who can reach the bytes, and a link
//! that keeps the handle while the kernel or the network card writes makes them unreachable.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use memmap2::{Advice, MmapMut, MmapOptions};

use crate::link::CHUNK_BYTES;

/// Hands out chunks, takes them back when they are dropped, and bounds how many there are.
#[derive(Clone)]
pub struct Arena {
    shared: Arc<Shared>,
}

/// How an [`Arena`]'s chunks are spread at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArenaStats {
    /// The most chunks that may exist.
    pub limit_chunks: usize,
    /// Chunks that exist, in use or free.
    pub mapped_chunks: usize,
    /// Chunks that nobody has.
    pub free_chunks: usize,
    /// Free chunks whose every page is in memory: using one faults nothing in.
    pub ready_chunks: usize,
}

/// A chunk with one writer: whoever has this.
pub struct ChunkMut {
    /// Taken only by `drop` and by the conversions, which consume the handle.
    body: Option<Body>,
    shared: Arc<Shared>,
}

/// A chunk that nobody writes, and how many of its bytes are in use.
pub struct Chunk {
    chunk: ChunkMut,
    used_bytes: usize,
}

/// Tells whether a mapping still exists, and is another for each: a chunk's id is not enough to
/// name registered memory, as a later mapping inherits it.
#[derive(Clone, Debug)]
pub(crate) struct MappingWatch(Weak<()>);

struct Body {
    id: u32,
    memory: MmapMut,
    /// Every page is known to be in memory.
    populated: bool,
    alive: Arc<()>,
}

/// See [`unmapped_count`].
static UNMAPPED: AtomicU64 = AtomicU64::new(0);

/// Changes whenever a chunk of any arena is given back to the system: time to look at every
/// [`MappingWatch`].
pub(crate) fn unmapped_count() -> u64 {
    UNMAPPED.load(Ordering::Relaxed)
}

struct Shared {
    limit_chunks: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Free, every page in memory.
    ready: Vec<Body>,
    /// Free, with whatever pages their last use left.
    cold: Vec<Body>,
    /// Ids that were ever used are the numbers below this.
    ids: usize,
    /// Of these, the ones that have no mapping now.
    vacant: Vec<u32>,
}

impl Arena {
    /// An arena of at most `limit_chunks` chunks; none is mapped yet.
    pub fn new(limit_chunks: usize) -> Arena {
        let limit_chunks = limit_chunks.min(u32::MAX as usize);
        Arena {
            shared: Arc::new(Shared {
                limit_chunks,
                state: Mutex::default(),
            }),
        }
    }

    /// A chunk of whatever bytes its last user left: a free one, or a new one below the limit.
    /// `None` at the limit, or if the system has no memory left.
    pub fn alloc(&self) -> Option<ChunkMut> {
        let mut state = self.shared.lock();
        let body = match state.ready.pop().or_else(|| state.cold.pop()) {
            Some(body) => body,
            None => {
                let id = state.take_id(self.shared.limit_chunks)?;
                drop(state);
                self.map(id, false)?
            }
        };
        Some(ChunkMut {
            body: Some(body),
            shared: Arc::clone(&self.shared),
        })
    }

    /// Makes `chunks` free chunks ready, every page in memory, as far as the limit allows, so that
    /// [`Arena::alloc`] and writing them costs no system call. Returns how many are ready.
    ///
    /// Takes about 0.2 ms per chunk that wasn't: call it while nobody waits.
    pub fn reserve(&self, chunks: usize) -> usize {
        loop {
            let mut state = self.shared.lock();
            if state.ready.len() >= chunks {
                return state.ready.len();
            }
            // Populated outside the lock: `alloc` in another thread must not wait for it.
            let body = match state.cold.pop() {
                Some(body) => {
                    drop(state);
                    body.memory
                        .advise(Advice::PopulateWrite)
                        .is_ok()
                        .then_some(body)
                }
                None => match state.take_id(self.shared.limit_chunks) {
                    Some(id) => {
                        drop(state);
                        self.map(id, true)
                    }
                    None => return state.ready.len(),
                },
            };
            let Some(mut body) = body else {
                return self.shared.lock().ready.len();
            };
            body.populated = true;
            self.shared.lock().ready.push(body);
        }
    }

    /// Gives free chunks back to the system until `keep_free` are left.
    pub fn shrink(&self, keep_free: usize) {
        let mut unmapped = Vec::new();
        {
            let mut state = self.shared.lock();
            while state.ready.len() + state.cold.len() > keep_free {
                let body = state
                    .cold
                    .pop()
                    .or_else(|| state.ready.pop())
                    .expect("the two lists together are not empty");
                state.vacant.push(body.id);
                unmapped.push(body);
            }
        }
        // Outside the lock: munmap of many chunks takes milliseconds.
        drop(unmapped);
    }

    pub fn stats(&self) -> ArenaStats {
        let state = self.shared.lock();
        ArenaStats {
            limit_chunks: self.shared.limit_chunks,
            mapped_chunks: state.ids - state.vacant.len(),
            free_chunks: state.ready.len() + state.cold.len(),
            ready_chunks: state.ready.len(),
        }
    }

    fn map(&self, id: u32, populated: bool) -> Option<Body> {
        let mut options = MmapOptions::new();
        options.len(CHUNK_BYTES);
        if populated {
            options.populate();
        }
        match options.map_anon() {
            Ok(memory) => Some(Body {
                id,
                memory,
                populated,
                alive: Arc::new(()),
            }),
            Err(error) => {
                tracing::warn!(%error, "no memory for another chunk");
                self.shared.lock().vacant.push(id);
                None
            }
        }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Arena").field(&self.stats()).finish()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No state is left half-changed by a panic: every critical section is a few pushes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take_id(&mut self, limit_chunks: usize) -> Option<u32> {
        if let Some(id) = self.vacant.pop() {
            return Some(id);
        }
        if self.ids == limit_chunks {
            return None;
        }
        let id = self.ids as u32;
        self.ids += 1;
        // Every list can take every id without allocating, so that dropping a chunk never does.
        self.ready.reserve(self.ids - self.ready.len());
        self.cold.reserve(self.ids - self.cold.len());
        self.vacant.reserve(self.ids - self.vacant.len());
        Some(id)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        UNMAPPED.fetch_add(1, Ordering::Relaxed);
    }
}

impl MappingWatch {
    pub(crate) fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }

    pub(crate) fn is_of(&self, chunk: &Chunk) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&chunk.chunk.body().alive))
    }
}

impl ChunkMut {
    /// The chunk's index in its arena, below the arena's limit. Stable while the chunk exists; a
    /// chunk that is mapped later can inherit it.
    pub fn id(&self) -> u32 {
        self.body().id
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.body().memory
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.body_mut().memory
    }

    /// Ends the writing: the first `used_bytes` bytes are what counts.
    ///
    /// # Panics
    /// If `used_bytes` is 0 or more than [`CHUNK_BYTES`].
    pub fn freeze(self, used_bytes: usize) -> Chunk {
        assert!(
            (1..=CHUNK_BYTES).contains(&used_bytes),
            "a chunk of {used_bytes} used bytes"
        );
        Chunk {
            chunk: self,
            used_bytes,
        }
    }

    /// Where the kernel shall write. Nothing else may look at the bytes until it is done.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.body_mut().memory.as_mut_ptr()
    }

    fn body(&self) -> &Body {
        self.body.as_ref().expect("only drop takes the body")
    }

    fn body_mut(&mut self) -> &mut Body {
        self.body.as_mut().expect("only drop takes the body")
    }
}

impl AsMut<[u8]> for ChunkMut {
    fn as_mut(&mut self) -> &mut [u8] {
        self.as_mut_slice()
    }
}

impl fmt::Debug for ChunkMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkMut").field("id", &self.id()).finish()
    }
}

impl Drop for ChunkMut {
    fn drop(&mut self) {
        let body = self.body.take().expect("drop runs once");
        let mut state = self.shared.lock();
        if body.populated {
            state.ready.push(body);
        } else {
            state.cold.push(body);
        }
    }
}

impl Chunk {
    /// See [`ChunkMut::id`].
    pub fn id(&self) -> u32 {
        self.chunk.id()
    }

    /// The bytes in use.
    pub fn bytes(&self) -> &[u8] {
        &self.chunk.as_slice()[..self.used_bytes]
    }

    /// Makes the whole chunk writable again.
    pub fn thaw(self) -> ChunkMut {
        self.chunk
    }

    pub(crate) fn watch(&self) -> MappingWatch {
        MappingWatch(Arc::downgrade(&self.chunk.body().alive))
    }

    /// The whole mapping, of which [`Chunk::bytes`] is the beginning.
    pub(crate) fn mapping(&self) -> &[u8] {
        self.chunk.as_slice()
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunk")
            .field("id", &self.id())
            .field("used_bytes", &self.used_bytes)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_page_aligned_distinct_and_bounded() {
        let arena = Arena::new(3);
        let mut chunks: Vec<_> = std::iter::from_fn(|| arena.alloc()).collect();
        assert_eq!(chunks.len(), 3);
        for (index, chunk) in chunks.iter_mut().enumerate() {
            assert_eq!(chunk.id() as usize, index);
            assert_eq!(chunk.as_slice().len(), CHUNK_BYTES);
            assert_eq!(chunk.as_slice().as_ptr() as usize % 4096, 0);
            chunk.as_mut_slice().fill(index as u8 + 1);
        }
        for (index, chunk) in chunks.iter().enumerate() {
            assert!(chunk.as_slice().iter().all(|&b| b == index as u8 + 1));
        }
        drop(chunks);
        assert_eq!(arena.stats().free_chunks, 3);
        assert!(arena.alloc().is_some());
    }

    #[test]
    fn freeze_and_thaw_keep_bytes_and_identity() {
        let arena = Arena::new(1);
        let mut chunk = arena.alloc().expect("one chunk");
        chunk.as_mut_slice()[..4].copy_from_slice(b"abcd");
        let id = chunk.id();
        let frozen = chunk.freeze(4);
        assert_eq!(frozen.bytes(), b"abcd");
        assert_eq!(frozen.id(), id);
        let thawed = frozen.thaw();
        assert_eq!(&thawed.as_slice()[..4], b"abcd");
        drop(thawed);
        assert_eq!(arena.stats().free_chunks, 1);
    }

    #[test]
    fn reserve_makes_free_chunks_ready_up_to_the_limit() {
        let arena = Arena::new(4);
        drop(arena.alloc());
        assert_eq!(arena.stats().ready_chunks, 0);
        assert_eq!(arena.reserve(2), 2);
        assert_eq!(arena.stats().mapped_chunks, 2);
        assert_eq!(arena.reserve(9), 4);
        let ready = arena.alloc().expect("a ready chunk");
        assert_eq!(resident_pages(&ready), CHUNK_BYTES / 4096);
        drop(ready);
        assert_eq!(arena.stats().ready_chunks, 4);
    }

    #[test]
    fn shrink_unmaps_and_the_ids_are_used_again_by_other_mappings() {
        let arena = Arena::new(4);
        let held = arena.alloc().expect("a chunk");
        arena.reserve(3);
        let before = arena.alloc().expect("a chunk").freeze(1);
        let (id, watch) = (before.id(), before.watch());
        assert!(watch.is_alive() && watch.is_of(&before));
        drop(before);
        let seen = unmapped_count();
        arena.shrink(0);
        assert!(unmapped_count() >= seen + 3);
        assert_eq!(arena.stats().mapped_chunks, 1);
        assert!(!watch.is_alive());
        let again: Vec<_> = std::iter::from_fn(|| arena.alloc()).collect();
        assert_eq!(again.len(), 3);
        let heir = again.into_iter().find(|chunk| chunk.id() == id);
        assert!(!watch.is_of(&heir.expect("the id is used again").freeze(1)));
        drop(held);
    }

    #[test]
    fn a_chunk_outlives_its_arena() {
        let arena = Arena::new(1);
        let mut chunk = arena.alloc().expect("a chunk");
        drop(arena);
        chunk.as_mut_slice()[0] = 1;
        assert_eq!(chunk.freeze(1).bytes(), [1]);
    }

    fn resident_pages(chunk: &ChunkMut) -> usize {
        let mut pages = [0u8; CHUNK_BYTES / 4096];
        // SAFETY: the range is the chunk's own mapping, and `pages` has a byte for each page.
        let done = unsafe {
            libc::mincore(
                chunk.as_slice().as_ptr() as *mut _,
                CHUNK_BYTES,
                pages.as_mut_ptr(),
            )
        };
        assert_eq!(done, 0);
        pages.iter().filter(|&&page| page & 1 == 1).count()
    }
}
