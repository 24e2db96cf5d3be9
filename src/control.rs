//! The control socket: one line of JSON asks, one answers.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::exit::Exit;

const CONNECTIONS_MAX: usize = 16;
const LINE_BYTES_MAX: usize = 4096;
/// A client that says nothing for so long is let go.
const IDLE: Duration = Duration::from_secs(10);
/// How long the client waits for an answer.
const ANSWER: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Status,
    Detach,
    Switchover,
    Continue,
    Rehearse,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    line: Vec<u8>,
    heard: Instant,
}

/// The daemon's side.
#[derive(Debug)]
pub(crate) struct ControlServer {
    listener: UnixListener,
    path: PathBuf,
    connections: Vec<Connection>,
}

impl ControlServer {
    /// Listens at `path`, for this user only.
    ///
    /// # Errors
    /// Another daemon answers there, or the socket can't be made.
    pub(crate) fn bind(path: &Path) -> anyhow::Result<ControlServer> {
        let shown = path.display();
        if UnixStream::connect(path).is_ok() {
            bail!("another daemon answers at {shown}: end it, or use another --control or --vm-id");
        }
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing the stale socket {shown}"));
            }
            _ => {}
        }
        let listener = UnixListener::bind(path)
            .with_context(|| format!("making the control socket {shown} (see --control)"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .and_then(|()| listener.set_nonblocking(true))
            .with_context(|| format!("setting up the control socket {shown}"))?;
        Ok(ControlServer { listener, path: path.to_owned(), connections: Vec::new() })
    }

    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let connections = self.connections.iter().map(|c| c.stream.as_fd());
        std::iter::once(self.listener.as_fd()).chain(connections)
    }

    /// Answers what was asked. Never blocks.
    pub(crate) fn progress(&mut self, answer: &mut dyn FnMut(Request) -> Value) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.connections.len() >= CONNECTIONS_MAX {
                self.connections.retain(|c| c.heard.elapsed() < IDLE);
            }
            let ready = stream.set_nonblocking(true).is_ok();
            if ready && self.connections.len() < CONNECTIONS_MAX {
                let heard = Instant::now();
                self.connections.push(Connection { stream, line: Vec::new(), heard });
            }
        }
        self.connections.retain_mut(|connection| connection.serve(answer));
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Connection {
    /// Whether the connection is to be kept.
    fn serve(&mut self, answer: &mut dyn FnMut(Request) -> Value) -> bool {
        let mut buffer = [0; LINE_BYTES_MAX];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return false,
                Ok(count) => {
                    self.heard = Instant::now();
                    self.line.extend_from_slice(&buffer[..count]);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
            if self.line.len() > LINE_BYTES_MAX {
                return false;
            }
        }
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            let reply = match parse(&line) {
                Ok(request) => answer(request),
                Err(text) => json!({ "error": text }),
            };
            // The answer fits a fresh socket's buffer; a client that doesn't read is let go.
            if self.stream.write_all(format!("{reply}\n").as_bytes()).is_err() {
                return false;
            }
        }
        true
    }
}

fn parse(line: &[u8]) -> Result<Request, String> {
    let value: Value = serde_json::from_slice(line).map_err(|_| "not a line of JSON".to_owned())?;
    match value["command"].as_str() {
        Some("status") => Ok(Request::Status),
        Some("detach") => Ok(Request::Detach),
        Some("switchover") => Ok(Request::Switchover),
        Some("continue") => Ok(Request::Continue),
        Some("rehearse") => Ok(Request::Rehearse),
        Some(other) => Err(format!("unknown command {other:?}")),
        None => Err("expected {\"command\": …}".to_owned()),
    }
}

/// The client's side: asks, prints, and says how to exit.
///
/// # Errors
/// The daemon's answer can't be read.
pub(crate) fn ask(command: &str, socket: &Path, json: bool) -> anyhow::Result<Exit> {
    let Ok(mut stream) = UnixStream::connect(socket) else {
        eprintln!(
            "no daemon answers at {}: is it running, and is this its --control or --vm-id and --mode?",
            socket.display()
        );
        return Ok(Exit::Refused);
    };
    stream.set_read_timeout(Some(ANSWER)).context("setting a time-out")?;
    stream.write_all(format!("{}\n", json!({ "command": command })).as_bytes()).context("asking")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("waiting for the daemon's answer")?;
    let reply: Value = serde_json::from_str(&line).context("the daemon's answer is no JSON")?;
    if let Some(error) = reply["error"].as_str() {
        eprintln!("{command}: {error}");
        return Ok(Exit::Refused);
    }
    if command != "status" {
        println!("{command}: accepted; the daemon's log and `status` say how it goes");
        return Ok(Exit::Clean);
    }
    if json {
        print!("{line}");
    } else {
        print_status(&reply);
    }
    let fine = reply["protected"] == true || reply["state"] == "active";
    Ok(if fine { Exit::Clean } else { Exit::Other })
}

fn print_status(reply: &Value) {
    let text = |key: &str| match &reply[key] {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let yes = |key: &str| if reply[key] == true { "yes" } else { "no" };
    println!("protected   {}", yes("protected"));
    println!("state       {} (for {})", text("state"), human_us(&reply["state_age_us"]));
    println!("link        {}", if reply["link_up"] == true { "up" } else { "down" });
    println!("epoch       {}", text("epoch"));
    println!("term        {}", text("term"));
    if reply["mode"] == "primary" {
        println!("behind      {}", human_us(&reply["behind_us"]));
        println!("guest       {}", if reply["guest_running"] == true { "running" } else { "stopped" });
    } else {
        println!("silent for  {}", human_us(&reply["silent_us"]));
    }
}

fn human_us(value: &Value) -> String {
    match value.as_u64() {
        None => "-".to_owned(),
        Some(us) if us < 1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        Some(us) => format!("{:.1} s", us as f64 / 1e6),
    }
}
