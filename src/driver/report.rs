//! What `status` answers.

use ft_core::{Micros, backup, primary};
use serde_json::{Value, json};

use super::clock;

/// What a daemon knows beside its machine.
#[derive(Debug)]
pub(crate) struct Facts {
    vm_id: String,
    rehearsals: u64,
    rehearsal: Option<Rehearsal>,
}

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
            "epoch": status.last_acknowledged.0,
            "behind_us": status.behind.map(|d| d.as_micros()),
            "term": status.term.0,
            "guest_running": status.guest_running && !status.fenced,
            "fenced": status.fenced,
            "dropped_packets": dropped_packets,
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
