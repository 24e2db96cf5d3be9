//! What `status` answers.

use ft_core::{Micros, backup, primary};
use serde_json::{Value, json};

pub(crate) fn primary_status(status: &primary::Status, now: Micros) -> Value {
    let state = match status.state {
        primary::Protection::Unprotected => "unprotected",
        primary::Protection::Syncing => "syncing",
        primary::Protection::Protected => "protected",
        primary::Protection::Tainted => "tainted",
    };
    json!({
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
    })
}

pub(crate) fn backup_status(status: &backup::Status, now: Micros) -> Value {
    json!({
        "mode": "backup",
        "state": status.state.as_str(),
        "protected": status.state == backup::State::Protecting && status.link_up,
        "state_age_us": now.since(status.since).as_micros(),
        "link_up": status.link_up,
        "epoch": status.last_flipped.0,
        "applied": status.last_applied.0,
        "silent_us": status.silent_for.map(|d| d.as_micros()),
        "term": status.term.0,
    })
}
