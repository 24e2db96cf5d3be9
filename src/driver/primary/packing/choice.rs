//! Whether packing pays: measured, as it depends on the link, on the processor and on the guest.
//!
//! Epochs are packed for a while, then sent as they are for a while; whichever was acknowledged
//! sooner, per page and in the median, is kept until it is tried again.

use std::time::Duration;

/// Epochs with fewer pages say more about the time of day.
const PAGES_MIN: u64 = 16;
/// The shadow fills meanwhile.
const WARM_UP: u32 = 8;
const PACKED_UNTIL: u32 = WARM_UP + 16;
const RAW_UNTIL: u32 = PACKED_UNTIL + 16;
/// Then it is tried again.
const PERIOD: u32 = 2048;

#[derive(Debug, Default)]
pub(super) struct Choice {
    /// Epochs of this period so far.
    epoch: u32,
    /// Seconds per page of the epochs that were packed, and of the others.
    packed: Vec<f64>,
    raw: Vec<f64>,
    pays: bool,
}

impl Choice {
    /// Whether the next epoch is to be packed.
    pub(super) fn packs(&self) -> bool {
        match self.epoch {
            0..PACKED_UNTIL => true,
            PACKED_UNTIL..RAW_UNTIL => false,
            _ => self.pays,
        }
    }

    /// An epoch of so many pages, packed or not as [`Choice::packs`] says, was acknowledged so long
    /// after its guest went on.
    pub(super) fn acknowledged(&mut self, pages: u64, time: Duration) {
        if pages < PAGES_MIN {
            return;
        }
        let cost = time.as_secs_f64() / pages as f64;
        match self.epoch {
            WARM_UP..PACKED_UNTIL => self.packed.push(cost),
            PACKED_UNTIL..RAW_UNTIL => self.raw.push(cost),
            _ => {}
        }
        self.epoch += 1;
        if self.epoch == RAW_UNTIL {
            let (packed, raw) = (median(&mut self.packed), median(&mut self.raw));
            self.pays = packed < raw;
            tracing::debug!(
                "per page an epoch takes {:.2} us packed and {:.2} us as it is",
                packed * 1e6,
                raw * 1e6
            );
        }
        if self.epoch == PERIOD {
            let pays = self.pays;
            *self = Choice {
                pays,
                ..Choice::default()
            };
        }
    }
}

fn median(costs: &mut [f64]) -> f64 {
    costs.sort_by(f64::total_cmp);
    costs.get(costs.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is chosen in the end, where a packed epoch takes so much longer.
    fn chosen(packed: f64) -> bool {
        let mut choice = Choice::default();
        for _ in 0..PERIOD + RAW_UNTIL + 1 {
            let time = if choice.packs() { packed } else { 1.0 };
            choice.acknowledged(100, Duration::from_secs_f64(time));
        }
        choice.packs()
    }

    #[test]
    fn what_is_sooner_is_kept() {
        assert!(chosen(0.5));
        assert!(!chosen(1.5));
    }

    #[test]
    fn it_is_tried_again() {
        let mut choice = Choice::default();
        let mut packed = 0;
        for _ in 0..3 * PERIOD {
            packed += u32::from(choice.packs());
            let time = if choice.packs() { 2 } else { 1 };
            choice.acknowledged(100, Duration::from_millis(time));
        }
        assert_eq!(packed, 3 * PACKED_UNTIL);
    }

    #[test]
    fn epochs_of_a_few_pages_decide_nothing() {
        let mut choice = Choice::default();
        for _ in 0..PERIOD {
            choice.acknowledged(PAGES_MIN - 1, Duration::from_secs(1));
        }
        assert!(choice.packs());
        assert_eq!(choice.epoch, 0);
    }
}
