//! Where soft-dirty bits can't be trusted: what takes a written page out of QEMU's page tables
//! takes its bit along, unless the kernel has another place for it.
//!
//! - **Swap**, for shared RAM: a page of a file that is swapped out leaves an empty entry
//!   (`try_to_unmap_one` in mm/rmap.c). Of private RAM the swap entry carries the bit.
//! - **Huge pages of tmpfs**, for shared RAM: splitting one empties its entries
//!   (`__split_huge_pmd_locked` in mm/huge_memory.c), and khugepaged empties them when it makes one
//!   (`retract_page_tables` in mm/khugepaged.c). Those of private RAM keep the bit.
//! - **KSM**, for private RAM: a page that it merges gets an entry without the bit (`replace_page` in
//!   mm/ksm.c).
//!
//! The uffd tracker has none of this: its mark says "not written", so a lost one is reported.
//! Huge pages of hugetlbfs, which neither sees, are refused with the RAM blocks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::TrackerError;
use crate::blocks::maps::{Mapping, Mappings};
use crate::guest_ram::GuestRam;

/// The three files that are looked at are some hundred bytes, `/proc/swaps` a line per device.
const FILE_BYTES: usize = 4096;

/// What to look at again and again, because an operator can switch it on at any time.
#[derive(Debug)]
pub(super) struct Trust {
    watched: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    hazard: &'static Hazard,
    file: File,
}

#[derive(Debug)]
struct Hazard {
    file: &'static str,
    /// Whether a mapping of guest RAM is exposed to it.
    exposes: fn(&Mapping) -> bool,
    is_on: fn(&str) -> bool,
    what: &'static str,
    cure: &'static str,
}

const HAZARDS: &[Hazard] = &[
    Hazard {
        file: "/proc/swaps",
        exposes: |ram| ram.shared && !ram.locked,
        is_on: |text| text.lines().count() > 1,
        what: "swap is on, and a shared page that is swapped out is forgotten",
        cure: "give QEMU -overcommit mem-lock=on, or switch swap off",
    },
    Hazard {
        file: "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        exposes: |ram| ram.shared,
        is_on: |text| !(text.contains("[never]") || text.contains("[deny]")),
        what: "tmpfs may use huge pages, and writes to one that is split or made are forgotten",
        cure: "write never to /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    },
    Hazard {
        file: "/sys/kernel/mm/ksm/run",
        exposes: |ram| !ram.shared && ram.mergeable,
        is_on: |text| text.trim() == "1",
        what: "KSM is on, and a page that it merges is forgotten",
        cure: "give QEMU -machine mem-merge=off, or write 2 to /sys/kernel/mm/ksm/run",
    },
];

impl Trust {
    /// Looks at how QEMU has mapped this RAM.
    ///
    /// # Errors
    /// Writes to some of it could be forgotten.
    pub(super) fn of(ram: &GuestRam) -> Result<Trust, TrackerError> {
        let pid = ram.pid();
        let mappings = Mappings::read(pid).map_err(|error| TrackerError::Process {
            operation: "reading the mappings of",
            pid,
            source: io::Error::other(error),
        })?;
        let mut exposed: Vec<&Mapping> = Vec::new();
        for (start, bytes) in ram.host_ranges() {
            let inside = |m: &&Mapping| m.start < start + bytes && start < m.end;
            exposed.extend(mappings.0.iter().filter(inside));
        }
        if let Some(huge) = exposed.iter().find(|m| m.shared && m.huge_allowed) {
            return Err(TrackerError::Untrusted {
                what: format!("{} may have huge pages of tmpfs", huge.path),
                cure: "mount it without huge=, or use a memfd",
            });
        }
        let mut watched = Vec::new();
        for hazard in HAZARDS {
            if !exposed.iter().any(|mapping| (hazard.exposes)(mapping)) {
                continue;
            }
            match File::open(hazard.file) {
                Ok(file) => watched.push(Watched { hazard, file }),
                // A kernel that was built without it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(unreadable(hazard, source)),
            }
        }
        let trust = Trust { watched };
        trust.check()?;
        Ok(trust)
    }

    /// # Errors
    /// One of them was switched on: writes may have been forgotten.
    pub(super) fn check(&self) -> Result<(), TrackerError> {
        for Watched { hazard, file } in &self.watched {
            let mut buffer = [0; FILE_BYTES];
            let bytes = file.read_at(&mut buffer, 0);
            let bytes = bytes.map_err(|source| unreadable(hazard, source))?;
            if (hazard.is_on)(&String::from_utf8_lossy(&buffer[..bytes])) {
                return Err(TrackerError::Untrusted {
                    what: hazard.what.to_owned(),
                    cure: hazard.cure,
                });
            }
        }
        Ok(())
    }
}

fn unreadable(hazard: &Hazard, source: io::Error) -> TrackerError {
    TrackerError::Untrusted {
        what: format!("{} can't be read ({source})", hazard.file),
        cure: "run as root",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazards_are_told_from_what_the_kernel_says() {
        let [swaps, shmem, ksm] = HAZARDS else {
            panic!("as listed")
        };
        let head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        assert!(!(swaps.is_on)(head));
        assert!((swaps.is_on)(&format!(
            "{head}/dev/sda2 partition 1 0 -2\n"
        )));
        let modes = "always within_size advise [never] deny force\n";
        assert!(!(shmem.is_on)(modes));
        assert!((shmem.is_on)(
            "always within_size [advise] never deny force\n"
        ));
        assert!((ksm.is_on)("1\n"));
        assert!(!(ksm.is_on)("0\n") && !(ksm.is_on)("2\n"));
    }
}
