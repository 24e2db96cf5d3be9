//! One `ppoll` over whatever the driver waits for at the moment.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

/// The descriptors of one wait, each with the caller's name for it.
#[derive(Debug)]
pub(crate) struct Poller<'a, T> {
    descriptors: Vec<PollFd<'a>>,
    names: Vec<T>,
}

impl<'a, T: Copy> Poller<'a, T> {
    pub(crate) fn new() -> Poller<'a, T> {
        Poller {
            descriptors: Vec::new(),
            names: Vec::new(),
        }
    }

    pub(crate) fn watch(&mut self, name: T, fd: BorrowedFd<'a>) {
        self.watch_for(name, fd, PollFlags::POLLIN);
    }

    pub(crate) fn watch_for(&mut self, name: T, fd: BorrowedFd<'a>, flags: PollFlags) {
        self.descriptors.push(PollFd::new(fd, flags));
        self.names.push(name);
    }

    /// The names of what is ready; empty when the time is up or a signal came in between.
    pub(crate) fn wait(mut self, patience: Duration) -> nix::Result<Vec<T>> {
        match ppoll(
            &mut self.descriptors,
            Some(TimeSpec::from_duration(patience)),
            None,
        ) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        let both = self.descriptors.iter().zip(self.names);
        Ok(both
            .filter(|(fd, _)| ready(fd))
            .map(|(_, name)| name)
            .collect())
    }
}
