//! How it goes, in one line: live on a terminal, every ten seconds elsewhere.

use std::time::Duration;

use ft_core::primary::EpochReport;
use ft_core::{Epoch, EpochKind, Micros, backup, primary};
use hdrhistogram::Histogram;

use crate::screen::Show;

/// A live line shows what the last second was like.
const LIVE_PERIOD: Duration = Duration::from_secs(1);
const PLAIN_PERIOD: Duration = Duration::from_secs(10);
/// Longer pauses are shown as this.
const PAUSE_MAX_US: u64 = 60_000_000;
/// The progress bar stands for it.
const SYNCHRONISING: &str = "synchronising";
const PROTECTING: &str = "PROTECTING";
const LINK_LOST: &str = "link LOST";

#[derive(Debug)]
pub(crate) struct StatusLine {
    live: bool,
    protection: &'static str,
    link_lost: Micros,
    tainted: bool,
    fenced: bool,
    throttled: bool,
    epoch: Epoch,
    window: Window,
    now: Micros,
    window_since: Micros,
    /// When the last epoch was acknowledged (or flipped), and how old its boundary was then.
    last_epoch: Option<(Micros, Duration)>,
    /// `None`: there is nothing that changes by itself.
    next_at: Option<Micros>,
}

/// What has happened since the last line.
#[derive(Debug)]
struct Window {
    pauses: Histogram<u64>,
    epochs: u64,
    pages: u64,
    bytes: u64,
}

/// A line that is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// For the terminal's live line.
    Live(Show),
    /// For the log.
    Plain(String),
}

impl StatusLine {
    pub(crate) fn new(live: bool) -> StatusLine {
        StatusLine {
            live,
            protection: "waiting",
            link_lost: Micros(0),
            tainted: false,
            fenced: false,
            throttled: false,
            epoch: Epoch::NONE,
            window: Window::new(),
            now: Micros(0),
            window_since: Micros(0),
            last_epoch: None,
            // Tells us the time as soon as the loop runs.
            next_at: Some(Micros(0)),
        }
    }

    /// What changes on the screen at once.
    pub(crate) fn primary(&mut self, report: &primary::Report) -> Option<Show> {
        use primary::Report;
        let before = self.state();
        match report {
            // Whether it still protects is settled next: an epoch or a round tells.
            Report::Connected => self.protection = "connected",
            Report::LinkLost => self.lose_link(),
            Report::SyncProgress {
                round,
                pages_sent,
                pages_total,
            } => {
                (self.protection, self.tainted) = (SYNCHRONISING, false);
                let (done, total) = (*pages_sent, *pages_total);
                let round = *round;
                return self.live.then_some(Show::Progress { round, done, total });
            }
            Report::Synced { epoch, .. } => {
                self.epoch = *epoch;
                (self.protection, self.tainted) = ("PROTECTED", false);
            }
            Report::Epoch(epoch) => {
                self.protection = "PROTECTED";
                self.tainted &= epoch.kind != EpochKind::Full;
                self.count(epoch);
            }
            Report::Tainted(_) => self.tainted = true,
            Report::BackupLost { .. } => {
                (self.protection, self.tainted) = ("NOT PROTECTED, no backup", false);
            }
            Report::Fenced => self.fenced = true,
            Report::Unfenced => self.fenced = false,
            Report::Throttled(on) => self.throttled = *on,
            Report::Audit { .. }
            | Report::GuestStopped
            | Report::GuestResumed
            | Report::Rehearsed { .. }
            | Report::Error(_)
            | Report::Note(_) => {}
        }
        self.changed(before)
    }

    /// As [`StatusLine::primary`].
    pub(crate) fn backup(&mut self, report: &backup::Report) -> Option<Show> {
        use backup::Report;
        let before = self.state();
        match report {
            Report::Connected => self.protection = "connected",
            Report::Syncing => self.protection = "synchronising, would not take over yet",
            Report::Protecting { epoch } => {
                self.epoch = *epoch;
                self.protection = PROTECTING;
            }
            Report::EpochFlipped {
                epoch, kind, pages, ..
            } => {
                self.epoch = *epoch;
                self.tainted &= *kind != EpochKind::Full;
                self.protection = PROTECTING;
                self.window.epochs += 1;
                self.window.pages += pages;
                self.last_epoch = Some((self.now, Duration::ZERO));
            }
            Report::LinkLost { .. } => self.lose_link(),
            Report::PrimaryLeft => {
                (self.protection, self.tainted) = ("waiting for a primary", false);
            }
            Report::Activating { .. } => self.protection = "TAKING OVER",
            Report::Activated { .. } => self.protection = "the guest runs HERE",
            Report::NotActivating(_) => self.protection = "can't take over",
            Report::Audit {
                mismatched_blocks, ..
            } => self.tainted = !mismatched_blocks.is_empty(),
            Report::Refused { .. }
            | Report::Rehearsed { .. }
            | Report::Error(_)
            | Report::Note(_) => {}
        }
        self.changed(before)
    }

    pub(crate) fn next_timeout(&self) -> Option<Micros> {
        self.next_at
    }

    pub(crate) fn on_time(&mut self, now: Micros) -> Option<Due> {
        self.now = now;
        if self.next_at.is_none_or(|at| now < at) {
            return None;
        }
        let first = self.window_since == Micros(0);
        let quiet = self.window.epochs == 0;
        let text = self.text();
        self.window.clear();
        self.window_since = now;
        self.next_at = Some(now + if self.live { LIVE_PERIOD } else { PLAIN_PERIOD });
        match (self.live, quiet) {
            (true, _) if self.state() == SYNCHRONISING => None,
            (true, _) => Some(Due::Live(Show::Live(text))),
            // The state's change was logged; without epochs there is no more to say.
            (false, true) => None,
            (false, false) => (!first).then_some(Due::Plain(text)),
        }
    }

    /// The most important of what is going on.
    fn state(&self) -> &'static str {
        match self {
            _ if self.fenced => "STOPPED, the backup is silent",
            _ if self.tainted => "NOT PROTECTED until a full epoch is through",
            _ if self.throttled => "the guest waits for the backup",
            _ => self.protection,
        }
    }

    fn lose_link(&mut self) {
        (self.protection, self.link_lost) = (LINK_LOST, self.now);
    }

    fn changed(&self, before: &str) -> Option<Show> {
        (self.live && self.state() != before).then(|| Show::Live(self.text()))
    }

    fn count(&mut self, report: &EpochReport) {
        self.epoch = report.epoch;
        self.window.epochs += 1;
        self.window.pages += report.dirty_pages;
        self.window.bytes += report.bytes;
        let pause_us = u64::try_from(report.pause.as_micros()).unwrap_or(u64::MAX);
        self.window.pauses.saturating_record(pause_us.max(1));
        self.last_epoch = Some((self.now, report.commit));
    }

    fn text(&self) -> String {
        let mut text = self.state().to_owned();
        if text == LINK_LOST {
            text += &format!(" for {} s", self.now.since(self.link_lost).as_secs());
        }
        text += &format!(" · epoch {}", self.epoch);
        let Window {
            pauses,
            epochs,
            pages,
            bytes,
        } = &self.window;
        // What matters most comes first: a narrow terminal cuts the end.
        if let Some((at, age)) = self.last_epoch {
            let behind = self.now.since(at) + age;
            text += &format!(" · behind {:.0} ms", behind.as_secs_f64() * 1e3);
        }
        if !pauses.is_empty() {
            let [p50, p99] = [0.5, 0.99].map(|q| pauses.value_at_quantile(q) as f64 / 1e3);
            text += &format!(" · pause {p50:.1}/{p99:.1} ms (p50/p99)");
        }
        if let Some(mean) = pages.checked_div(*epochs) {
            text += &format!(" · {mean} pages");
        }
        let seconds = self.now.since(self.window_since).as_secs_f64();
        if *bytes > 0 && seconds > 0.0 {
            text += &format!(" · {:.1} MB/s", *bytes as f64 / 1e6 / seconds);
        }
        text
    }
}

impl Window {
    fn new() -> Window {
        let pauses = Histogram::new_with_bounds(1, PAUSE_MAX_US, 2).expect("the bounds are right");
        Window {
            pauses,
            epochs: 0,
            pages: 0,
            bytes: 0,
        }
    }

    fn clear(&mut self) {
        self.pauses.reset();
        (self.epochs, self.pages, self.bytes) = (0, 0, 0);
    }
}

#[cfg(test)]
mod tests {
    use ft_core::primary::Phases;

    use super::*;

    fn epoch(number: u64, pause_ms: u64) -> primary::Report {
        primary::Report::Epoch(EpochReport {
            epoch: Epoch(number),
            kind: EpochKind::Delta,
            pause: Duration::from_millis(pause_ms),
            dirty_pages: 800,
            precopied_pages: 0,
            bytes: 3_300_000,
            commit: Duration::from_millis(4),
            phases: Phases::default(),
        })
    }

    const START: Micros = Micros(5_000_000);

    /// A second of epochs.
    fn second_of_epochs(line: &mut StatusLine) {
        line.on_time(START);
        line.primary(&primary::Report::Synced {
            epoch: Epoch(1),
            rounds: 2,
            took: Duration::from_secs(1),
        });
        for number in 2..=51 {
            line.primary(&epoch(number, if number == 51 { 9 } else { 2 }));
        }
    }

    #[test]
    fn a_live_line_tells_what_the_last_second_was_like() {
        let mut line = StatusLine::new(true);
        second_of_epochs(&mut line);
        assert_eq!(line.next_timeout(), Some(START + LIVE_PERIOD));
        assert_eq!(line.on_time(START + LIVE_PERIOD / 2), None);
        let Some(Due::Live(Show::Live(text))) = line.on_time(START + LIVE_PERIOD) else {
            panic!()
        };
        assert_eq!(
            text,
            "PROTECTED · epoch 51 · behind 1004 ms · pause 2.0/9.0 ms (p50/p99) · 800 pages · \
             165.0 MB/s"
        );
        // The next second is its own.
        let Some(Due::Live(Show::Live(text))) = line.on_time(START + LIVE_PERIOD * 2) else {
            panic!()
        };
        assert!(!text.contains("pause"), "{text}");
    }

    #[test]
    fn elsewhere_there_is_a_line_in_ten_seconds_if_there_were_epochs() {
        let mut line = StatusLine::new(false);
        second_of_epochs(&mut line);
        assert_eq!(line.on_time(START + LIVE_PERIOD), None);
        let Some(Due::Plain(text)) = line.on_time(START + PLAIN_PERIOD) else {
            panic!()
        };
        assert!(
            text.starts_with("PROTECTED · epoch 51 · behind 10004 ms · pause 2.0/"),
            "{text}"
        );
        assert_eq!(line.on_time(START + PLAIN_PERIOD * 2), None);
    }

    #[test]
    fn a_change_is_seen_at_once() {
        let mut line = StatusLine::new(true);
        let shown = line.primary(&primary::Report::Fenced);
        assert_eq!(
            shown,
            Some(Show::Live("STOPPED, the backup is silent · epoch 0".into()))
        );
        let progress = primary::Report::SyncProgress {
            round: 1,
            pages_sent: 5,
            pages_total: 10,
        };
        assert_eq!(
            line.primary(&progress),
            Some(Show::Progress {
                round: 1,
                done: 5,
                total: 10
            })
        );
        assert_eq!(StatusLine::new(false).primary(&progress), None);
        let shown = StatusLine::new(true).backup(&backup::Report::Protecting { epoch: Epoch(7) });
        assert_eq!(shown, Some(Show::Live("PROTECTING · epoch 7".into())));
    }

    #[test]
    fn a_lost_link_is_not_protection() {
        let mut line = StatusLine::new(true);
        second_of_epochs(&mut line);
        let Some(Show::Live(text)) = line.primary(&primary::Report::LinkLost) else {
            panic!()
        };
        assert!(text.starts_with("link LOST for 0 s · epoch 51"), "{text}");
        let Some(Due::Live(Show::Live(text))) = line.on_time(START + LIVE_PERIOD * 3) else {
            panic!()
        };
        assert!(text.starts_with("link LOST for 3 s · epoch 51"), "{text}");
        line.primary(&primary::Report::Connected);
        line.primary(&epoch(52, 2));
        assert_eq!(line.state(), "PROTECTED");
    }

    #[test]
    fn a_failed_audit_counts_until_a_full_epoch() {
        let mut line = StatusLine::new(true);
        line.primary(&epoch(1, 2));
        line.primary(&primary::Report::Tainted("an audit".into()));
        assert_eq!(line.state(), "NOT PROTECTED until a full epoch is through");
        line.primary(&epoch(2, 2));
        assert_eq!(line.state(), "NOT PROTECTED until a full epoch is through");
        let primary::Report::Epoch(report) = epoch(3, 2) else {
            unreachable!()
        };
        line.primary(&primary::Report::Epoch(EpochReport {
            kind: EpochKind::Full,
            ..report
        }));
        assert_eq!(line.state(), "PROTECTED");
        // A backup that comes back may hold nothing any more.
        line.primary(&primary::Report::Connected);
        assert_eq!(line.state(), "connected");
    }
}
