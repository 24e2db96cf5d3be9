//! What a test of the plug does with a lab.

use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use bench::cache;
use bench::lab::{Command, Ended, Host, Lab, Running, Settings};
use serde_json::Value;

pub(crate) const PORT: u16 = 7000;
/// Emulation in emulation, on a machine that others use.
const PATIENCE: Duration = Duration::from_secs(240);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Two labs at once would take each other's processors.
static ONE_LAB: Mutex<()> = Mutex::new(());

pub(crate) struct Hosts {
    lab: Lab,
    // After the lab: fields are dropped in this order.
    _turn: MutexGuard<'static, ()>,
}

impl Deref for Hosts {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl Hosts {
    pub(crate) fn up() -> Result<Hosts> {
        let turn = ONE_LAB.lock().unwrap_or_else(PoisonError::into_inner);
        let lab = Lab::up(Settings::new()?)?;
        Ok(Hosts { lab, _turn: turn })
    }

    /// Runs a command line, which has to succeed, and returns what it says.
    pub(crate) fn say(&self, host: Host, line: &str) -> Result<String> {
        let output = self.run(host, &Command::shell(line))?;
        let text = String::from_utf8_lossy(&output.output).into_owned();
        let errors = String::from_utf8_lossy(&output.errors);
        ensure!(
            output.ended == Ended::Exit(0),
            "{host}: {line}: {text}{errors}"
        );
        Ok(text.trim().to_owned())
    }

    /// Starts a daemon: `--mode backup` on host B, `--mode primary` on host A.
    pub(crate) fn daemon(&self, host: Host, options: &str) -> Result<Running> {
        let mode = match host {
            Host::A => "primary",
            Host::B => "backup",
        };
        let line = format!(
            "exec {} --mode {mode} --vm-id v --transport tcp --allow-unauthenticated \
             --state-dir /run/state --control /run/control --events /lab/{host}.events {options}",
            cache::program()?.display()
        );
        self.spawn(host, &Command::shell(&line))
    }

    /// That the gate is the plug, and the packets do not go through QEMU.
    pub(crate) fn check_gate(&self) -> Result<()> {
        let attached = self.event(Host::A, "attached")?;
        let gate = attached.as_ref().map(|event| &event["gate"]);
        ensure!(
            gate == Some(&Value::from("plug on n0 (tap0)")),
            "{attached:?}"
        );
        // Some of them come and go.
        let look = "ls -l /proc/$(pgrep -f ^qemu-system)/fd || true";
        let files = self.say(Host::A, look)?;
        ensure!(files.contains("/dev/vhost-net"), "{files}");
        Ok(())
    }

    /// The last event of that name that a host's daemon has written.
    pub(crate) fn event(&self, host: Host, name: &str) -> Result<Option<Value>> {
        let text = self.shared_file(&format!("{host}.events"));
        let lines = text.lines().rev();
        let mut events = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(events.find(|event| event["event"] == name))
    }

    /// A file of `/lab`, as far as it is there.
    pub(crate) fn shared_file(&self, name: &str) -> String {
        std::fs::read_to_string(self.shared().join(name)).unwrap_or_default()
    }

    pub(crate) fn wait(
        &self,
        what: &str,
        mut is_there: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !is_there()? {
            if Instant::now() > deadline {
                let told = |host: Host| {
                    let text = self.shared_file(&format!("{host}.events"));
                    let end = text.lines().rev().take(5).collect::<Vec<_>>().join("\n");
                    format!("\n{host}:\n{end}")
                };
                let (a, b) = (told(Host::A), told(Host::B));
                bail!("waited in vain for {what}{a}{b}");
            }
            sleep(LOOK_EVERY);
        }
        Ok(())
    }
}
