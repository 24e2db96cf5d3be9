//! What the lab and the agents inside its hosts say to each other.
//!
//! An agent dials the lab. Its first connection takes orders, one JSON value a line; for each
//! command it is ordered to run it dials once more, and that connection is the command's: frames of
//! a kind (one byte), a length (u32, little-endian) and that many bytes. TCP does the flow control,
//! and a connection that ends without [`Frame::Ended`] means that the host is gone.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Bytes in a frame.
pub(super) const MAX_FRAME: usize = 64 << 10;
/// Bytes in a line: a command with its arguments and environment.
const MAX_LINE: usize = 256 << 10;

/// An agent's first line on each connection. The token tells which boot of which host it is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) token: String,
    pub(super) purpose: Purpose,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Purpose {
    Orders,
    Command { id: u64 },
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    Run { id: u64, command: Command },
    Ping,
}

/// The answer to [`Order::Ping`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Pong;

/// A program to run on a host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Command {
    pub program: String,
    pub arguments: Vec<String>,
    /// Beside PATH and HOME.
    pub environment: Vec<(String, String)>,
    /// `/` is taken where the host has no such folder.
    pub directory: String,
}

impl Command {
    pub fn new(program: &str, arguments: &[&str]) -> Command {
        Command {
            program: program.to_owned(),
            arguments: arguments.iter().map(|&argument| argument.into()).collect(),
            environment: Vec::new(),
            directory: "/".to_owned(),
        }
    }

    /// A line for bash, which ends as soon as a part of it fails.
    pub fn shell(line: &str) -> Command {
        Command::new("bash", &["-euo", "pipefail", "-c", line])
    }
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    Exit(i32),
    Signal(i32),
    /// It could not be started.
    NotStarted(String),
    /// The host was gone before the command was.
    HostDied,
}

impl Ended {
    /// The exit status that a shell would give it; 255 where there is none, as ssh does.
    pub fn code(&self) -> u8 {
        match self {
            Ended::Exit(code) => u8::try_from(*code).unwrap_or(255),
            Ended::Signal(signal) => u8::try_from(128 + signal).unwrap_or(255),
            Ended::NotStarted(_) => 127,
            Ended::HostDied => 255,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// From the command's standard output.
    Output(Vec<u8>),
    /// From the command's standard error.
    Errors(Vec<u8>),
    Ended(Ended),
    /// For the command's standard input; an empty one ends it.
    Input(Vec<u8>),
    /// A signal for the command and what it has started.
    Signal(i32),
}

impl Frame {
    pub(super) fn write(&self, mut to: impl Write) -> io::Result<()> {
        let json;
        let (kind, body): (u8, &[u8]) = match self {
            Frame::Output(bytes) => (1, bytes),
            Frame::Errors(bytes) => (2, bytes),
            Frame::Ended(ended) => {
                json = serde_json::to_vec(ended)?;
                (3, &json)
            }
            Frame::Input(bytes) => (4, bytes),
            Frame::Signal(signal) => {
                json = serde_json::to_vec(signal)?;
                (5, &json)
            }
        };
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let mut message = Vec::with_capacity(5 + body.len());
        message.push(kind);
        message.extend_from_slice(&length.to_le_bytes());
        message.extend_from_slice(body);
        to.write_all(&message)
    }

    /// The next frame, or `None` when the connection has ended between two.
    pub(super) fn read(mut from: impl Read) -> io::Result<Option<Frame>> {
        let mut header = [0; 5];
        if from.read(&mut header[..1])? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut header[1..])?;
        let [kind, length @ ..] = header;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_FRAME {
            return Err(invalid(format!(
                "a frame of {length} bytes, at most {MAX_FRAME} are allowed"
            )));
        }
        let mut body = vec![0; length];
        from.read_exact(&mut body)?;
        Ok(Some(match kind {
            1 => Frame::Output(body),
            2 => Frame::Errors(body),
            3 => Frame::Ended(serde_json::from_slice(&body)?),
            4 => Frame::Input(body),
            5 => Frame::Signal(serde_json::from_slice(&body)?),
            other => return Err(invalid(format!("a frame of unknown kind {other}"))),
        }))
    }
}

pub(super) fn write_line(mut to: impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// The next line, or `None` at the end. It reads byte by byte: what follows may be frames.
pub(super) fn read_line<T: DeserializeOwned>(mut from: impl Read) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < MAX_LINE {
        if from.read(&mut byte)? == 0 {
            return if line.is_empty() {
                Ok(None)
            } else {
                Err(io::ErrorKind::UnexpectedEof.into())
            };
        }
        if byte == *b"\n" {
            return Ok(Some(serde_json::from_slice(&line)?));
        }
        line.push(byte[0]);
    }
    Err(invalid(format!("a line of more than {MAX_LINE} bytes")))
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were_sent() {
        let frames = [
            Frame::Output(vec![0, 255, b'\n']),
            Frame::Errors(vec![7; MAX_FRAME]),
            Frame::Input(Vec::new()),
            Frame::Signal(9),
            Frame::Ended(Ended::Signal(9)),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write(&mut bytes).unwrap();
        }
        let mut from = bytes.as_slice();
        for frame in frames {
            assert_eq!(Frame::read(&mut from).unwrap(), Some(frame));
        }
        assert_eq!(Frame::read(&mut from).unwrap(), None);
    }

    #[test]
    fn garbage_and_half_a_frame_are_errors() {
        assert!(Frame::read([1, 255, 255, 255, 255].as_slice()).is_err());
        assert!(Frame::read([9, 0, 0, 0, 0].as_slice()).is_err());
        assert!(Frame::read([1, 4, 0, 0, 0, 1].as_slice()).is_err());
        assert!(Frame::read([3, 1, 0, 0, 0, b'{'].as_slice()).is_err());
        assert!(read_line::<Order>(b"\"Ping\"".as_slice()).is_err());
    }
}
