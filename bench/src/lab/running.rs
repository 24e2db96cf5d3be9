//! A command on a host, seen from the machine.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, bail};

use super::wire::{Ended, Frame, MAX_FRAME};

/// A command that runs on a host. It is killed when this goes out of scope.
#[derive(Debug)]
pub struct Running {
    connection: File,
    input: Input,
}

/// What a command has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Output(Vec<u8>),
    Errors(Vec<u8>),
    Ended(Ended),
}

/// All that a command has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    pub output: Vec<u8>,
    pub errors: Vec<u8>,
    pub ended: Ended,
}

/// Where a command's input and signals go in; any thread may have one.
#[derive(Clone, Debug)]
pub struct Input(Arc<Mutex<File>>);

impl Running {
    pub(super) fn new(socket: impl Into<OwnedFd>) -> Result<Running> {
        let file = File::from(socket.into());
        Ok(Running {
            input: Input(Arc::new(Mutex::new(file.try_clone()?))),
            connection: file,
        })
    }

    /// Waits for what it does next. After [`Event::Ended`] there is nothing more.
    ///
    /// # Errors
    /// The agent has sent what no agent sends.
    pub fn next_event(&mut self) -> Result<Event> {
        match Frame::read(&mut self.connection) {
            Ok(Some(Frame::Output(bytes))) => Ok(Event::Output(bytes)),
            Ok(Some(Frame::Errors(bytes))) => Ok(Event::Errors(bytes)),
            Ok(Some(Frame::Ended(ended))) => Ok(Event::Ended(ended)),
            Ok(Some(other)) => bail!("an agent sent {other:?}"),
            Ok(None) => Ok(Event::Ended(Ended::HostDied)),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(error.into()),
            Err(_) => Ok(Event::Ended(Ended::HostDied)),
        }
    }

    /// Waits until it has ended, and keeps all that it says.
    ///
    /// # Errors
    /// As [`Running::next_event`].
    pub fn wait(mut self) -> Result<Output> {
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        loop {
            match self.next_event()? {
                Event::Output(bytes) => output.extend(bytes),
                Event::Errors(bytes) => errors.extend(bytes),
                Event::Ended(ended) => {
                    return Ok(Output {
                        output,
                        errors,
                        ended,
                    });
                }
            }
        }
    }

    pub fn input(&self) -> Input {
        self.input.clone()
    }

    /// Connects a command that another process has asked for with that process, until one of the
    /// two is gone.
    pub(super) fn splice(self, client: impl Into<OwnedFd>) -> Result<()> {
        let client = File::from(client.into());
        let (mut from_client, mut to_client) = (client.try_clone()?, client);
        let mut to_agent = self.connection.try_clone()?;
        let upward = std::thread::spawn(move || {
            let _ = io::copy(&mut from_client, &mut to_agent);
            close(&to_agent);
        });
        let mut from_agent = &self.connection;
        let _ = io::copy(&mut from_agent, &mut to_client);
        close(&to_client);
        let _ = upward.join();
        Ok(())
    }
}

impl Input {
    /// # Errors
    /// The command or its host is gone.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        bytes
            .chunks(MAX_FRAME)
            .try_for_each(|part| self.frame(&Frame::Input(part.to_owned())))
    }

    /// Tells the command that its input is over.
    ///
    /// # Errors
    /// As [`Input::send`].
    pub fn end(&self) -> io::Result<()> {
        self.frame(&Frame::Input(Vec::new()))
    }

    /// Signals the command and what it has started.
    ///
    /// # Errors
    /// As [`Input::send`].
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> io::Result<()> {
        self.frame(&Frame::Signal(signal as i32))
    }

    fn frame(&self, frame: &Frame) -> io::Result<()> {
        let connection = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        frame.write(&*connection)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An `Input` may be left in another thread: that must not keep the command.
        close(&self.connection);
    }
}

fn close(socket: &File) {
    let _ = nix::sys::socket::shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
}
