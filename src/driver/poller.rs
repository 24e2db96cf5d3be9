//! One `ppoll` over whatever the driver waits for at the moment.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

/// Looking in vain about this often ends it, until it has been passed over as often.
const VAIN_MAX: u32 = 8;

/// The descriptors of one wait, each with the caller's name for it.
#[derive(Debug)]
pub(crate) struct Poller<'a, T> {
    descriptors: Vec<PollFd<'a>>,
    names: Vec<T>,
}

/// Looking for a while before sleeping, as long as that pays off: being woken takes the kernel
/// longer than most peers need to answer.
#[derive(Debug)]
pub(crate) struct Spin {
    patience: Duration,
    vain: u32,
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
        let found = match spin.look(patience, || self.poll(Duration::ZERO)) {
            Ok(false) => self.poll(patience),
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

    /// Whether anything is ready.
    fn poll(&mut self, patience: Duration) -> nix::Result<bool> {
        let patience = TimeSpec::from_duration(patience);
        Ok(ppoll(&mut self.descriptors, Some(patience), None)? > 0)
    }
}

impl Spin {
    /// Looks for so long, or not at all.
    pub(crate) fn new(patience: Duration) -> Spin {
        Spin { patience, vain: 0 }
    }

    /// Looks until there is something, or `limit` or its own patience is over.
    fn look<E>(
        &mut self,
        limit: Duration,
        mut is_there: impl FnMut() -> Result<bool, E>,
    ) -> Result<bool, E> {
        let patience = self.patience.min(limit);
        if patience.is_zero() {
            return Ok(false);
        }
        if self.vain >= VAIN_MAX {
            self.vain -= 1;
            return Ok(false);
        }
        let began = Instant::now();
        loop {
            if is_there()? {
                self.vain = 0;
                return Ok(true);
            }
            if began.elapsed() >= patience {
                self.vain = (self.vain + 1) * 2;
                return Ok(false);
            }
            std::hint::spin_loop();
        }
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

    #[test]
    fn looking_in_vain_ends_and_begins_again() {
        let mut spin = Spin::new(Duration::from_nanos(1));
        let mut looks = 0;
        for _ in 0..1000 {
            let found: Result<bool, ()> = spin.look(LONG, || {
                looks += 1;
                Ok(false)
            });
            assert_eq!(found, Ok(false));
        }
        assert!((10..500).contains(&looks), "{looks} looks in 1000 waits");
        // One that finds something makes it look every time.
        while spin.look(LONG, || Ok::<_, ()>(true)) != Ok(true) {}
        assert_eq!(spin.look(LONG, || Ok::<_, ()>(true)), Ok(true));
        assert_eq!(spin.look(Duration::ZERO, || Ok::<_, ()>(true)), Ok(false));
    }
}
