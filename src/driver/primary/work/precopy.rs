//! Copies of dirty pages from before the pause.
//!
//! They lie in the chunks of the epoch to come. A page is armed before it is copied, so one that is
//! written afterwards is reported again, and copied again to where it lies.

use ft_core::EpochKind;
use ft_core::types::PAGE_BYTES;
use ft_core::wire::Frame;
use qemu_bridge::gather::{Progress, fill};

use super::{OpenEpoch, PrimaryWorker, describe};

/// At most so often what was written during one round is copied in another.
const ROUNDS: u32 = 3;
/// Pages that are left for the pause without a further round.
const FEW_PAGES: u64 = 256;

impl PrimaryWorker {
    /// Fills the epoch that comes next while the guest runs.
    pub(super) fn precopy(&mut self, frame: Frame, pack: bool) -> Result<(), String> {
        self.drop_open();
        let mut open = self.new_epoch(frame, EpochKind::Delta, pack)?;
        let copied = self.precopy_rounds(&mut open);
        match copied {
            Ok(()) => self.open = Some(open),
            Err(_) => self.drop_open(),
        }
        copied
    }

    fn precopy_rounds(&mut self, open: &mut OpenEpoch) -> Result<(), String> {
        let mut before = u64::MAX;
        for _ in 0..ROUNDS {
            self.collect(true).map_err(|error| describe(&error))?;
            let found = self.fresh.count();
            self.rest.copy_from(&self.fresh);
            self.rest.remove(&self.precopied);
            self.fresh.intersect(&self.precopied);
            self.copy_again(open)?;
            self.cursor.load_live(&self.rest);
            while fill(&self.ram, &mut open.builder, &mut self.cursor)
                .map_err(|error| describe(&error))?
                == Progress::Full
            {
                open.next_chunk(self.alloc()?);
            }
            for builder in open.full.iter_mut().chain([&mut open.builder]) {
                builder.for_each_data_run(|run, _| self.precopied.set(run));
            }
            // A guest that writes the same pages faster than they are copied is no better off.
            if found <= FEW_PAGES || found > before / 2 {
                break;
            }
            before = found;
        }
        Ok(())
    }

    /// Copies what is `fresh` to where it lies in the epoch's chunks.
    pub(super) fn copy_again(&mut self, open: &mut OpenEpoch) -> Result<(), String> {
        if self.fresh.is_empty() {
            return Ok(());
        }
        let mut result = Ok(());
        for builder in open.full.iter_mut().chain([&mut open.builder]) {
            builder.for_each_data_run(|run, bytes| {
                for (page, bytes) in (run.first..).zip(bytes.chunks_exact_mut(PAGE_BYTES)) {
                    if result.is_ok() && self.fresh.contains(run.block, page) {
                        result = self.ram.copy_out(run.block, page, bytes);
                    }
                }
            });
        }
        result.map_err(|error| describe(&error))
    }
}
