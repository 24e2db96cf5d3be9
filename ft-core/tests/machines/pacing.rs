//! When boundaries come.

use std::time::Duration;

use ft_core::primary::{Action, PrimaryConfig, Step};

use crate::rig::{EPOCH, Pair, primary_config};

const IDLE_EPOCH: Duration = Duration::from_millis(200);

/// How often the guest is paused in ten idle epochs.
fn pauses(pair: &mut Pair, dirty_pages: u64) -> usize {
    pair.primary.dirty_pages = dirty_pages;
    pair.pass(2 * IDLE_EPOCH);
    pair.forget_actions();
    pair.pass(10 * IDLE_EPOCH);
    let pauses = pair.primary.done.iter();
    pauses
        .filter(|action| **action == Action::PauseAndSave)
        .count()
}

#[test]
fn a_guest_that_does_next_to_nothing_has_longer_epochs() {
    let mut pair = Pair::protected_with(PrimaryConfig {
        epoch_idle: IDLE_EPOCH,
        ..primary_config()
    });
    let usual = 10 * (IDLE_EPOCH.as_millis() / EPOCH.as_millis()) as usize;
    assert_eq!(pauses(&mut pair, 10), 10);
    // As much as it may write in usual epochs, in one that is ten times as long.
    assert_eq!(pauses(&mut pair, 640), 10);
    assert_eq!(pauses(&mut pair, 641), usual);
    assert_eq!(pauses(&mut pair, 64), 10);
}

const PRECOPY_PAGES_MIN: u64 = 100;

fn precopying() -> Pair {
    Pair::protected_with(PrimaryConfig {
        precopy_pages_min: Some(PRECOPY_PAGES_MIN),
        ..primary_config()
    })
}

/// Whether pages were copied before the pause of each of the boundaries that come now.
fn precopies(pair: &mut Pair, boundaries: u32) -> Vec<bool> {
    pair.forget_actions();
    pair.pass(boundaries * EPOCH);
    let mut before = false;
    let mut found = Vec::new();
    for action in &pair.primary.done {
        match action {
            Action::Precopy { .. } => before = true,
            Action::PauseAndSave => found.push(std::mem::take(&mut before)),
            _ => {}
        }
    }
    found
}

#[test]
fn pages_are_copied_before_the_pause_if_there_are_many() {
    let mut pair = precopying();
    pair.primary.dirty_pages = PRECOPY_PAGES_MIN - 1;
    pair.primary.precopied_pages = PRECOPY_PAGES_MIN;
    pair.pass(2 * EPOCH);
    assert_eq!(precopies(&mut pair, 3), [false; 3]);
    pair.primary.dirty_pages = PRECOPY_PAGES_MIN;
    pair.pass(2 * EPOCH);
    assert_eq!(precopies(&mut pair, 3), [true; 3]);
    // What fails there costs a larger epoch, and nothing else.
    pair.primary.fails = Some(Step::Precopy);
    assert_eq!(precopies(&mut pair, 3), [true; 3]);
}

#[test]
fn copies_that_are_in_vain_become_rare() {
    let mut pair = precopying();
    pair.primary.dirty_pages = 2 * PRECOPY_PAGES_MIN;
    pair.primary.precopied_pages = PRECOPY_PAGES_MIN - 1;
    pair.pass(100 * EPOCH);
    let found = precopies(&mut pair, 100);
    let rare = found.iter().filter(|precopied| **precopied).count();
    assert!((3..=4).contains(&rare), "{found:?}");
    pair.primary.precopied_pages = PRECOPY_PAGES_MIN;
    pair.pass(40 * EPOCH);
    assert_eq!(precopies(&mut pair, 10), [true; 10]);
}
