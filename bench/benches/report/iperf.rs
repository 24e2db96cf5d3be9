//! `iperf3` over loopback: what a link's bytes could take without checksums and answers.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bench::process::{Process, Workplace, free_port};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(20);
const SECONDS: u32 = 1;

/// A server that runs until it is dropped.
pub(crate) struct Iperf {
    port: String,
    _server: Process,
    _place: Workplace,
}

impl Iperf {
    /// # Errors
    /// It isn't installed, or doesn't come up.
    pub(crate) fn start() -> Result<Iperf> {
        let place = Workplace::new("iperf3")?;
        let port = free_port()?.to_string();
        let mut arguments = ["--server", "--forceflush", "--bind", "127.0.0.1"]
            .map(str::to_owned)
            .to_vec();
        arguments.extend(["--port".to_owned(), port.clone()]);
        let mut server = Process::start(place.path(), "iperf3", "iperf3", &arguments)
            .context("iperf3 (scripts/setup bench installs it)")?;
        while !server.said().contains("listening") {
            let ended = server.wait(RETRY)?;
            ensure!(ended.is_none(), "iperf3 has ended: {}", server.said());
        }
        Ok(Iperf {
            port,
            _server: server,
            _place: place,
        })
    }

    /// One stream for a moment, in bytes a second.
    ///
    /// # Errors
    /// It fails, or says something else than expected.
    pub(crate) fn measure(&self) -> Result<f64> {
        let output = Command::new("iperf3")
            .args(["--client", "127.0.0.1", "--port", &self.port, "--json"])
            .args(["--time", &SECONDS.to_string()])
            .args(["--connect-timeout", &PATIENCE.as_millis().to_string()])
            .output()
            .context("running iperf3")?;
        let said: Value =
            serde_json::from_slice(&output.stdout).context("reading iperf3's answer")?;
        let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
        let bits =
            bits.with_context(|| format!("iperf3 has measured nothing: {}", said["error"]))?;
        Ok(bits / 8.0)
    }
}
