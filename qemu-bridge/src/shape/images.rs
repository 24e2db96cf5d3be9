//! Whether disks' data comes into guest RAM by way of the page cache.
//!
//! The kernel counts a transfer past it as a write when it pins the page, not when the data comes: a
//! page that is copied in between has old bytes in the copy, and is not found written again until the
//! guest is stopped (see [`crate::tracker::Tracker::collect_live`]). `cache.direct=on` is one such way; so
//! are file systems that read into the caller's pages whatever he says, as FUSE may, and 9p and CIFS
//! without a cache. So only those are trusted that are known to copy.

use std::collections::BTreeSet;

use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, ISOFS_SUPER_MAGIC, NFS_SUPER_MAGIC, TMPFS_MAGIC,
    XFS_SUPER_MAGIC, statfs,
};
use serde_json::Value;

/// File systems whose buffered reads copy from the page cache.
const COPYING: [FsType; 6] = [
    BTRFS_SUPER_MAGIC,
    EXT4_SUPER_MAGIC,
    ISOFS_SUPER_MAGIC,
    NFS_SUPER_MAGIC,
    TMPFS_MAGIC,
    XFS_SUPER_MAGIC,
];

/// Drivers that may hand guest RAM to hardware: those of libblkio, VFIO's, and iSCSI's for RDMA.
const PINNING_DRIVERS: [&str; 3] = ["io_uring", "iscsi", "nvme"];

/// Image files that were looked at when the VM was attached to. A look may take long, when a server
/// does not answer: so a file that comes later is not trusted.
#[derive(Debug)]
pub(super) struct Images {
    copied: BTreeSet<String>,
}

impl Images {
    /// From an answer to `query-named-block-nodes` of this process.
    pub(super) fn look(pid: i32, nodes: &Value) -> Images {
        // A name need not lead to what is open. What is open need not be a disk, but then it is
        // rarely on a file system of another kind.
        let trusted = open_files_copy(pid).unwrap_or(false);
        let nodes = nodes.as_array().into_iter().flatten();
        let copied = nodes
            .filter(|node| trusted && node["drv"] == "file")
            .filter_map(|node| node["file"].as_str())
            .map(str::to_owned)
            .collect();
        Images { copied }
    }

    /// Whether the data of one of these nodes may come past the page cache.
    pub(super) fn any_direct(&self, nodes: &Value) -> bool {
        !nodes
            .as_array()
            .is_some_and(|nodes| nodes.iter().all(|node| self.is_copied(node)))
    }

    fn is_copied(&self, node: &Value) -> bool {
        let by_driver = match node["drv"].as_str() {
            Some("file") => node["file"]
                .as_str()
                .is_some_and(|file| self.copied.contains(file)),
            Some(driver) => !PINNING_DRIVERS.iter().any(|it| driver.starts_with(it)),
            None => false,
        };
        by_driver && node["cache"]["direct"] == false
    }
}

/// Whether all regular files that a process has open are on file systems that copy.
fn open_files_copy(pid: i32) -> std::io::Result<bool> {
    for descriptor in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // By this path the kernel looks at the file that is open, whatever its name leads to.
        let path = descriptor?.path();
        let is_file = std::fs::metadata(&path).is_ok_and(|it| it.is_file());
        if is_file && !COPYING.contains(&statfs(&path)?.filesystem_type()) {
            return Ok(false);
        }
    }
    Ok(true)
}
