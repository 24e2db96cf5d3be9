//! Figures, and what they are shown as.

pub mod latency;
pub mod machine;
pub mod page;
pub mod plot;
pub mod rank;

use serde_json::{Map, Value, json};

pub use latency::Latency;
pub use plot::Svg;

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

/// The middle one of some numbers; 0 of none.
pub fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// What one group of measurements has found.
#[derive(Clone, Debug, Default)]
pub struct Group {
    pub name: &'static str,
    pub title: &'static str,
    /// Everything that was measured, for `report.json`.
    pub data: Value,
    pub figures: Vec<Figure>,
    pub ratios: Vec<Ratio>,
    /// What belongs here and was not measured, with the reason.
    pub missing: Vec<String>,
}

/// A plot with what it says.
#[derive(Clone, Debug)]
pub struct Figure {
    pub heading: String,
    pub plot: Svg,
    /// One sentence or two: what one sees.
    pub sentence: String,
    pub table: Table,
}

/// The numbers behind a plot.
#[derive(Clone, Debug, Default)]
pub struct Table {
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new<const N: usize>(head: [&str; N]) -> Table {
        let head = head.map(str::to_owned).to_vec();
        Table { head, rows: vec![] }
    }

    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.to_vec());
    }
}

/// A figure beside the limit that was set for it.
#[derive(Clone, Debug)]
pub struct Ratio {
    pub name: String,
    pub value: f64,
    pub bound: Bound,
    /// What is divided by what.
    pub meaning: String,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Ratio {
    pub fn is_reached(&self) -> bool {
        match self.bound {
            Bound::AtMost(limit) => self.value <= limit,
            Bound::AtLeast(limit) => self.value >= limit,
        }
    }
}

impl Bound {
    pub fn text(self) -> String {
        match self {
            Bound::AtMost(limit) => format!("at most {limit}"),
            Bound::AtLeast(limit) => format!("at least {limit}"),
        }
    }
}

/// The whole report as JSON: `ratios` by name, their limits under `limits`, and each group's data.
pub fn to_json(machine: &Value, groups: &[Group]) -> Value {
    let ratios = || groups.iter().flat_map(|group| &group.ratios);
    let values: Map<_, _> = ratios()
        .map(|r| (r.name.clone(), json!(rounded(r.value))))
        .collect();
    let limits: Map<_, _> = ratios()
        .map(|r| {
            let limit =
                json!({ "limit": r.bound.text(), "reached": r.is_reached(), "meaning": r.meaning });
            (r.name.clone(), limit)
        })
        .collect();
    let data: Map<_, _> = groups
        .iter()
        .map(|g| (g.name.to_owned(), g.data.clone()))
        .collect();
    let missing: Map<_, _> = groups
        .iter()
        .filter(|g| !g.missing.is_empty())
        .map(|g| (g.name.to_owned(), json!(g.missing)))
        .collect();
    json!({ "machine": machine, "ratios": values, "limits": limits, "groups": data, "not_measured": missing })
}

/// Four digits are more than these measurements have.
pub fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let digits = 3 - value.abs().log10().floor() as i32;
    let scale = 10_f64.powi(digits.clamp(-12, 12));
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_digits_are_kept() {
        assert_eq!(rounded(1234.5678), 1235.0);
        assert_eq!(rounded(0.001_234_567), 0.001_235);
        assert_eq!(rounded(0.0), 0.0);
    }

    #[test]
    fn ratios_are_found_by_name_beside_their_limits() {
        let group = Group {
            name: "link",
            ratios: vec![Ratio {
                name: "x".into(),
                value: 0.97,
                bound: Bound::AtLeast(0.95),
                meaning: "a / b".into(),
            }],
            ..Group::default()
        };
        let report = to_json(&json!({}), &[group]);
        assert_eq!(report["ratios"]["x"], 0.97);
        assert_eq!(report["limits"]["x"]["reached"], true);
    }
}
