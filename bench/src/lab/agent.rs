//! The process inside a lab host that runs commands for the lab.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::wire::{
    Command, Ended, Frame, Hello, MAX_FRAME, Order, Pong, Purpose, read_line, write_line,
};

/// Where QEMU's user-mode network shows the machine's loopback address.
const MACHINE: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

nix::ioctl_read_bad!(bytes_in_pipe, nix::libc::FIONREAD, nix::libc::c_int);

type MakeFrame = fn(Vec<u8>) -> Frame;

/// Takes orders until the lab is gone.
///
/// # Errors
/// The lab can't be reached, or speaks another language.
pub fn serve(port: u16, token: &str) -> Result<()> {
    let orders = dial(port, token, Purpose::Orders)?;
    while let Some(order) = read_line(&orders).context("reading an order")? {
        match order {
            Order::Ping => write_line(&orders, &Pong).context("answering a ping")?,
            Order::Run { id, command } => {
                let token = token.to_owned();
                thread::spawn(move || {
                    let outcome = dial(port, &token, Purpose::Command { id })
                        .and_then(|connection| run(connection, &command));
                    if let Err(error) = outcome {
                        eprintln!("lab: {}: {error:#}", command.program);
                    }
                });
            }
        }
    }
    Ok(())
}

fn dial(port: u16, token: &str, purpose: Purpose) -> Result<TcpStream> {
    let connection = TcpStream::connect((MACHINE, port)).context("connecting to the lab")?;
    connection.set_nodelay(true)?;
    let token = token.to_owned();
    write_line(&connection, &Hello { token, purpose }).context("greeting the lab")?;
    Ok(connection)
}

/// Runs one command over its own connection. The command does not outlive the connection.
fn run(connection: TcpStream, command: &Command) -> Result<()> {
    let mut child = match start(command) {
        Ok(child) => child,
        Err(error) => {
            let ended = Ended::NotStarted(format!("{}: {error}", command.program));
            return Ok(Frame::Ended(ended).write(&connection)?);
        }
    };
    let group = Pid::from_raw(i32::try_from(child.id())?);
    // Empty once the child is reaped, for then its number may be another's.
    let alive = Arc::new(Mutex::new(Some(group)));
    let listener = {
        let (alive, input) = (alive.clone(), child.stdin.take());
        let connection = connection.try_clone()?;
        thread::spawn(move || listen(&connection, input, &alive))
    };
    let relayed = relay(&mut child, &connection);
    if relayed.is_err() {
        let _ = killpg(group, Signal::SIGKILL);
    }
    let status = {
        let mut alive = alive.lock().unwrap_or_else(PoisonError::into_inner);
        let status = child.wait()?;
        *alive = None;
        status
    };
    relayed?;
    let ended = match status.signal() {
        Some(signal) => Ended::Signal(signal),
        None => Ended::Exit(status.code().unwrap_or(255)),
    };
    Frame::Ended(ended).write(&connection)?;
    // The lab closes the connection when it has read that.
    let _ = listener.join();
    Ok(())
}

fn start(command: &Command) -> std::io::Result<Child> {
    let directory = std::path::Path::new(&command.directory);
    let inherited: HashMap<_, _> = std::env::vars()
        .filter(|(name, _)| name == "PATH" || name == "HOME")
        .collect();
    std::process::Command::new(&command.program)
        .args(&command.arguments)
        .env_clear()
        .envs(inherited)
        .envs(command.environment.iter().cloned())
        .current_dir(if directory.is_dir() {
            &command.directory
        } else {
            "/"
        })
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
}

/// Passes on input and signals until the connection ends, and with it the command.
fn listen(mut connection: &TcpStream, mut input: Option<ChildStdin>, alive: &Mutex<Option<Pid>>) {
    let signal = |signal| {
        if let Some(group) = *alive.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = killpg(group, signal);
        }
    };
    loop {
        match Frame::read(&mut connection) {
            Ok(Some(Frame::Input(bytes))) if bytes.is_empty() => input = None,
            Ok(Some(Frame::Input(bytes))) => {
                // A command that reads no more than it wants is no error.
                if input
                    .as_mut()
                    .is_some_and(|input| input.write_all(&bytes).is_err())
                {
                    input = None;
                }
            }
            Ok(Some(Frame::Signal(number))) => {
                if let Ok(known) = Signal::try_from(number) {
                    signal(known);
                }
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return signal(Signal::SIGKILL),
        }
    }
}

/// Passes on output until the command has ended and all that it wrote is on its way. What it left
/// running may hold the pipes open: that is not waited for.
fn relay(child: &mut Child, connection: &TcpStream) -> Result<()> {
    let exit = pidfd(child.id())?;
    let output = child.stdout.take().context("no standard output")?;
    let errors = child.stderr.take().context("no standard error")?;
    let mut pipes: Vec<(File, MakeFrame)> = vec![
        (OwnedFd::from(output).into(), Frame::Output),
        (OwnedFd::from(errors).into(), Frame::Errors),
    ];
    loop {
        let mut watched = vec![PollFd::new(exit.as_fd(), PollFlags::POLLIN)];
        watched.extend(
            pipes
                .iter()
                .map(|(pipe, _)| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)),
        );
        match poll(&mut watched, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other.context("polling a command")?,
        };
        let ready: Vec<bool> = watched.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        if ready[0] {
            for (pipe, frame) in &mut pipes {
                let mut left = waiting(pipe)?;
                while left > 0 {
                    match pass(pipe, left.min(MAX_FRAME), *frame, connection)? {
                        0 => break,
                        passed => left -= passed,
                    }
                }
            }
            return Ok(());
        }
        for at in (0..pipes.len()).rev().filter(|at| ready[at + 1]) {
            let (pipe, frame) = &mut pipes[at];
            if pass(pipe, MAX_FRAME, *frame, connection)? == 0 {
                pipes.remove(at);
            }
        }
    }
}

/// Bytes in a pipe.
fn waiting(pipe: &File) -> Result<usize> {
    let mut bytes = 0;
    // SAFETY: the descriptor is open for as long as `pipe` is borrowed, and FIONREAD writes one int
    // to the place that is passed, which is one.
    unsafe { bytes_in_pipe(pipe.as_raw_fd(), &mut bytes) }.context("FIONREAD")?;
    Ok(usize::try_from(bytes)?)
}

/// Passes on one piece; 0 at the end of the pipe.
fn pass(
    pipe: &mut File,
    at_most: usize,
    frame: MakeFrame,
    connection: &TcpStream,
) -> Result<usize> {
    let mut bytes = vec![0; at_most];
    let count = pipe
        .read(&mut bytes)
        .context("reading a command's output")?;
    bytes.truncate(count);
    if count > 0 {
        frame(bytes)
            .write(connection)
            .context("sending a command's output")?;
    }
    Ok(count)
}

/// Becomes readable when the child has ended.
fn pidfd(pid: u32) -> Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers and touches no memory of ours; the child is not
    // reaped yet, so that the number is its.
    let fd = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0) };
    let fd = Errno::result(fd).context("pidfd_open")?;
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) })
}
