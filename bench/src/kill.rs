//! The death of a host in a chosen phase of an epoch, and the proof that it was that phase.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::memory::{Copy, Memory, PAGE};
use crate::pair::Pair;
use crate::proxy::Seen;
use crate::relay::{Relay, Stop};

const PATIENCE: Duration = Duration::from_secs(20);
/// How often an apply is waited for that is caught in the middle.
const FREEZES_MAX: u64 = 40;
/// After the acknowledgement: by then the backup has applied the epoch, usually.
const IDLE_AFTER: Duration = Duration::from_millis(6);
/// Within this time after the acknowledgement the backup is applying, usually.
const APPLY_WITHIN_US: u64 = 900;
/// The start of a boundary, in which its state is saved and its pages are gathered.
const BOUNDARY_WITHIN_US: u64 = 4000;

/// What the pair was doing when the primary's host died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The guest stands still: QEMU has said STOP, and its `cont` has not been let through.
    Boundary,
    /// Some of the epoch's bytes have passed, and the rest never left.
    Push,
    /// All of the epoch has passed; its acknowledgement has not reached the primary.
    BeforeAck,
    /// Acknowledged; the standby's RAM is not yet all of that epoch.
    Apply,
    /// Acknowledged and applied, and the next boundary has not begun.
    Idle,
}

/// A kill as it went.
#[derive(Clone, Copy, Debug)]
pub struct Kill {
    pub phase: Phase,
    /// The first kill(2), in microseconds since 1970.
    pub at_us: u64,
    /// The epochs that a failover may resume from.
    pub oldest: u64,
    pub newest: u64,
    /// For how long the backup stood still, so that its progress could be looked at.
    pub backup_stopped: bool,
}

impl Phase {
    pub const ALL: [Phase; 5] = [
        Phase::Boundary,
        Phase::Push,
        Phase::BeforeAck,
        Phase::Apply,
        Phase::Idle,
    ];

    /// The phase to aim at: the one that was hit least.
    pub fn rarest(hit: &[Phase]) -> Phase {
        let count = |phase: &Phase| hit.iter().filter(|it| *it == phase).count();
        Phase::ALL
            .into_iter()
            .min_by_key(count)
            .unwrap_or(Phase::Idle)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Phase::Boundary => "boundary",
            Phase::Push => "push",
            Phase::BeforeAck => "before-ack",
            Phase::Apply => "apply",
            Phase::Idle => "idle",
        })
    }
}

/// Kills the primary's host in `aim`, or in the phase after it if that was over too soon; `draw`
/// says where in it. The pair has a relay, and copies all of RAM.
///
/// # Errors
/// The phase does not come.
pub fn kill_in(pair: &mut Pair, aim: Phase, draw: u64) -> Result<Kill> {
    match aim {
        Phase::Boundary => in_boundary(pair, draw),
        Phase::Push => {
            let thousandths = 1 + draw % 998;
            let epoch = relay(pair)?.stop_at(Stop::InPush { thousandths }, PATIENCE)?;
            let before = epoch.checked_sub(1).context("a push of epoch 0")?;
            held(pair, Phase::Push, before)
        }
        Phase::BeforeAck => {
            let epoch = relay(pair)?.stop_at(Stop::BeforeAck, PATIENCE)?;
            held(pair, Phase::BeforeAck, epoch)
        }
        Phase::Apply | Phase::Idle => after_ack(pair, aim, draw),
    }
}

fn relay(pair: &Pair) -> Result<&Relay> {
    pair.relay.as_ref().context("the pair has no relay")
}

fn in_boundary(pair: &mut Pair, draw: u64) -> Result<Kill> {
    let deadline = Instant::now() + PATIENCE;
    for begun in [false, true] {
        while pair.guest_proxy.seen(Seen::in_boundary) != begun {
            ensure!(
                Instant::now() < deadline,
                "no boundary begins, or none ends"
            );
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    std::thread::sleep(Duration::from_micros(draw % BOUNDARY_WITHIN_US));
    let acked = relay(pair)?.passed().acked_epoch;
    let at_us = pair.kill_host()?;
    relay(pair)?.host_died();
    let in_boundary = pair.guest_proxy.seen(Seen::in_boundary);
    let phase = if in_boundary {
        Phase::Boundary
    } else {
        Phase::Push
    };
    Ok(Kill {
        phase,
        at_us,
        oldest: acked,
        newest: acked + 1,
        backup_stopped: false,
    })
}

/// The relay holds what the primary or the backup has sent last.
fn held(pair: &mut Pair, phase: Phase, epoch: u64) -> Result<Kill> {
    let at_us = pair.kill_host()?;
    relay(pair)?.host_died();
    Ok(Kill {
        phase,
        at_us,
        oldest: epoch,
        newest: epoch,
        backup_stopped: false,
    })
}

/// Freezes the backup some time after an acknowledgement, looks how far its apply is, and lets the
/// host die meanwhile. An apply that is over already makes room for the next one.
fn after_ack(pair: &mut Pair, aim: Phase, draw: u64) -> Result<Kill> {
    let backup = pair.backup.process.pid();
    for attempt in 0..FREEZES_MAX {
        let after = match aim {
            Phase::Apply => Duration::from_micros((draw + attempt * 197) % APPLY_WITHIN_US),
            _ => IDLE_AFTER + Duration::from_micros(draw % 4000),
        };
        let epoch = relay(pair)?.stop_at(Stop::Freeze { backup, after }, PATIENCE)?;
        // An apply stays as it is while the backup is frozen; the primary goes on, so an idle one
        // has to die before one looks.
        let mut killed = None;
        if aim == Phase::Idle || attempt + 1 == FREEZES_MAX {
            killed = Some(pair.kill_host()?);
        }
        let pushed_more = relay(pair)?.passed().pushed_epoch > epoch;
        let in_boundary = pair.guest_proxy.seen(Seen::in_boundary);
        let phase = if !is_applied(pair, epoch)? {
            Phase::Apply
        } else if pushed_more {
            Phase::Push
        } else if in_boundary {
            Phase::Boundary
        } else {
            Phase::Idle
        };
        if killed.is_none() && phase == aim {
            killed = Some(pair.kill_host()?);
        }
        if let Some(at_us) = killed {
            relay(pair)?.host_died();
            pair.backup.process.signal(Signal::SIGCONT)?;
            let newest = epoch + 1;
            return Ok(Kill {
                phase,
                at_us,
                oldest: epoch,
                newest,
                backup_stopped: true,
            });
        }
        pair.backup.process.signal(Signal::SIGCONT)?;
    }
    bail!("{FREEZES_MAX} is not 0")
}

/// Whether all that an epoch has changed is in the standby's RAM.
fn is_applied(pair: &Pair, epoch: u64) -> Result<bool> {
    pair.taken(|taken| {
        let copy = |number: u64| {
            let found = taken.boundaries.iter().find(|b| b.number == number);
            found
                .and_then(|b| b.copy.as_ref())
                .with_context(|| format!("no copy of epoch {number}"))
        };
        let (before, after) = (copy(epoch - 1)?, copy(epoch)?);
        for (name, page) in changed(before, after) {
            let bytes = after.page(&name, page).context("a block has shrunk")?;
            if pair.standby_memory.read_page(&name, page)? != bytes {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

/// Block and number of the pages that differ between two copies.
fn changed(before: &Copy, after: &Copy) -> Vec<(String, usize)> {
    let mut pages = Vec::new();
    for ((name, old), (_, new)) in before.blocks.iter().zip(&after.blocks) {
        let both = old.chunks(PAGE).zip(new.chunks(PAGE)).enumerate();
        pages.extend(
            both.filter(|(_, (old, new))| old != new)
                .map(|(page, _)| (name.clone(), page)),
        );
    }
    pages
}

/// What a process has in memory without the guest's RAM, which it maps but doesn't own, in KiB:
/// `ram` are the files that hold the guest's RAM.
///
/// # Errors
/// The process is gone.
pub fn resident_kib(pid: nix::unistd::Pid, ram: &Memory) -> Result<u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).context("reading smaps")?;
    let mut total_kib = 0;
    let mut counted = true;
    for line in smaps.lines() {
        if let Some(size) = line.strip_prefix("Rss:") {
            let kib: u64 = size
                .trim()
                .trim_end_matches(" kB")
                .parse()
                .context("smaps")?;
            total_kib += if counted { kib } else { 0 };
        } else if let Some(inode) = inode_of_head(line) {
            counted = !ram.inodes.contains(&inode);
        }
    }
    Ok(total_kib)
}

/// `START-END rw-p OFFSET MAJOR:MINOR INODE PATH`, as in the test bed's own reading of maps.
fn inode_of_head(line: &str) -> Option<u64> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    u64::from_str_radix(start, 16).ok()?;
    u64::from_str_radix(end, 16).ok()?;
    words.nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rarest_phase_is_aimed_at_until_all_are_hit() {
        let mut hit = Vec::new();
        for _ in 0..15 {
            hit.push(Phase::rarest(&hit));
        }
        for phase in Phase::ALL {
            assert_eq!(hit.iter().filter(|it| **it == phase).count(), 3);
        }
    }

    #[test]
    fn only_heads_of_mappings_have_an_inode() {
        let head = "7f00-7f10 rw-s 00000000 00:01 4242    /memfd:memory-backend-memfd (deleted)";
        assert_eq!(inode_of_head(head), Some(4242));
        assert_eq!(inode_of_head("Rss:   12 kB"), None);
        assert_eq!(inode_of_head("VmFlags: rd wr mr mw me dc ac"), None);
    }
}
