//! Strangers who knock ten thousand times must not fill a disk with it.

use std::time::Duration;

use ft_core::Micros;

/// So many are told one by one in each period; the rest in one line at its end.
const SINGLY: u64 = 5;
const PERIOD: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct Refused {
    now: Micros,
    period_ends: Option<Micros>,
    told: u64,
    untold: u64,
    last: String,
}

impl Refused {
    /// How many to tell of now, and what about.
    pub(super) fn add(&mut self, text: &str) -> Option<(u64, String)> {
        if self.period_ends.is_none() {
            self.period_ends = Some(self.now + PERIOD);
        }
        if self.told < SINGLY {
            self.told += 1;
            return Some((1, text.to_owned()));
        }
        self.untold += 1;
        text.clone_into(&mut self.last);
        None
    }

    pub(super) fn next_timeout(&self) -> Option<Micros> {
        self.period_ends
    }

    pub(super) fn on_time(&mut self, now: Micros) -> Option<(u64, String)> {
        self.now = now;
        if self.period_ends.is_none_or(|ends| now < ends) {
            return None;
        }
        (self.period_ends, self.told) = (None, 0);
        self.rest()
    }

    /// Those that were not told of yet.
    pub(super) fn rest(&mut self) -> Option<(u64, String)> {
        let count = std::mem::take(&mut self.untold);
        (count > 0).then(|| (count, std::mem::take(&mut self.last)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everyone_is_counted_once_and_few_are_told() {
        let mut refused = Refused::default();
        assert_eq!(refused.on_time(Micros(1)), None);
        let singly: u64 = (0..10_000)
            .filter_map(|n| refused.add(&n.to_string()))
            .map(|(count, _)| count)
            .sum();
        assert_eq!(singly, SINGLY);
        let ends = refused.next_timeout().unwrap();
        assert_eq!(refused.on_time(Micros(2)), None);
        assert_eq!(
            refused.on_time(ends),
            Some((10_000 - SINGLY, "9999".to_owned()))
        );
        assert_eq!(refused.next_timeout(), None);
        assert_eq!(refused.add("again"), Some((1, "again".to_owned())));
    }
}
