//! The RAM blocks of a running QEMU: what they are called, and where their bytes can be reached.
//!
//! QEMU lists its blocks (`info ramblock`). Since 8.1 or so it also prints where each of them
//! lies in its address space; for older ones the address is found in QEMU's own record of the block
//! ([`record`]) and proven by a memory mapping that begins there and is as long as the block.
//! Nothing is guessed: a block that is not found exactly is an error that names it.

mod listing;
pub(crate) mod maps;
mod record;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use ft_core::limits::BLOCKS_MAX;
use ft_core::shape::{BlockShape, MAIN_RAM};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use serde_json::Value;

pub use listing::{ListedBlock, parse_listing};

use crate::qmp::{Command, Qmp, QmpError};
use maps::{Mapping, Mappings};

const PAGE: u64 = ft_core::types::PAGE_BYTES as u64;

/// One RAM block of a running QEMU.
#[derive(Debug)]
pub struct RamBlock {
    /// The same on both hosts: QEMU's name, or [`MAIN_RAM`].
    pub name: String,
    pub qemu_name: String,
    /// The used length, rounded up to whole pages.
    pub bytes: u64,
    /// The guest can't write it. QEMU can (it builds the ACPI tables anew when the guest reboots), so
    /// it is tracked like any other block. False where QEMU does not say, before 8.1.
    pub read_only: bool,
    pub backing: Backing,
}

/// How another process reaches a block's bytes.
#[derive(Debug)]
pub enum Backing {
    /// QEMU maps a tmpfs file or a memfd shared; `fd` is open for reading and writing.
    Shared {
        fd: OwnedFd,
        /// Where in the file the block begins.
        offset: u64,
        /// Where QEMU has it.
        host_address: u64,
    },
    /// Only QEMU maps it: `process_vm_readv` or `/proc/PID/mem`.
    Private { host_address: u64 },
}

impl Backing {
    /// Where the block begins in QEMU's address space.
    pub fn host_address(&self) -> u64 {
        match self {
            Backing::Shared { host_address, .. } | Backing::Private { host_address } => {
                *host_address
            }
        }
    }
}

impl RamBlock {
    /// The part of the block that the two hosts compare.
    pub fn shape(&self) -> BlockShape {
        BlockShape {
            name: self.name.clone(),
            bytes: self.bytes,
            read_only: self.read_only,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum BlocksError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("`info ramblock` has a line that can't be understood: {line:?}")]
    Listing { line: String },
    #[error("QEMU has more than {BLOCKS_MAX} RAM blocks")]
    TooMany,
    #[error("two RAM blocks are called {name}")]
    SameName { name: String },
    #[error(
        "reading {what} of QEMU's process {pid} failed: run as root, or as QEMU's user with ptrace allowed"
    )]
    Process {
        what: String,
        pid: i32,
        source: io::Error,
    },
    #[error(
        "RAM block {name} has pages of {page_size}: huge pages can't be tracked; back it with tmpfs or a memfd without hugetlb=on"
    )]
    HugePages { name: String, page_size: String },
    #[error(
        "the address of RAM block {name} can't be proven ({why}): use QEMU 8.1 or newer, which prints it, or leave the device out that owns the block"
    )]
    AddressUnknown { name: String, why: String },
    #[error(
        "RAM block {name} is a private mapping of the file {path}: add share=on to its memory backend"
    )]
    PrivateFile { name: String, path: String },
    #[error(
        "RAM block {name} lies in {path}, which is not on tmpfs: use -object memory-backend-memfd,share=on or a mem-path on /dev/shm"
    )]
    NotTmpfs { name: String, path: String },
}

/// Finds every RAM block of the QEMU with process id `pid`, sorted by name. Blocks. Blocks that are
/// empty are left out.
///
/// # Errors
/// A block can't be reached or not be told apart: the message names it and says what to do.
pub fn ram_blocks(
    qmp: &mut Qmp,
    pid: i32,
    timeout: Duration,
) -> Result<Vec<RamBlock>, BlocksError> {
    find_blocks(qmp, pid, timeout, PrivateFiles::Refused)
}

/// As [`ram_blocks`], of a QEMU that runs on a private copy of somebody else's RAM.
///
/// # Errors
/// As [`ram_blocks`].
pub fn ram_blocks_of_copy(
    qmp: &mut Qmp,
    pid: i32,
    timeout: Duration,
) -> Result<Vec<RamBlock>, BlocksError> {
    find_blocks(qmp, pid, timeout, PrivateFiles::Allowed)
}

/// Whether a file may be mapped privately: what is written then never reaches the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PrivateFiles {
    Refused,
    Allowed,
}

fn find_blocks(
    qmp: &mut Qmp,
    pid: i32,
    timeout: Duration,
    private_files: PrivateFiles,
) -> Result<Vec<RamBlock>, BlocksError> {
    let listed = parse_listing(&qmp.human("info ramblock", timeout)?)?;
    let main = main_ram_name(qmp, timeout)?;
    let mappings = Mappings::read(pid)?;
    let addresses = match listed.iter().map(|b| b.host_address).collect() {
        Some(printed) => printed,
        None => record::find_addresses(pid, &listed, &mappings)?,
    };
    let mut blocks = Vec::with_capacity(listed.len());
    for (block, address) in listed.into_iter().zip(addresses) {
        blocks.push(RamBlock {
            name: canonical_name(&block.name, main.as_deref()),
            bytes: block.used_bytes.next_multiple_of(PAGE),
            read_only: block.read_only.unwrap_or(false),
            backing: find_backing(pid, &block, address, &mappings, private_files)?,
            qemu_name: block.name,
        });
    }
    blocks.sort_by(|a, b| a.name.cmp(&b.name));
    match blocks.windows(2).find(|pair| pair[0].name == pair[1].name) {
        Some(pair) => Err(BlocksError::SameName {
            name: pair[0].name.clone(),
        }),
        None => Ok(blocks),
    }
}

/// What QEMU calls the machine's main RAM: the path of its memory backend, such as `/objects/ram`.
fn main_ram_name(qmp: &mut Qmp, timeout: Duration) -> Result<Option<String>, BlocksError> {
    let get = Command::new("qom-get")
        .arg("path", "/machine")
        .arg("property", "memory-backend");
    match qmp.call(get, timeout) {
        Ok(Value::String(path)) if !path.is_empty() => Ok(Some(path)),
        Ok(_) => Ok(None),
        // A machine with NUMA nodes of its own backends has none.
        Err(QmpError::Refused { .. }) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// A block is named after its backend's id; by machine types before 4.0 after its whole path.
fn canonical_name(qemu_name: &str, main: Option<&str>) -> String {
    let id = main.and_then(|path| path.rsplit('/').next());
    match main == Some(qemu_name) || id == Some(qemu_name) {
        true => MAIN_RAM.to_owned(),
        false => qemu_name.to_owned(),
    }
}

fn find_backing(
    pid: i32,
    block: &ListedBlock,
    address: u64,
    mappings: &Mappings,
    private_files: PrivateFiles,
) -> Result<Backing, BlocksError> {
    let mapping = mappings
        .covering(address, block.used_bytes.next_multiple_of(PAGE))
        .ok_or_else(|| BlocksError::AddressUnknown {
            name: block.name.clone(),
            why: format!("nothing is mapped for all of it at {address:#x}"),
        })?;
    if !mapping.is_file() || (!mapping.shared && private_files == PrivateFiles::Allowed) {
        return Ok(Backing::Private {
            host_address: address,
        });
    }
    if !mapping.shared {
        return Err(BlocksError::PrivateFile {
            name: block.name.clone(),
            path: mapping.path.clone(),
        });
    }
    Ok(Backing::Shared {
        fd: open_mapped_file(pid, block, mapping)?,
        offset: mapping.file_offset + (address - mapping.start),
        host_address: address,
    })
}

/// Opens the file that QEMU maps, even if it has no name any more.
fn open_mapped_file(
    pid: i32,
    block: &ListedBlock,
    mapping: &Mapping,
) -> Result<OwnedFd, BlocksError> {
    let file = open_map_file(pid, mapping).or_else(|by_range| {
        // Without CAP_CHECKPOINT_RESTORE, through a descriptor that QEMU still has open.
        open_same_file(pid, mapping).ok_or_else(|| BlocksError::Process {
            what: format!("the file behind RAM block {}", block.name),
            pid,
            source: by_range,
        })
    })?;
    let kind = fstatfs(&file).map_err(|e| BlocksError::Process {
        what: format!("the file system of RAM block {}", block.name),
        pid,
        source: e.into(),
    })?;
    match kind.filesystem_type() {
        TMPFS_MAGIC => Ok(file.into()),
        HUGETLBFS_MAGIC => Err(BlocksError::HugePages {
            name: block.name.clone(),
            page_size: "a hugetlbfs file".to_owned(),
        }),
        _ => Err(BlocksError::NotTmpfs {
            name: block.name.clone(),
            path: mapping.path.clone(),
        }),
    }
}

fn open_map_file(pid: i32, mapping: &Mapping) -> io::Result<File> {
    let path = format!(
        "/proc/{pid}/map_files/{:x}-{:x}",
        mapping.start, mapping.end
    );
    OpenOptions::new().read(true).write(true).open(path)
}

fn open_same_file(pid: i32, mapping: &Mapping) -> Option<File> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    entries.flatten().find_map(|entry| {
        let metadata = std::fs::metadata(entry.path()).ok()?;
        if !metadata.is_file()
            || metadata.ino() != mapping.inode
            || metadata.dev() != mapping.device
        {
            return None;
        }
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(entry.path())
            .ok()
    })
}
