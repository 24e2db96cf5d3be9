//! Scripts of epochs, and what they must leave behind on a standby.

use std::collections::BTreeMap;

use ft_core::image::{Piece, entries};
use ft_core::{BlockId, EpochKind, PAGE_BYTES, PageRun, RunState};
use proptest::prelude::*;

use crate::common::epochs::{BLOCKS, Script, Step};

pub(crate) fn script() -> impl Strategy<Value = Script> {
    let kind = prop::sample::select(vec![EpochKind::Delta, EpochKind::Full]);
    let state = prop::sample::select(vec![RunState::Running, RunState::Stopped]);
    let device = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..10_000),
        1 => (any::<u8>(), 0..2_200_000usize).prop_map(|(byte, count)| vec![byte; count]),
    ];
    let audit = prop::option::of(prop::collection::vec(any::<u64>(), BLOCKS.len()));
    let steps = prop::collection::vec(steps(), 0..8).prop_map(|lists| lists.concat());
    let parts = (kind, steps, device, any::<bool>(), state, audit);
    parts.prop_map(
        |(kind, steps, device, pack_device, run_state, audit)| Script {
            kind,
            steps,
            device,
            pack_device,
            run_state,
            audit,
        },
    )
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let one = (run(300), 1..=255u8, 0..4).prop_map(|(run, fill, kind)| {
        vec![match kind {
            0 => Step::Zero { run },
            1 => Step::Data { run, fill },
            kind => Step::Packed {
                run,
                fill,
                lz4: kind == 2,
            },
        }]
    });
    let hole = run(u64::MAX).prop_map(|run| vec![Step::Zero { run }]);
    // Every other page, so that a chunk runs out of entries before it runs out of pages.
    let scattered = (0..1000u64, 1..300u64, 1..=255u8).prop_map(|(first, count, fill)| {
        let page = |i| PageRun {
            block: BlockId(0),
            first: first + 2 * i,
            count: 1,
        };
        let step = |i| match i % 3 {
            0 => Step::Zero { run: page(i) },
            _ => Step::Data { run: page(i), fill },
        };
        (0..count).map(step).collect()
    });
    prop_oneof![4 => one, 1 => hole, 1 => scattered]
}

fn run(max_count: u64) -> impl Strategy<Value = PageRun> {
    (0..BLOCKS.len(), any::<u64>(), any::<u64>()).prop_map(move |(block, first, count)| {
        let pages = BLOCKS[block];
        let first = first % pages;
        PageRun {
            block: BlockId(u16::try_from(block).expect("few blocks")),
            first,
            count: 1 + count % (pages - first).min(max_count),
        }
    })
}

/// What a standby holds after an epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    /// What fills the page, by block and page; pages of zeros are left out.
    pub(crate) pages: BTreeMap<(u16, u64), u8>,
    pub(crate) device: Vec<u8>,
}

impl Contents {
    pub(crate) fn of_script(script: &Script) -> Contents {
        let mut contents = Contents {
            device: script.device.clone(),
            ..Contents::default()
        };
        for step in &script.steps {
            match *step {
                Step::Data { run, fill } | Step::Packed { run, fill, .. } => {
                    contents.put(run, fill)
                }
                Step::Zero { run } => contents.put(run, 0),
            }
        }
        contents
    }

    pub(crate) fn apply(&mut self, chunk: &[u8]) {
        for piece in entries(chunk) {
            match piece {
                Piece::Zero { run } => self.put(run, 0),
                Piece::Data { run, bytes } => {
                    assert_eq!(bytes.len() as u64, run.count * PAGE_BYTES as u64);
                    for (i, page) in (0..).zip(bytes.chunks(PAGE_BYTES)) {
                        assert!(page.iter().all(|&b| b == page[0]), "torn page");
                        let first = run.first + i;
                        self.put(
                            PageRun {
                                first,
                                count: 1,
                                ..run
                            },
                            page[0],
                        );
                    }
                }
                Piece::Packed { pages } => {
                    for page in pages.iter() {
                        let mut bytes = [0xa5; PAGE_BYTES];
                        assert!(page.unpack(&mut bytes), "torn page");
                        let (block, first) = (page.block, page.page);
                        self.put(
                            PageRun {
                                block,
                                first,
                                count: 1,
                            },
                            bytes[0],
                        );
                    }
                }
                Piece::Device { offset, bytes } => {
                    assert_eq!(offset, self.device.len() as u64);
                    self.device.extend_from_slice(bytes);
                }
                Piece::PackedDevice { state } => {
                    assert!(self.device.is_empty(), "it is all of the state");
                    state.unpack(&mut self.device);
                }
            }
        }
    }

    fn put(&mut self, run: PageRun, fill: u8) {
        let end = run.first + run.count;
        if fill == 0 {
            let pages = self
                .pages
                .range((run.block.0, run.first)..(run.block.0, end));
            let cleared: Vec<_> = pages.map(|(&key, _)| key).collect();
            for key in cleared {
                self.pages.remove(&key);
            }
        } else {
            let pages = (run.first..end).map(|page| ((run.block.0, page), fill));
            self.pages.extend(pages);
        }
    }
}
