//! The backup's host: daemon, standby QEMU and what the driver does between them.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use ft_core::backup::{Action, Backup, Input, LinkDown, LinkId, State};
use ft_core::wire::{ChunkTag, Frame, Message};
use ft_core::{ChunkId, Epoch, GrantToken, RunState, SlotId};

use crate::clock::Clock;
use crate::faults::Moment;
use crate::image::{CHUNK_PAGES, Chunk};
use crate::net::{Delivery, Item, Lane, Side};
use crate::primary_host::SOURCES;
use crate::vm::{BLOCK_PAGES, Device, Vm};
use crate::world::{Event, World};

#[derive(Debug)]
pub enum BackupIn {
    Up(u32),
    Lost {
        link: u32,
        lane: Lane,
        fin: bool,
    },
    Message(u32, Vec<u8>),
    Chunk {
        link: u32,
        serial: u64,
        tag: ChunkTag,
        chunk: Rc<Chunk>,
    },
    Other(Input<'static>),
}

/// What takes a while and then reports.
#[derive(Clone, Debug)]
pub enum Later {
    TermStored,
    Granted {
        slot: SlotId,
        link: u32,
        serials: Vec<u64>,
    },
    Revoked(SlotId),
    Activated {
        /// By this standby, if it is still there.
        standby: u32,
        epoch: Epoch,
        run_state: RunState,
    },
    RehearsalReady,
    Rehearsed,
}

#[derive(Debug)]
pub enum Job {
    Check(ChunkId, Frame),
    ApplySync(ChunkId),
    Apply {
        epoch: Epoch,
        chunks: Vec<ChunkId>,
        audit: Option<Vec<u64>>,
        /// Which image it belongs to.
        image: u64,
    },
}

#[derive(Debug)]
pub struct BackupHost {
    pub up: bool,
    pub clock: Clock,
    pub daemon: Option<BackupDaemon>,
    pub number: u32,
    pub vm: Option<Vm>,
    /// RAM of a standby that has died: it belongs to the daemon.
    pub remains: Option<Vm>,
    /// Counts standbys.
    pub standby: u32,
    pub guardian: bool,
    /// Has told the primary that it will not activate.
    pub stood_down: bool,
    pub end: Option<ft_core::backup::End>,
    pub apply_fails: bool,
    pub apply_slow: bool,
    pub activation_fails: bool,
    pub rehearsal_fails: bool,
    handling: bool,
}

#[derive(Debug)]
pub struct BackupDaemon {
    pub machine: Backup,
    pub stopped: bool,
    inbox: [VecDeque<BackupIn>; SOURCES],
    pub wake_at: Option<u64>,
    links: Vec<u32>,
    proofs: Vec<u32>,
    current: Option<u32>,
    grants: BTreeMap<u64, (u32, SlotId)>,
    next_serial: u64,
    pub chunks: BTreeMap<ChunkId, Rc<Chunk>>,
    next_chunk: u32,
    pub jobs: VecDeque<Job>,
    pub worker_busy: bool,
    /// Of the last applied epoch.
    pub device: Option<Device>,
    /// No apply may start now.
    pub rehearsing: bool,
}

impl BackupHost {
    pub fn new(clock: Clock, number: u32, machine: Backup) -> BackupHost {
        BackupHost {
            up: true,
            clock,
            daemon: Some(BackupDaemon {
                machine,
                stopped: false,
                inbox: Default::default(),
                wake_at: None,
                links: Vec::new(),
                proofs: Vec::new(),
                current: None,
                grants: BTreeMap::new(),
                next_serial: u64::from(number) << 32,
                chunks: BTreeMap::new(),
                next_chunk: 0,
                jobs: VecDeque::new(),
                worker_busy: false,
                device: None,
                rehearsing: false,
            }),
            number,
            vm: Some(Vm::standby()),
            remains: None,
            guardian: false,
            stood_down: false,
            end: None,
            apply_fails: false,
            apply_slow: false,
            standby: 0,
            activation_fails: false,
            rehearsal_fails: false,
            handling: false,
        }
    }

    /// The daemon could still decide to activate, or has.
    pub fn can_activate(&self) -> bool {
        let state = self
            .daemon
            .as_ref()
            .filter(|_| self.up)
            .map(|d| d.machine.status().state);
        !self.stood_down
            && matches!(
                state,
                Some(State::Protecting | State::Activating | State::Active)
            )
    }
}

impl BackupDaemon {
    pub fn holds_proof(&self, link: u32) -> bool {
        self.proofs.contains(&link)
    }
}

impl World {
    pub fn to_backup(&mut self, source: usize, input: BackupIn) {
        if let Some(daemon) = &mut self.backup.daemon {
            daemon.inbox[source].push_back(input);
            self.run_backup();
        }
    }

    pub fn run_backup(&mut self) {
        if std::mem::replace(&mut self.backup.handling, true) {
            return;
        }
        let mut spins = 0;
        self.drain_backup();
        while let Some(daemon) = self.backup.daemon.as_mut().filter(|d| !d.stopped) {
            let full: Vec<usize> = (0..SOURCES)
                .filter(|&s| !daemon.inbox[s].is_empty())
                .collect();
            if !full.is_empty() {
                let source = self.rng.pick(&full);
                let input = daemon.inbox[source].pop_front();
                self.backup_input(input);
            } else {
                let now = self.backup.clock.local(self.now);
                if daemon.machine.poll_timeout().is_none_or(|at| at > now) {
                    break;
                }
                spins += 1;
                if spins > 20 {
                    self.violation("the backup's timer does not advance");
                    break;
                }
                daemon.machine.handle_timeout(now);
            }
            self.drain_backup();
        }
        self.backup.handling = false;
        self.schedule_backup();
    }

    fn schedule_backup(&mut self) {
        let clock = self.backup.clock;
        let Some(daemon) = self.backup.daemon.as_mut().filter(|d| !d.stopped) else {
            return;
        };
        let Some(at) = daemon.machine.poll_timeout() else {
            return;
        };
        let at = clock.when(at).max(self.now + 1);
        if daemon
            .wake_at
            .is_none_or(|wake| at < wake || wake <= self.now)
        {
            daemon.wake_at = Some(at);
            self.at(at, Event::WakeBackup(at));
        }
    }

    fn backup_input(&mut self, input: Option<BackupIn>) {
        let now = self.backup.clock.local(self.now);
        let (Some(daemon), Some(input)) = (&mut self.backup.daemon, input) else {
            return;
        };
        if self.trace {
            println!("{:>10} B <- {input:?}", self.now);
        }
        let input = match input {
            BackupIn::Up(link) => {
                daemon.links.push(link);
                daemon.proofs.push(link);
                Input::LinkUp(LinkId(link))
            }
            BackupIn::Message(link, bytes) => {
                if daemon.links.contains(&link) {
                    let agreed = daemon.current == Some(link);
                    daemon
                        .machine
                        .handle(now, Input::Message(LinkId(link), &bytes));
                    if agreed {
                        self.keep_backup_proof(link);
                    }
                }
                return;
            }
            BackupIn::Chunk {
                link,
                serial,
                tag,
                chunk,
            } => {
                if daemon.current != Some(link) || !daemon.links.contains(&link) {
                    return;
                }
                let granted = daemon
                    .grants
                    .get(&serial)
                    .is_some_and(|(on, _)| *on == link);
                if !granted {
                    self.checks.late_writes += 1; // revoked meanwhile: dropped, never stored
                    return;
                }
                daemon.grants.remove(&serial);
                let id = ChunkId(daemon.next_chunk);
                daemon.next_chunk += 1;
                daemon.chunks.insert(id, chunk);
                Input::Arrived { chunk: id, tag }
            }
            BackupIn::Lost {
                link,
                lane: Lane::Proof,
                fin,
            } => {
                if !daemon.proofs.contains(&link) {
                    return;
                }
                daemon.proofs.retain(|l| *l != link);
                let down = if fin {
                    LinkDown::PeerDead
                } else {
                    LinkDown::Broken("proof lane reset".to_owned())
                };
                Input::LinkDown(LinkId(link), down)
            }
            BackupIn::Lost { link, .. } => {
                if !daemon.links.contains(&link) {
                    return;
                }
                self.drop_backup_link(link);
                Input::LinkDown(
                    LinkId(link),
                    LinkDown::Broken("the connection ended".to_owned()),
                )
            }
            BackupIn::Other(input) => input,
        };
        if let Some(daemon) = &mut self.backup.daemon {
            daemon.machine.handle(now, input);
        }
    }

    /// The primary speaks after our hello: it goes by this link too, and earlier lanes may go.
    fn keep_backup_proof(&mut self, link: u32) {
        let Some(daemon) = &mut self.backup.daemon else {
            return;
        };
        let old: Vec<u32> = daemon
            .proofs
            .iter()
            .copied()
            .filter(|l| *l < link)
            .collect();
        daemon.proofs.retain(|l| *l >= link);
        if let Some(vm) = &mut self.backup.vm {
            vm.proofs.retain(|l| *l >= link);
        }
        for link in old {
            self.close_proof(link, Side::Backup);
        }
    }

    /// The link object goes, and its grants with it; the proof lane stays.
    fn drop_backup_link(&mut self, link: u32) {
        let Some(daemon) = &mut self.backup.daemon else {
            return;
        };
        daemon.links.retain(|l| *l != link);
        daemon.grants.retain(|_, (on, _)| *on != link);
        if daemon.current == Some(link) {
            daemon.current = None;
        }
        self.close_lanes(link, Side::Backup);
    }

    fn drain_backup(&mut self) {
        let mut actions = 0;
        while let Some(daemon) = self.backup.daemon.as_mut().filter(|d| !d.stopped) {
            let Some(action) = daemon.machine.poll_action() else {
                break;
            };
            actions += 1;
            if actions > 400 {
                return self.violation("the backup wants more than 400 things at once");
            }
            if self.trace {
                println!(
                    "{:>10} B -> {}",
                    self.now,
                    crate::trace::backup_action(&action)
                );
            }
            let moment = Moment::of_backup(&action);
            self.carry_out_backup(action);
            self.fault_moment(moment);
        }
        self.check_backup_bounds();
    }

    fn check_backup_bounds(&mut self) {
        let Some(daemon) = &self.backup.daemon else {
            return;
        };
        let epoch = BLOCK_PAGES.iter().sum::<u64>() as usize / CHUNK_PAGES + 2;
        if daemon.chunks.len() > 2 * epoch + 64 {
            let held = daemon.chunks.len();
            return self.violation(format!("the backup holds {held} chunks"));
        }
        if daemon.grants.len() > 96 {
            self.violation("the backup has more than 96 grants out");
        }
    }

    fn carry_out_backup(&mut self, action: Action) {
        let Some(daemon) = &mut self.backup.daemon else {
            return;
        };
        match action {
            Action::Send(link, bytes) => self.send_from_backup(link.0, bytes),
            Action::CloseLink(link) => {
                let used = self
                    .backup
                    .vm
                    .as_ref()
                    .is_some_and(|vm| vm.proofs.contains(&link.0));
                self.drop_backup_link(link.0);
                if !used && let Some(daemon) = &mut self.backup.daemon {
                    daemon.proofs.retain(|l| *l != link.0);
                    self.close_proof(link.0, Side::Backup);
                }
            }
            Action::UseLink(link) => {
                daemon.current = Some(link.0);
                daemon.grants.clear();
                if let Some(vm) = &mut self.backup.vm {
                    vm.proofs.push(link.0);
                }
            }
            Action::Grant { slot, count } => self.grant(slot, count),
            Action::Revoke(slot) => {
                daemon.grants.retain(|_, (_, of)| *of != slot);
                self.backup_later((1, 40), Later::Revoked(slot));
            }
            Action::Check { chunk, frame } => self.backup_work(Job::Check(chunk, frame)),
            Action::ApplySync(chunk) => self.backup_work(Job::ApplySync(chunk)),
            Action::Apply {
                epoch,
                chunks,
                audit,
            } => {
                if daemon.rehearsing {
                    return self.violation("an apply starts during a rehearsal");
                }
                let image = self.checks.images;
                self.backup_work(Job::Apply {
                    epoch,
                    chunks,
                    audit,
                    image,
                });
            }
            Action::Free(chunks) => {
                for chunk in chunks {
                    daemon.chunks.remove(&chunk);
                }
            }
            Action::StoreTerm { term, activated } => {
                self.terms[1] = term;
                if activated {
                    self.backup_later(self.params.store_us, Later::TermStored);
                }
            }
            Action::Activate { epoch, run_state } => {
                if std::mem::take(&mut self.backup.activation_fails) {
                    let text = "unknown savevm section".to_owned();
                    return self.to_backup(5, BackupIn::Other(Input::ActivationFailed { text }));
                }
                self.load_state((4_000, 17_000), epoch, run_state);
            }
            Action::RespawnAndActivate { epoch, run_state } => {
                if let Some(remains) = self.backup.remains.take() {
                    self.backup.vm = Some(remains);
                }
                self.backup.standby += 1;
                self.load_state((100_000, 300_000), epoch, run_state);
            }
            Action::ForgetImage => self.checks.image_forgotten(),
            Action::PrepareRehearsal => {
                let next = if self.rng.chance(50) {
                    Later::Rehearsed
                } else {
                    Later::RehearsalReady
                };
                self.backup_later((50_000, 300_000), next);
            }
            Action::Rehearse { epoch, .. } => {
                daemon.rehearsing = true;
                self.check_standby(epoch, "a rehearsal");
                self.backup_later((10_000, 60_000), Later::Rehearsed);
            }
            Action::CancelRehearsal => daemon.rehearsing = false,
            Action::Guardian { armed } => self.backup.guardian = armed,
            Action::EndStandby => self.kill_backup_vm(),
            Action::Report(report) => self.backup_report(&report),
            Action::Finish(end) => {
                self.backup.end = Some(end);
                self.kill_backup_vm();
                self.kill_backup_daemon();
            }
        }
    }

    fn send_from_backup(&mut self, link: u32, bytes: Vec<u8>) {
        if let Ok((frame, message)) = ft_core::wire::decode(&bytes) {
            match message {
                Message::Ack => self.check_ack(frame),
                Message::Farewell { .. } => self.backup.stood_down = true,
                _ => {}
            }
        }
        self.send(link, Lane::Control, Side::Primary, Item::Message(bytes));
    }

    fn grant(&mut self, slot: SlotId, count: u32) {
        let Some(daemon) = &mut self.backup.daemon else {
            return;
        };
        let Some(link) = daemon.current else { return };
        let mut serials = Vec::new();
        for _ in 0..count {
            let serial = daemon.next_serial;
            daemon.next_serial += 1;
            daemon.grants.insert(serial, (link, slot));
            serials.push(serial);
        }
        self.backup_later(
            (0, 30),
            Later::Granted {
                slot,
                link,
                serials,
            },
        );
    }

    pub fn backup_link_up(&mut self, link: u32) {
        self.to_backup(0, BackupIn::Up(link));
    }

    pub fn deliver_to_backup(&mut self, delivery: Delivery, item: Item) {
        let Delivery { link, lane, .. } = delivery;
        if !self.backup.up {
            return;
        }
        if self.backup.daemon.is_none()
            || self.net.owner(link, Side::Backup) != Some(self.backup.number)
        {
            return self.refuse_item(delivery, &item);
        }
        let source = lane as usize;
        let input = match item {
            Item::Message(bytes) => BackupIn::Message(link, bytes),
            Item::Chunk { chunk, serial, tag } => BackupIn::Chunk {
                link,
                serial,
                tag,
                chunk,
            },
            Item::Fin => BackupIn::Lost {
                link,
                lane,
                fin: true,
            },
            Item::Reset => BackupIn::Lost {
                link,
                lane,
                fin: false,
            },
        };
        self.to_backup(source, input);
    }

    /// The chunks of an epoch that have arrived, by index, whether they were checked or not.
    pub fn arrived(&self, frame: Frame) -> Vec<Rc<Chunk>> {
        let Some(daemon) = &self.backup.daemon else {
            return Vec::new();
        };
        let mut chunks: Vec<_> = daemon
            .chunks
            .values()
            .filter(|c| c.frame == frame && !c.corrupt)
            .cloned()
            .collect();
        chunks.sort_by_key(|c| c.index);
        chunks
    }

    pub fn kill_backup_vm(&mut self) {
        let Some(mut vm) = self.backup.vm.take() else {
            return;
        };
        let links = std::mem::take(&mut vm.proofs);
        vm.running = false;
        self.backup.remains = Some(vm);
        for link in links {
            self.close_proof(link, Side::Backup);
        }
    }

    pub fn kill_backup_daemon(&mut self) {
        let Some(daemon) = self.backup.daemon.take() else {
            return;
        };
        if self.backup.guardian {
            let wait = self.rng.range(1_000..=30_000);
            self.after(wait, Event::GuardBackup(self.backup.number));
        }
        for link in daemon.links {
            self.close_lanes(link, Side::Backup);
        }
        for link in daemon.proofs {
            self.close_proof(link, Side::Backup);
        }
    }
}

pub fn token(link: u32, serial: u64) -> GrantToken {
    let mut bytes = [0; 24];
    bytes[..4].copy_from_slice(&link.to_le_bytes());
    bytes[4..12].copy_from_slice(&serial.to_le_bytes());
    GrantToken(bytes)
}

pub fn read_token(token: GrantToken) -> (u32, u64) {
    let [a, b, c, d, rest @ ..] = token.0;
    let serial: [u8; 8] = std::array::from_fn(|i| rest[i]);
    (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(serial))
}
