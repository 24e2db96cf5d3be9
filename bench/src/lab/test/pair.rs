//! A protected guest across two hosts, seen from the machine: [`super::stand`] is what runs there.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::guest_ram::Digest;
use super::stand::Role;
use crate::cache;
use crate::lab::{Command, Ended, Host, Input, Lab};

/// For what takes less than a second on an idle machine that isn't emulated.
pub(super) const PATIENCE: Duration = Duration::from_secs(90);
/// Silence that ends a primary, and half of it. A host of the lab that is busy may be late by a
/// second.
pub(super) const LEASE_MS: u64 = 4000;
/// Where the backup listens.
pub(super) const PORT: u16 = 7070;
/// So that most kills come while nothing else does, and not all.
const EPOCH_MS: u64 = 300;
const AUDIT_EVERY: u64 = 4;

/// How a pair is started.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// `--transport` of both.
    pub(super) transport: &'static str,
    pub(super) epoch_ms: u64,
    /// What starts the backup's stand, in a line for a shell.
    pub(super) backup_prefix: &'static str,
}

/// A guest on A, its standby on B.
#[derive(Debug)]
pub(super) struct Pair<'lab> {
    pub(super) lab: &'lab Lab,
    folder: PathBuf,
    stands: [Stand; 2],
}

/// A stand that runs on a host. It ends when its input does.
#[derive(Debug)]
struct Stand {
    input: Input,
    ended: Option<std::thread::JoinHandle<Result<crate::lab::Output>>>,
}

/// What came of a failover.
#[derive(Clone, Debug)]
pub(super) struct Survivor {
    pub(super) epoch: u64,
    pub(super) reason: String,
    /// Why its RAM isn't that of the epoch's boundary, if it isn't.
    pub(super) torn: Option<String>,
}

impl Plan {
    pub(super) fn new(transport: &'static str) -> Plan {
        Plan {
            transport,
            epoch_ms: EPOCH_MS,
            backup_prefix: "exec",
        }
    }
}

impl<'lab> Pair<'lab> {
    /// Starts both sides and waits until the guest is protected.
    ///
    /// # Errors
    /// It is not: with what the daemons have said.
    pub(super) fn protected(lab: &'lab Lab, plan: &Plan) -> Result<Pair<'lab>> {
        let pair = Pair::start(lab, plan)?;
        pair.wait(Role::Primary, "synced", PATIENCE)?;
        Ok(pair)
    }

    /// Starts both sides.
    ///
    /// # Errors
    /// A host does not take commands.
    pub(super) fn start(lab: &'lab Lab, plan: &Plan) -> Result<Pair<'lab>> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("pair-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let folder = lab.shared().join(&name);
        std::fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        let address = format!("{}:{PORT}", Host::B.address());
        let (epoch, lease) = (plan.epoch_ms.to_string(), LEASE_MS.to_string());
        let (audit, transport) = (AUDIT_EVERY.to_string(), plan.transport);
        let primary = [
            "--peer",
            &address,
            "--transport",
            transport,
            "--epoch-ms",
            &epoch,
            "--min-epoch-ms",
            &epoch,
            "--failover-after-ms",
            &lease,
            "--audit-every",
            &audit,
        ];
        let backup = ["--listen", &address, "--transport", transport];
        let stand = |host, role, prefix: &str, options: &[&str]| {
            Stand::start(lab, host, role, prefix, &name, options)
        };
        let stands = [
            stand(Host::A, Role::Primary, "exec", &primary)?,
            stand(Host::B, Role::Backup, plan.backup_prefix, &backup)?,
        ];
        Ok(Pair {
            lab,
            folder,
            stands,
        })
    }

    /// What a daemon's event log has.
    pub(super) fn events(&self, role: Role) -> Vec<Value> {
        lines(&self.folder.join(format!("{role}.events")))
    }

    /// What a stand has said.
    pub(super) fn said(&self, role: Role) -> Vec<Value> {
        lines(&self.folder.join(format!("{role}.said")))
    }

    /// What a daemon has said.
    pub(super) fn log(&self, role: Role) -> String {
        let path = self.folder.join(format!("{role}.daemon.log"));
        std::fs::read_to_string(path).unwrap_or_default()
    }

    /// Waits for a daemon's first event of a kind.
    ///
    /// # Errors
    /// It does not come.
    pub(super) fn wait(&self, role: Role, kind: &str, patience: Duration) -> Result<Value> {
        self.wait_for(&format!("event {kind} of the {role}"), patience, || {
            Ok(self.events(role).into_iter().find(|it| it["event"] == kind))
        })
    }

    /// Waits for so many more epochs.
    ///
    /// # Errors
    /// They don't come.
    pub(super) fn wait_epochs(&self, more: usize) -> Result<()> {
        let count = || self.count(Role::Primary, |it| it["event"] == "epoch");
        let wanted = count() + more;
        self.wait_for(&format!("{more} more epochs"), PATIENCE, || {
            Ok((count() >= wanted).then_some(()))
        })
    }

    /// How many of a daemon's events fit.
    pub(super) fn count(&self, role: Role, fits: impl Fn(&Value) -> bool) -> usize {
        self.events(role).iter().filter(|it| fits(it)).count()
    }

    /// Looks again and again.
    ///
    /// # Errors
    /// Nothing is found in time: with what both sides have said.
    pub(super) fn wait_for<T>(
        &self,
        what: &str,
        patience: Duration,
        look: impl Fn() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            for role in [Role::Primary, Role::Backup] {
                let said = self.said(role);
                if let Some(failed) = said.iter().find(|it| it["stand"] == "failed") {
                    bail!(
                        "no {what}: the {role}'s stand: {}\n{}",
                        failed["text"],
                        self.story()
                    );
                }
            }
            ensure!(
                Instant::now() < deadline,
                "no {what} in {patience:?}\n{}",
                self.story()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The last of all logs, for a failure.
    fn story(&self) -> String {
        let end = |text: String, count: usize| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(count)..].join("\n")
        };
        [Role::Primary, Role::Backup]
            .map(|role| {
                let events = self.folder.join(format!("{role}.events"));
                let events = std::fs::read_to_string(events).unwrap_or_default();
                format!("--- {role}\n{}\n{}", end(events, 6), end(self.log(role), 6))
            })
            .join("\n")
    }

    /// Tells a stand something.
    ///
    /// # Errors
    /// Its host is gone.
    pub(super) fn tell(&self, role: Role, line: &str) -> Result<()> {
        let input = &self.stands[role as usize].input;
        input
            .send(format!("{line}\n").as_bytes())
            .with_context(|| format!("telling the {role}: {line}"))
    }

    /// What a side's guest counts now.
    ///
    /// # Errors
    /// Its stand does not answer, or has no guest.
    pub(super) fn counter(&self, role: Role) -> Result<u64> {
        let counts = || -> Vec<Value> {
            let said = self.said(role).into_iter();
            said.filter(|it| it["stand"] == "count").collect()
        };
        let before = counts().len();
        self.tell(role, "count")?;
        let answer = self.wait_for("count", PATIENCE, || Ok(counts().into_iter().nth(before)))?;
        answer["count"]
            .as_u64()
            .with_context(|| format!("the {role} has no guest any more"))
    }

    /// A process of a side: `daemon` or `qemu`.
    pub(super) fn pid(&self, role: Role, which: &str) -> Result<i64> {
        let said = self.said(role);
        let up = said.iter().find(|it| it["stand"] == "up");
        up.and_then(|it| it[which].as_i64())
            .with_context(|| format!("no {which} of the {role}"))
    }

    /// Waits for the failover, compares the RAM that it started from with that of the boundary that
    /// it names, and sees the guest run on.
    ///
    /// # Errors
    /// There is no survivor, or what is known of it does not suffice to judge.
    pub(super) fn survivor(&self) -> Result<Survivor> {
        let failover = self.wait(Role::Backup, "failover", PATIENCE)?;
        let epoch = failover["epoch"]
            .as_u64()
            .context("the failover names no epoch")?;
        let acknowledged = self
            .events(Role::Primary)
            .iter()
            .filter(|it| it["event"] == "epoch")
            .filter_map(|it| it["epoch"].as_u64())
            .max()
            .unwrap_or(0);
        ensure!(
            epoch >= acknowledged,
            "resumed from epoch {epoch}, and {acknowledged} was acknowledged"
        );
        let said = self.said(Role::Backup);
        let loading = said.iter().find(|it| it["stand"] == "loading");
        let loading = loading.context("nobody saw the standby load")?;
        let standby = Digest::read(&self.folder.join("standby.loading"))?;
        let torn = match (self.differences(epoch, &standby)?, loading["torn"].as_str()) {
            (0, None) => None,
            (0, Some(why)) => Some(format!("the guest's own pages: {why}")),
            (pages, why) => Some(format!(
                "{pages} pages are not those of epoch {epoch}; the guest's own: {why:?}"
            )),
        };
        let from = loading["count"].as_u64().unwrap_or(0);
        self.wait_for("rising counter of the survivor", PATIENCE, || {
            Ok((self.counter(Role::Backup)? > from + 3).then_some(()))
        })?;
        let reason = failover["reason"].as_str().unwrap_or_default().to_owned();
        Ok(Survivor {
            epoch,
            reason,
            torn,
        })
    }

    /// How many pages differ from those at the boundary of `epoch`. Where the link was lost, epochs
    /// were given up, and boundaries are ahead of them: then it is the boundary that differs least.
    fn differences(&self, epoch: u64, standby: &Digest) -> Result<usize> {
        let was_lost = self.count(Role::Backup, |it| it["event"] == "link_lost") > 0;
        let mut boundary = epoch;
        let mut least = None;
        loop {
            let path = self.folder.join(format!("{boundary}.boundary"));
            if boundary > epoch && !(was_lost && path.exists()) {
                return least.with_context(|| format!("nobody saw the boundary of {epoch}"));
            }
            let pages = Digest::read(&path)?.differences(standby);
            least = Some(least.map_or(pages, |least: usize| least.min(pages)));
            boundary += 1;
        }
    }

    /// No audit has found a difference, and there were some.
    ///
    /// # Errors
    /// There were none, or one has.
    pub(super) fn audited(&self) -> Result<usize> {
        let audits = self.count(Role::Primary, |it| it["event"] == "audit");
        let failed = self.count(Role::Primary, |it| {
            it["event"] == "audit" && it["ok"] != true
        });
        ensure!(
            failed == 0,
            "{failed} of {audits} audits found a difference"
        );
        Ok(audits)
    }

    /// Which transport the daemons said that they use, last.
    pub(super) fn transport(&self) -> Option<String> {
        let notes = self.events(Role::Primary).into_iter();
        let mut texts = notes.filter_map(|it| it["text"].as_str().map(str::to_owned));
        texts.rfind(|text| text.starts_with("transport: "))
    }

    /// # Errors
    /// It is another, or none.
    pub(super) fn ensure_transport(&self, name: &str) -> Result<()> {
        let said = self.transport().unwrap_or_default();
        ensure!(
            said.starts_with(&format!("transport: {name}")),
            "not {name}: {said:?}"
        );
        Ok(())
    }
}

impl Drop for Pair<'_> {
    fn drop(&mut self) {
        for stand in &mut self.stands {
            // A host may be gone.
            let _ = stand.input.end();
            if let Some(thread) = stand.ended.take()
                && let Ok(Ok(output)) = thread.join()
                && output.ended != Ended::Exit(0)
                && output.ended != Ended::HostDied
            {
                let errors = String::from_utf8_lossy(&output.errors).into_owned();
                eprintln!("lab test: a stand: {:?}: {errors}", output.ended);
            }
        }
    }
}

impl Stand {
    fn start(
        lab: &Lab,
        host: Host,
        role: Role,
        prefix: &str,
        folder: &str,
        options: &[&str],
    ) -> Result<Stand> {
        let words = options.join(" ");
        let line =
            format!("{prefix} /run/lab-agent stand --role {role} --to /lab/{folder} -- {words}");
        let mut command = Command::shell(&line);
        let program = cache::program()?.display().to_string();
        command.environment.push(("CURLING_RDMA".into(), program));
        let running = lab.spawn(host, &command)?;
        Ok(Stand {
            input: running.input(),
            ended: Some(std::thread::spawn(move || running.wait())),
        })
    }
}

/// The JSON objects of a file, one a line, as far as they are whole.
fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}
