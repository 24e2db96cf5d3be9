//! Looking again, once a second, whether the VM is still the one that was attached to.
//!
//! QEMU sends no event for `device_add`, and none for a blocker of migration. So a few cheap
//! questions go out with the other commands, and the answers are compared with the first ones.
//! All of them together take QEMU one to two milliseconds (two shared cores, TCG): not to be sent
//! inside a boundary.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::images::Images;
use super::{DEVICE_FOLDERS, ShapeError, children, list, parse_network};
use crate::blocks::parse_listing;
use crate::qmp::{Command, Incoming, Qmp, QmpFailure, RequestId};

/// What a look at the VM found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Something is not as it was; for the operator.
    Changed { what: String },
    /// The run state, as `query-status` names it. Whether it is a surprise only the caller knows.
    RunState(String),
}

/// Compares answers with those at the start.
#[derive(Debug)]
pub struct ShapeWatch {
    /// Name and value of everything that is watched, by question.
    baseline: Vec<Facts>,
    images: Images,
    direct_io: bool,
    pending: BTreeMap<RequestId, Question>,
}

type Facts = BTreeMap<String, String>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    /// An index into [`DEVICE_FOLDERS`].
    Devices(usize),
    Network,
    Blocks,
    Blockers,
    BlockNodes,
    RunState,
}

/// The board's own devices, the third folder, stay as they are: what is plugged goes into the others.
const QUESTIONS: [Question; 7] = [
    Question::Devices(0),
    Question::Devices(1),
    Question::Network,
    Question::Blocks,
    Question::Blockers,
    Question::BlockNodes,
    Question::RunState,
];

impl ShapeWatch {
    /// Asks everything for the first time, of QEMU's process `pid`. Blocks. Do it *before* the shape is
    /// queried, so that nothing can change between the two unseen.
    ///
    /// # Errors
    /// QEMU doesn't answer as expected.
    pub fn begin(qmp: &mut Qmp, pid: i32, timeout: Duration) -> Result<ShapeWatch, ShapeError> {
        let commands = QUESTIONS.map(Question::command);
        let replies = qmp.call_all(&commands, timeout)?;
        let facts = QUESTIONS.iter().zip(&replies).map(|(question, reply)| {
            let reply = reply.as_ref().map_err(|source| ShapeError::Refused {
                command: question.name(),
                source: source.clone(),
            })?;
            question
                .facts(reply)
                .ok_or(ShapeError::Answer(question.name()))
        });
        let baseline = facts.collect::<Result<Vec<_>, _>>()?;
        let nodes = QUESTIONS.iter().position(|q| *q == Question::BlockNodes);
        let nodes = nodes.and_then(|at| replies[at].as_ref().ok());
        let nodes = nodes.unwrap_or(&Value::Null);
        let images = Images::look(pid, nodes);
        Ok(ShapeWatch {
            direct_io: images.any_direct(nodes),
            images,
            baseline,
            pending: BTreeMap::new(),
        })
    }

    /// Sends the questions, unless answers are still due. Doesn't block.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn ask(&mut self, qmp: &mut Qmp) -> Result<(), crate::qmp::QmpError> {
        if self.pending.is_empty() {
            let ids = qmp.submit(&QUESTIONS.map(Question::command))?;
            self.pending = ids.into_iter().zip(QUESTIONS).collect();
        }
        Ok(())
    }

    /// Whether a disk's data may come into RAM past the page cache, as of the last look: then a page
    /// can change after it was found written, without being found again.
    pub fn direct_io(&self) -> bool {
        self.direct_io
    }

    /// Whether the answers to the last [`Self::ask`] have all come.
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// Looks at one message of the watched QEMU; `None` if it is nothing to us or as it was.
    ///
    /// A change is reported once: from then on the new value is the one that is compared with.
    pub fn feed(&mut self, message: &Incoming) -> Option<Finding> {
        let Incoming::Reply { id, result } = message else {
            return None;
        };
        let question = self.pending.remove(id)?;
        if question == Question::RunState {
            let status = result.as_ref().ok()?["status"].as_str()?;
            return Some(Finding::RunState(status.to_owned()));
        }
        if question == Question::BlockNodes {
            let nodes = result.as_ref().unwrap_or(&Value::Null);
            self.direct_io = self.images.any_direct(nodes);
            return None;
        }
        let what = match facts_of(question, result) {
            Ok(facts) => {
                let at = QUESTIONS
                    .iter()
                    .position(|q| *q == question)
                    .expect("it is one of them");
                let before = std::mem::replace(&mut self.baseline[at], facts);
                difference(&before, &self.baseline[at])?
            }
            Err(why) => format!("QEMU's answer to {}: {why}", question.name()),
        };
        Some(Finding::Changed { what })
    }
}

fn facts_of(question: Question, result: &Result<Value, QmpFailure>) -> Result<Facts, String> {
    let value = result.as_ref().map_err(QmpFailure::to_string)?;
    question
        .facts(value)
        .ok_or_else(|| "it can't be understood".to_owned())
}

impl Question {
    fn command(self) -> Command {
        match self {
            Question::Devices(folder) => list(DEVICE_FOLDERS[folder]),
            Question::Network => Command::human("info network"),
            Question::Blocks => Command::human("info ramblock"),
            Question::Blockers => Command::new("query-migrate"),
            Question::BlockNodes => Command::new("query-named-block-nodes").arg("flat", true),
            Question::RunState => Command::new("query-status"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Question::Devices(_) => "qom-list",
            Question::Network => "info network",
            Question::Blocks => "info ramblock",
            Question::Blockers => "query-migrate",
            Question::BlockNodes => "query-named-block-nodes",
            Question::RunState => "query-status",
        }
    }

    /// An answer as names and values.
    fn facts(self, answer: &Value) -> Option<Facts> {
        Some(match self {
            Question::Devices(folder) => {
                let named = |(name, kind): (&str, &str)| {
                    (
                        format!("device {}/{name}", DEVICE_FOLDERS[folder]),
                        kind.to_owned(),
                    )
                };
                children(answer)?.map(named).collect()
            }
            Question::Network => {
                let nics = parse_network(answer.as_str()?);
                nics.iter()
                    .map(|nic| (nic.shape_name(), nic.shape_value()))
                    .collect()
            }
            Question::Blocks => {
                let blocks = parse_listing(answer.as_str()?).ok()?;
                let named = |b: &crate::blocks::ListedBlock| {
                    (
                        format!("RAM block {}", b.name),
                        format!("{} bytes", b.used_bytes),
                    )
                };
                blocks.iter().map(named).collect()
            }
            Question::Blockers => migration_blockers(answer)
                .map(|reason| {
                    (
                        format!("blocker of migration \"{reason}\""),
                        "present".to_owned(),
                    )
                })
                .collect(),
            Question::BlockNodes | Question::RunState => Facts::new(),
        })
    }
}

/// Why QEMU would not migrate, from an answer to `query-migrate`.
pub(crate) fn migration_blockers(answer: &Value) -> impl Iterator<Item = &str> {
    let reasons = answer["blocked-reasons"].as_array();
    reasons.into_iter().flatten().filter_map(Value::as_str)
}

/// Names the first thing that differs.
fn difference(before: &Facts, now: &Facts) -> Option<String> {
    let changed = before
        .iter()
        .find(|(name, value)| now.get(*name) != Some(value));
    if let Some((name, value)) = changed {
        return Some(match now.get(name) {
            Some(new) => format!("{name} was {value} and is now {new}"),
            None => format!("{name} ({value}) is gone"),
        });
    }
    let added = now.iter().find(|(name, _)| !before.contains_key(*name));
    added.map(|(name, value)| format!("{name} ({value}) was added"))
}
