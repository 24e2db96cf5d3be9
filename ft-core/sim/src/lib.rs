//! The production machines on virtual time, under faults that one seed draws.
//!
//! [`world`] holds two hosts ([`primary_host`], [`backup_host`]) with their [`vm`]s and a
//! [`net`]work; [`faults`] happen to them; [`checkers`] stand outside the machines and hold what
//! comes out of them against the invariants of ARCHITECTURE.md.
#![forbid(unsafe_code)]

pub mod backup_host;
pub mod checkers;
pub mod clock;
pub mod faults;
pub mod image;
pub mod monitor;
pub mod net;
pub mod primary_host;
pub mod rng;
pub mod standby;
pub mod table;
mod trace;
pub mod tracking;
pub mod vm;
pub mod world;

use ft_core::Term;

use crate::rng::Rng;
use crate::table::Table;
use crate::world::World;

/// What became of one seed.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub epochs: u64,
    pub lives: u64,
    pub failovers: u64,
    pub late_writes: u64,
    pub table: Table,
    pub violation: Option<String>,
}

/// Runs lives until `epochs` epochs were acknowledged, or one shows a violation.
pub fn run_seed(seed: u64, epochs: u64, trace: bool) -> Outcome {
    let mut outcome = Outcome::default();
    let mut terms = [Term(1), Term(1)];
    let mut rng = Rng::new(seed);
    // A life without a single epoch counts for one, so that a seed always ends.
    while outcome.epochs + outcome.lives < epochs && outcome.violation.is_none() {
        let quiet = outcome.lives == 0 && rng.chance(30);
        let life_epochs = rng.range(5..=40);
        let world = World::new(Rng::new(rng.number()), terms, quiet, trace);
        let life = world.live(life_epochs);
        outcome.epochs += life.epochs;
        outcome.lives += 1;
        outcome.failovers += life.failovers;
        outcome.late_writes += life.late_writes;
        outcome.table.add(&life.table);
        outcome.violation = life.violation;
        // The guest moves on to where the higher term is; the other host becomes its backup.
        let highest = life.terms[0].max(life.terms[1]);
        terms = [highest, highest];
    }
    outcome
}
