//! Work for the databases, as much as they can do: what protection takes of it is its price.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::GUEST;
use super::clients::STUCK_AFTER;
use super::network::{Network, inside};
use super::redis::Redis;
use crate::cache;
use crate::draw::Draw;
use crate::process::Process;

/// Closed loops at a time.
const REDIS_CLIENTS: u64 = 4;
const PGBENCH_CLIENTS: &str = "2";
const KEYS: u64 = 4096;
const VALUE_BYTES: usize = 512;
/// Beyond the time that it was told to take.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// SETs of 512 bytes under 4,096 keys: every second value is random, the others are text.
    Redis,
    /// pgbench's own mix (TPC-B) at scale 1.
    Pgbench,
}

impl Load {
    pub fn name(self) -> &'static str {
        match self {
            Load::Redis => "Redis",
            Load::Pgbench => "pgbench",
        }
    }

    /// Makes the tables; once for each guest.
    ///
    /// # Errors
    /// The database refuses.
    pub fn prepare(self, network: &Network, dir: &Path) -> Result<()> {
        match self {
            Load::Redis => Ok(()),
            Load::Pgbench => {
                pgbench(network, dir, PATIENCE, &["--initialize", "--quiet"]).map(drop)
            }
        }
    }

    /// Works for some time; requests or transactions in a second.
    ///
    /// # Errors
    /// The database does not answer.
    pub fn run(self, network: &Network, dir: &Path, time: Duration) -> Result<f64> {
        match self {
            Load::Redis => redis(network, time),
            Load::Pgbench => {
                let seconds = time.as_secs().to_string();
                let line = [
                    "--no-vacuum",
                    "--client",
                    PGBENCH_CLIENTS,
                    "--time",
                    &seconds,
                ];
                let said = pgbench(network, dir, time + PATIENCE, &line)?;
                let rate = said
                    .lines()
                    .find_map(|line| line.strip_prefix("tps = ")?.split(' ').next());
                rate.with_context(|| format!("pgbench says no rate: {said}"))?
                    .parse()
                    .context("pgbench's rate")
            }
        }
    }
}

fn redis(network: &Network, time: Duration) -> Result<f64> {
    inside(&network.outside(), || {
        let began = Instant::now();
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..REDIS_CLIENTS)
                .map(|seed| scope.spawn(move || set_values(seed, began + time)))
                .collect();
            let mut done = 0;
            for client in clients {
                done += client.join().map_err(|_| anyhow!("a client panicked"))??;
            }
            Ok(f64::from(done) / began.elapsed().as_secs_f64())
        })
    })
}

fn set_values(seed: u64, until: Instant) -> Result<u32> {
    let mut redis = Redis::connect(GUEST, STUCK_AFTER)?;
    let mut draw = Draw(seed);
    let text: Vec<u8> = b"a line of text like any other\n"
        .iter()
        .copied()
        .cycle()
        .take(VALUE_BYTES)
        .collect();
    let mut random = vec![0; VALUE_BYTES];
    let mut done = 0;
    while Instant::now() < until {
        let key = format!("key:{}", draw.below(KEYS));
        if done % 2 == 0 {
            let (words, _) = random.as_chunks_mut();
            words
                .iter_mut()
                .for_each(|word| *word = draw.number().to_ne_bytes());
            redis.set(&key, &random)?;
        } else {
            redis.set(&key, &text)?;
        }
        done += 1;
    }
    Ok(done)
}

/// Runs the guest's pgbench on the clients' network; what it says.
fn pgbench(network: &Network, dir: &Path, patience: Duration, options: &[&str]) -> Result<String> {
    let tree = cache::database_guest("debian.tree")?.display().to_string();
    let program = "/usr/lib/postgresql/15/bin/pgbench";
    let line = [&tree, program, "--host", GUEST, "--username", "postgres"];
    let line = line.iter().chain(options).chain(&["postgres"]);
    let line: Vec<_> = line.map(|&word| word.to_owned()).collect();
    let outside = network.outside();
    let mut process = Process::start_inside(&outside, dir, "pgbench", "/usr/sbin/chroot", &line)?;
    let status = process.wait(patience)?;
    let status = status.with_context(|| format!("pgbench does not end: {}", process.said()))?;
    ensure!(status.success(), "pgbench: {status}: {}", process.said());
    Ok(process.said())
}
