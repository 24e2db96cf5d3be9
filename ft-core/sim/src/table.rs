//! Which fault met which state, how often.

use std::fmt;

use crate::faults::Fault;
use crate::world::Phase;

#[derive(Clone, Debug)]
pub struct Table {
    counts: Vec<Vec<u64>>,
}

impl Default for Table {
    fn default() -> Table {
        Table {
            counts: vec![vec![0; Phase::ALL.len()]; Fault::ALL.len()],
        }
    }
}

impl Table {
    pub fn count(&mut self, fault: Fault, phase: Phase) {
        self.counts[fault as usize][phase as usize] += 1;
    }

    pub fn add(&mut self, other: &Table) {
        for (ours, theirs) in self.counts.iter_mut().zip(&other.counts) {
            for (our, their) in ours.iter_mut().zip(theirs) {
                *our += their;
            }
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<22}", "fault \\ state")?;
        for phase in Phase::ALL {
            write!(f, "{:>12}", format!("{phase:?}"))?;
        }
        writeln!(f)?;
        for (fault, row) in Fault::ALL.iter().zip(&self.counts) {
            write!(f, "{:<22}", format!("{fault:?}"))?;
            for count in row {
                write!(f, "{count:>12}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
