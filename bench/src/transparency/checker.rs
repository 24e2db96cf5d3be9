//! Judges a failover by the logs of the clients alone.
//!
//! It knows no epochs, no gate and no host: only what clients were told, in which order, and what
//! was there in the end.

use std::collections::{BTreeMap, BTreeSet};

use super::clients::STUCK_AFTER;
use super::log::{Failure, Record};

/// What clients have to say about a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub acknowledged_writes: u64,
    /// Writes that were acknowledged and are not there in the end.
    pub lost_writes: u64,
    /// Reads of a number lower than one that somebody had been told of before the read began.
    pub stale_reads: u64,
    pub connections: u64,
    pub resets: u64,
    /// Connections without an answer for [`STUCK_AFTER`].
    pub stuck: u64,
    /// Keys that could not be read back.
    pub unread: u64,
    /// Of each connection, the longest time without an answer, in microseconds.
    pub silences_us: Vec<u64>,
    /// For people.
    pub violations: Vec<String>,
}

/// When a client was told of a number, and the highest that any was told of by then.
#[derive(Clone, Copy, Debug)]
struct Told {
    at_us: u64,
    highest: u64,
}

/// Judges the logs of a run: one for each connection, in its order.
pub fn judge(logs: &[Vec<Record>]) -> Verdict {
    let mut verdict = Verdict::default();
    for log in logs {
        verdict.look_at_connection(log);
    }
    let all = || logs.iter().flatten();
    let mut listed: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
    let mut told: BTreeMap<&str, Vec<Told>> = BTreeMap::new();
    for record in all() {
        match record {
            Record::Listed { key, numbers } => {
                listed.insert(key, numbers.iter().copied().collect());
            }
            Record::Written {
                key,
                n,
                answered_us,
                ..
            }
            | Record::Read {
                key,
                n,
                answered_us,
                ..
            } => {
                let at_us = *answered_us;
                told.entry(key)
                    .or_default()
                    .push(Told { at_us, highest: *n });
            }
            _ => {}
        }
    }
    told.values_mut().for_each(|told| in_order(told));
    for key in told.keys().filter(|key| !listed.contains_key(*key)) {
        verdict.unread += 1;
        verdict.violations.push(format!("{key} was not read back"));
    }
    for record in all() {
        match record {
            Record::Written { key, n, .. } => {
                verdict.acknowledged_writes += 1;
                let there = listed.get(key.as_str());
                if there.is_some_and(|numbers| !numbers.contains(n)) {
                    verdict.lost_writes += 1;
                    let text = format!("{key}: {n} was acknowledged and is not there");
                    verdict.violations.push(text);
                }
            }
            Record::Read {
                key, n, sent_us, ..
            } => {
                let told = &told[key.as_str()];
                let before = told.partition_point(|t| t.at_us < *sent_us);
                let known = before.checked_sub(1).map_or(0, |last| told[last].highest);
                if *n < known {
                    verdict.stale_reads += 1;
                    let text = format!("{key}: {n} was read, when {known} was known");
                    verdict.violations.push(text);
                }
            }
            _ => {}
        }
    }
    verdict
}

fn in_order(told: &mut [Told]) {
    told.sort_by_key(|t| t.at_us);
    let mut highest = 0;
    for t in told {
        highest = highest.max(t.highest);
        t.highest = highest;
    }
}

/// How many writes were acknowledged from one moment on until another, which is not in it.
pub fn acknowledged_within(logs: &[Vec<Record>], from_us: u64, until_us: u64) -> u64 {
    let within = |record: &&Record| match record {
        Record::Written { answered_us, .. } => (from_us..until_us).contains(answered_us),
        _ => false,
    };
    logs.iter().flatten().filter(within).count() as u64
}

impl Verdict {
    fn look_at_connection(&mut self, log: &[Record]) {
        let Some(Record::Opened { at_us: opened }) = log.first() else {
            return; // of the reading back
        };
        self.connections += 1;
        let (mut last_us, mut silence_us, mut stuck) = (*opened, 0, false);
        for record in log {
            let at_us = match record {
                Record::Written { answered_us, .. } | Record::Read { answered_us, .. } => {
                    *answered_us
                }
                Record::Closed { at_us } => *at_us,
                Record::Failed { how, text, at_us } => {
                    match how {
                        Failure::Reset => self.resets += 1,
                        Failure::Stuck => stuck = true,
                    }
                    self.violations.push(format!("a connection failed: {text}"));
                    *at_us
                }
                Record::Opened { .. } | Record::Listed { .. } => continue,
            };
            silence_us = silence_us.max(at_us.saturating_sub(last_us));
            last_us = at_us;
        }
        if u128::from(silence_us) >= STUCK_AFTER.as_micros() && !stuck {
            stuck = true;
            self.violations
                .push(format!("no answer for {} s", silence_us / 1_000_000));
        }
        self.stuck += u64::from(stuck);
        self.silences_us.push(silence_us);
    }

    /// Nothing that a client could take amiss.
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }

    pub fn add(&mut self, other: Verdict) {
        self.acknowledged_writes += other.acknowledged_writes;
        self.lost_writes += other.lost_writes;
        self.stale_reads += other.stale_reads;
        self.connections += other.connections;
        self.resets += other.resets;
        self.stuck += other.stuck;
        self.unread += other.unread;
        self.silences_us.extend(other.silences_us);
        self.violations.extend(other.violations);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(n: u64, answered_us: u64) -> Record {
        Record::Written {
            key: "k".into(),
            n,
            sent_us: answered_us - 5,
            answered_us,
        }
    }

    fn read(n: u64, sent_us: u64) -> Record {
        Record::Read {
            key: "k".into(),
            n,
            sent_us,
            answered_us: sent_us + 5,
        }
    }

    /// A writer, a reader, and what was there in the end.
    fn run(writer: &[Record], reader: &[Record], there: &[u64]) -> Verdict {
        let log = |records: &[Record]| {
            let opened = Record::Opened { at_us: 0 };
            std::iter::once(opened)
                .chain(records.iter().cloned())
                .collect::<Vec<_>>()
        };
        let listed = Record::Listed {
            key: "k".into(),
            numbers: there.to_vec(),
        };
        judge(&[log(writer), log(reader), vec![listed]])
    }

    #[test]
    fn honest_server_is_not_accused() {
        // A write that nobody was told of may be there or not, and an early read may see it.
        let verdict = run(
            &[written(1, 10), written(2, 20)],
            &[read(0, 5), read(2, 12), read(3, 30)],
            &[1, 2, 3],
        );
        assert!(verdict.is_clean(), "{verdict:?}");
        assert_eq!((verdict.acknowledged_writes, verdict.connections), (2, 2));
        assert_eq!(verdict.silences_us, [10, 18]);
    }

    #[test]
    fn missing_write_is_found() {
        let verdict = run(
            &[written(1, 10), written(2, 20), written(3, 30)],
            &[],
            &[1, 3],
        );
        assert_eq!((verdict.lost_writes, verdict.violations.len()), (1, 1));
    }

    #[test]
    fn read_that_goes_back_is_found() {
        let behind_the_writer = run(&[written(1, 10), written(2, 20)], &[read(1, 21)], &[1, 2]);
        assert_eq!(behind_the_writer.stale_reads, 1);
        let behind_a_reader = run(&[written(1, 10)], &[read(2, 12), read(1, 30)], &[1, 2]);
        assert_eq!(behind_a_reader.stale_reads, 1);
        let at_the_same_time = run(&[written(1, 10), written(2, 20)], &[read(1, 18)], &[1, 2]);
        assert_eq!(at_the_same_time.stale_reads, 0);
    }

    #[test]
    fn broken_and_silent_connections_are_found() {
        let failed = |how| Record::Failed {
            how,
            text: "so".into(),
            at_us: 50,
        };
        let verdict = run(
            &[written(1, 10), failed(Failure::Reset)],
            &[failed(Failure::Stuck)],
            &[1],
        );
        assert_eq!((verdict.resets, verdict.stuck), (1, 1));
        let verdict = run(&[written(1, 10), written(2, 20_000_000)], &[], &[1, 2]);
        assert_eq!(
            (verdict.resets, verdict.stuck, verdict.is_clean()),
            (0, 1, false)
        );
    }

    #[test]
    fn what_was_not_read_back_is_found() {
        let log = vec![Record::Opened { at_us: 0 }, written(1, 10)];
        assert_eq!(judge(&[log]).unread, 1);
    }

    #[test]
    fn acknowledgements_are_counted_in_time() {
        let log = vec![written(1, 10), written(2, 20), read(2, 22), written(3, 30)];
        assert_eq!(acknowledged_within(&[log], 20, 30), 1);
    }
}
