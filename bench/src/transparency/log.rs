//! What a client has seen, one JSON object a line, written before it goes on.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// One thing that a connection has seen. Times are microseconds of `CLOCK_MONOTONIC`, the same for
/// all processes of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "lowercase")]
pub enum Record {
    Opened {
        at_us: u64,
    },
    /// The server has acknowledged number `n` of `key`.
    Written {
        key: String,
        n: u64,
        sent_us: u64,
        answered_us: u64,
    },
    /// The server said that `n` is the last number of `key`; 0 if it has none.
    Read {
        key: String,
        n: u64,
        sent_us: u64,
        answered_us: u64,
    },
    /// Everything that the server had of `key`, after all clients had ended.
    Listed {
        key: String,
        numbers: Vec<u64>,
    },
    /// The connection is of no use any more.
    Failed {
        how: Failure,
        text: String,
        at_us: u64,
    },
    Closed {
        at_us: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Failure {
    /// It was reset or ended, or the server said what makes no sense.
    Reset,
    /// No answer came for [`super::clients::STUCK_AFTER`].
    Stuck,
}

/// The log of one connection.
#[derive(Debug)]
pub struct Log {
    file: File,
}

impl Log {
    /// # Errors
    /// The file can't be made.
    pub fn create(path: &Path) -> Result<Log> {
        let file = File::create_new(path).with_context(|| format!("making {}", path.display()))?;
        Ok(Log { file })
    }

    /// # Errors
    /// The disk fails.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let line = serde_json::to_string(record)? + "\n";
        self.file
            .write_all(line.as_bytes())
            .context("writing a client's log")
    }
}

/// The logs of all connections in a folder, each in its order.
///
/// # Errors
/// One can't be read, or has a line that is none of ours.
pub fn read_all(dir: &Path) -> Result<Vec<Vec<Record>>> {
    let mut logs = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        if path
            .extension()
            .is_none_or(|extension| extension != "jsonl")
        {
            continue;
        }
        let text = std::fs::read_to_string(&path)?;
        // Of a client at work the last line may be half written.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let records: Result<Vec<Record>, _> = whole.lines().map(serde_json::from_str).collect();
        logs.push(records.with_context(|| format!("reading {}", path.display()))?);
    }
    Ok(logs)
}

pub fn now_us() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or((0, 0), |t| (t.tv_sec(), t.tv_nsec()));
    u64::try_from(now.0 * 1_000_000 + now.1 / 1000).unwrap_or(0)
}
