//! The cable between the two hosts: a thread between two QEMU `stream` netdevs.
//!
//! It is outside of both hosts, so that cutting one direction, delaying and losing need no help of
//! theirs, and a host that is killed leaves a socket that nobody reads, not a FIN. The hosts' link
//! lights stay on: they notice a cut by silence alone.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::Host;
use super::prompt::make_prompt;
use crate::draw::Draw;

/// What waits in one direction at most; more is dropped, as by any switch.
const QUEUE_BYTES: usize = 8 << 20;
/// Bytes of a packet: QEMU's own limit (NET_BUFSIZE).
const MAX_PACKET: usize = (4 << 10) + (64 << 10);

/// What one direction of the cable does to packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cable {
    pub cut: bool,
    pub delay_us: u64,
    /// Of the packets, 0 to 100.
    pub loss_percent: f64,
}

/// What became of one direction's packets.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Traffic {
    pub passed: u64,
    /// Lost in a cut, to `loss_percent`, or because the other host is off.
    pub lost: u64,
    /// More than the switch can hold.
    pub overrun: u64,
}

pub(super) struct Switch {
    shared: Arc<Mutex<Shared>>,
    /// A byte here makes the thread look again; its end, that it ends.
    bell: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    ports: [Option<Port>; 2],
    /// By the host that packets come from.
    lanes: [Lane; 2],
}

struct Port {
    socket: Arc<UnixStream>,
    /// What QEMU has sent of a packet that isn't complete.
    partial: Vec<u8>,
}

#[derive(Default)]
struct Lane {
    cable: Cable,
    traffic: Traffic,
    queue: VecDeque<Packet>,
    queue_bytes: usize,
    /// What is left of the packet that is being written.
    writing: Vec<u8>,
    draw: Draw,
}

struct Packet {
    due: Instant,
    /// With QEMU's length before it.
    bytes: Vec<u8>,
}

impl Switch {
    pub(super) fn start() -> Result<Switch> {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (bell, ear) = UnixStream::pair().context("making the switch's bell")?;
        bell.set_nonblocking(true)?;
        ear.set_nonblocking(true)?;
        let thread = {
            let shared = shared.clone();
            thread::Builder::new()
                .name("switch".into())
                .spawn(move || serve(&shared, &ear))
                .context("starting the switch")?
        };
        Ok(Switch {
            shared,
            bell: Some(bell),
            thread: Some(thread),
        })
    }

    /// Connects a host; the returned end is for its QEMU. Nothing of an earlier connection is left.
    pub(super) fn plug(&self, host: Host) -> Result<UnixStream> {
        let (socket, end) = UnixStream::pair().context("making a host's end of the cable")?;
        socket.set_nonblocking(true)?;
        let mut shared = lock(&self.shared);
        shared.unplug(host);
        shared.ports[host.index()] = Some(Port {
            socket: Arc::new(socket),
            partial: Vec::new(),
        });
        drop(shared);
        self.ring();
        Ok(end)
    }

    /// Changes the cable in the direction from a host. When this returns no packet that was still
    /// in the switch, or comes later, passes a cut.
    pub(super) fn change(&self, from: Host, change: impl FnOnce(&mut Cable)) {
        let mut shared = lock(&self.shared);
        let lane = &mut shared.lanes[from.index()];
        change(&mut lane.cable);
        if lane.cable.cut {
            lane.lose_queue();
        }
        drop(shared);
        self.ring();
    }

    pub(super) fn look(&self, from: Host) -> (Cable, Traffic) {
        let shared = lock(&self.shared);
        let lane = &shared.lanes[from.index()];
        (lane.cable, lane.traffic)
    }

    fn ring(&self) {
        if let Some(mut bell) = self.bell.as_ref() {
            // A full bell has been rung enough.
            let _ = bell.write(&[0]);
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.bell = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switch").finish_non_exhaustive()
    }
}

fn serve(shared: &Mutex<Shared>, mut ear: &UnixStream) {
    if let Err(error) = make_prompt(Pid::from_raw(0)) {
        eprintln!("lab: the switch goes on without a short time slice: {error:#}");
    }
    let mut buffer = vec![0; 256 << 10];
    loop {
        let (sockets, writing, due) = lock(shared).wants();
        let mut watched = vec![PollFd::new(ear.as_fd(), PollFlags::POLLIN)];
        for (socket, writing) in sockets.iter().zip(writing) {
            let Some(socket) = socket else { continue };
            let mut events = PollFlags::POLLIN;
            events.set(PollFlags::POLLOUT, writing);
            watched.push(PollFd::new(socket.as_fd(), events));
        }
        // Rounded up: a packet is never early, and there is no spinning for its last fraction.
        let patience = due.map_or(PollTimeout::NONE, |due| {
            let left = due.saturating_duration_since(Instant::now());
            let ms = left.as_micros().div_ceil(1000);
            PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
        });
        let _ = poll(&mut watched, patience);
        loop {
            match ear.read(&mut buffer) {
                Ok(0) => return,
                Ok(_) => {}
                Err(_) => break,
            }
        }
        let mut shared = lock(shared);
        for from in Host::BOTH {
            shared.take_in(from, &mut buffer);
            shared.give_out(from);
        }
    }
}

impl Shared {
    /// What the thread waits for: the ports' sockets, whether each can't be written fast enough,
    /// and when the next delayed packet is due.
    fn wants(&self) -> ([Option<Arc<UnixStream>>; 2], [bool; 2], Option<Instant>) {
        let now = Instant::now();
        let sockets = [0, 1].map(|at| {
            let port: Option<&Port> = self.ports[at].as_ref();
            port.map(|port| port.socket.clone())
        });
        // Lane `from` is written to the other port.
        let writing = [1, 0].map(|from: usize| {
            let lane = &self.lanes[from];
            !lane.writing.is_empty() || lane.queue.front().is_some_and(|packet| packet.due <= now)
        });
        let due = self
            .lanes
            .iter()
            .filter_map(|lane| lane.queue.front())
            .map(|packet| packet.due)
            .filter(|&due| due > now)
            .min();
        (sockets, writing, due)
    }

    fn unplug(&mut self, host: Host) {
        self.ports[host.index()] = None;
        let to_it = &mut self.lanes[host.peer().index()];
        to_it.lose_queue();
        to_it.writing.clear();
    }

    /// Reads what a host's QEMU has sent, and queues the packets in it.
    fn take_in(&mut self, from: Host, buffer: &mut [u8]) {
        let peer_is_on = self.ports[from.peer().index()].is_some();
        let Some(port) = &mut self.ports[from.index()] else {
            return;
        };
        let lane = &mut self.lanes[from.index()];
        let count = match (&*port.socket).read(buffer) {
            Ok(count) if count > 0 => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Ok(_) | Err(_) => return self.unplug(from),
        };
        port.partial.extend_from_slice(&buffer[..count]);
        let mut rest = port.partial.as_slice();
        while let Some((length, _)) = rest.split_first_chunk() {
            let length = u32::from_be_bytes(*length) as usize;
            if length > MAX_PACKET {
                return self.unplug(from);
            }
            let Some((packet, after)) = rest.split_at_checked(4 + length) else {
                break;
            };
            lane.queue(packet, peer_is_on);
            rest = after;
        }
        let done = port.partial.len() - rest.len();
        port.partial.drain(..done);
    }

    /// Writes what is due to the other host, as long as it takes it.
    fn give_out(&mut self, from: Host) {
        let to = from.peer();
        let Some(port) = &self.ports[to.index()] else {
            return;
        };
        let lane = &mut self.lanes[from.index()];
        let now = Instant::now();
        loop {
            if lane.writing.is_empty() {
                let Some(packet) = lane.queue.pop_front_if(|packet| packet.due <= now) else {
                    return;
                };
                lane.queue_bytes -= packet.bytes.len();
                lane.writing = packet.bytes;
                lane.traffic.passed += 1;
            }
            match (&*port.socket).write(&lane.writing) {
                Ok(count) => drop(lane.writing.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.unplug(to),
            }
        }
    }
}

impl Lane {
    fn queue(&mut self, packet: &[u8], peer_is_on: bool) {
        let drawn_percent = self.draw.below(1_000_000) as f64 / 1e4;
        if self.cable.cut || !peer_is_on || drawn_percent < self.cable.loss_percent {
            self.traffic.lost += 1;
        } else if self.queue_bytes + packet.len() > QUEUE_BYTES {
            self.traffic.overrun += 1;
        } else {
            self.queue_bytes += packet.len();
            self.queue.push_back(Packet {
                due: Instant::now() + Duration::from_micros(self.cable.delay_us),
                bytes: packet.to_owned(),
            });
        }
    }

    fn lose_queue(&mut self) {
        self.traffic.lost += self.queue.len() as u64;
        self.queue.clear();
        self.queue_bytes = 0;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
