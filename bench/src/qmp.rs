//! The smallest QMP client: for set-up and questions, on a socket of the tests' own.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Events that wait for somebody to ask; later ones are dropped.
const EVENTS_KEPT: usize = 256;

#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    /// Came while something else was waited for.
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to a QEMU that may be just starting.
    ///
    /// # Errors
    /// It does not answer in ten seconds.
    pub fn connect(path: &Path) -> Result<Qmp> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("connecting to {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut qmp = Qmp {
            reader: BufReader::new(stream),
            events: VecDeque::new(),
        };
        qmp.line()?;
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// # Errors
    /// QEMU refuses, or is gone.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.reader
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())?;
        loop {
            let reply = self.line()?;
            if let Some(error) = reply.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(value) = reply.get("return") {
                return Ok(value.clone());
            }
            if reply.get("event").is_some() {
                self.events.truncate(EVENTS_KEPT - 1);
                self.events.push_back(reply);
            }
        }
    }

    /// The next event, also one that came before the last reply.
    ///
    /// # Errors
    /// None comes in ten seconds, or QEMU is gone.
    pub fn event(&mut self) -> Result<Value> {
        match self.events.pop_front() {
            Some(event) => Ok(event),
            None => self.line(),
        }
    }

    /// A command of the human monitor.
    ///
    /// # Errors
    /// As [`Qmp::call`].
    pub fn human(&mut self, line: &str) -> Result<String> {
        let reply = self.call("human-monitor-command", json!({ "command-line": line }))?;
        Ok(reply.as_str().unwrap_or_default().to_owned())
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let count = self.reader.read_line(&mut line).context("reading QMP")?;
        if count == 0 {
            bail!("QEMU closed the connection");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
