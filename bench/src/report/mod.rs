//! Figures.

use serde_json::{Value, json};

/// Median, 99th percentile and maximum, as a report has them.
pub fn quantiles(numbers: &[u64]) -> Value {
    json!({ "p50": quantile(numbers, 50), "p99": quantile(numbers, 99), "max": quantile(numbers, 100) })
}

/// The smallest number that `percent` percent of all are not above; 0 of none.
pub fn quantile(numbers: &[u64], percent: usize) -> u64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(rank).copied().unwrap_or(0)
}
