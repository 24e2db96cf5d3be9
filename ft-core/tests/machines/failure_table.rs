//! What comes of each failure, as far as the machines decide it.

use std::time::Duration;

use crate::rig::{EPOCH, LEASE, MAX_UNACKED, Pair, primary_config};
use ft_core::backup;
use ft_core::primary::{
    self, Action, Command, End, GateState, Input, LinkDown, OnBackupLoss, PrimaryConfig,
    Protection, QemuEvent, Report, Step,
};
use ft_core::{Epoch, EpochKind, RunState};

#[test]
fn daemon_and_qemu_die() {
    let mut pair = Pair::protected();
    let last = pair.backup.machine.status().last_flipped;
    pair.primary_dies();
    assert_eq!(pair.backup.activated(), Some((last, RunState::Running)));
    assert_eq!(pair.backup.machine.status().state, backup::State::Active);
    assert!(pair.backup.machine.status().term.0 > 1);
}

#[test]
fn nothing_is_activated_before_the_first_epoch() {
    let mut pair = Pair::new(primary_config());
    pair.primary_dies();
    assert_eq!(pair.backup.activated(), None);
}

#[test]
fn primary_cut_off() {
    let mut pair = Pair::protected();
    pair.cut = true;
    pair.forget_actions();
    let cut_at = pair.now;
    while pair.backup.activated().is_none() {
        pair.pass(Duration::from_millis(1));
        assert!(pair.now.since(cut_at) < 3 * LEASE, "nobody takes over");
        if pair.backup.activated().is_some() {
            assert!(
                pair.primary.has(|a| *a == Action::FenceVm),
                "both copies run"
            );
        }
    }
    // The cut is healed: the old primary must end its guest.
    pair.cut = false;
    pair.lose_link();
    pair.pass(Duration::from_secs(5));
    assert!(
        matches!(pair.primary.end(), Some(End::FailedOver { .. })),
        "{:?}",
        pair.primary.end()
    );
    assert!(pair.primary.has(|a| *a == Action::EndVm));
    assert!(!pair.primary.has(|a| *a == Action::Gate(GateState::Open)));
    // Started once more on this host, it must not get far.
    let stored = pair.primary.done.iter().rev().find_map(|a| match a {
        Action::StoreTerm { term, protected } => Some((*term, *protected)),
        _ => None,
    });
    let (term, protected) = stored.expect("it has stored the term");
    assert!(protected, "the backup runs the guest");
    let config = primary_config();
    let session = ft_core::Session(config.session.0 + 1);
    pair.start_primary(PrimaryConfig {
        term,
        session,
        ..config
    });
    pair.pass(Duration::from_secs(1));
    assert!(matches!(pair.primary.end(), Some(End::FailedOver { .. })));
    assert!(pair.primary.has(|a| *a == Action::EndVm));
}

#[test]
fn qemu_dies_and_the_daemon_lives() {
    let mut pair = Pair::protected();
    pair.primary.vm_runs = false;
    let gone = QemuEvent::Gone("killed".to_owned());
    pair.primary.machine.handle(pair.now, Input::Qemu(gone));
    pair.settle();
    assert!(pair.backup.activated().is_some());
    assert!(matches!(pair.primary.end(), Some(End::FailedOver { .. })));
    // Its QMP connection may be all that has ended.
    assert!(pair.primary.has(|a| *a == Action::EndVm));
}

#[test]
fn daemon_dies_and_qemu_lives() {
    let mut pair = Pair::protected();
    pair.cut = true;
    let down = backup::LinkDown::Broken("FIN of the daemon's lanes".to_owned());
    let link = backup::LinkId(pair.link);
    pair.backup
        .machine
        .handle(pair.now, backup::Input::LinkDown(link, down));
    pair.settle_backup();
    assert_eq!(
        pair.backup.activated(),
        None,
        "the guest may still run over there"
    );
    pair.primary_dies(); // the guardian has killed QEMU
    assert!(pair.backup.activated().is_some());
}

#[test]
fn guest_powers_off() {
    let mut pair = Pair::protected();
    pair.primary
        .machine
        .handle(pair.now, Input::Qemu(QemuEvent::Shutdown));
    pair.settle();
    assert_eq!(pair.primary.end(), Some(&End::PoweredOff));
    assert!(pair.primary.has(|a| *a == Action::EndVm));
    assert!(
        pair.backup
            .has(|a| *a == backup::Action::Finish(backup::End::PoweredOff))
    );
    assert_eq!(pair.backup.activated(), None);
}

#[test]
fn operator_stops_the_guest() {
    let mut pair = Pair::protected();
    pair.primary.vm_runs = false;
    pair.primary
        .machine
        .handle(pair.now, Input::Qemu(QemuEvent::Stopped));
    pair.pass(3 * EPOCH);
    let stopped = pair.backup.machine.status().last_flipped;
    pair.pass(10 * EPOCH);
    assert_eq!(
        pair.backup.machine.status().last_flipped,
        stopped,
        "epochs of a stopped guest"
    );
    assert!(!pair.primary.vm_runs, "the guest was resumed by us");
    pair.primary_dies();
    assert_eq!(pair.backup.activated(), Some((stopped, RunState::Stopped)));
}

#[test]
fn a_guest_that_runs_unknown_to_us_is_stopped_for_its_boundary() {
    let mut pair = Pair::protected();
    // STOP of an operator is seen; his `cont` was taken for ours.
    pair.primary
        .machine
        .handle(pair.now, Input::Qemu(QemuEvent::Stopped));
    assert!(pair.primary.vm_runs);
    pair.pass(3 * EPOCH);
    assert!(pair.primary.machine.status().guest_running);
    assert!(pair.primary.vm_runs);
}

#[test]
fn somebody_else_resumes_the_guest_in_a_boundary() {
    let mut pair = Pair::protected();
    pair.forget_actions();
    pair.now = pair.now + EPOCH;
    pair.primary.machine.handle_timeout(pair.now);
    pair.primary.drain();
    assert!(pair.primary.has(|a| *a == Action::PauseAndSave));
    while let Some(answer) = pair.primary.answers.pop_front() {
        if matches!(answer, Input::Harvested(_)) {
            break;
        }
        pair.primary.machine.handle(pair.now, answer);
        pair.primary.drain();
    }
    pair.primary.vm_runs = true;
    pair.primary
        .machine
        .handle(pair.now, Input::Qemu(QemuEvent::Resumed));
    pair.primary
        .machine
        .handle(pair.now, Input::Harvested(Default::default()));
    pair.settle();
    assert!(
        !pair.primary.has(|a| matches!(a, Action::Seal { .. })),
        "a torn epoch is sealed"
    );
    assert!(pair.primary.has(|a| *a == Action::MergeDirt));
    pair.pass(Duration::from_secs(1));
    assert!(
        pair.primary.has(|a| matches!(a, Action::Seal { .. })),
        "epochs go on"
    );
}

#[test]
fn link_lost_with_the_acknowledgement_on_its_way() {
    let mut pair = Pair::protected();
    pair.acks_held = true;
    pair.pass(2 * EPOCH);
    let flipped = pair.backup.machine.status().last_flipped;
    assert_eq!(
        pair.primary.machine.status().last_acknowledged.next(),
        flipped
    );
    pair.forget_actions();
    pair.acks_held = false;
    pair.lose_link();
    assert_eq!(pair.primary.machine.status().link_lost, Some(pair.now));
    pair.pass(Duration::from_secs(1));
    assert_eq!(pair.primary.machine.status().link_lost, None);
    assert!(
        pair.primary.has(|a| *a == Action::Release(flipped)),
        "the hello acknowledges it"
    );
    assert!(!pair.primary.has(|a| *a == Action::MergeDirt));
    assert!(pair.backup.machine.status().last_flipped > flipped);
}

#[test]
fn link_lost_with_the_epoch_on_its_way() {
    let mut pair = Pair::protected();
    let flipped = pair.backup.machine.status().last_flipped;
    pair.forget_actions();
    pair.cut = true;
    pair.pass(2 * EPOCH);
    pair.cut = false;
    pair.lose_link();
    pair.settle();
    assert!(
        !pair.primary.has(|a| matches!(a, Action::Release(_))),
        "nothing is acknowledged"
    );
    pair.pass(Duration::from_secs(1));
    assert!(
        pair.primary.has(|a| *a == Action::MergeDirt),
        "the dirt goes back"
    );
    assert!(pair.backup.machine.status().last_flipped > flipped);
}

#[test]
fn a_throttled_guest_goes_on_after_the_link_is_back() {
    let mut pair = Pair::protected();
    pair.cut = true;
    pair.pass(EPOCH + MAX_UNACKED + Duration::from_millis(10));
    assert!(!pair.primary.vm_runs, "throttled");
    pair.cut = false;
    pair.lose_link();
    pair.pass(Duration::from_secs(1));
    assert!(pair.primary.vm_runs);
    assert!(!pair.primary.machine.status().fenced);
}

#[test]
fn a_detach_without_a_link_says_what_it_waits_for() {
    let mut pair = Pair::protected();
    assert_eq!(pair.primary.machine.detach_waits(), None);
    pair.cut = true;
    pair.lose_link();
    pair.settle();
    let detach = Input::Command(Command::Detach);
    pair.primary.machine.handle(pair.now, detach);
    pair.settle();
    let said = |pair: &Pair, what: &str| {
        pair.primary
            .has(|a| matches!(a, Action::Report(Report::Note(text)) if text.contains(what)))
    };
    assert!(said(&pair, "the guest stops in 0.4 s"));
    pair.pass(2 * LEASE);
    assert_eq!(pair.primary.end(), None);
    let waits = pair.primary.machine.detach_waits();
    assert!(waits.is_some_and(|text| text.contains("stands still")));
    pair.primary
        .machine
        .handle(pair.now, Input::Command(Command::Continue));
    pair.settle();
    assert_eq!(pair.primary.end(), Some(&End::Detached));
    assert!(pair.primary.vm_runs);
}

/// Found by the simulator: nothing was on its way whose acknowledgement would have let it go on.
#[test]
fn a_throttled_guest_goes_on_after_a_seal_has_failed() {
    let mut pair = Pair::protected();
    pair.primary.seal_hangs = true;
    pair.pass(MAX_UNACKED + 2 * EPOCH);
    assert!(!pair.primary.vm_runs, "throttled");
    pair.primary.seal_hangs = false;
    let before = pair.primary.machine.status().last_acknowledged;
    let (step, text) = (Step::Seal, "the test says so".to_owned());
    let failed = Input::StepFailed { step, text };
    pair.primary.machine.handle(pair.now, failed);
    pair.pass(10 * EPOCH);
    assert!(pair.primary.vm_runs);
    assert!(pair.primary.machine.status().last_acknowledged > before);
}

#[test]
fn a_throttled_guest_goes_on_after_a_detach() {
    let mut pair = Pair::protected();
    pair.cut = true;
    pair.pass(EPOCH + MAX_UNACKED + Duration::from_millis(10));
    assert!(!pair.primary.vm_runs, "throttled");
    let detach = Input::Command(Command::Detach);
    pair.primary.machine.handle(pair.now, detach);
    pair.settle();
    pair.cut = false;
    pair.lose_link();
    pair.pass(Duration::from_secs(1));
    assert_eq!(pair.primary.end(), Some(&End::Detached));
    assert!(pair.primary.vm_runs);
}

#[test]
fn shape_changes() {
    let mut pair = Pair::protected();
    let changed = Input::ShapeChanged("a device appeared".to_owned());
    pair.primary.machine.handle(pair.now, changed);
    pair.settle();
    assert!(matches!(pair.primary.end(), Some(End::Unprotectable(_))));
    assert!(pair.primary.has(|a| *a == Action::LeaveVm));
    assert!(pair.primary.vm_runs, "the guest runs on");
    pair.primary_dies();
    assert_eq!(pair.backup.activated(), None, "after a clean end");
}

#[test]
fn standby_ends_while_it_waits() {
    let mut pair = Pair::protected();
    let gone = backup::Input::StandbyGone {
        clean: false,
        text: "killed".to_owned(),
    };
    pair.backup.machine.handle(pair.now, gone);
    pair.settle();
    assert!(
        pair.backup
            .has(|a| matches!(a, backup::Action::Finish(backup::End::NoStandby(_))))
    );
    assert_eq!(pair.backup.activated(), None);
    assert_eq!(pair.primary.machine.status().state, Protection::Unprotected);
    assert!(pair.primary.vm_runs);
}

/// The backup has lost the link, and then its standby: the primary's host may be dead.
fn standby_ends_without_a_link() -> Pair {
    let mut pair = Pair::protected();
    pair.forget_actions();
    pair.cut = true;
    let down = backup::LinkDown::Broken("reset".to_owned());
    let link = backup::LinkId(pair.link);
    let gone = backup::Input::StandbyGone {
        clean: false,
        text: "killed".to_owned(),
    };
    for input in [backup::Input::LinkDown(link, down), gone] {
        pair.backup.machine.handle(pair.now, input);
    }
    pair.settle_backup();
    assert!(!pair.backup.has(|a| matches!(a, backup::Action::Finish(_))));
    assert_eq!(pair.backup.activated(), None, "the guest may still run");
    pair
}

#[test]
fn standby_ends_and_the_primary_stays_silent() {
    let fresh = |a: &backup::Action| matches!(a, backup::Action::RespawnAndActivate { .. });
    let dead = |a: &backup::Action| matches!(a, backup::Action::Activate { .. });
    let mut pair = standby_ends_without_a_link();
    pair.pass(3 * LEASE);
    assert!(pair.backup.has(fresh) && !pair.backup.has(dead));
    assert_eq!(pair.backup.machine.status().state, backup::State::Active);
    assert!(pair.primary.has(|a| *a == Action::FenceVm));

    let mut pair = standby_ends_without_a_link();
    // The first one that was asked may fail as well.
    pair.backup.activation_fails = true;
    pair.primary_dies();
    assert!(pair.backup.has(fresh) && !pair.backup.has(dead));
    assert_eq!(pair.backup.machine.status().state, backup::State::Active);
}

#[test]
fn standby_ends_and_the_primary_comes_back() {
    let mut pair = standby_ends_without_a_link();
    pair.cut = false;
    pair.lose_link();
    pair.pass(Duration::from_secs(1));
    let told = |a: &backup::Action| matches!(a, backup::Action::Finish(backup::End::NoStandby(_)));
    assert!(pair.backup.has(told));
    assert_eq!(pair.backup.activated(), None);
    assert_eq!(pair.primary.machine.status().state, Protection::Unprotected);
    assert!(pair.primary.vm_runs);
}

#[test]
fn standby_fails_to_load() {
    let mut pair = Pair::protected();
    pair.backup.activation_fails = true;
    pair.primary_dies();
    assert!(
        pair.backup
            .has(|a| matches!(a, backup::Action::RespawnAndActivate { .. }))
    );
    assert_eq!(pair.backup.machine.status().state, backup::State::Active);
}

#[test]
fn steps_of_a_boundary_fail() {
    for step in [Step::Pause, Step::Save, Step::Harvest, Step::Resume] {
        let mut pair = Pair::protected();
        pair.forget_actions();
        pair.primary.fails = Some(step);
        pair.pass(2 * EPOCH);
        let failed = |a: &Action| matches!(a, Action::Report(Report::Error(_)));
        assert!(pair.primary.has(failed), "{step:?}");
        pair.pass(Duration::from_secs(2));
        assert!(pair.primary.vm_runs, "{step:?} leaves the guest paused");
        let before = pair.backup.machine.status().last_flipped;
        pair.pass(5 * EPOCH);
        assert!(
            pair.backup.machine.status().last_flipped > before,
            "{step:?} ends the epochs"
        );
    }
}

#[test]
fn a_minute_of_failures_ends_the_protection() {
    for step in [Step::Pause, Step::Save, Step::Harvest, Step::Seal] {
        let mut pair = Pair::protected();
        pair.primary.fails_always = Some(step);
        pair.pass(Duration::from_secs(30));
        assert_eq!(pair.primary.end(), None, "{step:?}");
        pair.pass(Duration::from_secs(60));
        let end = pair.primary.end();
        assert!(
            matches!(end, Some(End::Unprotectable(_))),
            "{step:?}: {end:?}"
        );
        assert!(pair.primary.vm_runs, "{step:?}");
        pair.primary_dies();
        assert_eq!(pair.backup.activated(), None, "after a clean end");
    }
}

#[test]
fn backup_dies() {
    let mut pair = Pair::protected();
    pair.forget_actions();
    pair.cut = true;
    pair.primary
        .machine
        .handle(pair.now, Input::LinkDown(LinkDown::PeerDead));
    pair.settle();
    assert!(pair.primary.has(|a| *a == Action::Gate(GateState::Open)));
    assert_eq!(pair.primary.machine.status().state, Protection::Unprotected);
    assert!(pair.primary.vm_runs);
    pair.pass(2 * LEASE);
    assert!(
        pair.primary.vm_runs,
        "no lease binds a guest whose backup is dead"
    );
}

#[test]
fn a_backup_that_dies_after_the_lease_may_have_spoken() {
    let mut pair = Pair::protected();
    pair.cut = true;
    pair.pass(2 * LEASE);
    pair.forget_actions();
    pair.primary
        .machine
        .handle(pair.now, Input::LinkDown(LinkDown::PeerDead));
    pair.settle();
    assert!(!pair.primary.has(|a| *a == Action::Gate(GateState::Open)));
    assert!(!pair.primary.vm_runs);
    pair.primary
        .machine
        .handle(pair.now, Input::Command(Command::Continue));
    pair.settle();
    assert!(
        pair.primary.has(|a| *a == Action::Gate(GateState::Open)),
        "the operator's word"
    );
    assert!(pair.primary.vm_runs);
}

#[test]
fn silent_backup_with_continue() {
    let config = primary::PrimaryConfig {
        on_backup_loss: OnBackupLoss::Continue,
        ..primary_config()
    };
    let mut pair = Pair::protected_with(config);
    pair.cut = true;
    pair.pass(2 * LEASE);
    assert!(pair.primary.vm_runs);
    assert!(
        pair.primary
            .has(|a| { matches!(a, Action::Report(Report::BackupLost { proven: false, .. })) })
    );
}

#[test]
fn backup_stands_down() {
    let mut pair = Pair::protected();
    let command = backup::Input::Command(backup::Command::StandDown);
    pair.backup.machine.handle(pair.now, command);
    pair.settle();
    assert!(
        pair.backup
            .has(|a| *a == backup::Action::Finish(backup::End::StoodDown))
    );
    assert_eq!(pair.primary.machine.status().state, Protection::Unprotected);
    assert!(pair.primary.vm_runs);
}

#[test]
fn detach() {
    let mut pair = Pair::protected();
    pair.primary
        .machine
        .handle(pair.now, Input::Command(Command::Detach));
    pair.settle();
    assert_eq!(pair.primary.end(), Some(&End::Detached));
    assert!(pair.primary.vm_runs);
    assert_eq!(pair.backup.machine.status().state, backup::State::Waiting);
}

#[test]
fn switchover() {
    let mut pair = Pair::protected();
    pair.primary
        .machine
        .handle(pair.now, Input::Command(Command::Switchover));
    pair.pass(3 * EPOCH);
    let last = pair.backup.machine.status().last_flipped;
    assert_eq!(pair.backup.activated(), Some((last, RunState::Running)));
    assert!(matches!(pair.primary.end(), Some(End::SwitchedOver { .. })));
    // Nothing may stay behind that the guest has sent: the gate is moved when it stands still, and QEMU lets
    // go of what is released only while it runs.
    let output = pair.primary.done.iter().filter(|action| {
        matches!(
            action,
            Action::PauseAndSave
                | Action::MoveGate
                | Action::Release(_)
                | Action::ResumeVm
                | Action::PauseVm
                | Action::EndVm
        )
    });
    let output: Vec<_> = output.cloned().collect();
    assert!(output.ends_with(&[
        Action::PauseAndSave,
        Action::MoveGate,
        Action::Release(last),
        Action::ResumeVm,
        Action::PauseVm,
        Action::EndVm,
    ]));
}

#[test]
fn a_switchover_takes_another_epoch_if_its_last_one_fails() {
    let mut pair = Pair::protected();
    let before = pair.backup.machine.status().last_flipped;
    pair.primary.fails = Some(Step::Seal);
    pair.primary
        .machine
        .handle(pair.now, Input::Command(Command::Switchover));
    pair.pass(10 * EPOCH);
    assert!(pair.primary.fails.is_none());
    assert_eq!(
        pair.backup.activated(),
        Some((before.next(), RunState::Running))
    );
}

/// QEMU refuses a command of the moment in which the guest's last output leaves.
fn switchover_with_failing(step: Step) -> Pair {
    let mut pair = Pair::protected();
    pair.primary.fails_behind_release = Some(step);
    let switchover = Input::Command(Command::Switchover);
    pair.primary.machine.handle(pair.now, switchover);
    pair.pass(5 * EPOCH);
    assert!(pair.primary.fails_behind_release.is_none() && pair.primary.fails.is_none());
    pair
}

#[test]
fn a_switchover_goes_on_without_its_last_output() {
    let pair = switchover_with_failing(Step::Resume);
    assert!(matches!(pair.primary.end(), Some(End::SwitchedOver { .. })));
    // Had it failed, nobody would have let the guest go on.
    assert!(
        !pair
            .primary
            .has(|a| *a == Action::Report(Report::GuestStopped))
    );
}

/// It runs, so the backup must not.
#[test]
fn a_switchover_whose_guest_runs_is_given_up() {
    let mut pair = switchover_with_failing(Step::Pause);
    assert_eq!(pair.primary.end(), None);
    assert_eq!(pair.backup.activated(), None);
    assert!(pair.primary.vm_runs && !pair.primary.machine.status().fenced);
    let before = pair.backup.machine.status().last_flipped;
    pair.pass(5 * EPOCH);
    assert!(
        pair.backup.machine.status().last_flipped > before,
        "epochs go on"
    );
}

#[test]
fn audit_finds_a_difference() {
    let mut pair = Pair::protected();
    pair.backup.audit_differs = true;
    pair.pass(EPOCH + Duration::from_millis(5));
    pair.pass(5 * EPOCH);
    // Meanwhile the backup would not take over: the guardian must not end the only copy.
    let armed = pair.primary.done.iter().filter_map(|a| match a {
        Action::Guardian { armed } => Some(*armed),
        _ => None,
    });
    assert_eq!(armed.collect::<Vec<_>>(), [true, false, true]);
    let full = |a: &Action| {
        matches!(
            a,
            Action::Harvest {
                kind: EpochKind::Full,
                ..
            }
        )
    };
    assert!(pair.primary.has(full));
    assert_eq!(pair.primary.machine.status().state, Protection::Protected);
    assert_eq!(
        pair.backup.machine.status().state,
        backup::State::Protecting
    );
    assert!(pair.backup.machine.status().last_flipped > Epoch(2));
}
