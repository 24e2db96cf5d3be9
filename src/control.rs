//! The control socket: a line of JSON asks, a line of JSON answers.
//!
//! `{"command":"status"}` and its like. Whoever can open the socket may do anything with the
//! guest, so only its user can.

mod client;
#[cfg(test)]
mod tests;

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen,
    socket, sockopt::PeerCredentials,
};
use nix::sys::stat::{Mode, fchmod};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(crate) use self::client::run;

const CONNECTIONS_MAX: usize = 16;
const LINE_BYTES_MAX: usize = 4096;
/// After this silence a client gives way to a new one.
const IDLE: Duration = Duration::from_secs(10);
/// Without descriptors `accept` fails at once, again and again.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What an operator asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub(crate) enum Request {
    Status,
    Detach,
    Switchover,
    Continue,
    Rehearse,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error(
        "another daemon{owner} has the control socket {}: end that one, or use another \
         --vm-id or --control", path.display()
    )]
    Taken { path: PathBuf, owner: String },
    #[error(
        "{} is there and is no socket: remove it, or use another --control", path.display()
    )]
    NotASocket { path: PathBuf },
    #[error("{operation} the control socket {} failed: see --control", path.display())]
    Socket {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// The daemon's side, for a loop that polls.
#[derive(Debug)]
pub(crate) struct ControlServer {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket: only this one is removed at the end.
    identity: Option<(u64, u64)>,
    connections: Vec<Connection>,
    accept_again: Option<Instant>,
}

impl ControlServer {
    /// Listens at `path`, for this user only. A socket that a killed daemon left there is
    /// replaced.
    ///
    /// # Errors
    /// Another daemon answers there, or the socket can't be made.
    pub(crate) fn bind(path: &Path) -> Result<ControlServer, ControlError> {
        let failed = |operation, source| {
            let path = path.to_owned();
            ControlError::Socket {
                operation,
                path,
                source,
            }
        };
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(|source| failed("making the directory of", source))?;
        }
        remove_stale(path)?;
        let listener = listen_privately(path).map_err(|source| failed("making", source))?;
        let identity = identity(path);
        Ok(ControlServer {
            listener,
            path: path.to_owned(),
            identity,
            connections: Vec::new(),
            accept_again: None,
        })
    }

    /// What to poll for input; after any of them [`ControlServer::progress`].
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let accepting = self.accept_again.is_none_or(|at| at <= Instant::now());
        let connections = self
            .connections
            .iter()
            .map(|connection| connection.stream.as_fd());
        accepting
            .then(|| self.listener.as_fd())
            .into_iter()
            .chain(connections)
    }

    /// Answers what was asked. Never blocks: a client that doesn't read its answers is let go.
    pub(crate) fn progress(&mut self, answer: &mut dyn FnMut(Request) -> Value) {
        self.accept();
        self.connections
            .retain_mut(|connection| connection.serve(answer));
    }

    /// Tells everyone who is connected how it ended.
    pub(crate) fn end(self, how: &str, exit_code: u8) {
        for connection in &self.connections {
            tell(
                &connection.stream,
                &json!({ "ended": how, "exit_code": exit_code }),
            );
        }
    }

    fn accept(&mut self) {
        self.accept_again = None;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    _ => {
                        tracing::warn!("accepting a control connection failed: {error}");
                        self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                        return;
                    }
                },
            }
        }
    }

    fn admit(&mut self, stream: UnixStream) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if self.connections.len() >= CONNECTIONS_MAX {
            let longest = self
                .connections
                .iter()
                .enumerate()
                .max_by_key(|(_, c)| c.silence());
            match longest {
                Some((at, connection)) if connection.silence() >= IDLE => {
                    self.connections.swap_remove(at);
                }
                _ => {
                    tell(
                        &stream,
                        &json!({ "error": "too many control connections: try again" }),
                    );
                    return;
                }
            }
        }
        self.connections.push(Connection {
            stream,
            line: Vec::new(),
            heard: Instant::now(),
        });
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    /// The beginning of a line.
    line: Vec<u8>,
    heard: Instant,
}

impl Connection {
    fn silence(&self) -> Duration {
        self.heard.elapsed()
    }

    /// Whether the connection is to be kept. Reads once: what is left makes the poll return.
    fn serve(&mut self, answer: &mut dyn FnMut(Request) -> Value) -> bool {
        let mut buffer = [0; LINE_BYTES_MAX];
        match self.stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(count) => {
                self.heard = Instant::now();
                self.line.extend_from_slice(&buffer[..count]);
            }
            Err(error) => {
                return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted);
            }
        }
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            let reply = match serde_json::from_slice(&line) {
                Ok(request) => answer(request),
                Err(error) => json!({ "error": format!("not understood: {error}") }),
            };
            if !tell(&self.stream, &reply) {
                return false;
            }
        }
        if self.line.len() < LINE_BYTES_MAX {
            return true;
        }
        tell(
            &self.stream,
            &json!({ "error": format!("a line has at most {LINE_BYTES_MAX} bytes") }),
        );
        false
    }
}

/// Whether all of it went into the socket's buffer.
fn tell(mut stream: &UnixStream, reply: &Value) -> bool {
    let line = format!("{reply}\n");
    stream
        .write(line.as_bytes())
        .is_ok_and(|count| count == line.len())
}

/// # Errors
/// Somebody listens there, or it is something else than a socket.
fn remove_stale(path: &Path) -> Result<(), ControlError> {
    use std::os::unix::fs::FileTypeExt;
    let path_buf = || path.to_owned();
    let failed = |operation, source| ControlError::Socket {
        operation,
        path: path_buf(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("looking for", error)),
        Ok(data) if !data.file_type().is_socket() => {
            return Err(ControlError::NotASocket { path: path_buf() });
        }
        Ok(_) => {}
    }
    match dial(path) {
        Ok(stream) => Err(ControlError::Taken {
            path: path_buf(),
            owner: owner(&stream),
        }),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Err(ControlError::Taken {
            path: path_buf(),
            owner: " that hangs".to_owned(),
        }),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|source| failed("removing the stale", source))
        }
        Err(error) => Err(failed("trying", error)),
    }
}

/// ` (process 123)`, if the kernel tells.
fn owner(stream: &UnixStream) -> String {
    getsockopt(stream, PeerCredentials)
        .map(|credentials| format!(" (process {})", credentials.pid()))
        .unwrap_or_default()
}

/// Connects without waiting: the backlog of a daemon that hangs may be full.
fn dial(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(stream.as_raw_fd(), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(stream);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// The mode is set before the socket has a name: nobody else can connect for a moment.
fn listen_privately(path: &Path) -> io::Result<UnixListener> {
    let address = UnixAddr::new(path).map_err(|_| {
        io::Error::other(format!(
            "the path has {} bytes, a socket's has at most 107",
            path.as_os_str().len()
        ))
    })?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&listener, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(listener.as_raw_fd(), &address)?;
    listen(&listener, Backlog::new(CONNECTIONS_MAX as i32)?)?;
    Ok(UnixListener::from(listener))
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let data = fs::symlink_metadata(path).ok()?;
    Some((data.dev(), data.ino()))
}
