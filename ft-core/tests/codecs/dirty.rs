//! `DirtySet` against a set of page numbers.

use std::collections::BTreeSet;

use ft_core::dirty::{DirtyError, DirtySet};
use ft_core::{BlockId, PageRun};
use proptest::collection::vec;
use proptest::prelude::*;

/// Around the edges of a word, and a block with no page at all.
const BLOCKS: [u64; 6] = [1, 63, 64, 65, 0, 1000];

type Pages = BTreeSet<(u16, u64)>;

fn runs() -> impl Strategy<Value = Vec<PageRun>> {
    let run = (0..BLOCKS.len(), any::<u64>(), any::<u64>()).prop_map(|(block, first, count)| {
        let first = first % (BLOCKS[block] + 1);
        let count = count % (BLOCKS[block] - first + 1);
        PageRun {
            block: BlockId(u16::try_from(block).unwrap()),
            first,
            count,
        }
    });
    vec(run, 0..20)
}

fn both(runs: &[PageRun]) -> (DirtySet, Pages) {
    let mut set = DirtySet::new(&BLOCKS);
    let mut pages = Pages::new();
    for run in runs {
        set.set(*run);
        pages.extend((run.first..run.first + run.count).map(|p| (run.block.0, p)));
    }
    (set, pages)
}

fn pages_of(set: &DirtySet) -> Pages {
    let pages = |run: PageRun| (run.first..run.first + run.count).map(move |p| (run.block.0, p));
    set.runs().flat_map(pages).collect()
}

proptest! {
    #[test]
    fn holds_what_was_set(runs in runs()) {
        let (set, pages) = both(&runs);
        prop_assert_eq!(&pages_of(&set), &pages);
        prop_assert_eq!(set.count(), pages.len() as u64);
        prop_assert_eq!(set.is_empty(), pages.is_empty());
        for (block, length) in (0u16..).zip(BLOCKS) {
            for page in 0..length + 70 {
                let expected = pages.contains(&(block, page));
                prop_assert_eq!(set.contains(BlockId(block), page), expected);
            }
        }
    }

    #[test]
    fn runs_are_maximal_and_in_order(runs in runs()) {
        let (set, _) = both(&runs);
        let found: Vec<PageRun> = set.runs().collect();
        for run in &found {
            prop_assert!(run.count > 0);
        }
        for pair in found.windows(2) {
            let end = (pair[0].block, pair[0].first + pair[0].count);
            prop_assert!(end < (pair[1].block, pair[1].first));
        }
    }

    #[test]
    fn sets_are_combined_page_by_page(left in runs(), right in runs()) {
        let ((set, left), (other, right)) = (both(&left), both(&right));
        let mut removed = set.clone();
        removed.remove(&other);
        prop_assert_eq!(pages_of(&removed), &left - &right);
        let mut common = set.clone();
        common.intersect(&other);
        prop_assert_eq!(pages_of(&common), &left & &right);
        let mut copy = set;
        copy.copy_from(&other);
        prop_assert_eq!(copy, other);
    }

    #[test]
    fn merge_is_union(left in runs(), right in runs()) {
        let ((mut set, pages), (other, more)) = (both(&left), both(&right));
        set.merge(&other).unwrap();
        prop_assert_eq!(pages_of(&set), &pages | &more);
    }

    #[test]
    fn take_and_swap_move_everything(runs in runs()) {
        let (mut set, pages) = both(&runs);
        let mut taken = set.take();
        prop_assert!(set.is_empty());
        prop_assert_eq!(pages_of(&taken), pages.clone());
        taken.swap(&mut set);
        prop_assert!(taken.is_empty());
        prop_assert_eq!(pages_of(&set), pages);
        set.clear();
        prop_assert!(set.is_empty());
    }

    #[test]
    fn an_untrusted_run_is_taken_whole_or_not_at_all(
        block in 0..8u16, first in any::<u64>(), count in any::<u64>(), small in any::<bool>(),
    ) {
        let (first, count) = if small { (first % 70, count % 70) } else { (first, count) };
        let mut set = DirtySet::new(&BLOCKS);
        let fits = BLOCKS.get(usize::from(block))
            .is_some_and(|pages| first.checked_add(count).is_some_and(|end| end <= *pages));
        let outcome = set.try_set(PageRun { block: BlockId(block), first, count });
        prop_assert_eq!(outcome.is_ok(), fits);
        prop_assert_eq!(set.count(), if fits { count } else { 0 });
    }
}

#[test]
fn set_all_stops_at_the_last_page() {
    let mut set = DirtySet::new(&BLOCKS);
    set.set_all();
    assert_eq!(set.count(), BLOCKS.iter().sum::<u64>());
    let whole: Vec<u64> = set.runs().map(|run| run.count).collect();
    assert_eq!(whole, [1, 63, 64, 65, 1000]);
}

#[test]
fn sets_of_different_shape_never_meet() {
    let mut set = DirtySet::new(&[10, 65]);
    let longer = DirtySet::new(&[10, 65, 1]);
    let expected = DirtyError::BlockCount { ours: 2, theirs: 3 };
    assert_eq!(set.merge(&longer), Err(expected));

    // As many words, but a page more: the last bit of the one is past the end of the other.
    let mut other = DirtySet::new(&[10, 66]);
    other.set_all();
    let expected = DirtyError::BlockPages {
        block: 1,
        ours: 65,
        theirs: 66,
    };
    assert_eq!(set.merge(&other), Err(expected));
    assert!(set.is_empty(), "a refused merge changes nothing");
}

#[test]
#[should_panic(expected = "leaves RAM block 0")]
fn our_own_run_past_the_end_is_a_bug() {
    DirtySet::new(&[10]).set(PageRun {
        block: BlockId(0),
        first: 9,
        count: 2,
    });
}
