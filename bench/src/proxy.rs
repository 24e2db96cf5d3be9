//! A man in the middle between a daemon and a QMP socket.
//!
//! It passes everything on, descriptors included, and lets a test look at a command before QEMU
//! gets it: while the hook runs, the command is held. It can also send commands of its own that
//! the daemon never hears of, to time what QEMU alone needs for a boundary.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde_json::Value;

use crate::floor::{Floor, state_sink};

/// Of every so many boundaries one is followed by the same commands without a harvest.
const FLOOR_EVERY: u64 = 3;
/// Of the guests whose floors move a gate.
const NETDEV: &str = "n0";

/// Called with a command's name before QEMU gets it.
pub type Hook = Box<dyn FnMut(&str) + Send>;

/// What the proxy has seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Of the daemon's boundaries, in their order.
    pub pauses: Vec<Pause>,
    /// STOP → RESUME of our own boundaries.
    pub floors_us: Vec<u64>,
    /// Boundaries of the daemon that have begun.
    pub stops: u64,
    /// When QEMU last sent RESUME, in microseconds since 1970.
    pub resumed_at_us: u64,
}

/// STOP → RESUME as QEMU has stamped them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// Microseconds since 1970.
    pub began_us: u64,
    pub took_us: u64,
}

impl Seen {
    /// Whether the guest stands still for the daemon: more boundaries have begun than ended.
    pub fn in_boundary(&self) -> bool {
        self.stops > self.pauses.len() as u64
    }
}

/// A proxy that runs until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    seen: Arc<Mutex<Seen>>,
    end: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens at `path` for one daemon after the other, in front of the QEMU at `qemu`.
    ///
    /// # Errors
    /// The socket can't be made.
    pub fn start(path: &Path, qemu: &Path, floors: Option<Floor>, hook: Hook) -> Result<Proxy> {
        let listener = UnixListener::bind(path).context("making the proxy's socket")?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let end = Arc::new(EventFd::new().context("making an eventfd")?);
        let mut relay = Relay {
            qemu: qemu.to_owned(),
            seen: Arc::clone(&seen),
            end: Arc::clone(&end),
            hook,
            floors: floors.map(Floors::new).transpose()?,
        };
        let thread = std::thread::Builder::new()
            .name("qmp-proxy".into())
            .spawn(move || {
                while relay.wait_readable(listener.as_raw_fd()) {
                    let Ok((daemon, _)) = listener.accept() else {
                        return;
                    };
                    if let Err(error) = relay.serve(&daemon) {
                        eprintln!("qmp proxy: {error:#}");
                    }
                }
            })
            .context("starting the proxy")?;
        Ok(Proxy {
            seen,
            end,
            thread: Some(thread),
        })
    }

    /// Looks at what was seen so far.
    pub fn seen<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        look(
            &self
                .seen
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner),
        )
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.end.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Relay {
    qemu: std::path::PathBuf,
    seen: Arc<Mutex<Seen>>,
    end: Arc<EventFd>,
    hook: Hook,
    floors: Option<Floors>,
}

/// Our own boundaries.
struct Floors {
    kind: Floor,
    /// A sink as the daemon has one.
    sink: File,
    handed_over: bool,
    boundaries: u64,
    /// Of the last boundary, and how long the guest had run before it.
    resumed: Instant,
    ran: Duration,
    due: Option<Instant>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    /// The sink is being handed over; so many replies are still to come.
    Adding(usize),
    /// So are they of a boundary.
    Running(usize),
}

impl Floors {
    fn new(kind: Floor) -> Result<Floors> {
        Ok(Floors {
            kind,
            sink: state_sink()?,
            handed_over: false,
            boundaries: 0,
            resumed: Instant::now(),
            ran: Duration::ZERO,
            due: None,
            stage: Stage::Idle,
        })
    }
}

impl Relay {
    /// Waits until the descriptor is readable; false: the proxy is to end.
    fn wait_readable(&self, fd: RawFd) -> bool {
        self.wait(&[fd], None)
            .is_some_and(|ready| !ready.is_empty())
    }

    /// Which of the descriptors are readable; `None`: the proxy is to end.
    fn wait(&self, fds: &[RawFd], until: Option<Instant>) -> Option<Vec<usize>> {
        use std::os::fd::{AsFd, BorrowedFd};
        // SAFETY: the callers keep the descriptors open for the whole call.
        let borrow = |fd: &RawFd| unsafe { BorrowedFd::borrow_raw(*fd) };
        let mut polled: Vec<_> = fds
            .iter()
            .map(|fd| PollFd::new(borrow(fd), PollFlags::POLLIN))
            .collect();
        polled.push(PollFd::new(self.end.as_fd(), PollFlags::POLLIN));
        let patience = until.map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now());
            PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX)
        });
        let _ = poll(&mut polled, patience);
        let ready = |p: &PollFd<'_>| p.any().unwrap_or(false);
        if polled.last().is_some_and(ready) {
            return None;
        }
        Some((0..fds.len()).filter(|at| ready(&polled[*at])).collect())
    }

    /// Relays one daemon's connection until either side ends it.
    fn serve(&mut self, daemon: &UnixStream) -> Result<()> {
        let qemu = UnixStream::connect(&self.qemu).context("connecting to QEMU")?;
        if let Some(floors) = &mut self.floors {
            *floors = Floors::new(floors.kind)?;
        }
        let mut from_daemon = Lines::default();
        let mut from_qemu = Lines::default();
        let mut waiting: VecDeque<(Vec<u8>, Vec<OwnedFd>)> = VecDeque::new();
        let mut unanswered = 0_usize;
        let mut stopped_at = None;
        loop {
            let due = self.floors.as_ref().and_then(|f| f.due);
            let fds = [daemon.as_raw_fd(), qemu.as_raw_fd()];
            let Some(ready) = self.wait(&fds, due) else {
                return Ok(());
            };
            if ready.contains(&0) {
                if !from_daemon.read(daemon)? {
                    return Ok(());
                }
                waiting.extend(from_daemon.take());
            }
            if ready.contains(&1) {
                if !from_qemu.read(&qemu)? {
                    return Ok(());
                }
                for (line, descriptors) in from_qemu.take() {
                    let message: Value = serde_json::from_slice(&line).unwrap_or_default();
                    if self.is_ours(&message, &qemu, &mut stopped_at)? {
                        continue;
                    }
                    if message.get("event").is_none() && message.get("QMP").is_none() {
                        unanswered = unanswered.saturating_sub(1);
                    }
                    send(daemon, &line, &descriptors)?;
                }
            }
            if waiting.is_empty() {
                self.start_floor(unanswered, &qemu)?;
            }
            let ours = self.floors.as_ref().is_some_and(|f| f.stage != Stage::Idle);
            while !ours && let Some((line, descriptors)) = waiting.pop_front() {
                let command: Value = serde_json::from_slice(&line).unwrap_or_default();
                let name = command["execute"].as_str().unwrap_or_default();
                (self.hook)(name);
                self.note_command(name);
                send(&qemu, &line, &descriptors)?;
                unanswered += 1;
            }
        }
    }

    fn note_command(&mut self, name: &str) {
        let Some(floors) = &mut self.floors else {
            return;
        };
        match name {
            "stop" => {
                floors.ran = floors.resumed.elapsed();
                // Too late: its `cont` would set the guest going in the daemon's pause.
                floors.due = None;
            }
            "xen-save-devices-state" => floors.boundaries += 1,
            "cont" => {
                floors.resumed = Instant::now();
                // In the middle between two boundaries: both kinds of pause meet the same guest,
                // and caches that it had as much time to fill with its own.
                if floors.boundaries > 0 && floors.boundaries.is_multiple_of(FLOOR_EVERY) {
                    floors.due = Some(floors.resumed + floors.ran / 2);
                }
            }
            _ => {}
        }
    }

    /// Begins a boundary of ours when none of the daemon's commands is under way.
    fn start_floor(&mut self, unanswered: usize, qemu: &UnixStream) -> Result<()> {
        let Some(floors) = &mut self.floors else {
            return Ok(());
        };
        if floors.due.is_none_or(|at| Instant::now() < at) || unanswered > 0 {
            return Ok(());
        }
        floors.due = None;
        if std::mem::replace(&mut floors.handed_over, true) {
            return floors.begin(qemu);
        }
        let preparation = floors.kind.preparation(NETDEV);
        floors.stage = Stage::Adding(preparation.len());
        send_commands(qemu, &preparation, &[floors.sink.try_clone()?.into()])
    }

    /// Whether a message of QEMU belongs to a boundary of ours; also notes pauses.
    fn is_ours(
        &mut self,
        message: &Value,
        qemu: &UnixStream,
        stopped_at: &mut Option<u64>,
    ) -> Result<bool> {
        let ours = self.floors.as_ref().is_some_and(|f| f.stage != Stage::Idle);
        let stamp = &message["timestamp"];
        let at = stamp["seconds"].as_u64().unwrap_or(0) * 1_000_000
            + stamp["microseconds"].as_u64().unwrap_or(0);
        let mut seen = self
            .seen
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match message["event"].as_str() {
            Some("STOP") => {
                *stopped_at = Some(at);
                seen.stops += u64::from(!ours);
            }
            Some("RESUME") => {
                seen.resumed_at_us = at;
                if let Some(stopped) = stopped_at.take() {
                    let took_us = at.saturating_sub(stopped);
                    if ours {
                        seen.floors_us.push(took_us);
                    } else {
                        seen.pauses.push(Pause {
                            began_us: stopped,
                            took_us,
                        });
                    }
                }
            }
            Some(_) => return Ok(false),
            None => {}
        }
        drop(seen);
        let Some(floors) = self.floors.as_mut().filter(|_| ours) else {
            return Ok(false);
        };
        if message.get("event").is_some() {
            return Ok(true);
        }
        // None of the daemon's commands is under way: the reply is to one of ours.
        ensure!(
            message.get("return").is_some(),
            "QEMU refused a command of the floor: {message}"
        );
        match floors.stage {
            Stage::Adding(2..) => floors.stage = Stage::Adding(1),
            Stage::Adding(_) => floors.begin(qemu)?,
            Stage::Running(left @ 2..) => floors.stage = Stage::Running(left - 1),
            Stage::Running(_) => floors.stage = Stage::Idle,
            Stage::Idle => unreachable!("it is ours"),
        }
        Ok(true)
    }
}

impl Floors {
    fn begin(&mut self, qemu: &UnixStream) -> Result<()> {
        self.sink.seek(io::SeekFrom::Start(0))?;
        let commands = [self.kind.boundary(), self.kind.release()].concat();
        self.stage = Stage::Running(commands.len());
        send_commands(qemu, &commands, &[])
    }
}

fn send_commands(qemu: &UnixStream, commands: &[String], descriptors: &[OwnedFd]) -> Result<()> {
    let text = commands.join("\n") + "\n";
    send(qemu, text.as_bytes(), descriptors)
}

/// Bytes that are cut into lines, each with the descriptors that came with it.
#[derive(Default)]
struct Lines {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Lines {
    /// Reads what is there; false at the end.
    fn read(&mut self, stream: &UnixStream) -> Result<bool> {
        let mut buffer = vec![0; 64 << 10];
        let mut space = cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = match recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)
        {
            Ok(received) => received,
            Err(nix::errno::Errno::ECONNRESET) => return Ok(false),
            Err(error) => return Err(error).context("reading QMP"),
        };
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = message {
                // SAFETY: the kernel has just made these descriptors for us.
                let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
                self.descriptors.extend(fds.into_iter().map(own));
            }
        }
        let count = received.bytes;
        self.bytes.extend_from_slice(&buffer[..count]);
        Ok(count > 0)
    }

    fn take(&mut self) -> Vec<(Vec<u8>, Vec<OwnedFd>)> {
        let mut lines = Vec::new();
        while let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            // A descriptor travels with the first byte of its command, and alone.
            let wants = line.windows(6).any(|w| w == b"\"getfd" || w == b"add-fd");
            let descriptors = if wants {
                std::mem::take(&mut self.descriptors)
            } else {
                Vec::new()
            };
            lines.push((line, descriptors));
        }
        lines
    }
}

pub(crate) fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> Result<()> {
    let mut sent = 0;
    if !descriptors.is_empty() {
        let fds: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        sent = sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(bytes)],
            &rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .context("passing a descriptor on")?;
    }
    match (&mut &*stream).write_all(&bytes[sent..]) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.context("passing QMP on"),
    }
}
