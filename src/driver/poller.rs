//! One `ppoll` over whatever the driver waits for at the moment.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use transport::Spin;

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
    pub(crate) fn wait(mut self, patience: Duration, spin: &mut Spin) -> nix::Result<Vec<T>> {
        let found = match spin.until(patience, || self.poll(Duration::ZERO)) {
            Ok(None) => self.poll(patience),
            other => other,
        };
        match found {
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

    /// Something if anything is ready.
    fn poll(&mut self, patience: Duration) -> nix::Result<Option<()>> {
        let patience = TimeSpec::from_duration(patience);
        let ready = ppoll(&mut self.descriptors, Some(patience), None)?;
        Ok((ready > 0).then_some(()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_is_there_is_found_with_and_without_looking() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&writer, b"x").unwrap();
        for patience in [Duration::ZERO, LONG] {
            let mut poller = Poller::new();
            poller.watch("full", reader.as_fd());
            poller.watch("empty", writer.as_fd());
            let ready = poller.wait(LONG, &mut Spin::new(patience)).unwrap();
            assert_eq!(ready, ["full"]);
        }
    }
}
