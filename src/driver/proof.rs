//! Watching the proof lane: its FIN says that daemon and QEMU of the other side are gone.
//!
//! The driver keeps a copy of the descriptor of its own, because the proof must still be read
//! after the link's other lanes broke: when a host's processes are killed, the kernel closes
//! their descriptors in no particular order.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use qemu_bridge::qmp::{Command, Qmp, QmpError, RequestId};
use transport::LossKind;
use transport::tcp::end_of_file;

/// What the proof lane says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    Silent,
    /// The kernel closed it in good order: nobody over there holds it any more.
    Dead,
    /// A reset, a time-out, or bytes where none belong: proves nothing.
    Broken(String),
}

#[derive(Debug)]
pub(crate) struct ProofLane {
    fd: OwnedFd,
}

impl ProofLane {
    pub(crate) fn new(lane: BorrowedFd<'_>) -> std::io::Result<ProofLane> {
        Ok(ProofLane {
            fd: lane.try_clone_to_owned()?,
        })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(crate) fn read(&self) -> Proof {
        let mut byte = [0];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        match recv(self.fd.as_raw_fd(), &mut byte, flags) {
            // The link has a copy as well, and may have been told of an error in our place.
            Ok(0) => match end_of_file(self.fd.as_fd()) {
                LossKind::Fin => Proof::Dead,
                kind => Proof::Broken(format!("the proof lane ended without a FIN: {kind:?}")),
            },
            Ok(_) => Proof::Broken("the proof lane carries bytes".to_owned()),
            Err(Errno::EAGAIN | Errno::EINTR) => Proof::Silent,
            Err(error) => Proof::Broken(format!("proof lane: {error}")),
        }
    }
}

/// The copies of proof lanes that a QEMU holds, under names of ours.
#[derive(Debug, Default)]
pub(crate) struct HeldProofs {
    /// Oldest first.
    names: Vec<String>,
    made: u32,
}

impl HeldProofs {
    /// Gives QEMU a copy; the reply to the returned request says that it has it.
    ///
    /// # Errors
    /// The descriptor can't be sent.
    pub(crate) fn hold(
        &mut self,
        qmp: &mut Qmp,
        lane: BorrowedFd<'_>,
    ) -> Result<RequestId, QmpError> {
        self.made += 1;
        let name = format!("curling-proof-{}", self.made);
        let id = qmp.submit_with_fd(&Command::new("getfd").arg("fdname", name.as_str()), lane)?;
        self.names.push(name);
        Ok(id)
    }

    /// The commands by which QEMU closes all copies but the newest.
    pub(crate) fn drop_old(&mut self) -> Vec<Command> {
        let newest = self.names.pop();
        let commands = self.drop_all();
        self.names.extend(newest);
        commands
    }

    /// The command by which QEMU closes the newest copy, if it has any.
    pub(crate) fn drop_newest(&mut self) -> Option<Command> {
        self.names.pop().map(close)
    }

    /// The commands by which QEMU closes all copies.
    pub(crate) fn drop_all(&mut self) -> Vec<Command> {
        self.names.drain(..).map(close).collect()
    }
}

fn close(name: String) -> Command {
    Command::new("closefd").arg("fdname", name)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::socket::{setsockopt, sockopt};

    use super::*;

    fn pair() -> (ProofLane, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (theirs, _) = listener.accept().unwrap();
        (ProofLane::new(ours.as_fd()).unwrap(), theirs)
    }

    fn wait(lane: &ProofLane) {
        let mut fds = [PollFd::new(lane.fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(30_000_u16)), Ok(1));
    }

    #[test]
    fn a_fin_is_proof_however_often_it_is_read() {
        let (lane, theirs) = pair();
        assert_eq!(lane.read(), Proof::Silent);
        drop(theirs);
        wait(&lane);
        assert_eq!(lane.read(), Proof::Dead);
        assert_eq!(lane.read(), Proof::Dead);
    }

    #[test]
    fn a_reset_is_none_even_if_another_copy_was_told_of_it() {
        let (lane, theirs) = pair();
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&theirs, sockopt::Linger, &linger).unwrap();
        drop(theirs);
        wait(&lane);
        assert!(matches!(lane.read(), Proof::Broken(_)));
        assert!(matches!(lane.read(), Proof::Broken(_)));
    }
}
