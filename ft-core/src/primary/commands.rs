//! Which STOP and RESUME events our own commands have caused.
//!
//! QEMU carries commands out in order and sends a command's event before its reply. A `stop` of a
//! guest that is stopped already causes no event, so events can't be counted: each belongs to
//! the newest command of its kind that has not had one and whose reply has not come.

use std::collections::VecDeque;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Stop,
    /// A `stop` whose reply the driver keeps to itself.
    Fence,
    Cont,
}

/// Commands that have no reply yet, oldest first.
#[derive(Debug, Default)]
pub(super) struct Commands {
    sent: VecDeque<(Kind, bool)>,
}

impl Commands {
    pub(super) fn sent(&mut self, kind: Kind) {
        // A fence has no reply: without a bound, fences of a guest that an operator resumes
        // again and again would gather.
        if kind == Kind::Fence && self.sent.back() == Some(&(Kind::Fence, false)) {
            return;
        }
        self.sent.push_back((kind, false));
    }

    /// A reply has come, so everything before that command is done as well. Whether the command
    /// had its event, and so has changed anything.
    pub(super) fn replied(&mut self, kind: Kind) -> bool {
        let place = self.sent.iter().position(|(k, _)| *k == kind);
        let done = place.and_then(|place| self.sent.drain(..=place).next_back());
        match done {
            Some((Kind::Stop, false)) => self.take_from_fence(),
            done => done.is_some_and(|(_, event)| event),
        }
    }

    /// A fence that was sent after a `stop` can't have had its event before the reply to the `stop`:
    /// it was the `stop`'s. Whether there was one.
    fn take_from_fence(&mut self) -> bool {
        let claimed = self.sent.iter_mut().find(|it| **it == (Kind::Fence, true));
        claimed.map(|(_, event)| *event = false).is_some()
    }

    /// A STOP event; whether it is of one of our commands.
    pub(super) fn stopped(&mut self) -> bool {
        self.claim(|kind| kind != Kind::Cont)
    }

    /// A RESUME event; whether it is of one of our commands. It is not if a reply of QEMU to a command before
    /// those has not come.
    pub(super) fn resumed(&mut self, replies_due: bool) -> bool {
        let ours = !replies_due && self.claim(|kind| kind == Kind::Cont);
        if !ours {
            // Fences before it are done; if the guest must stay fenced, it is told so again.
            self.sent.retain(|(kind, _)| *kind != Kind::Fence);
        }
        ours
    }

    fn claim(&mut self, fits: impl Fn(Kind) -> bool) -> bool {
        let mut newest_first = self.sent.iter_mut().rev();
        let claimed = newest_first.find(|(kind, seen)| !seen && fits(*kind));
        claimed.map(|(_, seen)| *seen = true).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_without_a_command_is_somebody_elses() {
        let mut commands = Commands::default();
        assert!(!commands.stopped());
        commands.sent(Kind::Stop);
        assert!(!commands.resumed(false));
        assert!(commands.stopped());
        assert!(!commands.stopped());
    }

    #[test]
    fn a_stop_of_a_stopped_guest_leaves_no_claim_behind() {
        let mut commands = Commands::default();
        commands.sent(Kind::Stop);
        assert!(!commands.replied(Kind::Stop));
        assert!(!commands.stopped());
        commands.sent(Kind::Stop);
        assert!(commands.stopped());
        assert!(commands.replied(Kind::Stop));
    }

    #[test]
    fn the_event_of_a_fence_is_ours_even_after_the_fence_was_lifted() {
        let mut commands = Commands::default();
        commands.sent(Kind::Cont); // of a boundary
        commands.sent(Kind::Fence);
        assert!(commands.resumed(false));
        commands.replied(Kind::Cont);
        commands.sent(Kind::Cont); // the fence is lifted before QEMU has carried it out
        assert!(commands.stopped());
        assert!(commands.resumed(false));
        commands.replied(Kind::Cont);
        assert!(!commands.stopped());
    }

    #[test]
    fn the_event_of_a_stop_is_not_that_of_a_fence_behind_it() {
        let mut commands = Commands::default();
        commands.sent(Kind::Stop);
        commands.sent(Kind::Fence);
        assert!(commands.stopped());
        assert!(commands.replied(Kind::Stop));
        commands.sent(Kind::Cont);
        assert!(commands.resumed(false));
        commands.replied(Kind::Cont);
        assert!(!commands.stopped()); // an operator's
    }

    #[test]
    fn a_fence_that_stopped_nothing_takes_no_later_event() {
        let mut commands = Commands::default();
        commands.sent(Kind::Fence);
        commands.sent(Kind::Stop);
        assert!(commands.stopped());
        assert!(commands.replied(Kind::Stop));
        commands.sent(Kind::Fence);
        assert!(!commands.resumed(false)); // an operator's `cont`
        assert!(!commands.stopped()); // and his `stop`
    }

    #[test]
    fn fences_do_not_gather() {
        let mut commands = Commands::default();
        for _ in 0..1000 {
            commands.sent(Kind::Fence);
        }
        assert_eq!(commands.sent.len(), 1);
    }
}
