//! What happens, for people and for machines: lines on standard error, and one JSON object per
//! line in the file of `--events`. `docs/events.md` describes them.

mod event;
mod file;
mod refused;

use std::path::Path;
use std::time::Duration;

use ft_core::backup::Reason;
use ft_core::primary::EpochReport;
use ft_core::{Epoch, EpochKind, Micros, Term, backup, primary};

pub(crate) use self::event::Attached;
use self::event::{Event, Line};
use self::file::EventFile;
use self::refused::Refused;
use crate::screen::{self, Show};
use crate::status_line::{Due, StatusLine};

/// What `--gate off` means.
const NO_GATE: &str = "the output gate is off: what the guest sends leaves at once, so after a \
                       failover others may have seen up to an epoch more than the guest remembers; \
                       and a primary that is only cut off can be heard until its lease ends";

/// The one place that everything worth knowing goes to. Nothing here blocks.
#[derive(Debug)]
pub(crate) struct Events {
    mode: &'static str,
    file: Option<EventFile>,
    status_line: StatusLine,
    refused: Refused,
    /// What the log has said last.
    said: Said,
    audit_said: Option<bool>,
    /// Why this backup activates, and how long it took to see that.
    activating: Option<(Reason, Duration)>,
}

/// What a reader of the log believes: it has to be told when that changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Unprotected,
    Protected,
    Tainted,
}

impl Events {
    /// # Errors
    /// The file can't be opened.
    pub(crate) fn open(path: Option<&Path>, mode: &'static str) -> anyhow::Result<Events> {
        Ok(Events {
            mode,
            file: path.map(|path| EventFile::open(path, mode)).transpose()?,
            status_line: StatusLine::new(screen::is_terminal()),
            refused: Refused::default(),
            said: Said::Unprotected,
            audit_said: None,
            activating: None,
        })
    }

    pub(crate) fn attached(&mut self, attached: &Attached) {
        let Attached {
            qemu_pid,
            qemu_version,
            accel,
            ram_bytes,
            expected_pause_us,
            ..
        } = attached;
        let ram_mib = ram_bytes >> 20;
        tracing::info!("QEMU {qemu_version} (process {qemu_pid}, {accel}, {ram_mib} MiB of RAM)");
        if let Some(pause_us) = expected_pause_us {
            let pause_ms = *pause_us as f64 / 1e3;
            tracing::info!("expect each epoch to pause the guest {pause_ms:.1} ms");
        }
        match attached.gate.as_deref() {
            None => {}
            Some("off") => tracing::warn!("{NO_GATE}"),
            Some(gate) => tracing::info!("output gate: {gate}"),
        }
        self.write(Event::Attached(attached));
    }

    pub(crate) fn error(&mut self, text: &str) {
        tracing::error!("{text}");
        self.write(Event::Error { text });
    }

    pub(crate) fn ended(&mut self, how: &str, exit_code: u8) {
        let refused = self.refused.rest();
        self.tell_refused(refused);
        screen::show(Show::Clear);
        tracing::info!("ended: {how}");
        self.write(Event::Ended { how, exit_code });
    }

    pub(crate) fn next_timeout(&self) -> Option<Micros> {
        [self.status_line.next_timeout(), self.refused.next_timeout()]
            .into_iter()
            .flatten()
            .min()
    }

    pub(crate) fn on_time(&mut self, now: Micros) {
        match self.status_line.on_time(now) {
            Some(Due::Live(show)) => screen::show(show),
            Some(Due::Plain(text)) => tracing::info!("{text}"),
            None => {}
        }
        let refused = self.refused.on_time(now);
        self.tell_refused(refused);
    }

    pub(crate) fn primary(&mut self, report: &primary::Report) {
        use primary::Report;
        match report {
            Report::Connected => {
                tracing::info!("connected to the backup");
                self.write(Event::Connected);
            }
            Report::LinkLost => {}
            Report::SyncProgress {
                round,
                pages_sent,
                pages_total,
            } => {
                if self.said != Said::Unprotected {
                    self.said = Said::Unprotected;
                    tracing::warn!(
                        "NOT PROTECTED: the backup begins anew, all of RAM is sent again"
                    );
                    self.write(Event::Syncing);
                }
                // On a terminal there is a bar.
                if !screen::is_terminal() {
                    tracing::info!("synchronising: round {round}, {pages_sent} pages sent");
                }
                let (round, pages_sent, pages_total) = (*round, *pages_sent, *pages_total);
                self.write(Event::SyncProgress {
                    round,
                    pages_sent,
                    pages_total,
                });
            }
            Report::Synced {
                epoch,
                rounds,
                took,
            } => {
                tracing::info!(
                    "PROTECTED from epoch {epoch} on: synchronised in {rounds} rounds, {took:.1?}"
                );
                self.said = Said::Protected;
                let (epoch, rounds, took_us) = (epoch.0, *rounds, us(*took));
                self.write(Event::Synced {
                    epoch,
                    rounds,
                    took_us,
                });
            }
            Report::Epoch(epoch) => self.epoch(epoch),
            Report::Audit {
                epoch,
                mismatched_blocks,
            } => self.audit(*epoch, mismatched_blocks),
            Report::Tainted(text) => {
                self.said = Said::Tainted;
                tracing::error!("NOT PROTECTED until a full epoch is acknowledged: {text}");
                self.write(Event::Tainted { text });
            }
            Report::BackupLost { proven, text } => {
                let what = if *proven {
                    "it can't take over"
                } else {
                    "it may be alive"
                };
                self.said = Said::Unprotected;
                tracing::error!("NOT PROTECTED: the backup is lost, {what}: {text}");
                self.write(Event::BackupLost {
                    proven: *proven,
                    text,
                });
            }
            Report::Fenced => {
                tracing::error!(
                    "the lease is over: the guest is STOPPED until the backup is heard again. If \
                     you know that the backup doesn't run it, `curling-rdma continue` lets it go on"
                );
                self.write(Event::Fenced);
            }
            Report::Unfenced => {
                tracing::info!("the guest goes on");
                self.write(Event::Unfenced);
            }
            Report::Throttled(on) => {
                match on {
                    true => tracing::warn!("the guest waits: the backup is slow"),
                    false => tracing::info!("the guest no longer waits for the backup"),
                }
                self.write(Event::Throttled { on: *on });
            }
            Report::GuestStopped => {
                tracing::info!("the guest was stopped; the backup will know");
                self.write(Event::GuestStopped);
            }
            Report::GuestResumed => {
                tracing::info!("the guest was resumed");
                self.write(Event::GuestResumed);
            }
            Report::Rehearsed { ok, text } => self.rehearsed(*ok, text),
            Report::Error(text) => self.error(text),
            Report::Note(text) => self.note(text),
        }
        self.show(|line| line.primary(report));
    }

    pub(crate) fn backup(&mut self, report: &backup::Report) {
        use backup::Report;
        match report {
            Report::Connected => {
                tracing::info!("a primary has connected");
                self.write(Event::Connected);
            }
            Report::Refused { text } => {
                let now = self.refused.add(text);
                self.tell_refused(now);
            }
            Report::PrimaryLeft => {
                tracing::info!("the primary has detached: waiting for one");
                self.write(Event::PrimaryLeft);
            }
            Report::Syncing => {
                tracing::info!("synchronising: would not take over yet");
                self.write(Event::Syncing);
            }
            Report::Protecting { epoch } => {
                tracing::info!("PROTECTING from epoch {epoch} on");
                self.write(Event::Protecting { epoch: epoch.0 });
            }
            Report::EpochFlipped {
                epoch,
                kind,
                chunks,
                pages,
                phases,
            } => {
                let (epoch, kind, chunks, pages) = (epoch.0, (*kind).into(), *chunks, *pages);
                self.write(Event::Flipped {
                    epoch,
                    kind,
                    chunks,
                    pages,
                    phases_us: event::BackupPhases {
                        arrive: us(phases.arrive),
                        check: us(phases.check),
                        flip: us(phases.flip),
                        apply_before: us(phases.apply_before),
                    },
                });
            }
            Report::Audit {
                epoch,
                mismatched_blocks,
            } => self.audit(*epoch, mismatched_blocks),
            Report::LinkLost { text } => {
                tracing::warn!("the link to the primary is lost: {text}");
                self.write(Event::LinkLost { text });
            }
            Report::Activating {
                epoch,
                term,
                reason,
                detect,
            } => {
                self.activating(*epoch, *term, *reason, *detect);
            }
            Report::Activated { epoch, term, took } => self.activated(*epoch, *term, *took),
            Report::NotActivating(text) => {
                tracing::error!("NOT taking over: {text}");
                self.write(Event::NotActivating { text });
            }
            Report::Rehearsed { ok, text } => self.rehearsed(*ok, text),
            Report::Error(text) => self.error(text),
            Report::Note(text) => self.note(text),
        }
        self.show(|line| line.backup(report));
    }
}

impl Events {
    /// Fifty times a second: not for the log.
    fn epoch(&mut self, report: &EpochReport) {
        self.write(Event::Epoch {
            epoch: report.epoch.0,
            kind: report.kind.into(),
            pause_us: us(report.pause),
            dirty_pages: report.dirty_pages,
            precopied_pages: report.precopied_pages,
            bytes: report.bytes,
            commit_us: us(report.commit),
            phases_us: event::Phases {
                stop: us(report.phases.stop),
                save: us(report.phases.save),
                harvest: us(report.phases.harvest),
                scan: us(report.phases.scan),
                copy: us(report.phases.copy),
                cont: us(report.phases.cont),
                gate: us(report.phases.gate),
                seal: us(report.phases.seal),
                push: us(report.phases.push),
                release: us(report.phases.release),
            },
        });
        if self.said == Said::Tainted && report.kind == EpochKind::Full {
            self.said = Said::Protected;
            tracing::info!("PROTECTED again, from epoch {} on", report.epoch);
            self.write(Event::Untainted {
                epoch: report.epoch.0,
            });
        }
    }

    fn activating(&mut self, epoch: Epoch, term: Term, reason: Reason, detect: Duration) {
        tracing::warn!(
            "TAKING OVER from epoch {epoch}, in term {term} ({})",
            reason.as_str()
        );
        self.activating = Some((reason, detect));
        self.write(Event::Activating {
            epoch: epoch.0,
            term: term.0,
            reason: reason.as_str(),
            detect_us: us(detect),
        });
    }

    fn activated(&mut self, epoch: Epoch, term: Term, took: Duration) {
        let (reason, detect) = self
            .activating
            .map_or(("unknown", Duration::ZERO), |(r, detect)| {
                (r.as_str(), detect)
            });
        tracing::warn!(
            "the guest runs HERE now, from epoch {epoch} on: seen after {detect:.1?}, activated \
             in {took:.1?}"
        );
        self.write(Event::Failover {
            epoch: epoch.0,
            term: term.0,
            reason,
            detect_us: us(detect),
            activate_us: us(took),
        });
    }

    fn audit(&mut self, epoch: Epoch, mismatched_blocks: &[u16]) {
        let ok = mismatched_blocks.is_empty();
        match ok {
            // Once is enough: there may be one a second.
            true if self.audit_said == Some(true) => {}
            true => tracing::info!("audit of epoch {epoch}: all of RAM is equal"),
            false => tracing::error!(
                "audit of epoch {epoch}: these RAM blocks differ: {mismatched_blocks:?}"
            ),
        }
        self.audit_said = Some(ok);
        self.write(Event::Audit {
            epoch: epoch.0,
            ok,
            mismatched_blocks,
        });
    }

    fn rehearsed(&mut self, ok: bool, text: &str) {
        match ok {
            true => tracing::info!("rehearsal: {text}"),
            false => tracing::error!("the rehearsal FAILED, and so would a failover: {text}"),
        }
        self.write(Event::Rehearsed { ok, text });
    }

    pub(crate) fn note(&mut self, text: &str) {
        tracing::info!("{text}");
        self.write(Event::Note { text });
    }

    fn tell_refused(&self, refused: Option<(u64, String)>) {
        let Some((count, text)) = refused else { return };
        match count {
            1 => tracing::warn!("refused: {text}"),
            _ => tracing::warn!("refused {count} more, the last: {text}"),
        }
        self.write(Event::Refused { text: &text, count });
    }

    fn show(&mut self, change: impl FnOnce(&mut StatusLine) -> Option<Show>) {
        if let Some(show) = change(&mut self.status_line) {
            screen::show(show);
        }
    }

    fn write(&self, event: Event<'_>) {
        if let Some(file) = &self.file {
            file.write(&Line::new(self.mode, event));
        }
    }
}

fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
