//! The saved state of a VM's devices: where QEMU writes it, and what it looks like.
//!
//! `xen-save-devices-state` has nothing to do with Xen: it writes every vmstate section except
//! RAM. It is told to write to a descriptor that it was given, and that descriptor is a memfd of ours.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use ft_core::limits::DEVICE_STATE_BYTES_MAX;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::qmp::{Command, Qmp, QmpError};

/// `QEVM`, then version 3, both big-endian.
const HEADER: [u8; 8] = *b"QEVM\0\0\0\x03";
const END: u8 = 0x00;
const SECTION_FULL: u8 = 0x04;
const SECTION_FOOTER: u8 = 0x7e;
/// Bytes of a footer: the mark and the section's id.
const FOOTER_BYTES: usize = 5;
/// Sections of one state that are listed at most.
const SECTIONS_MAX: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{operation} failed for the device state")]
    Io {
        operation: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("QEMU answered add-fd without a descriptor set")]
    NoFdset,
    #[error("the device state is {0} bytes, more than {DEVICE_STATE_BYTES_MAX}")]
    TooLong(u64),
    #[error("the device state is broken: {0}")]
    Malformed(&'static str),
}

/// Where one QEMU writes its device state, over and over.
#[derive(Debug)]
pub struct StateSink {
    memory: File,
    /// Shares its file position with the descriptor that QEMU writes to, so that it tells how
    /// much was written and can be set back.
    writer: File,
    fdset: u64,
}

impl StateSink {
    /// Makes the memory and hands it to QEMU. Blocks.
    ///
    /// # Errors
    /// No memory or descriptors are left, or QEMU refuses the descriptor.
    pub fn install(qmp: &mut Qmp, timeout: Duration) -> Result<StateSink, StateError> {
        let memory =
            memfd_create("ft-device-state", MFdFlags::MFD_CLOEXEC).map_err(|e| StateError::Io {
                operation: "memfd_create",
                source: e.into(),
            })?;
        // QEMU picks from the set by access mode, and it asks for writing only.
        let writer = OpenOptions::new()
            .write(true)
            .open(format!("/proc/self/fd/{}", memory.as_raw_fd()))
            .map_err(|source| StateError::Io {
                operation: "reopening for writing",
                source,
            })?;
        let answer = qmp.call_with_fd(&Command::new("add-fd"), writer.as_fd(), timeout)?;
        let fdset = answer["fdset-id"].as_u64().ok_or(StateError::NoFdset)?;
        Ok(StateSink {
            memory: File::from(memory),
            writer,
            fdset,
        })
    }

    /// The command that saves here. `live` must be said: without it QEMU gives the disks away.
    pub fn save_command(&self) -> Command {
        Command::new("xen-save-devices-state")
            .arg("filename", format!("/dev/fdset/{}", self.fdset))
            .arg("live", false)
    }

    /// The command by which QEMU forgets the descriptor: for a clean detach.
    pub fn remove_command(&self) -> Command {
        Command::new("remove-fd").arg("fdset-id", self.fdset)
    }

    /// Before each save: the next one begins at the start again.
    ///
    /// # Errors
    /// The kernel refuses to seek.
    pub fn rewind(&mut self) -> Result<(), StateError> {
        let source = |source| StateError::Io {
            operation: "rewinding",
            source,
        };
        self.writer.rewind().map_err(source)
    }

    /// Bytes that the last save wrote.
    ///
    /// # Errors
    /// More than [`DEVICE_STATE_BYTES_MAX`].
    pub fn saved_bytes(&mut self) -> Result<usize, StateError> {
        let source = |source| StateError::Io {
            operation: "asking for the length",
            source,
        };
        let position = self.writer.stream_position().map_err(source)?;
        match usize::try_from(position) {
            Ok(length) if length <= DEVICE_STATE_BYTES_MAX => Ok(length),
            _ => Err(StateError::TooLong(position)),
        }
    }

    /// Copies what the last save wrote from byte `at` on.
    ///
    /// # Errors
    /// There is less than that.
    pub fn read_into(&self, at: usize, out: &mut [u8]) -> Result<(), StateError> {
        let source = |source| StateError::Io {
            operation: "reading",
            source,
        };
        self.memory.read_exact_at(out, at as u64).map_err(source)
    }

    /// All of what the last save wrote, checked for its form.
    ///
    /// # Errors
    /// It is too long, or no device state.
    pub fn read(&mut self) -> Result<Vec<u8>, StateError> {
        let mut state = vec![0; self.saved_bytes()?];
        self.read_into(0, &mut state)?;
        check(&state)?;
        Ok(state)
    }

    /// The memory itself; longer than the last save if an earlier one was.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

/// Puts a device state into a memfd of exactly its size, ready to be loaded.
///
/// # Errors
/// No memory or descriptors are left.
pub fn into_memory(state: &[u8]) -> Result<File, StateError> {
    let fail = |operation| move |source| StateError::Io { operation, source };
    let memory = memfd_create("ft-device-state", MFdFlags::MFD_CLOEXEC)
        .map_err(|e| fail("memfd_create")(e.into()))?;
    let memory = File::from(memory);
    memory.write_all_at(state, 0).map_err(fail("writing"))?;
    Ok(memory)
}

/// Checks what can be seen without knowing the devices: the header, and that it was ended.
///
/// # Errors
/// Says what is wrong.
pub fn check(state: &[u8]) -> Result<(), StateError> {
    if state.len() > DEVICE_STATE_BYTES_MAX {
        return Err(StateError::TooLong(state.len() as u64));
    }
    if !state.starts_with(&HEADER) {
        return Err(StateError::Malformed(
            "it doesn't begin with QEVM, version 3",
        ));
    }
    match state[HEADER.len()..].last() {
        Some(&END) => Ok(()),
        _ => Err(StateError::Malformed("it has no end mark")),
    }
}

/// What one device adds to the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// As QEMU names it, for instance `0000:00:03.0/virtio-net`.
    pub name: String,
    pub instance: u32,
    pub bytes: usize,
}

/// The sections of a state, for a report of what each device costs.
///
/// A section doesn't say how long it is; its end is the footer with its own id, directly before
/// another section or the end.
///
/// # Errors
/// The state is malformed, or has more than 4,096 sections.
pub fn sections(state: &[u8]) -> Result<Vec<Section>, StateError> {
    check(state)?;
    let mut sections = Vec::new();
    let mut rest = &state[HEADER.len()..];
    while rest != [END] {
        if sections.len() == SECTIONS_MAX {
            return Err(StateError::Malformed("it has too many sections"));
        }
        let head =
            Head::parse(rest).ok_or(StateError::Malformed("a section doesn't begin as one"))?;
        let bytes = head
            .find_end(rest)
            .ok_or(StateError::Malformed("a section doesn't end"))?;
        sections.push(Section {
            name: head.name.to_owned(),
            instance: head.instance,
            bytes,
        });
        rest = &rest[bytes..];
    }
    Ok(sections)
}

/// The beginning of a section: mark, id, name, instance, version.
struct Head<'a> {
    id: [u8; 4],
    name: &'a str,
    instance: u32,
    bytes: usize,
}

impl Head<'_> {
    fn parse(bytes: &[u8]) -> Option<Head<'_>> {
        let (mark, rest) = bytes.split_first()?;
        let (id, rest) = rest.split_first_chunk::<4>()?;
        let (length, rest) = rest.split_first()?;
        let (name, rest) = rest.split_at_checked(usize::from(*length))?;
        let (instance, rest) = rest.split_first_chunk::<4>()?;
        let (_version, rest) = rest.split_first_chunk::<4>()?;
        let name = std::str::from_utf8(name).ok()?;
        let named = !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
        (*mark == SECTION_FULL && named).then_some(Head {
            id: *id,
            name,
            instance: u32::from_be_bytes(*instance),
            bytes: bytes.len() - rest.len(),
        })
    }

    /// How many bytes of `section`, which begins with this head, belong to it.
    fn find_end(&self, section: &[u8]) -> Option<usize> {
        let mut from = self.bytes;
        loop {
            let found = section[from..].iter().position(|b| *b == SECTION_FOOTER)?;
            let footer = from + found;
            let after = section.get(footer + FOOTER_BYTES..)?;
            let ours = section[footer + 1..footer + FOOTER_BYTES] == self.id;
            if ours && (after == [END] || Head::parse(after).is_some()) {
                return Some(footer + FOOTER_BYTES);
            }
            from = footer + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(id: u32, name: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![SECTION_FULL];
        bytes.extend(id.to_be_bytes());
        bytes.push(u8::try_from(name.len()).unwrap());
        bytes.extend(name.as_bytes());
        bytes.extend([0, 0, 0, 2, 0, 0, 0, 1]);
        bytes.extend(data);
        bytes.push(SECTION_FOOTER);
        bytes.extend(id.to_be_bytes());
        bytes
    }

    #[test]
    fn sections_are_told_apart_even_if_data_looks_like_a_footer() {
        let tricky = [&[SECTION_FOOTER, 0, 0, 0, 5, 1][..], &[SECTION_FOOTER]].concat();
        let parts = [
            section(5, "timer", &tricky),
            section(9, "0000:00:03.0/virtio-net", &[7; 100]),
        ];
        let state = [&HEADER[..], &parts[0], &parts[1], &[END]].concat();
        let expected = [
            ("timer", parts[0].len()),
            ("0000:00:03.0/virtio-net", parts[1].len()),
        ];
        let found = sections(&state).unwrap();
        assert_eq!(
            found
                .iter()
                .map(|s| (s.name.as_str(), s.bytes))
                .collect::<Vec<_>>(),
            expected
        );
        assert_eq!(found[0].instance, 2);
    }

    #[test]
    fn every_cut_is_noticed() {
        let state = [&HEADER[..], &section(5, "timer", &[1; 9]), &[END]].concat();
        for length in 0..state.len() {
            assert!(sections(&state[..length]).is_err(), "{length} bytes");
        }
        assert!(sections(&state).is_ok());
    }
}
