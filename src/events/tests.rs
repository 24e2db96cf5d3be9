use std::fs;

use ft_core::EpochKind;
use ft_core::primary::Phases;
use serde_json::Value;

use super::*;

/// What a file has after `tell`, without times.
fn lines(name: &str, mode: &'static str, tell: impl FnOnce(&mut Events)) -> Vec<Value> {
    let path = std::env::temp_dir().join(format!("cr-event-{name}-{}", std::process::id()));
    let mut events = Events::open(Some(&path), mode).unwrap();
    tell(&mut events);
    drop(events);
    let text = fs::read_to_string(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let parse = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        let fields = value.as_object_mut().unwrap();
        assert!(fields.remove("time_us").unwrap().as_u64().unwrap() > 1_600_000_000_000_000);
        assert_eq!(fields.remove("mode").unwrap(), mode);
        value
    };
    text.lines().map(parse).collect()
}

#[test]
fn a_failover_is_told_with_what_led_to_it() {
    let (epoch, term) = (Epoch(41), Term(2));
    let told = lines("failover", "backup", |events| {
        events.backup(&backup::Report::Activating {
            epoch,
            term,
            reason: Reason::ProofOfDeath,
            detect: Duration::from_micros(2500),
        });
        let took = Duration::from_millis(9);
        events.backup(&backup::Report::Activated { epoch, term, took });
        events.ended("the guest has powered off", 0);
    });
    let expected = serde_json::json!([
        { "event": "activating", "epoch": 41, "term": 2, "reason": "proof-of-death",
          "detect_us": 2500 },
        { "event": "failover", "epoch": 41, "term": 2, "reason": "proof-of-death",
          "detect_us": 2500, "activate_us": 9000 },
        { "event": "ended", "how": "the guest has powered off", "exit_code": 0 },
    ]);
    assert_eq!(Value::from(told), expected);
}

#[test]
fn epochs_and_audits_are_told_in_numbers() {
    let told = lines("epochs", "primary", |events| {
        events.primary(&epoch(3, EpochKind::Full));
        let mismatched_blocks = vec![4];
        events.primary(&primary::Report::Audit {
            epoch: Epoch(3),
            mismatched_blocks,
        });
    });
    let expected = serde_json::json!([
        { "event": "epoch", "epoch": 3, "kind": "full", "pause_us": 1900, "dirty_pages": 12, "precopied_pages": 5,
          "bytes": 50_000, "commit_us": 700,
          "phases_us": { "stop": 100, "save": 1500, "harvest": 1200, "scan": 300, "copy": 600,
                         "cont": 200, "gate": 50, "seal": 250, "push": 450, "release": 900 } },
        { "event": "audit", "epoch": 3, "ok": false, "mismatched_blocks": [4] },
    ]);
    assert_eq!(Value::from(told), expected);
}

fn epoch(number: u64, kind: EpochKind) -> primary::Report {
    primary::Report::Epoch(EpochReport {
        epoch: Epoch(number),
        kind,
        pause: Duration::from_micros(1900),
        dirty_pages: 12,
        precopied_pages: 5,
        bytes: 50_000,
        commit: Duration::from_micros(700),
        phases: Phases {
            stop: Duration::from_micros(100),
            save: Duration::from_micros(1500),
            harvest: Duration::from_micros(1200),
            scan: Duration::from_micros(300),
            copy: Duration::from_micros(600),
            cont: Duration::from_micros(200),
            gate: Duration::from_micros(50),
            seal: Duration::from_micros(250),
            push: Duration::from_micros(450),
            release: Duration::from_micros(900),
        },
    })
}

#[test]
fn every_change_of_the_protection_is_told() {
    use primary::Report;
    let progress = |round| Report::SyncProgress {
        round,
        pages_sent: 1,
        pages_total: 2,
    };
    let took = Duration::from_millis(1);
    let told = lines("changes", "primary", |events| {
        for report in [
            progress(1),
            Report::Synced {
                epoch: Epoch(1),
                rounds: 1,
                took,
            },
            epoch(2, EpochKind::Delta),
            Report::Tainted("an audit".into()),
            epoch(3, EpochKind::Delta),
            epoch(4, EpochKind::Full),
            epoch(5, EpochKind::Full),
            Report::Connected,
            progress(1),
            progress(2),
        ] {
            events.primary(&report);
        }
    });
    let names: Vec<_> = told
        .iter()
        .map(|line| line["event"].as_str().unwrap())
        .collect();
    let expected = "sync_progress synced epoch tainted epoch epoch untainted epoch connected \
                    syncing sync_progress sync_progress";
    assert_eq!(names.join(" "), expected);
}

#[test]
fn every_refused_stranger_is_counted() {
    let told = lines("refused", "backup", |events| {
        for _ in 0..1000 {
            events.backup(&backup::Report::Refused {
                text: "bad magic".into(),
            });
        }
        events.ended("stood down", 0);
    });
    let count = |line: &Value| line["count"].as_u64().unwrap_or(0);
    assert_eq!(told.iter().map(count).sum::<u64>(), 1000);
    assert!(told.len() < 10, "{}", told.len());
}
