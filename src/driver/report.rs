//! What `status` answers.

use std::time::Duration;

use ft_core::{Micros, backup, primary};
use serde_json::{Value, json};

use super::clock;

/// What a daemon knows beside its machine.
#[derive(Debug)]
pub(crate) struct Facts {
    vm_id: String,
    rehearsals: u64,
    rehearsal: Option<Rehearsal>,
    pauses: Pauses,
}

/// How much of the time the guest stands still. That is cut out of its clock: QEMU sets kvmclock and
/// the emulated timers back when it goes on.
#[derive(Debug)]
struct Pauses {
    window_began: Micros,
    in_window: Duration,
    /// Of the last full window.
    share: Option<f64>,
}

/// Long enough for a steady figure.
const PAUSE_WINDOW: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Rehearsal {
    at: Micros,
    ok: bool,
    text: String,
}

impl Facts {
    pub(crate) fn new(vm_id: String) -> Facts {
        Facts {
            vm_id,
            rehearsals: 0,
            rehearsal: None,
            pauses: Pauses {
                window_began: clock::now(),
                in_window: Duration::ZERO,
                share: None,
            },
        }
    }

    /// The guest stood still for an epoch.
    pub(crate) fn paused(&mut self, pause: Duration) {
        let pauses = &mut self.pauses;
        pauses.in_window += pause;
        let now = clock::now();
        let window = now.since(pauses.window_began);
        if window >= PAUSE_WINDOW {
            pauses.share = Some(pauses.in_window.as_secs_f64() / window.as_secs_f64());
            (pauses.window_began, pauses.in_window) = (now, Duration::ZERO);
        }
    }

    /// A rehearsal has ended like this.
    pub(crate) fn rehearsed(&mut self, ok: bool, text: &str) {
        self.rehearsals += 1;
        self.rehearsal = Some(Rehearsal {
            at: clock::now(),
            ok,
            text: text.to_owned(),
        });
    }

    pub(crate) fn primary(
        &self,
        status: &primary::Status,
        dropped_packets: u64,
        now: Micros,
    ) -> Value {
        let state = match status.state {
            primary::Protection::Unprotected => "unprotected",
            primary::Protection::Syncing => "syncing",
            primary::Protection::Protected => "protected",
            primary::Protection::Tainted => "tainted",
        };
        let specific = json!({
            "mode": "primary",
            "state": state,
            "protected": status.state == primary::Protection::Protected && status.link_up,
            "state_age_us": now.since(status.since).as_micros(),
            "link_up": status.link_up,
            "link_lost_us": status.link_lost.map(|at| now.since(at).as_micros()),
            "epoch": status.last_acknowledged.0,
            "behind_us": status.behind.map(|d| d.as_micros()),
            "term": status.term.0,
            "guest_running": status.guest_running && !status.fenced,
            "fenced": status.fenced,
            "dropped_packets": dropped_packets,
            "paused_percent": self.pauses.share.map(|share| (share * 1000.0).round() / 10.0),
        });
        self.complete(specific, now)
    }

    pub(crate) fn backup(&self, status: &backup::Status, now: Micros) -> Value {
        let specific = json!({
            "mode": "backup",
            "state": status.state.as_str(),
            "protected": status.state == backup::State::Protecting && status.link_up,
            "state_age_us": now.since(status.since).as_micros(),
            "link_up": status.link_up,
            "epoch": status.last_flipped.0,
            "applied": status.last_applied.0,
            "silent_us": status.silent_for.map(|d| d.as_micros()),
            "term": status.term.0,
        });
        self.complete(specific, now)
    }

    fn complete(&self, mut status: Value, now: Micros) -> Value {
        status["vm_id"] = json!(self.vm_id);
        status["rehearsals"] = json!(self.rehearsals);
        status["rehearsal"] = self.rehearsal.as_ref().map_or(Value::Null, |rehearsal| {
            json!({
                "ok": rehearsal.ok,
                "text": rehearsal.text,
                "age_us": now.since(rehearsal.at).as_micros(),
            })
        });
        status
    }
}
