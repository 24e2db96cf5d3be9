//! `/proc/PID/smaps`: what a process has mapped.

use std::fs::File;
use std::io::{BufRead, BufReader};

use super::BlocksError;

/// One line range of `/proc/PID/smaps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub start: u64,
    pub end: u64,
    pub writable: bool,
    pub executable: bool,
    pub shared: bool,
    pub file_offset: u64,
    /// As `stat` has it.
    pub device: u64,
    /// 0: no file.
    pub inode: u64,
    pub path: String,
    /// `MADV_DONTFORK` was set, as QEMU does for every RAM block.
    pub dont_fork: bool,
    /// `mlock` or the like: never swapped out.
    pub locked: bool,
    /// `MADV_MERGEABLE`: KSM may share its pages.
    pub mergeable: bool,
    /// It has transparent huge pages of a file, or may get some.
    pub huge_allowed: bool,
}

impl Mapping {
    pub(super) fn is_file(&self) -> bool {
        self.inode != 0
    }

    pub(super) fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// One of the lines behind the first (`Documentation/filesystems/proc.rst`).
    fn note_detail(&mut self, line: &str) {
        let Some((name, value)) = line.split_once(':') else {
            return;
        };
        let value = value.trim();
        match name {
            "VmFlags" => {
                let has = |flag| value.split_whitespace().any(|f| f == flag);
                self.dont_fork = has("dc");
                self.locked = has("lo");
                self.mergeable = has("mg");
            }
            "THPeligible" => self.huge_allowed |= value != "0",
            "ShmemPmdMapped" | "FilePmdMapped" => self.huge_allowed |= value != "0 kB",
            _ => {}
        }
    }

    /// Whether `next` goes on where this one ends, in the same file: the kernel splits a mapping
    /// when an attribute of a part of it changes.
    fn continues_in(&self, next: &Mapping) -> bool {
        let same = (self.shared, self.writable, self.device, self.inode)
            == (next.shared, next.writable, next.device, next.inode);
        let in_file = !self.is_file() || self.file_offset + self.bytes() == next.file_offset;
        self.end == next.start && same && in_file
    }
}

/// All mappings of a process, in order of their addresses.
#[derive(Debug)]
pub(crate) struct Mappings(pub(crate) Vec<Mapping>);

impl Mappings {
    pub(crate) fn read(pid: i32) -> Result<Mappings, BlocksError> {
        let failed = |source| BlocksError::Process {
            what: "/proc/PID/smaps".to_owned(),
            pid,
            source,
        };
        let file = File::open(format!("/proc/{pid}/smaps")).map_err(failed)?;
        let mut mappings: Vec<Mapping> = Vec::new();
        for line in BufReader::new(file).lines() {
            let line = line.map_err(failed)?;
            if let Some(mapping) = parse_head(&line) {
                mappings.push(mapping);
            } else if let Some(last) = mappings.last_mut() {
                last.note_detail(&line);
            }
        }
        Ok(Mappings(mappings))
    }

    /// The mapping that holds `address`, if from there on at least `bytes` are mapped writable.
    pub(super) fn covering(&self, address: u64, bytes: u64) -> Option<&Mapping> {
        let end = address.checked_add(bytes)?;
        let first = self
            .0
            .iter()
            .position(|m| m.start <= address && address < m.end)?;
        let mut last = &self.0[first];
        for next in &self.0[first + 1..] {
            if last.end >= end || !last.continues_in(next) {
                break;
            }
            last = next;
        }
        (last.end >= end && last.writable).then(|| &self.0[first])
    }

    /// Whether a RAM block of exactly `bytes` is mapped at `address`: it begins and ends there,
    /// and is marked as QEMU marks its RAM.
    pub(super) fn is_ram_block(&self, address: u64, bytes: u64) -> bool {
        let Some(first) = self.0.iter().position(|m| m.start == address) else {
            return false;
        };
        let mut last = &self.0[first];
        for next in &self.0[first + 1..] {
            if !last.continues_in(next) {
                break;
            }
            last = next;
        }
        let marked = self.0[first..]
            .iter()
            .take_while(|m| m.end <= last.end)
            .all(|m| m.dont_fork);
        last.end - address == bytes && last.writable && marked
    }
}

/// `START-END rw-p OFFSET MAJOR:MINOR INODE   PATH`, or `None` for the lines between.
fn parse_head(line: &str) -> Option<Mapping> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    let permissions = words.next()?.as_bytes();
    let file_offset = u64::from_str_radix(words.next()?, 16).ok()?;
    let (major, minor) = words.next()?.split_once(':')?;
    let (major, minor) = (
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    let inode = words.next()?.parse().ok()?;
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        writable: permissions.get(1) == Some(&b'w'),
        executable: permissions.get(2) == Some(&b'x'),
        shared: permissions.get(3) == Some(&b's'),
        file_offset,
        device: libc::makedev(major, minor),
        inode,
        path: words.next().unwrap_or("").trim().to_owned(),
        dont_fork: false,
        locked: false,
        mergeable: false,
        huge_allowed: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, end: u64, inode: u64, file_offset: u64) -> Mapping {
        Mapping {
            start,
            end,
            writable: true,
            executable: false,
            shared: inode != 0,
            file_offset,
            device: 1,
            inode,
            path: String::new(),
            dont_fork: true,
            locked: false,
            mergeable: false,
            huge_allowed: false,
        }
    }

    #[test]
    fn head_line_is_told_from_the_details() {
        let line = "7f8297e00000-7f829be00000 rw-s 00001000 00:01 1234                       /memfd:a b (deleted)";
        let m = parse_head(line).unwrap();
        assert_eq!((m.start, m.end), (0x7f82_97e0_0000, 0x7f82_9be0_0000));
        assert!(m.shared && m.writable && !m.executable);
        assert_eq!(
            (m.file_offset, m.inode, m.path.as_str()),
            (0x1000, 1234, "/memfd:a b (deleted)")
        );
        assert_eq!(parse_head("Size:              65536 kB"), None);
        assert_eq!(parse_head("VmFlags: rd wr mr mw me dc ac"), None);
    }

    #[test]
    fn details_of_a_mapping() {
        let mut m = mapping(0x1000, 0x3000, 7, 0);
        let plain = [
            "ShmemPmdMapped:        0 kB",
            "THPeligible:    0",
            "VmFlags: rd wr sh",
        ];
        plain.iter().for_each(|line| m.note_detail(line));
        assert!(!(m.dont_fork || m.locked || m.mergeable || m.huge_allowed));
        m.note_detail("VmFlags: rd wr sh lo dc mg sd");
        m.note_detail("ShmemPmdMapped:     2048 kB");
        assert!(m.dont_fork && m.locked && m.mergeable && m.huge_allowed);
        m.huge_allowed = false;
        m.note_detail("THPeligible:           1");
        assert!(m.huge_allowed);
    }

    #[test]
    fn split_mapping_counts_as_one_if_the_file_goes_on() {
        let whole = Mappings(vec![
            mapping(0x1000, 0x3000, 7, 0),
            mapping(0x3000, 0x4000, 7, 0x2000),
        ]);
        assert!(whole.covering(0x1000, 0x3000).is_some());
        assert!(whole.is_ram_block(0x1000, 0x3000));
        assert!(whole.covering(0x1000, 0x3001).is_none());
        let torn = Mappings(vec![
            mapping(0x1000, 0x3000, 7, 0),
            mapping(0x3000, 0x4000, 7, 0x3000),
        ]);
        assert!(torn.covering(0x1000, 0x3000).is_none());
        assert!(!torn.is_ram_block(0x1000, 0x3000));
    }
}
