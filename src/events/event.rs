//! What a line of the events file says. docs/events.md describes every one, and a test holds the
//! two together.

use std::time::{SystemTime, UNIX_EPOCH};

use ft_core::EpochKind;
use serde::Serialize;

/// One line: an event, and who saw it when.
#[derive(Debug, Serialize)]
pub(super) struct Line<'a> {
    /// Microseconds since 1970, UTC: comparable between hosts as far as their clocks are.
    pub(super) time_us: u64,
    pub(super) mode: &'static str,
    #[serde(flatten)]
    pub(super) event: Event<'a>,
}

impl<'a> Line<'a> {
    pub(super) fn new(mode: &'static str, event: Event<'a>) -> Line<'a> {
        let since_1970 = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let time_us = u64::try_from(since_1970.as_micros()).unwrap_or(u64::MAX);
        Line {
            time_us,
            mode,
            event,
        }
    }

    /// With its end of line.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("events have no maps with odd keys");
        bytes.push(b'\n');
        bytes
    }
}

/// The subject of the protection.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Attached {
    pub(crate) qemu_pid: i32,
    pub(crate) qemu_version: String,
    pub(crate) accel: String,
    pub(crate) ram_bytes: u64,
    pub(crate) tracker: String,
    /// Nothing is paused on a backup.
    pub(crate) expected_pause_us: Option<u64>,
    /// Nothing is held on a backup.
    pub(crate) gate: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Event<'a> {
    Attached(&'a Attached),
    Connected,
    // The primary's.
    SyncProgress {
        round: u32,
        pages_sent: u64,
        pages_total: u64,
    },
    Synced {
        epoch: u64,
        rounds: u32,
        took_us: u64,
    },
    Epoch {
        epoch: u64,
        kind: Kind,
        pause_us: u64,
        dirty_pages: u64,
        /// Of those, the ones that were copied before the pause.
        precopied_pages: u64,
        bytes: u64,
        commit_us: u64,
        phases_us: Phases,
    },
    Tainted {
        text: &'a str,
    },
    Untainted {
        epoch: u64,
    },
    BackupLost {
        proven: bool,
        text: &'a str,
    },
    Fenced,
    Unfenced,
    Throttled {
        on: bool,
    },
    GuestStopped,
    GuestResumed,
    // The backup's.
    Refused {
        text: &'a str,
        count: u64,
    },
    Protecting {
        epoch: u64,
    },
    Flipped {
        epoch: u64,
        kind: Kind,
        chunks: u32,
        pages: u64,
        phases_us: BackupPhases,
    },
    PrimaryLeft,
    LinkLost {
        text: &'a str,
    },
    Activating {
        epoch: u64,
        term: u64,
        reason: &'static str,
        detect_us: u64,
    },
    Failover {
        epoch: u64,
        term: u64,
        reason: &'static str,
        detect_us: u64,
        activate_us: u64,
    },
    NotActivating {
        text: &'a str,
    },
    // Of both.
    Syncing,
    Audit {
        epoch: u64,
        ok: bool,
        mismatched_blocks: &'a [u16],
    },
    Rehearsed {
        ok: bool,
        text: &'a str,
    },
    Note {
        text: &'a str,
    },
    Error {
        text: &'a str,
    },
    EventsLost {
        count: u64,
    },
    Ended {
        how: &'a str,
        exit_code: u8,
    },
}

/// Where a pause went, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Phases {
    pub(super) stop: u64,
    pub(super) save: u64,
    pub(super) harvest: u64,
    pub(super) scan: u64,
    pub(super) copy: u64,
    pub(super) cont: u64,
    pub(super) gate: u64,
    pub(super) seal: u64,
    pub(super) push: u64,
    pub(super) release: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct BackupPhases {
    pub(super) arrive: u64,
    pub(super) check: u64,
    pub(super) flip: u64,
    pub(super) apply_before: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    SyncRound,
    Delta,
    Full,
}

impl From<EpochKind> for Kind {
    fn from(kind: EpochKind) -> Kind {
        match kind {
            EpochKind::SyncRound => Kind::SyncRound,
            EpochKind::Delta => Kind::Delta,
            EpochKind::Full => Kind::Full,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const DOCUMENT: &str = include_str!("../../docs/events.md");

    fn attached() -> Attached {
        Attached {
            qemu_pid: 1,
            qemu_version: "7.2.22".into(),
            accel: "kvm".into(),
            ram_bytes: 1 << 28,
            tracker: "uffd".into(),
            expected_pause_us: Some(2100),
            gate: Some("filter-buffer on n0".into()),
        }
    }

    /// One of each. The compiler asks for a new variant in `is_listed`, which stands beside it.
    fn one_of_each(attached: &Attached) -> Vec<Event<'_>> {
        let (epoch, text, kind) = (7, "t", Kind::Delta);
        let (term, reason, detect_us) = (2, "silence", 3);
        vec![
            Event::Attached(attached),
            Event::Connected,
            Event::SyncProgress {
                round: 1,
                pages_sent: 2,
                pages_total: 3,
            },
            Event::Synced {
                epoch,
                rounds: 2,
                took_us: 5,
            },
            Event::Epoch {
                epoch,
                kind,
                pause_us: 1,
                dirty_pages: 2,
                precopied_pages: 1,
                bytes: 3,
                commit_us: 4,
                phases_us: Phases::default(),
            },
            Event::Tainted { text },
            Event::Untainted { epoch },
            Event::BackupLost { proven: true, text },
            Event::Fenced,
            Event::Unfenced,
            Event::Throttled { on: true },
            Event::GuestStopped,
            Event::GuestResumed,
            Event::Refused { text, count: 1 },
            Event::Syncing,
            Event::PrimaryLeft,
            Event::Protecting { epoch },
            Event::Flipped {
                epoch,
                kind,
                chunks: 1,
                pages: 1,
                phases_us: BackupPhases::default(),
            },
            Event::LinkLost { text },
            Event::Activating {
                epoch,
                term,
                reason,
                detect_us,
            },
            Event::Failover {
                epoch,
                term,
                reason,
                detect_us,
                activate_us: 4,
            },
            Event::NotActivating { text },
            Event::Audit {
                epoch,
                ok: true,
                mismatched_blocks: &[],
            },
            Event::Rehearsed { ok: true, text },
            Event::Note { text },
            Event::Error { text },
            Event::EventsLost { count: 1 },
            Event::Ended {
                how: text,
                exit_code: 0,
            },
        ]
    }

    /// Fails to compile when a variant is added: add it to [`one_of_each`] too.
    fn is_listed(event: &Event<'_>) {
        match event {
            Event::Attached(_) | Event::Connected | Event::SyncProgress { .. } => {}
            Event::Synced { .. } | Event::Epoch { .. } | Event::Tainted { .. } => {}
            Event::Untainted { .. }
            | Event::BackupLost { .. }
            | Event::Fenced
            | Event::Unfenced => {}
            Event::Throttled { .. } | Event::GuestStopped | Event::GuestResumed => {}
            Event::Refused { .. } | Event::Syncing | Event::Protecting { .. } => {}
            Event::PrimaryLeft => {}
            Event::Flipped { .. } | Event::LinkLost { .. } | Event::Activating { .. } => {}
            Event::Failover { .. } | Event::NotActivating { .. } | Event::Audit { .. } => {}
            Event::Rehearsed { .. } | Event::Note { .. } | Event::Error { .. } => {}
            Event::EventsLost { .. } | Event::Ended { .. } => {}
        }
    }

    /// The examples of the document: event name to line.
    fn examples() -> Vec<Value> {
        let lines = DOCUMENT.lines().filter(|line| line.starts_with('{'));
        lines
            .map(|line| serde_json::from_str(line).expect(line))
            .collect()
    }

    fn keys(value: &Value) -> Vec<&String> {
        value
            .as_object()
            .expect("a line is an object")
            .keys()
            .collect()
    }

    #[test]
    fn every_event_is_documented_with_exactly_its_fields() {
        let attached = attached();
        let examples = examples();
        for event in one_of_each(&attached) {
            is_listed(&event);
            let line = serde_json::to_value(Line::new("primary", event)).unwrap();
            let name = line["event"].as_str().unwrap();
            let heading = format!("### `{name}`");
            assert!(
                DOCUMENT.contains(&heading),
                "docs/events.md lacks {heading}"
            );
            let example = examples.iter().find(|example| example["event"] == name);
            let example = example.unwrap_or_else(|| panic!("docs/events.md: no line for {name}"));
            assert_eq!(keys(example), keys(&line), "the example of {name}");
            for key in keys(&line) {
                assert!(
                    DOCUMENT.contains(&format!("`{key}`")),
                    "{name}: {key} is not explained"
                );
            }
        }
    }

    #[test]
    fn no_event_is_documented_that_does_not_exist() {
        let attached = attached();
        let names: Vec<Value> = one_of_each(&attached)
            .into_iter()
            .map(|event| serde_json::to_value(event).unwrap()["event"].clone())
            .collect();
        for example in examples() {
            assert!(names.contains(&example["event"]), "{example}");
        }
        let headings = DOCUMENT
            .lines()
            .filter(|line| line.starts_with("### "))
            .count();
        assert_eq!(headings, names.len());
    }

    #[test]
    fn a_line_is_one_line_whatever_the_text() {
        let line = Line::new(
            "backup",
            Event::Error {
                text: "a\nb\u{2028}\"\0",
            },
        );
        let bytes = line.to_bytes();
        assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), 1);
        assert!(bytes.ends_with(b"\n"));
        let value: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(value["mode"], "backup");
    }
}
