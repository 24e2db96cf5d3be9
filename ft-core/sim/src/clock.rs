//! A host's clock: an origin of its own, and a little too fast or too slow.

use ft_core::Micros;

#[derive(Clone, Copy, Debug)]
pub struct Clock {
    pub origin_us: u64,
    /// Parts in a million; two hosts differ by a thousand at most.
    pub drift_ppm: i64,
}

impl Clock {
    pub fn local(self, now: u64) -> Micros {
        let scaled = i128::from(now) * i128::from(1_000_000 + self.drift_ppm) / 1_000_000;
        Micros(self.origin_us + scaled as u64)
    }

    /// The first true microsecond at which this clock shows at least `at`.
    pub fn when(self, at: Micros) -> u64 {
        let scaled = u128::from(at.0.saturating_sub(self.origin_us)) * 1_000_000;
        let rate = (1_000_000 + self.drift_ppm) as u128;
        u64::try_from(scaled.div_ceil(rate)).unwrap_or(u64::MAX)
    }
}
