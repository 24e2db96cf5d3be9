//! Clients at work, in a process of their own on the guest's network.

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::GUEST;
use super::clients::{STOP_FILE, STUCK_AFTER};
use super::log::{Record, read_all};
use crate::process::Process;

/// To connect, and for the first answers.
const PATIENCE: Duration = Duration::from_secs(60);
/// Lines of a log after which its client is in its stride.
const SETTLED_LINES: usize = 10;

/// Clients that work until they are told to stop.
#[derive(Debug)]
pub struct Traffic {
    process: Process,
    dir: PathBuf,
}

impl Traffic {
    /// Starts the clients in the namespace `outside`, and waits until all of them have had answers.
    /// Their logs are in a new folder `dir`.
    ///
    /// # Errors
    /// They have none.
    pub fn start(outside: &str, dir: PathBuf, redis: u64, postgres: u64) -> Result<Traffic> {
        std::fs::create_dir(&dir)?;
        let run = dir
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let counts = [redis, postgres].map(|count| count.to_string());
        let logs = dir.display().to_string();
        let line = [
            "clients",
            "--dir",
            &logs,
            "--run",
            &run,
            "--host",
            GUEST,
            "--redis",
            &counts[0],
            "--postgres",
            &counts[1],
        ];
        let program = std::env::current_exe().context("finding this program")?;
        let line = line.map(str::to_owned);
        let process = Process::start_inside(outside, &dir, "clients", program, &line)?;
        let mut traffic = Traffic { process, dir };
        traffic.wait_settled(usize::try_from(redis + postgres)?)?;
        Ok(traffic)
    }

    /// The logs as they are now.
    ///
    /// # Errors
    /// They can't be read.
    pub fn so_far(&self) -> Result<Vec<Vec<Record>>> {
        read_all(&self.dir)
    }

    /// Lets the clients end and read back what they have written; their logs.
    ///
    /// # Errors
    /// They do not end, or could not write their logs.
    pub fn end(mut self) -> Result<Vec<Vec<Record>>> {
        File::create(self.dir.join(STOP_FILE))?;
        // For the answer that a client waits for, and as much for the reading back of each key.
        let status = self.process.wait(PATIENCE + STUCK_AFTER * 10)?;
        let status = status.context("the clients do not end")?;
        ensure!(
            status.success(),
            "the clients ended with {status}: {}",
            self.process.said()
        );
        read_all(&self.dir)
    }

    fn wait_settled(&mut self, clients: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let logs = self.so_far()?;
            let settled = logs.iter().filter(|log| log.len() >= SETTLED_LINES).count();
            if settled == clients {
                return Ok(());
            }
            ensure!(
                self.process.wait(Duration::ZERO)?.is_none() && Instant::now() < deadline,
                "{settled} of {clients} clients work: {}",
                self.process.said()
            );
        }
    }
}
