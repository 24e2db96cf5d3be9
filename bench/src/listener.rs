//! Somebody on the guest's network who writes down what was heard.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

/// Ethernet, IPv4 without options, UDP.
const HEADERS_BYTES: usize = 14 + 20 + 8;
const MARK: &[u8; 4] = b"TICK";

/// A counter that a guest has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// Which QEMU sent it.
    pub port: u16,
    pub tick: u64,
}

/// Listens until it is dropped.
#[derive(Debug)]
pub struct Listener {
    pub port: u16,
    heard: Arc<Mutex<Vec<Heard>>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// # Errors
    /// The socket can't be made.
    pub fn start() -> Result<Listener> {
        let socket = UdpSocket::bind(("127.0.0.1", 0)).context("making a listener")?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let port = socket.local_addr()?.port();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let end = Arc::new(AtomicBool::new(false));
        let (theirs, over) = (Arc::clone(&heard), Arc::clone(&end));
        let thread = std::thread::Builder::new()
            .name("listener".into())
            .spawn(move || {
                let mut frame = [0; 2048];
                while !over.load(Ordering::Relaxed) {
                    let Ok((bytes, from)) = socket.recv_from(&mut frame) else {
                        continue; // nothing was said for a while
                    };
                    if let Some(tick) = tick_in(&frame[..bytes]) {
                        let port = from.port();
                        let mut list = theirs.lock().unwrap_or_else(PoisonError::into_inner);
                        list.push(Heard { port, tick });
                    }
                }
            })
            .context("starting the listener")?;
        Ok(Listener {
            port,
            heard,
            end,
            thread: Some(thread),
        })
    }

    /// Everything so far, in the order of its arrival.
    pub fn heard(&self) -> Vec<Heard> {
        self.heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn tick_in(frame: &[u8]) -> Option<u64> {
    let said = frame.get(HEADERS_BYTES..)?.strip_prefix(MARK)?;
    Some(u64::from_le_bytes(*said.first_chunk()?))
}
