//! Where the agents in the hosts call: a port on the machine's loopback.

use std::collections::HashMap;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};

use super::Host;
use super::machine::Machine;
use super::wire::{Hello, Purpose, read_line};

/// For an agent to say who it is.
const HELLO_PATIENCE: Duration = Duration::from_secs(60);

/// Where agents call.
#[derive(Debug)]
pub(super) struct Reception {
    pub(super) port: u16,
    desk: Desk,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Debug)]
struct Desk {
    machines: Arc<[Machine; 2]>,
    calls: Arc<Mutex<Calls>>,
}

/// Commands whose connection has not come.
#[derive(Debug, Default)]
struct Calls {
    next: u64,
    expected: HashMap<u64, Sender<TcpStream>>,
    closing: bool,
}

impl Reception {
    pub(super) fn machine(&self, host: Host) -> &Machine {
        &self.desk.machines[host.index()]
    }

    pub(super) fn open(machines: [Machine; 2]) -> Result<Reception> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening for agents")?;
        let port = listener.local_addr()?.port();
        let desk = Desk {
            machines: Arc::new(machines),
            calls: Arc::default(),
        };
        let thread = {
            let desk = desk.clone();
            thread::Builder::new()
                .name("reception".into())
                .spawn(move || receive(&listener, &desk))?
        };
        Ok(Reception {
            port,
            desk,
            thread: Some(thread),
        })
    }

    /// For a command that an agent is about to be ordered to run.
    pub(super) fn expect_call(&self) -> (u64, Receiver<TcpStream>) {
        let (sender, receiver) = channel();
        let mut calls = lock(&self.desk.calls);
        let id = calls.next;
        calls.next += 1;
        calls.expected.insert(id, sender);
        (id, receiver)
    }

    pub(super) fn forget_call(&self, id: u64) {
        let mut calls = lock(&self.desk.calls);
        calls.expected.remove(&id);
    }
}

impl Drop for Reception {
    fn drop(&mut self) {
        lock(&self.desk.calls).closing = true;
        // So that it looks.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn receive(listener: &TcpListener, desk: &Desk) {
    for connection in listener.incoming() {
        if lock(&desk.calls).closing {
            return;
        }
        let Ok(connection) = connection else { continue };
        let desk = desk.clone();
        thread::spawn(move || desk.sort(connection));
    }
}

impl Desk {
    /// Brings a call to who expects it. One that says nothing sensible is hung up.
    fn sort(&self, connection: TcpStream) {
        let hello = connection
            .set_read_timeout(Some(HELLO_PATIENCE))
            .and_then(|()| connection.set_nodelay(true))
            .and_then(|()| read_line(&connection));
        let Ok(Some(Hello { token, purpose })) = hello else {
            return;
        };
        if connection.set_read_timeout(None).is_err() {
            return;
        }
        match purpose {
            Purpose::Orders => {
                let mut connection = Some(connection);
                for machine in self.machines.iter() {
                    machine.greet(&token, &mut connection);
                }
            }
            Purpose::Command { id } => {
                if self.machines.iter().any(|machine| machine.knows(&token))
                    && let Some(expecting) = lock(&self.calls).expected.remove(&id)
                {
                    let _ = expecting.send(connection);
                }
            }
        }
    }
}

fn lock(calls: &Mutex<Calls>) -> MutexGuard<'_, Calls> {
    calls.lock().unwrap_or_else(PoisonError::into_inner)
}
