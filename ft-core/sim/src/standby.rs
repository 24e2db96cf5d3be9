//! What the backup's daemon has done for it: its worker, the standby and the rehearsals.

use std::rc::Rc;

use ft_core::backup::Input;
use ft_core::{ChunkId, Epoch, RunState};

use crate::backup_host::{BackupIn, Job, Later, token};
use crate::image::{Chunk, audit};
use crate::world::{Event, World};

impl World {
    /// What the driver itself waits for keeps its order.
    pub fn backup_later(&mut self, range: (u64, u64), later: Later) {
        let takes = self.duration(range);
        let mut at = self.now + takes;
        if matches!(later, Later::Granted { .. } | Later::Revoked(_)) {
            self.slots_at = self.slots_at.max(at);
            at = self.slots_at;
        }
        self.at(at, Event::Later(self.backup.number, later));
    }

    pub fn on_later(&mut self, number: u32, later: Later) {
        if self.backup.number != number || self.backup.daemon.is_none() {
            return;
        }
        let input = match later {
            Later::TermStored => Input::TermStored,
            Later::Granted {
                slot,
                link,
                serials,
            } => {
                let grants = serials
                    .into_iter()
                    .map(|serial| token(link, serial))
                    .collect();
                Input::Granted { slot, grants }
            }
            Later::Revoked(slot) => Input::Revoked(slot),
            Later::Activated {
                standby,
                epoch,
                run_state,
            } => {
                if self.backup.vm.is_none() || self.backup.standby != standby {
                    return;
                }
                self.activate(epoch, run_state);
                Input::Activated
            }
            Later::RehearsalReady => Input::RehearsalReady,
            Later::Rehearsed => {
                if let Some(daemon) = &mut self.backup.daemon {
                    daemon.rehearsing = false;
                }
                let ok = !std::mem::take(&mut self.backup.rehearsal_fails);
                Input::Rehearsed {
                    ok,
                    text: String::new(),
                }
            }
        };
        self.to_backup(5, BackupIn::Other(input));
    }

    pub fn load_state(&mut self, takes_us: (u64, u64), epoch: Epoch, run_state: RunState) {
        let activated = Later::Activated {
            standby: self.backup.standby,
            epoch,
            run_state,
        };
        self.backup_later(takes_us, activated);
    }

    fn activate(&mut self, epoch: Epoch, run_state: RunState) {
        self.check_activation(epoch, run_state);
        let device = self.backup.daemon.as_ref().and_then(|d| d.device);
        if let Some(vm) = &mut self.backup.vm {
            vm.device = device.unwrap_or(vm.device);
            vm.running = run_state == RunState::Running;
        }
    }

    pub fn backup_work(&mut self, job: Job) {
        let Some(daemon) = &mut self.backup.daemon else {
            return;
        };
        daemon.jobs.push_back(job);
        if daemon.jobs.len() > 128 {
            return self.violation("more than 128 jobs wait for the backup's worker");
        }
        self.schedule_backup_worker();
    }

    fn schedule_backup_worker(&mut self) {
        let number = self.backup.number;
        let slow = self.backup.apply_slow;
        let Some(daemon) = &mut self.backup.daemon else {
            return;
        };
        let Some(job) = daemon.jobs.front() else {
            return;
        };
        let range = match job {
            Job::Check(..) => (5, 60),
            Job::ApplySync(_) => (20, 200),
            Job::Apply { .. } if slow => (50_000, 400_000),
            Job::Apply { .. } => self.params.apply_us,
        };
        if !std::mem::replace(&mut daemon.worker_busy, true) {
            let takes = self.duration(range);
            self.after(takes, Event::BackupWorker(number));
        }
    }

    pub fn on_backup_worker(&mut self, number: u32) {
        if self.backup.number != number {
            return;
        }
        let Some(daemon) = &mut self.backup.daemon else {
            return;
        };
        if daemon.stopped {
            return self.after(500, Event::BackupWorker(number));
        }
        daemon.worker_busy = false;
        let Some(job) = daemon.jobs.pop_front() else {
            return;
        };
        let input = match job {
            Job::Check(chunk, frame) => {
                let missing = || Err("it is gone".to_owned());
                let result = daemon
                    .chunks
                    .get(&chunk)
                    .map_or_else(missing, |c| c.check(frame));
                Some(Input::Checked { chunk, result })
            }
            Job::ApplySync(chunk) => {
                if let (Some(data), Some(vm)) = (daemon.chunks.remove(&chunk), &mut self.backup.vm)
                {
                    data.apply(&mut vm.ram, usize::MAX);
                }
                Some(Input::SyncApplied(chunk))
            }
            Job::Apply {
                epoch,
                chunks,
                audit,
                image,
            } => {
                let current = image == self.checks.images;
                self.apply(epoch, &chunks, audit, current)
            }
        };
        self.schedule_backup_worker();
        if let Some(input) = input {
            self.to_backup(4, BackupIn::Other(input));
        }
    }

    fn apply(
        &mut self,
        epoch: Epoch,
        chunks: &[ChunkId],
        digest: Option<Vec<u64>>,
        current: bool,
    ) -> Option<Input<'static>> {
        let fails = std::mem::take(&mut self.backup.apply_fails);
        let daemon = self.backup.daemon.as_mut()?;
        let vm = self.backup.vm.as_mut().or(self.backup.remains.as_mut())?;
        let data: Vec<Rc<Chunk>> = chunks
            .iter()
            .filter_map(|id| daemon.chunks.remove(id))
            .collect();
        if data.len() != chunks.len() {
            self.violation("an apply of chunks that are gone");
            return None;
        }
        for chunk in &data {
            chunk.apply(
                &mut vm.ram,
                if fails {
                    chunk.pages.len() / 2
                } else {
                    usize::MAX
                },
            );
        }
        if fails {
            self.checks.standby_damaged |= current;
            self.checks.damaged_once = true;
            return Some(Input::ApplyFailed {
                text: "the simulator says so".to_owned(),
            });
        }
        daemon.device = data
            .last()
            .and_then(|c| c.end.as_ref())
            .map(|(device, _)| *device);
        let full = data
            .last()
            .is_some_and(|c| c.kind == ft_core::EpochKind::Full);
        let device = daemon.device;
        let found = audit(&vm.ram).0;
        let differing = |expected: Vec<u64>| {
            let pairs = (0u16..).zip(expected.iter().zip(&found));
            pairs
                .filter(|(_, (e, f))| e != f)
                .map(|(block, _)| block)
                .collect::<Vec<u16>>()
        };
        let audit = digest.map(differing);
        if full && current {
            self.checks.standby_damaged = false;
        }
        // The apply of an image that was forgotten meanwhile has nothing to be held against.
        if current {
            self.check_applied(epoch, device, audit.as_deref());
        }
        Some(Input::Applied { epoch, audit })
    }
}
