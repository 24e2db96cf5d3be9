//! What a request costs without and with protection, and what that is compared with: a boundary of
//! QEMU alone, and the way of the same bytes from host to host and back.

use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::GUEST;
use super::clients::STUCK_AFTER;
use super::hosts::NETDEV;
use super::log::Record;
use super::network::{Host, Network, inside};
use super::redis::Redis;
use crate::floor::{Floor, state_sink};
use crate::proxy::send;

const BOUNDARIES: u32 = 200;
/// Between two of them the guest works.
const BOUNDARY_EVERY: Duration = Duration::from_millis(15);
const PING_PONGS: u32 = 200;
/// An acknowledgement, and more.
const PONG_BYTES: usize = 64;
const PORT: u16 = 7171;

/// How long each write took, in microseconds.
pub fn requests_us(logs: &[Vec<Record>]) -> Vec<u64> {
    let took = |record: &Record| match record {
        Record::Written {
            sent_us,
            answered_us,
            ..
        } => Some(answered_us - sent_us),
        _ => None,
    };
    logs.iter().flatten().filter_map(took).collect()
}

/// What QEMU needs for a boundary without anything of ours, from `stop` submitted to the reply to
/// `cont` as `pause_us` in docs/events.md, in microseconds. Nobody else may use the socket.
///
/// # Errors
/// QEMU refuses.
pub fn floors_us(qmp: &Path) -> Result<Vec<u64>> {
    let stream =
        UnixStream::connect(qmp).with_context(|| format!("connecting to {}", qmp.display()))?;
    let mut monitor = Monitor {
        reader: BufReader::new(stream),
    };
    monitor.line()?;
    monitor.run(&[r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#.into()])?;
    let mut sink = state_sink()?;
    for (nth, command) in (0..).zip(Floor::Gated.preparation(NETDEV)) {
        let sink: Option<OwnedFd> = (nth == 0)
            .then(|| sink.try_clone())
            .transpose()?
            .map(Into::into);
        monitor.run_with(&[command], sink.as_slice())?;
    }
    let (boundary, release) = (Floor::Gated.boundary(), Floor::Gated.release());
    let mut floors_us = Vec::new();
    for _ in 0..BOUNDARIES {
        std::thread::sleep(BOUNDARY_EVERY);
        sink.rewind()?;
        let began = Instant::now();
        monitor.run(&boundary)?;
        floors_us.push(micros(began));
        monitor.run(&release)?;
    }
    monitor.run(&Floor::Gated.removal())?;
    Ok(floors_us)
}

/// How long `bytes` need to the other host, and a short answer back, in microseconds.
///
/// # Errors
/// The hosts can't reach each other.
pub fn ping_pongs_us(network: &Network, from: Host, bytes: usize) -> Result<Vec<u64>> {
    let to = from.other();
    let listener = inside(&network.of(to), || {
        Ok(TcpListener::bind((to.address(), PORT))?)
    })?;
    std::thread::scope(|scope| {
        let answering = scope.spawn(move || answer(&listener, bytes));
        let took = inside(&network.of(from), || {
            let mut stream = TcpStream::connect((to.address(), PORT))?;
            stream.set_nodelay(true)?;
            let (ping, mut pong) = (vec![7; bytes], [0; PONG_BYTES]);
            let mut took_us = Vec::new();
            for _ in 0..PING_PONGS {
                let began = Instant::now();
                stream.write_all(&ping)?;
                stream.read_exact(&mut pong)?;
                took_us.push(micros(began));
            }
            Ok(took_us)
        });
        answering
            .join()
            .map_err(|_| anyhow::anyhow!("the other side panicked"))??;
        took
    })
}

fn answer(listener: &TcpListener, bytes: usize) -> Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut ping = vec![0; bytes];
    for _ in 0..PING_PONGS {
        stream.read_exact(&mut ping)?;
        stream.write_all(&[0; PONG_BYTES])?;
    }
    Ok(())
}

/// Of `wait`, how much the guest's clock misses, in percent.
///
/// # Errors
/// The guest does not tell the time.
pub fn clock_lost_percent(network: &Network, wait: Duration) -> Result<f64> {
    let [guest_us, here_us] = inside(&network.outside(), || {
        let mut redis = Redis::connect(GUEST, STUCK_AFTER)?;
        let began = Instant::now();
        let first = redis.time_us()?;
        std::thread::sleep(wait);
        Ok([redis.time_us()? - first, micros(began)])
    })?;
    Ok(100.0 * (1.0 - guest_us as f64 / here_us as f64))
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    /// Sends commands in one write, and returns when all of them are done.
    fn run(&mut self, commands: &[String]) -> Result<()> {
        self.run_with(commands, &[])
    }

    fn run_with(&mut self, commands: &[String], descriptors: &[OwnedFd]) -> Result<()> {
        let text = commands.join("\n") + "\n";
        send(self.reader.get_ref(), text.as_bytes(), descriptors)?;
        let mut left = commands.len();
        while left > 0 {
            let reply = self.line()?;
            if let Some(error) = reply.get("error") {
                bail!("{text} is refused: {error}");
            }
            left -= usize::from(reply.get("return").is_some());
        }
        Ok(())
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).context("reading QMP")? == 0 {
            bail!("QEMU closed the connection");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
