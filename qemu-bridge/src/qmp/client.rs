//! A QMP connection that never blocks, except where its caller asks for it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    self, AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr,
};
use serde_json::Value;

use super::codec::{CodecError, Command, Decoder, Message, QmpFailure};

/// Commands that may wait for their reply.
pub const PENDING_MAX: usize = 256;
/// Messages that [`Qmp::call`] may put aside for the next [`Qmp::progress`].
const KEPT_MAX: usize = 4096;
/// Commands that [`Qmp::call_all`] sends together.
const BATCH_MAX: usize = 64;
/// How often a socket is tried again whose queue is full.
const DIAL_RETRY: Duration = Duration::from_millis(10);
/// Bytes of one read.
const READ_BYTES: usize = 64 << 10;

/// Ties a reply to its command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What came from QEMU.
#[derive(Clone, Debug, PartialEq)]
pub enum Incoming {
    Reply {
        id: RequestId,
        result: Result<Value, QmpFailure>,
    },
    /// Also one that this program never heard of.
    Event {
        name: String,
        data: Value,
        /// QEMU's wall clock, in microseconds since 1970.
        at_us: u64,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error(
        "connecting to the QMP socket {path} failed: is QEMU running with -qmp unix:{path},server=on,wait=off?"
    )]
    Connect { path: PathBuf, source: io::Error },
    #[error("{operation} on the QMP socket failed")]
    Io {
        operation: &'static str,
        source: io::Error,
    },
    #[error("QEMU closed the QMP connection")]
    Closed,
    #[error(
        "no QMP greeting from {path} within {waited:?}: another program may hold this socket, which serves one at a time; give QEMU a second -qmp"
    )]
    NoGreeting { path: PathBuf, waited: Duration },
    #[error("QEMU did not answer {command} within {waited:?}")]
    Timeout { command: String, waited: Duration },
    #[error("QEMU refused {command}")]
    Refused { command: String, source: QmpFailure },
    #[error("QEMU broke the QMP protocol")]
    Codec(#[from] CodecError),
    #[error("QEMU broke the QMP protocol: {0}")]
    Protocol(&'static str),
    #[error("{PENDING_MAX} QMP commands wait for an answer already")]
    TooManyPending,
}

/// Bytes that go out together, with the descriptor that travels on their first byte.
#[derive(Debug)]
struct Segment {
    bytes: Vec<u8>,
    sent: usize,
    /// The descriptor and the request that takes it over.
    descriptor: Option<(OwnedFd, RequestId)>,
}

/// A connection to one QEMU.
///
/// Poll [`Qmp::fd`] for reading, and for writing while [`Qmp::wants_write`]; call
/// [`Qmp::progress`] when it is ready. Also call it once after every [`Qmp::call`], because
/// messages that came meanwhile wait inside.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    version: Value,
    decoder: Decoder,
    outgoing: VecDeque<Segment>,
    /// QEMU keeps one received descriptor at a time: the next one waits for this reply.
    descriptor_in_flight: Option<RequestId>,
    /// What QEMU has not answered yet, oldest first: it answers in order.
    pending: VecDeque<RequestId>,
    kept: VecDeque<Incoming>,
    next_id: u64,
}

/// Connects to a Unix socket, without waiting; so is the stream. A blocking connect would wait for
/// ever where others queue for a server that takes one client at a time, as QEMU's monitor does.
///
/// # Errors
/// `WouldBlock`: somebody listens there and the queue is full.
pub(crate) fn dial(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(UnixStream::from(socket))
}

impl Qmp {
    /// Connects and negotiates; `oob` is enabled where it is offered, because QEMU then reads
    /// ahead on a thread of its own instead of byte by byte between two commands.
    ///
    /// # Errors
    /// Nobody listens, or no greeting came in time.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Qmp, QmpError> {
        let deadline = Instant::now() + timeout;
        let connect_failed = |source| QmpError::Connect {
            path: path.to_owned(),
            source,
        };
        let stream = loop {
            match dial(path) {
                Ok(stream) => break stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(connect_failed(error)),
            }
            // Others wait already for the program that QEMU serves.
            if Instant::now() >= deadline {
                return Err(QmpError::NoGreeting {
                    path: path.to_owned(),
                    waited: timeout,
                });
            }
            std::thread::sleep(DIAL_RETRY);
        };
        let mut qmp = Qmp {
            stream,
            version: Value::Null,
            decoder: Decoder::default(),
            outgoing: VecDeque::new(),
            descriptor_in_flight: None,
            pending: VecDeque::new(),
            kept: VecDeque::new(),
            next_id: 1,
        };
        let oob = qmp
            .await_greeting(deadline)?
            .ok_or_else(|| QmpError::NoGreeting {
                path: path.to_owned(),
                waited: timeout,
            })?;
        let negotiate = match oob {
            true => Command::new("qmp_capabilities").arg("enable", vec!["oob"]),
            false => Command::new("qmp_capabilities"),
        };
        qmp.call(negotiate, timeout)?;
        Ok(qmp)
    }

    /// Whether `oob` is offered; `None` if the time was up before the greeting came.
    fn await_greeting(&mut self, deadline: Instant) -> Result<Option<bool>, QmpError> {
        loop {
            match self.decoder.next()? {
                Some(Message::Greeting { version, oob }) => {
                    self.version = version;
                    return Ok(Some(oob));
                }
                Some(_) => return Err(QmpError::Protocol("the first line is not a greeting")),
                None if !self.wait_ready(deadline)? => return Ok(None),
                None => {
                    self.read_once()?;
                }
            }
        }
    }

    /// The `version` object of the greeting.
    pub fn version(&self) -> &Value {
        &self.version
    }

    /// Readable means: call [`Qmp::progress`].
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether something waits for the socket to take it.
    pub fn wants_write(&self) -> bool {
        self.sendable_segment().is_some()
    }

    /// Sends all commands in one write; they are executed in order.
    ///
    /// # Errors
    /// Too many are unanswered, or the connection is gone.
    pub fn submit(&mut self, commands: &[Command]) -> Result<Vec<RequestId>, QmpError> {
        if self.pending.len() + commands.len() > PENDING_MAX {
            return Err(QmpError::TooManyPending);
        }
        let mut bytes = Vec::with_capacity(commands.len() * 64);
        let ids = commands
            .iter()
            .map(|c| self.encode(c, &mut bytes))
            .collect();
        self.enqueue(bytes, None)?;
        Ok(ids)
    }

    /// Sends a command together with a copy of a descriptor, as `getfd` and `add-fd` need it.
    ///
    /// # Errors
    /// As [`Qmp::submit`]; or no descriptor is left.
    pub fn submit_with_fd(
        &mut self,
        command: &Command,
        fd: BorrowedFd<'_>,
    ) -> Result<RequestId, QmpError> {
        if self.pending.len() >= PENDING_MAX {
            return Err(QmpError::TooManyPending);
        }
        let operation = "duplicating a descriptor to send";
        let fd = fd
            .try_clone_to_owned()
            .map_err(|source| QmpError::Io { operation, source })?;
        let mut bytes = Vec::with_capacity(128);
        let id = self.encode(command, &mut bytes);
        self.enqueue(bytes, Some((fd, id)))?;
        Ok(id)
    }

    /// Writes what can be written, reads what is there, and hands every message over in order.
    ///
    /// # Errors
    /// [`QmpError::Closed`] when QEMU is gone; everything that came before was handed over.
    pub fn progress(&mut self, sink: &mut dyn FnMut(Incoming)) -> Result<(), QmpError> {
        while let Some(message) = self.kept.pop_front() {
            sink(message);
        }
        let mut read_more = true;
        while read_more {
            // An error in writing must not hide what QEMU said before it went away.
            let written = self.flush();
            let read = self.read_once();
            while let Some(message) = self.decoder.next()? {
                sink(self.accept(message)?);
            }
            read_more = read? && written.is_ok();
            written?;
        }
        Ok(())
    }

    /// Sends one command and waits for its reply. For set-up only; what else comes meanwhile is
    /// kept for the next [`Qmp::progress`].
    ///
    /// # Errors
    /// QEMU refuses the command, takes longer than `timeout`, or is gone.
    pub fn call(&mut self, command: Command, timeout: Duration) -> Result<Value, QmpError> {
        let id = self.submit(std::slice::from_ref(&command))?[0];
        self.wait_for(id, &command, timeout)
    }

    /// [`Qmp::call`] with a descriptor.
    ///
    /// # Errors
    /// As [`Qmp::call`].
    pub fn call_with_fd(
        &mut self,
        command: &Command,
        fd: BorrowedFd<'_>,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.submit_with_fd(command, fd)?;
        self.wait_for(id, command, timeout)
    }

    /// Sends many commands and waits for all their replies, in the same order. For set-up only.
    ///
    /// # Errors
    /// QEMU takes longer than `timeout` for one of them, or is gone. What it refuses is in the list.
    pub fn call_all(
        &mut self,
        commands: &[Command],
        timeout: Duration,
    ) -> Result<Vec<Result<Value, QmpFailure>>, QmpError> {
        let mut replies = Vec::with_capacity(commands.len());
        for batch in commands.chunks(BATCH_MAX) {
            let ids = self.submit(batch)?;
            for (id, command) in ids.into_iter().zip(batch) {
                match self.wait_for(id, command, timeout) {
                    Ok(value) => replies.push(Ok(value)),
                    Err(QmpError::Refused { source, .. }) => replies.push(Err(source)),
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(replies)
    }

    /// Runs a line of the human monitor and returns what it printed.
    ///
    /// # Errors
    /// As [`Qmp::call`].
    pub fn human(&mut self, line: &str, timeout: Duration) -> Result<String, QmpError> {
        match self.call(Command::human(line), timeout)? {
            Value::String(text) => Ok(text),
            _ => Err(QmpError::Protocol(
                "the human monitor answered with something else than text",
            )),
        }
    }

    /// Waits until [`Qmp::progress`] may have something to do, at most `timeout`.
    ///
    /// # Errors
    /// The kernel can't wait.
    pub fn wait_ready_for(&self, timeout: Duration) -> Result<(), QmpError> {
        self.wait_ready(Instant::now() + timeout).map(|_| ())
    }

    fn wait_for(
        &mut self,
        id: RequestId,
        command: &Command,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let is_reply = |m: &Incoming| matches!(m, Incoming::Reply { id: got, .. } if *got == id);
        let deadline = Instant::now() + timeout;
        let kept = self.kept.iter().position(is_reply);
        let mut message = kept.and_then(|at| self.kept.remove(at));
        loop {
            if let Some(Incoming::Reply { result, .. }) = message {
                return result.map_err(|source| QmpError::Refused {
                    command: command.name().to_owned(),
                    source,
                });
            }
            message = self.keep_until(&is_reply)?;
            if message.is_some() {
                continue;
            }
            self.flush()?;
            if !self.wait_ready(deadline)? {
                return Err(QmpError::Timeout {
                    command: command.name().to_owned(),
                    waited: timeout,
                });
            }
            self.read_once()?;
        }
    }

    /// Puts aside what has come until `wanted` is met; that one is returned.
    fn keep_until(
        &mut self,
        wanted: &dyn Fn(&Incoming) -> bool,
    ) -> Result<Option<Incoming>, QmpError> {
        while let Some(message) = self.decoder.next()? {
            let message = self.accept(message)?;
            if wanted(&message) {
                return Ok(Some(message));
            }
            if self.kept.len() >= KEPT_MAX {
                return Err(QmpError::Protocol("it floods us with events"));
            }
            self.kept.push_back(message);
        }
        Ok(None)
    }

    fn encode(&mut self, command: &Command, bytes: &mut Vec<u8>) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        command.encode(bytes);
        self.pending.push_back(id);
        id
    }

    fn enqueue(
        &mut self,
        bytes: Vec<u8>,
        descriptor: Option<(OwnedFd, RequestId)>,
    ) -> Result<(), QmpError> {
        self.outgoing.push_back(Segment {
            bytes,
            sent: 0,
            descriptor,
        });
        self.flush()
    }

    /// The segment that may be sent now.
    fn sendable_segment(&self) -> Option<&Segment> {
        self.outgoing
            .front()
            .filter(|s| s.descriptor.is_none() || self.descriptor_in_flight.is_none())
    }

    fn flush(&mut self) -> Result<(), QmpError> {
        while let Some(segment) = self.sendable_segment() {
            let fds: Vec<_> = segment
                .descriptor
                .iter()
                .map(|(fd, _)| fd.as_raw_fd())
                .collect();
            let rights = [ControlMessage::ScmRights(&fds)];
            let control = if fds.is_empty() {
                &rights[..0]
            } else {
                &rights[..]
            };
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            let bytes = [IoSlice::new(&segment.bytes[segment.sent..])];
            match socket::sendmsg::<()>(self.stream.as_raw_fd(), &bytes, control, flags, None) {
                Ok(count) => self.sent(count),
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(QmpError::Closed),
                Err(e) => {
                    return Err(QmpError::Io {
                        operation: "sending",
                        source: e.into(),
                    });
                }
            }
        }
        Ok(())
    }

    fn sent(&mut self, count: usize) {
        let segment = self.outgoing.front_mut().expect("a segment was just sent");
        segment.sent += count;
        // The descriptor went with the first byte.
        if let Some((_, id)) = segment.descriptor.take() {
            self.descriptor_in_flight = Some(id);
        }
        if segment.sent == segment.bytes.len() {
            self.outgoing.pop_front();
        }
    }

    /// One read into the decoder; whether another may find more.
    fn read_once(&mut self) -> Result<bool, QmpError> {
        let mut buffer = [0u8; READ_BYTES];
        match io::Read::read(&mut self.stream, &mut buffer) {
            Ok(0) => Err(QmpError::Closed),
            Ok(count) => {
                self.decoder.feed(&buffer[..count]);
                Ok(count == buffer.len())
            }
            Err(e) => match e.kind() {
                ErrorKind::WouldBlock => Ok(false),
                ErrorKind::Interrupted => Ok(true),
                ErrorKind::ConnectionReset => Err(QmpError::Closed),
                _ => Err(QmpError::Io {
                    operation: "receiving",
                    source: e,
                }),
            },
        }
    }

    fn accept(&mut self, message: Message) -> Result<Incoming, QmpError> {
        match message {
            Message::Greeting { .. } => Err(QmpError::Protocol("a second greeting")),
            Message::Event { name, data, at_us } => Ok(Incoming::Event { name, data, at_us }),
            Message::Reply(result) => {
                let answered = self.pending.pop_front();
                let id = answered.ok_or(QmpError::Protocol("a reply to no command"))?;
                if self.descriptor_in_flight == Some(id) {
                    self.descriptor_in_flight = None;
                }
                Ok(Incoming::Reply { id, result })
            }
        }
    }

    /// Waits until the socket is ready; false when the deadline has passed.
    fn wait_ready(&self, deadline: Instant) -> Result<bool, QmpError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let write = if self.wants_write() {
            PollFlags::POLLOUT
        } else {
            PollFlags::empty()
        };
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN | write)];
        // Rounded up: a wait of 0 ms would spin through the last millisecond.
        let millis = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        match poll(&mut fds, PollTimeout::from(millis)) {
            Ok(0) => Ok(Instant::now() < deadline),
            Ok(_) | Err(Errno::EINTR) => Ok(true),
            Err(e) => Err(QmpError::Io {
                operation: "waiting",
                source: e.into(),
            }),
        }
    }
}
