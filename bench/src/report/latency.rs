//! Times in a histogram, with the stalls that nobody was there to see.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// Longer than anything that is measured here, in nanoseconds.
const LONGEST_NS: u64 = 600_000_000_000;

/// A distribution of times. Nanoseconds inside, microseconds outside.
#[derive(Clone, Debug)]
pub struct Latency {
    histogram: Histogram<u64>,
}

impl Default for Latency {
    fn default() -> Latency {
        let histogram = Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("constant bounds fit");
        Latency { histogram }
    }
}

impl Latency {
    pub fn of_us(times_us: &[u64]) -> Latency {
        let mut latency = Latency::default();
        for us in times_us {
            latency.record(Duration::from_micros(*us));
        }
        latency
    }

    /// Times of something that is due every `interval`. While one of them takes longer than that,
    /// those that were due meanwhile waited too: they are counted with what was left of it.
    pub fn of_scheduled_us(times_us: &[u64], interval: Duration) -> Latency {
        let mut latency = Latency::default();
        let interval_ns = u64::try_from(interval.as_nanos()).unwrap_or(LONGEST_NS);
        for us in times_us {
            let ns = (us * 1000).clamp(1, LONGEST_NS);
            let _ = latency.histogram.record_correct(ns, interval_ns);
        }
        latency
    }

    /// What is longer than ten minutes counts as that.
    pub fn record(&mut self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(LONGEST_NS);
        self.histogram.saturating_record(ns.max(1));
    }

    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// In microseconds; 0 of none.
    pub fn percentile_us(&self, percent: f64) -> f64 {
        self.histogram.value_at_percentile(percent) as f64 / 1e3
    }

    pub fn p50_us(&self) -> f64 {
        self.percentile_us(50.0)
    }

    pub fn p99_us(&self) -> f64 {
        self.percentile_us(99.0)
    }

    /// The usual percentiles in microseconds.
    pub fn to_json(&self) -> Value {
        let at = |percent| super::rounded(self.percentile_us(percent));
        json!({
            "p50": at(50.0), "p90": at(90.0), "p99": at(99.0), "p99.9": at(99.9),
            "max": super::rounded(self.histogram.max() as f64 / 1e3), "count": self.count(),
        })
    }

    /// Points for a plot: of how many times in `1/x` this value is exceeded, from 1 on, as far as
    /// there are enough of them.
    pub fn tail(&self) -> Vec<(f64, f64)> {
        let rarest = (self.count() as f64).max(2.0);
        let steps = (rarest.log10() * 8.0).ceil() as u32;
        (0..=steps)
            .map(|step| 10_f64.powf(f64::from(step) / 8.0).min(rarest))
            .map(|x| (x, self.percentile_us(100.0 - 100.0 / x)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_counts_for_all_that_were_due_in_it() {
        let times = [100, 100, 100, 10_000];
        let plain = Latency::of_us(&times);
        let scheduled = Latency::of_scheduled_us(&times, Duration::from_micros(1000));
        assert_eq!(plain.count(), 4);
        // 10 ms, and those due in it with 9, 8, … 1 ms.
        assert_eq!(scheduled.count(), 4 + 9);
        assert!(plain.p50_us() < 101.0 && scheduled.p50_us() > 2900.0);
    }

    #[test]
    fn a_tail_begins_with_the_least_and_ends_with_the_most() {
        let latency = Latency::of_us(&(1..=1000).collect::<Vec<_>>());
        let tail = latency.tail();
        assert!(tail[0].1 < 2.0);
        let last = tail.last().unwrap();
        assert!((last.0 - 1000.0).abs() < 1e-6 && last.1 > 998.0);
        assert!(tail.windows(2).all(|two| two[0].1 <= two[1].1));
    }
}
