//! Which pages have changed: one bitmap per RAM block.
//!
//! A set knows how many pages each block has, and no bit past a block's last page can ever be
//! set. Two sets of different shape never meet: [`DirtySet::merge`] refuses them, because
//! pairing them up block by block would silently lose the longer one's tail.

use crate::types::{BlockId, PageRun};

const WORD_BITS: u64 = u64::BITS as u64;

/// The dirty pages of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtySet {
    blocks: Vec<Bitmap>,
}

/// Why a run or a set doesn't fit in a [`DirtySet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DirtyError {
    #[error("dirty set covers {ours} RAM blocks, the other one {theirs}")]
    BlockCount { ours: usize, theirs: usize },
    #[error("RAM block {block} has {ours} pages in the dirty set and {theirs} in the other one")]
    BlockPages {
        block: usize,
        ours: u64,
        theirs: u64,
    },
    #[error("dirty run names RAM block {block}, of {blocks}")]
    UnknownBlock { block: u16, blocks: usize },
    #[error("dirty run of {count} pages from page {first} leaves RAM block {block} of {pages}")]
    OutOfRange {
        block: u16,
        first: u64,
        count: u64,
        pages: u64,
    },
}

impl DirtySet {
    /// An empty set over blocks of these many pages.
    pub fn new(pages_per_block: &[u64]) -> DirtySet {
        DirtySet {
            blocks: pages_per_block.iter().map(|&p| Bitmap::new(p)).collect(),
        }
    }

    /// Marks a run that this process has computed.
    ///
    /// # Panics
    /// If the run leaves its block.
    pub fn set(&mut self, run: PageRun) {
        if let Err(error) = self.try_set(run) {
            panic!("{error}");
        }
    }

    /// Marks a run that came from outside.
    ///
    /// # Errors
    /// If the block is unknown or the run leaves it; then nothing is marked.
    pub fn try_set(&mut self, run: PageRun) -> Result<(), DirtyError> {
        let blocks = self.blocks.len();
        let PageRun {
            block,
            first,
            count,
        } = run;
        let Some(bitmap) = self.blocks.get_mut(usize::from(block.0)) else {
            return Err(DirtyError::UnknownBlock {
                block: block.0,
                blocks,
            });
        };
        match first.checked_add(count) {
            Some(end) if end <= bitmap.pages => {
                bitmap.set(first, end);
                Ok(())
            }
            _ => Err(DirtyError::OutOfRange {
                block: block.0,
                first,
                count,
                pages: bitmap.pages,
            }),
        }
    }

    pub fn set_all(&mut self) {
        for bitmap in &mut self.blocks {
            bitmap.set(0, bitmap.pages);
        }
    }

    pub fn clear(&mut self) {
        for bitmap in &mut self.blocks {
            bitmap.words.fill(0);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.words().all(|w| w == 0)
    }

    /// Dirty pages.
    pub fn count(&self) -> u64 {
        self.words().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether the page is dirty; false for a page that doesn't exist.
    pub fn contains(&self, block: BlockId, page: u64) -> bool {
        self.blocks.get(usize::from(block.0)).is_some_and(|b| {
            page < b.pages && b.words[word_of(page)] >> (page % WORD_BITS) & 1 == 1
        })
    }

    /// Adds the pages of `other`.
    ///
    /// # Errors
    /// If the two don't cover the same blocks of the same length; then nothing is merged.
    pub fn merge(&mut self, other: &DirtySet) -> Result<(), DirtyError> {
        self.check_same_shape(other)?;
        for (ours, theirs) in self.blocks.iter_mut().zip(&other.blocks) {
            for (word, addition) in ours.words.iter_mut().zip(&theirs.words) {
                *word |= addition;
            }
        }
        Ok(())
    }

    /// Takes the pages of `other` out.
    ///
    /// # Panics
    /// If the two don't cover the same blocks of the same length; as the next two.
    pub fn remove(&mut self, other: &DirtySet) {
        self.combine(other, |ours, theirs| ours & !theirs);
    }

    /// Keeps only pages that `other` has as well.
    pub fn intersect(&mut self, other: &DirtySet) {
        self.combine(other, |ours, theirs| ours & theirs);
    }

    /// Becomes equal to `other`, without allocating.
    pub fn copy_from(&mut self, other: &DirtySet) {
        self.combine(other, |_, theirs| theirs);
    }

    fn combine(&mut self, other: &DirtySet, word: impl Fn(u64, u64) -> u64) {
        if let Err(error) = self.check_same_shape(other) {
            panic!("{error}");
        }
        for (ours, theirs) in self.blocks.iter_mut().zip(&other.blocks) {
            for (ours, theirs) in ours.words.iter_mut().zip(&theirs.words) {
                *ours = word(*ours, *theirs);
            }
        }
    }

    /// The dirty pages as maximal runs, by block and page.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        (0u16..)
            .zip(&self.blocks)
            .flat_map(|(block, bitmap)| bitmap.runs(BlockId(block)))
    }

    /// Moves the pages out and leaves an empty set. Allocates that: where the guest is paused,
    /// [`DirtySet::swap`] with a spare one.
    pub fn take(&mut self) -> DirtySet {
        let pages: Vec<u64> = self.blocks.iter().map(|b| b.pages).collect();
        std::mem::replace(self, DirtySet::new(&pages))
    }

    /// Exchanges the pages of two sets without copying them.
    ///
    /// # Panics
    /// If the two don't cover the same blocks of the same length.
    pub fn swap(&mut self, other: &mut DirtySet) {
        if let Err(error) = self.check_same_shape(other) {
            panic!("{error}");
        }
        std::mem::swap(self, other);
    }

    fn check_same_shape(&self, other: &DirtySet) -> Result<(), DirtyError> {
        let (ours, theirs) = (self.blocks.len(), other.blocks.len());
        if ours != theirs {
            return Err(DirtyError::BlockCount { ours, theirs });
        }
        let mut pairs = self.blocks.iter().zip(&other.blocks).enumerate();
        match pairs.find(|(_, (a, b))| a.pages != b.pages) {
            Some((block, (a, b))) => Err(DirtyError::BlockPages {
                block,
                ours: a.pages,
                theirs: b.pages,
            }),
            None => Ok(()),
        }
    }

    fn words(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.iter().flat_map(|b| b.words.iter().copied())
    }
}

/// One block's pages. Bits from `pages` on are always zero.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bitmap {
    pages: u64,
    words: Vec<u64>,
}

impl Bitmap {
    fn new(pages: u64) -> Bitmap {
        let words = usize::try_from(pages.div_ceil(WORD_BITS)).expect("x86-64 has 64-bit sizes");
        Bitmap {
            pages,
            words: vec![0; words],
        }
    }

    /// Marks pages `first..end`, which the caller has checked against `pages`.
    fn set(&mut self, first: u64, end: u64) {
        if first == end {
            return;
        }
        let (first_word, last_word) = (word_of(first), word_of(end - 1));
        let head = !0 << (first % WORD_BITS);
        let tail = !0 >> (WORD_BITS - 1 - (end - 1) % WORD_BITS);
        if first_word == last_word {
            self.words[first_word] |= head & tail;
            return;
        }
        self.words[first_word] |= head;
        self.words[first_word + 1..last_word].fill(!0);
        self.words[last_word] |= tail;
    }

    fn runs(&self, block: BlockId) -> impl Iterator<Item = PageRun> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let first = self.next_set(from)?;
            from = self.next_clear(first);
            Some(PageRun {
                block,
                first,
                count: from - first,
            })
        })
    }

    /// The first dirty page at or after `from`.
    fn next_set(&self, from: u64) -> Option<u64> {
        self.next_one(from, |word| word)
    }

    /// The first clean page at or after `from`, or the end of the block.
    fn next_clear(&self, from: u64) -> u64 {
        let clear = self.next_one(from, |word| !word);
        clear.map_or(self.pages, |page| page.min(self.pages))
    }

    /// The first one-bit at or after `from` of the words as `view` shows them.
    fn next_one(&self, from: u64, view: impl Fn(u64) -> u64) -> Option<u64> {
        let start = word_of(from);
        let first = view(*self.words.get(start)?) & (!0 << (from % WORD_BITS));
        if first != 0 {
            return Some(page_of(start, first));
        }
        let skipped = self.words[start + 1..].iter().position(|&w| view(w) != 0)?;
        let word = start + 1 + skipped;
        Some(page_of(word, view(self.words[word])))
    }
}

fn word_of(page: u64) -> usize {
    // Both callers stay below the number of words, or use `get`.
    usize::try_from(page / WORD_BITS).expect("x86-64 has 64-bit sizes")
}

fn page_of(word: usize, bits: u64) -> u64 {
    word as u64 * WORD_BITS + u64::from(bits.trailing_zeros())
}
