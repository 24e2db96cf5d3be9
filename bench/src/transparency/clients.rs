//! Clients of the databases in the guest: each is one connection, in a closed loop.

use std::io::{self, ErrorKind};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::log::{Failure, Log, Record, now_us};
use super::postgres::Postgres;
use super::redis::Redis;

/// An answer that takes longer than this does not come.
pub const STUCK_AFTER: Duration = Duration::from_secs(10);
/// When this file is in the folder of the logs, the clients end.
pub const STOP_FILE: &str = "stop";
/// Of so many requests the last one is a read: of what another client writes.
const READ_EVERY: u64 = 4;

/// A server that keeps numbers under keys.
pub trait Database: Send {
    /// Adds a number, and returns when the server has acknowledged it.
    ///
    /// # Errors
    /// The connection is of no use any more.
    fn write(&mut self, key: &str, n: u64) -> io::Result<()>;

    /// The largest number; 0 if there is none.
    ///
    /// # Errors
    /// As [`Database::write`].
    fn last(&mut self, key: &str) -> io::Result<u64>;

    /// All of them.
    ///
    /// # Errors
    /// As [`Database::write`].
    fn all(&mut self, key: &str) -> io::Result<Vec<u64>>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Redis,
    Postgres,
}

impl Kind {
    fn connect(self, host: &str, patience: Duration) -> io::Result<Box<dyn Database>> {
        Ok(match self {
            Kind::Redis => Box::new(Redis::connect(host, patience)?),
            Kind::Postgres => Box::new(Postgres::connect(host, patience)?),
        })
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Redis => "redis",
            Kind::Postgres => "postgres",
        }
    }
}

/// How many clients of each kind, and where.
#[derive(Clone, Debug)]
pub struct Crowd {
    pub host: String,
    pub redis: u64,
    pub postgres: u64,
    /// Sets the keys of this run apart from those of others.
    pub run: String,
    /// An answer that takes longer does not come: [`STUCK_AFTER`], unless all is known to be slow.
    pub patience: Duration,
}

impl Crowd {
    /// Lets all of them work until there is a [`STOP_FILE`] in `dir`, then reads back what they have
    /// written on a connection of its own. What they see goes into logs in `dir`.
    ///
    /// # Errors
    /// The first connection can't be made, or a log can't be written. A connection that breaks later
    /// is no error: it is in the log.
    pub fn work(&self, dir: &Path) -> Result<()> {
        let stop = AtomicBool::new(false);
        if self.postgres > 0 {
            Postgres::connect(&self.host, self.patience)
                .and_then(|mut p| p.make_table())
                .context("the table")?;
        }
        let mut clients = Vec::new();
        for (kind, count) in [(Kind::Redis, self.redis), (Kind::Postgres, self.postgres)] {
            for number in 0..count {
                let key = |number: u64| format!("{}-{}-{number}", self.run, kind.name());
                let (own, other) = (key(number), key((number + 1) % count));
                let log = Log::create(&dir.join(format!("{own}.jsonl")))?;
                let database = kind.connect(&self.host, self.patience);
                let database = database.with_context(|| format!("connecting for {own}"))?;
                clients.push((
                    kind,
                    own,
                    Client {
                        database,
                        other,
                        log,
                    },
                ));
            }
        }
        std::thread::scope(|scope| -> Result<()> {
            let working: Vec<_> = clients
                .into_iter()
                .map(|(kind, key, client)| {
                    let (stop, own) = (&stop, key.clone());
                    (kind, key, scope.spawn(move || client.work(&own, stop)))
                })
                .collect();
            let stop_file = dir.join(STOP_FILE);
            while !stop_file.exists() && working.iter().any(|(.., thread)| !thread.is_finished()) {
                std::thread::sleep(Duration::from_millis(5));
            }
            stop.store(true, Ordering::Relaxed);
            let mut keys = Vec::new();
            for (kind, key, thread) in working {
                thread
                    .join()
                    .map_err(|_| anyhow!("a client has panicked"))??;
                keys.push((kind, key));
            }
            self.read_back(dir, &keys)
        })
    }

    fn read_back(&self, dir: &Path, keys: &[(Kind, String)]) -> Result<()> {
        let mut log = Log::create(&dir.join(format!("{}-read-back.jsonl", self.run)))?;
        for (kind, key) in keys {
            let listed = kind
                .connect(&self.host, self.patience)
                .and_then(|mut d| d.all(key));
            log.write(&match listed {
                Ok(numbers) => Record::Listed {
                    key: key.clone(),
                    numbers,
                },
                Err(error) => failed(&error),
            })?;
        }
        Ok(())
    }
}

struct Client {
    database: Box<dyn Database>,
    /// The key of another client, to read.
    other: String,
    log: Log,
}

impl Client {
    fn work(mut self, key: &str, stop: &AtomicBool) -> Result<()> {
        self.log.write(&Record::Opened { at_us: now_us() })?;
        let mut written = 0;
        for request in 1.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let sent_us = now_us();
            let done = if request % READ_EVERY == 0 {
                self.database.last(&self.other).map(|n| {
                    let (key, answered_us) = (self.other.clone(), now_us());
                    Record::Read {
                        key,
                        n,
                        sent_us,
                        answered_us,
                    }
                })
            } else {
                let n = written + 1;
                self.database.write(key, n).map(|()| {
                    written = n;
                    let (key, answered_us) = (key.to_owned(), now_us());
                    Record::Written {
                        key,
                        n,
                        sent_us,
                        answered_us,
                    }
                })
            };
            match done {
                Ok(record) => self.log.write(&record)?,
                Err(error) => return self.log.write(&failed(&error)),
            }
        }
        self.log.write(&Record::Closed { at_us: now_us() })
    }
}

fn failed(error: &io::Error) -> Record {
    let how = match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Failure::Stuck,
        _ => Failure::Reset,
    };
    Record::Failed {
        how,
        text: error.to_string(),
        at_us: now_us(),
    }
}

/// A connection whose answers come within `patience`, or fail.
///
/// # Errors
/// Nobody listens there.
pub(super) fn dial(host: &str, port: u16, patience: Duration) -> io::Result<TcpStream> {
    let address = (host, port).to_socket_addrs()?.next();
    let address = address.ok_or(ErrorKind::AddrNotAvailable)?;
    let stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    Ok(stream)
}
