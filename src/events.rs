//! What happens, for people and for machines: lines on standard error, and one JSON object per
//! line in the file of `--events`. `docs/events.md` describes them.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use ft_core::{Micros, backup, primary};
use serde::Serialize;
use serde_json::{Value, json};

/// Of refused strangers at most one line in this time is shown.
const REFUSED_EVERY_US: u128 = 1_000_000;

/// The subject of the protection.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Attached {
    pub(crate) qemu_pid: i32,
    pub(crate) qemu_version: String,
    pub(crate) accel: String,
    pub(crate) ram_bytes: u64,
    pub(crate) tracker: String,
    pub(crate) expected_pause_us: Option<u64>,
}

/// The one place that everything worth knowing goes to.
#[derive(Debug)]
pub(crate) struct Events {
    file: Option<File>,
    mode: &'static str,
    /// Lines that the file did not take.
    lost: u64,
    detect: Duration,
    reason: &'static str,
    refused: u64,
    refused_shown_us: u128,
}

impl Events {
    /// # Errors
    /// The file can't be opened.
    pub(crate) fn open(path: Option<&Path>, mode: &'static str) -> anyhow::Result<Events> {
        let open = |path: &Path| {
            let mut options = OpenOptions::new();
            // A slow pipe must not stop a guest.
            options.create(true).append(true).custom_flags(nix::libc::O_NONBLOCK);
            options.open(path).with_context(|| format!("opening the event log {}", path.display()))
        };
        let file = path.map(open).transpose()?;
        let detect = Duration::ZERO;
        Ok(Events { file, mode, lost: 0, detect, reason: "", refused: 0, refused_shown_us: 0 })
    }

    pub(crate) fn attached(&mut self, attached: &Attached) {
        let mut fields = serde_json::to_value(attached).unwrap_or_default();
        fields["mode"] = self.mode.into();
        self.write("attached", fields);
    }

    pub(crate) fn ended(&mut self, how: &str, exit_code: u8) {
        tracing::info!("ended: {how}");
        self.write("ended", json!({ "how": how, "exit_code": exit_code }));
    }

    pub(crate) fn error(&mut self, text: &str) {
        tracing::error!("{text}");
        self.write("error", json!({ "text": text }));
    }

    pub(crate) fn next_timeout(&self) -> Option<Micros> {
        None
    }

    pub(crate) fn on_time(&mut self, _now: Micros) {}

    pub(crate) fn primary(&mut self, report: &primary::Report) {
        use primary::Report;
        match report {
            Report::Connected => {
                tracing::info!("connected to the backup");
                self.write("connected", json!({}));
            }
            Report::SyncProgress { round, pages_sent, pages_total } => {
                tracing::info!("synchronising: round {round}, {pages_sent} pages sent");
                let fields =
                    json!({ "round": round, "pages_sent": pages_sent, "pages_total": pages_total });
                self.write("sync_progress", fields);
            }
            Report::Synced { epoch, rounds, took } => {
                tracing::info!("PROTECTED from epoch {epoch} on, after {rounds} rounds in {took:.1?}");
                let fields = json!({ "epoch": epoch.0, "rounds": rounds, "took_us": us(*took) });
                self.write("synced", fields);
            }
            Report::Epoch(epoch) => {
                let fields = json!({
                    "epoch": epoch.epoch.0,
                    "kind": format!("{:?}", epoch.kind).to_lowercase(),
                    "pause_us": us(epoch.pause),
                    "dirty_pages": epoch.dirty_pages,
                    "bytes": epoch.bytes,
                    "commit_us": us(epoch.commit),
                });
                self.write("epoch", fields);
            }
            Report::Audit { epoch, mismatched_blocks } => self.audit(epoch.0, mismatched_blocks),
            Report::Tainted(text) => {
                tracing::error!("NOT PROTECTED until a full epoch is through: {text}");
                self.write("tainted", json!({ "text": text }));
            }
            Report::BackupLost { proven, text } => {
                tracing::error!("NOT PROTECTED: {text}");
                self.write("backup_lost", json!({ "proven": proven, "text": text }));
            }
            Report::Fenced => {
                tracing::error!(
                    "the lease is over: the guest is stopped until the backup is heard again. \
                     `curling-rdma continue` runs it without: be sure that the backup is dead"
                );
                self.write("fenced", json!({}));
            }
            Report::Unfenced => {
                tracing::info!("the guest may run again");
                self.write("unfenced", json!({}));
            }
            Report::Throttled(on) => {
                let what = if *on { "paused: the backup is slow" } else { "no longer paused" };
                tracing::warn!("the guest is {what}");
                self.write("throttled", json!({ "on": on }));
            }
            Report::GuestStopped => {
                tracing::info!("the guest was stopped");
                self.write("guest_stopped", json!({}));
            }
            Report::GuestResumed => {
                tracing::info!("the guest was resumed");
                self.write("guest_resumed", json!({}));
            }
            Report::Rehearsed { ok, text } => self.rehearsed(*ok, text),
            Report::Error(text) => self.error(text),
            Report::Note(text) => self.note(text),
        }
    }

    pub(crate) fn backup(&mut self, report: &backup::Report) {
        use backup::Report;
        match report {
            Report::Connected => {
                tracing::info!("a primary has connected");
                self.write("connected", json!({}));
            }
            Report::Refused { text } => self.refused(text),
            Report::Syncing => {
                tracing::info!("synchronising: would not take over yet");
                self.write("syncing", json!({}));
            }
            Report::Protecting { epoch } => {
                tracing::info!("PROTECTING from epoch {epoch} on");
                self.write("protecting", json!({ "epoch": epoch.0 }));
            }
            Report::EpochFlipped { epoch, kind, chunks, pages } => {
                let kind = format!("{kind:?}").to_lowercase();
                let fields =
                    json!({ "epoch": epoch.0, "kind": kind, "chunks": chunks, "pages": pages });
                self.write("flipped", fields);
            }
            Report::Audit { epoch, mismatched_blocks } => self.audit(epoch.0, mismatched_blocks),
            Report::LinkLost { text } => {
                tracing::warn!("link lost: {text}");
                self.write("link_lost", json!({ "text": text }));
            }
            Report::Activating { epoch, term, reason, detect } => {
                (self.detect, self.reason) = (*detect, reason.as_str());
                tracing::warn!("TAKING OVER from epoch {epoch} ({})", self.reason);
                let fields = json!({
                    "epoch": epoch.0,
                    "term": term.0,
                    "reason": self.reason,
                    "detect_us": us(*detect),
                });
                self.write("activating", fields);
            }
            Report::Activated { epoch, term, took } => {
                tracing::warn!("the guest runs HERE now, from epoch {epoch}, after {took:.1?}");
                let fields = json!({
                    "epoch": epoch.0,
                    "term": term.0,
                    "reason": self.reason,
                    "detect_us": us(self.detect),
                    "activate_us": us(*took),
                });
                self.write("failover", fields);
            }
            Report::NotActivating(text) => {
                tracing::error!("{text}");
                self.write("not_activating", json!({ "text": text }));
            }
            Report::Rehearsed { ok, text } => self.rehearsed(*ok, text),
            Report::Error(text) => self.error(text),
            Report::Note(text) => self.note(text),
        }
    }

    fn audit(&mut self, epoch: u64, mismatched_blocks: &[u16]) {
        let ok = mismatched_blocks.is_empty();
        if !ok {
            tracing::error!("the audit of epoch {epoch} found differing RAM blocks: {mismatched_blocks:?}");
        }
        let fields = json!({ "epoch": epoch, "ok": ok, "mismatched_blocks": mismatched_blocks });
        self.write("audit", fields);
    }

    fn rehearsed(&mut self, ok: bool, text: &str) {
        match ok {
            true => tracing::info!("rehearsal: {text}"),
            false => tracing::error!("REHEARSAL FAILED, a failover would too: {text}"),
        }
        self.write("rehearsed", json!({ "ok": ok, "text": text }));
    }

    fn note(&mut self, text: &str) {
        tracing::info!("{text}");
        self.write("note", json!({ "text": text }));
    }

    /// Strangers may knock thousands of times a second.
    fn refused(&mut self, text: &str) {
        self.refused += 1;
        let now = now_us();
        if now < self.refused_shown_us + REFUSED_EVERY_US {
            return;
        }
        self.refused_shown_us = now;
        let count = std::mem::take(&mut self.refused);
        tracing::warn!("refused ({count} since the last line): {text}");
        self.write("refused", json!({ "text": text, "count": count }));
    }

    fn write(&mut self, event: &str, mut fields: Value) {
        let Some(file) = &mut self.file else { return };
        if self.lost > 0 {
            let line = json!({ "time_us": now_us() as u64, "event": "events_lost", "count": self.lost });
            if file.write_all(format!("{line}\n").as_bytes()).is_err() {
                self.lost += 1;
                return;
            }
            self.lost = 0;
        }
        fields["time_us"] = (now_us() as u64).into();
        fields["event"] = event.into();
        if let Err(error) = file.write_all(format!("{fields}\n").as_bytes()) {
            if self.lost == 0 {
                tracing::warn!("the event log does not take lines, protection goes on: {error}");
            }
            self.lost += 1;
        }
    }
}

fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn now_us() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros())
}
