//! Pages as the backup has them: what deltas are made against.

use ft_core::image::Page;
use ft_core::types::PAGE_BYTES;
use ft_core::{BlockId, DirtySet, PageRun};

/// A bounded cache of pages. One that is not here is packed without a base.
///
/// It must hold what the backup holds: what an epoch puts in is forgotten when that is given up.
#[derive(Debug)]
pub(super) struct Shadow {
    /// Which slot each page of each block has, plus one; 0 is none. Made when the first page comes.
    index: Vec<Vec<u32>>,
    pages_per_block: Vec<u64>,
    slots: Vec<Slot>,
    limit: usize,
    /// Where the next slot to be reused is looked for (the CLOCK algorithm).
    hand: usize,
}

#[derive(Debug)]
struct Slot {
    page: Box<Page>,
    owner: Option<(BlockId, u64)>,
    used: bool,
}

impl Shadow {
    pub(super) fn new(pages_per_block: Vec<u64>, limit_bytes: usize) -> Shadow {
        Shadow {
            index: Vec::new(),
            pages_per_block,
            slots: Vec::new(),
            limit: (limit_bytes / PAGE_BYTES).min(u32::MAX as usize - 1),
            hand: 0,
        }
    }

    /// The page as the backup has it.
    pub(super) fn get(&mut self, block: BlockId, page: u64) -> Option<&Page> {
        let slot = self.slot_of(block, page)?;
        let slot = &mut self.slots[slot];
        slot.used = true;
        Some(&slot.page)
    }

    /// The backup will have the page like this.
    pub(super) fn put(&mut self, block: BlockId, page: u64, bytes: &Page) {
        if self.limit == 0 {
            return;
        }
        let at = match self.slot_of(block, page) {
            Some(at) => at,
            None => self.free_slot(),
        };
        if self.index.is_empty() {
            let pages = self.pages_per_block.iter();
            self.index = pages.map(|&pages| vec![0; pages as usize]).collect();
        }
        self.index[usize::from(block.0)][page as usize] = at as u32 + 1; // less than the limit
        let slot = &mut self.slots[at];
        *slot.page = *bytes;
        slot.owner = Some((block, page));
        slot.used = true;
    }

    pub(super) fn forget(&mut self, run: PageRun) {
        for page in run.first..run.first + run.count {
            if let Some(slot) = self.slot_of(run.block, page) {
                self.evict(slot);
            }
        }
    }

    /// Forgets every page that is in `dirty`.
    pub(super) fn forget_all_of(&mut self, dirty: &DirtySet) {
        for at in 0..self.slots.len() {
            let owner = self.slots[at].owner;
            if owner.is_some_and(|(block, page)| dirty.contains(block, page)) {
                self.evict(at);
            }
        }
    }

    /// Forgets all, and gives the memory back.
    pub(super) fn clear(&mut self) {
        self.index = Vec::new();
        self.slots = Vec::new();
        self.hand = 0;
    }

    fn slot_of(&self, block: BlockId, page: u64) -> Option<usize> {
        let slot = *self.index.get(usize::from(block.0))?.get(page as usize)?;
        slot.checked_sub(1).map(|slot| slot as usize)
    }

    fn free_slot(&mut self) -> usize {
        if self.slots.len() < self.limit {
            self.slots.push(Slot {
                page: Box::new([0; PAGE_BYTES]),
                owner: None,
                used: false,
            });
            return self.slots.len() - 1;
        }
        loop {
            let at = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            if !std::mem::take(&mut self.slots[at].used) {
                self.evict(at);
                return at;
            }
        }
    }

    fn evict(&mut self, at: usize) {
        if let Some((block, page)) = self.slots[at].owner.take() {
            self.index[usize::from(block.0)][page as usize] = 0;
        }
        self.slots[at].used = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: BlockId = BlockId(1);

    fn page(fill: u8) -> Page {
        [fill; PAGE_BYTES]
    }

    #[test]
    fn it_holds_the_last_bytes_of_as_many_pages_as_it_may() {
        let mut shadow = Shadow::new(vec![10, 100], 3 * PAGE_BYTES);
        assert_eq!(shadow.get(BLOCK, 7), None);
        for n in 0..3 {
            shadow.put(BLOCK, n, &page(n as u8));
        }
        shadow.put(BLOCK, 1, &page(9));
        let held: Vec<_> = (0..3).map(|n| shadow.get(BLOCK, n).map(|p| p[0])).collect();
        assert_eq!(held, [Some(0), Some(9), Some(2)]);
        for n in 50..60 {
            shadow.put(BLOCK, n, &page(n as u8));
            assert_eq!(shadow.get(BLOCK, n), Some(&page(n as u8)));
        }
        let held = (0..100).filter(|&n| shadow.get(BLOCK, n).is_some()).count();
        assert_eq!(held, 3);
        assert_eq!(shadow.get(BlockId(0), 1), None);
    }

    #[test]
    fn what_the_backup_may_not_have_is_forgotten() {
        let mut shadow = Shadow::new(vec![10, 100], 50 * PAGE_BYTES);
        for n in 0..30 {
            shadow.put(BLOCK, n, &page(1));
        }
        let run = |first, count| PageRun {
            block: BLOCK,
            first,
            count,
        };
        shadow.forget(run(5, 80));
        let mut dirty = DirtySet::new(&[10, 100]);
        dirty.set(run(2, 9));
        shadow.forget_all_of(&dirty);
        let held: Vec<_> = (0..100)
            .filter(|&n| shadow.get(BLOCK, n).is_some())
            .collect();
        assert_eq!(held, [0, 1]);
        shadow.clear();
        assert_eq!(shadow.get(BLOCK, 0), None);
        shadow.put(BLOCK, 0, &page(3));
        assert_eq!(shadow.get(BLOCK, 0), Some(&page(3)));
    }

    #[test]
    fn a_shadow_of_no_bytes_holds_nothing() {
        let mut shadow = Shadow::new(vec![10], PAGE_BYTES - 1);
        shadow.put(BlockId(0), 0, &page(1));
        assert_eq!(shadow.get(BlockId(0), 0), None);
    }
}
