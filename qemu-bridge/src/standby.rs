//! A QEMU that waits with `-incoming defer -S`, and its activation.
//!
//! ```text
//! waiting ──getfd, migrate-incoming──► loading ──MIGRATION completed──► loaded ──cont──► running
//!                                         └──────error, MIGRATION failed──► failed
//! ```
//! A failed load ends QEMU's process, and one process loads once: afterwards a new standby has to
//! be spawned on the same RAM.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::qmp::{Command, Incoming, Qmp, QmpError, RequestId};

/// The name under which the standby knows the device state's descriptor.
const STATE_NAME: &str = "s";

#[derive(Debug, thiserror::Error)]
pub enum StandbyError {
    #[error(
        "the standby is {found:?} instead of waiting for a state: start it with -incoming defer -S"
    )]
    NotWaiting { found: String },
    #[error("reopening the device state for reading failed")]
    Reopen(#[source] std::io::Error),
    #[error("the standby did not load the device state: {0}")]
    Failed(String),
    #[error("the standby did not load the device state within {0:?}")]
    TooSlow(Duration),
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

/// Makes sure that a standby waits for a state, and has it report how a load goes. Blocks.
///
/// # Errors
/// It is in another state, or refuses.
pub fn prepare_standby(qmp: &mut Qmp, timeout: Duration) -> Result<(), StandbyError> {
    let status = qmp.call(Command::new("query-status"), timeout)?;
    let found = status["status"].as_str().unwrap_or("unknown");
    if found != "inmigrate" {
        return Err(StandbyError::NotWaiting {
            found: found.to_owned(),
        });
    }
    let events = json!([{"capability": "events", "state": true}]);
    let capabilities = Command::new("migrate-set-capabilities").arg("capabilities", events);
    qmp.call(capabilities, timeout)?;
    Ok(())
}

/// How far an activation has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The devices have the state; the guest stands still. Call [`Activation::start`] to run it.
    Loaded { load: Duration },
    /// The guest runs.
    Running { start: Duration },
    /// It will not run in this process.
    Failed { why: String },
}

/// An activation that is under way.
///
/// Feed it everything that the standby's [`Qmp::progress`] hands over. If the connection or the
/// process ends before [`Progress::Running`], it has failed; QEMU's standard error says why.
#[derive(Debug)]
pub struct Activation {
    step: Step,
    since: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Loading { getfd: RequestId, load: RequestId },
    Loaded,
    Starting { cont: RequestId },
    Over,
}

impl Activation {
    /// Hands the device state over, from the start of `state`, and begins to load it. Doesn't block.
    ///
    /// # Errors
    /// The connection is gone, or there are no descriptors left.
    pub fn begin(qmp: &mut Qmp, state: BorrowedFd<'_>) -> Result<Activation, StandbyError> {
        // A position of its own: QEMU reads from where the descriptor stands.
        let reader = reopen_for_reading(state).map_err(StandbyError::Reopen)?;
        let since = Instant::now();
        let getfd = Command::new("getfd").arg("fdname", STATE_NAME);
        let getfd = qmp.submit_with_fd(&getfd, reader.as_fd())?;
        let incoming = Command::new("migrate-incoming").arg("uri", format!("fd:{STATE_NAME}"));
        let load = qmp.submit(&[incoming])?[0];
        Ok(Activation {
            step: Step::Loading { getfd, load },
            since,
        })
    }

    /// Starts the guest after [`Progress::Loaded`]. Doesn't block.
    ///
    /// # Errors
    /// The connection is gone.
    ///
    /// # Panics
    /// The state is not loaded yet.
    pub fn start(&mut self, qmp: &mut Qmp) -> Result<(), StandbyError> {
        assert_eq!(
            self.step,
            Step::Loaded,
            "a standby is started once, after it has loaded"
        );
        self.since = Instant::now();
        let cont = qmp.submit(&[Command::new("cont")])?[0];
        self.step = Step::Starting { cont };
        Ok(())
    }

    /// Looks at one message of the standby; what it means for the activation, if anything.
    pub fn feed(&mut self, message: &Incoming) -> Option<Progress> {
        match (message, &self.step) {
            (
                Incoming::Reply {
                    id,
                    result: Err(failure),
                },
                Step::Loading { getfd, load },
            ) if id == getfd || id == load => self.fail(format!("QEMU refuses it: {failure}")),
            (Incoming::Event { name, data, .. }, Step::Loading { .. }) if name == "MIGRATION" => {
                self.loading(data)
            }
            (Incoming::Reply { id, result }, Step::Starting { cont }) if id == cont => match result
            {
                Ok(_) => {
                    self.step = Step::Over;
                    Some(Progress::Running {
                        start: self.since.elapsed(),
                    })
                }
                Err(failure) => self.fail(format!("QEMU does not start it: {failure}")),
            },
            _ => None,
        }
    }

    /// QEMU sends `completed` after everything that belongs to a load is done.
    fn loading(&mut self, data: &Value) -> Option<Progress> {
        match data["status"].as_str() {
            Some("completed") => {
                self.step = Step::Loaded;
                Some(Progress::Loaded {
                    load: self.since.elapsed(),
                })
            }
            Some(status @ ("failed" | "cancelled")) => self.fail(format!("the load {status}")),
            _ => None,
        }
    }

    fn fail(&mut self, why: String) -> Option<Progress> {
        self.step = Step::Over;
        Some(Progress::Failed { why })
    }
}

/// Loads a state and waits for it: for a rehearsal, and for tests. How long it took.
///
/// # Errors
/// The standby can't load it, or not within `timeout`.
pub fn load_blocking(
    qmp: &mut Qmp,
    state: BorrowedFd<'_>,
    timeout: Duration,
) -> Result<Duration, StandbyError> {
    let mut activation = Activation::begin(qmp, state)?;
    match wait(qmp, &mut activation, timeout)? {
        Progress::Loaded { load } => Ok(load),
        Progress::Running { .. } => unreachable!("nobody has started it"),
        Progress::Failed { why } => Err(StandbyError::Failed(why)),
    }
}

fn wait(
    qmp: &mut Qmp,
    activation: &mut Activation,
    timeout: Duration,
) -> Result<Progress, StandbyError> {
    let deadline = Instant::now() + timeout;
    loop {
        let mut progress = None;
        qmp.progress(&mut |message| {
            progress = progress.take().or_else(|| activation.feed(&message))
        })?;
        if let Some(progress) = progress {
            return Ok(progress);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(StandbyError::TooSlow(timeout));
        }
        qmp.wait_ready_for(left)?;
    }
}

fn reopen_for_reading(fd: BorrowedFd<'_>) -> std::io::Result<File> {
    OpenOptions::new()
        .read(true)
        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}
