//! When boundaries come.

use std::time::Duration;

use ft_core::primary::{Action, PrimaryConfig};

use crate::rig::{EPOCH, Pair, primary_config};

const IDLE_EPOCH: Duration = Duration::from_millis(200);

/// How often the guest is paused in ten idle epochs.
fn pauses(pair: &mut Pair, dirty_pages: u64) -> usize {
    pair.primary.dirty_pages = dirty_pages;
    pair.pass(2 * IDLE_EPOCH);
    pair.forget_actions();
    pair.pass(10 * IDLE_EPOCH);
    let pauses = pair.primary.done.iter();
    pauses.filter(|action| **action == Action::PauseVm).count()
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
