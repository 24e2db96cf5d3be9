//! The daemons of the product, and their event logs.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cache;
use crate::process::Process;

/// A daemon that runs, with its event log.
#[derive(Debug)]
pub struct Daemon {
    pub process: Process,
    pub control: PathBuf,
    events: PathBuf,
}

impl Daemon {
    /// Starts a daemon; `arguments` are those beside `--mode` and the places of its files.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(dir: &Path, mode: &str, arguments: &[String]) -> Result<Daemon> {
        let state = dir.join(format!("{mode}.state"));
        Daemon::start_by(dir, mode, &state, arguments, |name, program, line| {
            Process::start(dir, name, program, line)
        })
    }

    /// Starts a daemon on a host that is a network namespace, with the host's memory of terms in
    /// `state`.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start_inside(
        namespace: &str,
        dir: &Path,
        mode: &str,
        state: &Path,
        arguments: &[String],
    ) -> Result<Daemon> {
        Daemon::start_by(dir, mode, state, arguments, |name, program, line| {
            Process::start_inside(namespace, dir, name, program, line)
        })
    }

    fn start_by(
        dir: &Path,
        mode: &str,
        state: &Path,
        arguments: &[String],
        start: impl FnOnce(&str, PathBuf, &[String]) -> Result<Process>,
    ) -> Result<Daemon> {
        let place = |what: &str| dir.join(format!("{mode}.{what}"));
        let (control, events) = (place("control"), place("events"));
        let mut line = vec![
            "--mode".to_owned(),
            mode.to_owned(),
            "--vm-id".into(),
            "test".into(),
        ];
        let files = [
            ("--control", control.as_path()),
            ("--events", &events),
            ("--state-dir", state),
        ];
        for (option, path) in files {
            line.extend([option.to_owned(), path.display().to_string()]);
        }
        line.extend_from_slice(arguments);
        let process = start(&format!("{mode}-daemon"), cache::program()?, &line)?;
        Ok(Daemon {
            process,
            control,
            events,
        })
    }

    /// What `curling-rdma status --json` says of it.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&self) -> Result<Value> {
        let output = Command::new(cache::program()?)
            .args(["status", "--json", "--control"])
            .arg(&self.control)
            .output()?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            let said = String::from_utf8_lossy(&output.stderr);
            format!("{} has no status: {said}", self.process.name)
        })
    }

    /// All events so far.
    pub fn events(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.events).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// The first event of this kind, as soon as it comes.
    ///
    /// # Errors
    /// It does not come in time: with what the daemon has said.
    pub fn wait_event(&mut self, kind: &str, patience: Duration) -> Result<Value> {
        self.wait_for(kind, patience, |event| event["event"] == kind)
    }

    /// The first event that fits, as soon as it comes.
    ///
    /// # Errors
    /// It does not come in time, or the daemon ends: with what it has said.
    pub fn wait_for(
        &mut self,
        what: &str,
        patience: Duration,
        fits: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + patience;
        loop {
            let ended = self.process.wait(Duration::ZERO)?;
            if let Some(event) = self.events().into_iter().find(&fits) {
                return Ok(event);
            }
            if let Some(status) = ended {
                bail!(
                    "{} ended ({status}) before {what}:\n{}",
                    self.process.name,
                    self.process.said()
                );
            }
            if Instant::now() > deadline {
                bail!(
                    "no {what} from {} in {patience:?}:\n{}",
                    self.process.name,
                    self.process.said()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Says something to it as an operator: `detach`, `switchover`, …
    ///
    /// # Errors
    /// It refuses: with what it says.
    pub fn operate(&self, what: &str) -> Result<Output> {
        let output = Command::new(cache::program()?)
            .arg(what)
            .arg("--control")
            .arg(&self.control)
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.success(),
            "{what} ended with {}: {said}",
            output.status
        );
        Ok(output)
    }

    /// Numbers of one field of all events of a kind.
    pub fn numbers(&self, kind: &str, field: &str) -> Vec<u64> {
        let events = self.events();
        events
            .iter()
            .filter(|e| e["event"] == kind)
            .filter_map(|e| e[field].as_u64())
            .collect()
    }
}
