//! Who may believe what about a silent peer, and when.
//!
//! Both ends count the same silence on clocks of their own. The primary counts from the moment
//! it *sent* the last heartbeat that was answered, the backup from the moment a heartbeat
//! *arrived*; sending comes before arriving, so with clocks that run equally fast the primary
//! stops its guest before the backup starts its copy. [`Silence`] adds what the clocks may
//! differ by and the time that stopping takes.

use std::time::Duration;

use crate::types::Micros;

/// The primary's right to run its guest, renewed by each answered heartbeat.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    length: Duration,
    answered_sent: Micros,
}

impl Lease {
    pub fn new(length: Duration, now: Micros) -> Lease {
        Lease {
            length,
            answered_sent: now,
        }
    }

    /// A heartbeat that was sent at `sent` has been answered.
    pub fn renew(&mut self, sent: Micros) {
        self.answered_sent = self.answered_sent.max(sent);
    }

    pub fn ends(&self) -> Micros {
        self.answered_sent + self.length
    }
}

/// The backup's patience with a silent primary.
#[derive(Clone, Copy, Debug)]
pub struct Silence {
    patience: Duration,
    last_heard: Micros,
}

impl Silence {
    /// `lease` is the primary's. Clocks are taken to differ by at most one part in a thousand
    /// (ntpd and chrony slew by half of that), and stopping a guest to take at most a tenth of
    /// the lease, but not less than [`Silence::STOP_ALLOWANCE`].
    pub fn new(lease: Duration, now: Micros) -> Silence {
        let margin = (lease / 10).max(Silence::STOP_ALLOWANCE);
        Silence {
            patience: lease + lease / 1000 + margin,
            last_heard: now,
        }
    }

    /// What a primary may need from the end of its lease until its guest stands still.
    pub const STOP_ALLOWANCE: Duration = Duration::from_millis(100);

    pub fn heard(&mut self, now: Micros) {
        self.last_heard = self.last_heard.max(now);
    }

    pub fn last_heard(&self) -> Micros {
        self.last_heard
    }

    pub fn ends(&self) -> Micros {
        self.last_heard + self.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backup_outwaits_the_primary_even_with_a_fast_clock() {
        let lease = Duration::from_millis(1000);
        let sent = Micros(5_000_000);
        let primary = Lease::new(lease, sent);
        // The heartbeat arrives at once, and the backup's clock runs a thousandth faster.
        let backup = Silence::new(lease, sent);
        let primary_stops = primary.ends().0 - sent.0;
        let backup_starts = (backup.ends().0 - sent.0) * 1000 / 1001;
        let allowance = u64::try_from(Silence::STOP_ALLOWANCE.as_micros()).unwrap();
        assert!(backup_starts >= primary_stops + allowance * 9 / 10);
    }

    #[test]
    fn an_older_answer_does_not_shorten_the_lease() {
        let mut lease = Lease::new(Duration::from_millis(100), Micros(1000));
        lease.renew(Micros(9000));
        lease.renew(Micros(2000));
        assert_eq!(lease.ends(), Micros(109_000));
    }
}
