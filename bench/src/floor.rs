//! A boundary of QEMU alone: the same commands as the daemon's, with no harvest to wait for, so all of
//! them in one write.

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::Result;
use nix::sys::memfd::{MFdFlags, memfd_create};

/// The descriptor set of its device state.
const FDSET: u32 = 9;

/// Which commands it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floor {
    /// Pause, save, and go on.
    Plain,
    /// A gate is moved before that, and released behind it.
    Gated,
}

impl Floor {
    /// What QEMU must be told once. The first of the commands wants the [`state_sink`] with it.
    pub(crate) fn preparation(self, netdev: &str) -> Vec<String> {
        let add_fd = format!(r#"{{"execute":"add-fd","arguments":{{"fdset-id":{FDSET}}}}}"#);
        // One that holds nothing: there is a gate to move in the daemon's boundaries.
        let filter = format!(
            r#"{{"execute":"object-add","arguments":{{"qom-type":"filter-buffer","id":"flr0","netdev":"{netdev}","queue":"rx","interval":4000000000,"status":"off"}}}}"#
        );
        match self {
            Floor::Plain => vec![add_fd],
            Floor::Gated => vec![add_fd, filter],
        }
    }

    /// The commands up to `cont`.
    pub(crate) fn boundary(self) -> Vec<String> {
        let pause = [
            r#"{"execute":"stop"}"#.to_owned(),
            format!(
                r#"{{"execute":"xen-save-devices-state","arguments":{{"filename":"/dev/fdset/{FDSET}","live":false}}}}"#
            ),
            r#"{"execute":"cont"}"#.to_owned(),
        ];
        let gate = match self {
            Floor::Plain => None,
            Floor::Gated => Some(filter_status("on")),
        };
        gate.into_iter().chain(pause).collect()
    }

    /// What follows when the guest runs again.
    pub(crate) fn release(self) -> Vec<String> {
        match self {
            Floor::Plain => Vec::new(),
            Floor::Gated => vec![filter_status("off")],
        }
    }

    /// What undoes the preparation, but for the descriptor.
    pub(crate) fn removal(self) -> Vec<String> {
        match self {
            Floor::Plain => Vec::new(),
            Floor::Gated => {
                vec![r#"{"execute":"object-del","arguments":{"id":"flr0"}}"#.to_owned()]
            }
        }
    }
}

fn filter_status(status: &str) -> String {
    format!(
        r#"{{"execute":"qom-set","arguments":{{"path":"flr0","property":"status","value":"{status}"}}}}"#
    )
}

/// For a device state, as the daemon has one: QEMU wants it to be open for writing only.
pub(crate) fn state_sink() -> Result<File> {
    let memfd = memfd_create(c"floor", MFdFlags::MFD_CLOEXEC)?;
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    Ok(File::options().write(true).open(path)?)
}
