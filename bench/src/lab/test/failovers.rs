//! Deaths of the primary's host, and what survives them.

use std::time::Duration;

use anyhow::{Context, Result};

use super::pair::{PATIENCE, Pair, Plan, Survivor};
use super::stand::Role;
use crate::lab::{Host, Lab};

/// Epochs before a kill: the slots have been used again.
const EPOCHS_BEFORE: usize = 4;
/// A kill comes so long after a boundary at most: in the push, the check, the apply, or after it.
const AFTER_BOUNDARY_US: u64 = 400_000;

/// What kills the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Death {
    /// Daemon and QEMU, by SIGKILL: their kernel says so.
    Processes,
    /// The host: nobody says anything.
    Host,
}

/// Counts of failovers.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(super) struct Count {
    pub(super) run: usize,
    pub(super) bit_exact: usize,
    pub(super) torn: usize,
    /// Comparisons of all RAM by the product itself, before the deaths.
    pub(super) audits: usize,
}

impl Count {
    pub(super) fn add(&mut self, survivor: &Survivor) {
        self.run += 1;
        match &survivor.torn {
            None => self.bit_exact += 1,
            Some(_) => self.torn += 1,
        }
    }
}

/// One death, and a look at the survivor. `draw` says when.
///
/// # Errors
/// There is no survivor.
pub(super) fn one(
    lab: &Lab,
    plan: &Plan,
    death: Death,
    draw: u64,
    count: &mut Count,
) -> Result<()> {
    let pair = Pair::protected(lab, plan)?;
    pair.wait_epochs(EPOCHS_BEFORE)?;
    pair.ensure_transport(if plan.transport == "tcp" {
        "TCP"
    } else {
        "RDMA"
    })?;
    count.audits += pair.audited()?;
    let survived = self::death(&pair, death, draw, count);
    drop(pair);
    if death == Death::Host {
        lab.boot(&[Host::A]).context("booting A again")?;
    }
    survived
}

/// The death of a pair's primary, and a look at the survivor.
///
/// # Errors
/// There is none.
pub(super) fn death(pair: &Pair<'_>, death: Death, draw: u64, count: &mut Count) -> Result<()> {
    die(pair, death, draw)?;
    let survivor = pair.survivor()?;
    let (reason, epoch) = (&survivor.reason, survivor.epoch);
    let verdict = survivor.torn.as_deref().unwrap_or("bit-exact");
    eprintln!("lab test: {death:?}: {reason}, from epoch {epoch}: {verdict}");
    count.add(&survivor);
    Ok(())
}

fn die(pair: &Pair<'_>, death: Death, draw: u64) -> Result<()> {
    let after_us = draw % AFTER_BOUNDARY_US;
    match death {
        Death::Processes => {
            pair.tell(Role::Primary, &format!("kill {after_us}"))?;
            let killed = || {
                pair.said(Role::Primary)
                    .into_iter()
                    .find(|it| it["stand"] == "killed")
            };
            pair.wait_for("death", PATIENCE, || Ok(killed()))?;
        }
        Death::Host => {
            let boundaries = || {
                let said = pair.said(Role::Primary);
                said.iter().filter(|it| it["stand"] == "boundary").count()
            };
            let before = boundaries();
            pair.wait_for("boundary", PATIENCE, || {
                Ok((boundaries() > before).then_some(()))
            })?;
            std::thread::sleep(Duration::from_micros(after_us));
            pair.lab.kill(Host::A);
        }
    }
    Ok(())
}
