//! Looking into a QEMU's memory from outside, independently of the product.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;

pub const PAGE: usize = 4096;

/// One RAM block as this side has found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    pub name: String,
    pub address: u64,
    pub bytes: usize,
}

/// The memory of one QEMU.
#[derive(Debug)]
pub struct Memory {
    file: File,
    pub blocks: Vec<Block>,
    /// Blocks whose address can't be told from outside.
    pub missing: Vec<String>,
    /// Of the files that blocks are mapped from.
    pub inodes: Vec<u64>,
}

/// The bytes of all blocks at one moment.
#[derive(Debug, Default)]
pub struct Copy {
    pub blocks: Vec<(String, Vec<u8>)>,
}

impl Memory {
    /// Finds the RAM blocks of a QEMU from what its monitor says (`info ramblock`) and from the
    /// process's memory map. The main RAM is a memfd that is called `ram`.
    ///
    /// # Errors
    /// The main RAM is not found.
    pub fn open(pid: Pid, ramblock: &str) -> Result<Memory> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("reading maps")?;
        let mut blocks = Vec::new();
        let mut missing = Vec::new();
        for line in ramblock.lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // NAME SIZE UNIT OFFSET USED TOTAL [HVA RO]
            let [name, _, "KiB" | "MiB" | "GiB", _, used, total, rest @ ..] = fields.as_slice()
            else {
                continue;
            };
            let (Some(used), Some(total)) = (hex(used), hex(total)) else {
                continue;
            };
            let printed = rest.first().and_then(|text| hex(text));
            let is_main = *name == "ram" || name.ends_with("/ram");
            let address = printed.or_else(|| {
                if is_main {
                    main_ram(&maps)
                } else {
                    unique(&maps, total)
                }
            });
            match address {
                Some(address) => blocks.push(Block {
                    name: (*name).to_owned(),
                    address,
                    bytes: usize::try_from(used)?,
                }),
                None if is_main => bail!("the main RAM is not in the memory map"),
                None => missing.push((*name).to_owned()),
            }
        }
        let file =
            File::open(format!("/proc/{pid}/mem")).context("opening the process's memory")?;
        let inodes = blocks
            .iter()
            .filter_map(|block| inode_at(&maps, block.address))
            .collect();
        Ok(Memory {
            file,
            blocks,
            missing,
            inodes,
        })
    }

    /// Eight bytes of the main RAM at a guest-physical address below 3 GiB.
    ///
    /// # Errors
    /// The process is gone.
    pub fn read_u64(&self, guest_address: u64) -> Result<u64> {
        let is_main = |b: &&Block| b.name == "ram" || b.name.ends_with("/ram");
        let main = self.blocks.iter().find(is_main).context("no main RAM")?;
        let mut bytes = [0; 8];
        self.file
            .read_exact_at(&mut bytes, main.address + guest_address)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// One page of a block, or what there is of it at the block's end.
    ///
    /// # Errors
    /// The process is gone, or has no such block.
    pub fn read_page(&self, name: &str, page: usize) -> Result<Vec<u8>> {
        let block = self.blocks.iter().find(|b| b.name == name);
        let block = block.with_context(|| format!("no block {name}"))?;
        let mut bytes = vec![0; block.bytes.saturating_sub(page * PAGE).min(PAGE)];
        self.file
            .read_exact_at(&mut bytes, block.address + (page * PAGE) as u64)?;
        Ok(bytes)
    }

    /// # Errors
    /// The process is gone.
    pub fn copy(&self) -> Result<Copy> {
        self.copy_into(Copy::default())
    }

    /// The same in the room of an old copy, which is faster: the kernel need not find new pages.
    ///
    /// # Errors
    /// The process is gone.
    pub fn copy_into(&self, mut room: Copy) -> Result<Copy> {
        room.blocks.resize_with(self.blocks.len(), Default::default);
        for (block, (name, bytes)) in self.blocks.iter().zip(&mut room.blocks) {
            name.clone_from(&block.name);
            bytes.resize(block.bytes, 0);
            self.file.read_exact_at(bytes, block.address)?;
        }
        Ok(room)
    }
}

impl Copy {
    /// One page of a block, or what there is of it at the block's end.
    pub fn page(&self, name: &str, page: usize) -> Option<&[u8]> {
        let (_, bytes) = self.blocks.iter().find(|(n, _)| n == name)?;
        bytes.chunks(PAGE).nth(page)
    }

    /// The first byte that differs, by block.
    pub fn difference(&self, other: &Copy) -> Option<String> {
        for (name, bytes) in &self.blocks {
            let Some((_, theirs)) = other.blocks.iter().find(|(n, _)| n == name) else {
                return Some(format!("block {name} is missing"));
            };
            if bytes.len() != theirs.len() {
                return Some(format!(
                    "block {name}: {} and {} bytes",
                    bytes.len(),
                    theirs.len()
                ));
            }
            if bytes != theirs {
                let at = bytes
                    .iter()
                    .zip(theirs)
                    .position(|(a, b)| a != b)
                    .unwrap_or(0);
                let (ours, theirs) = (bytes[at], theirs[at]);
                return Some(format!(
                    "block {name}, byte {at:#x}: {ours:#04x} and {theirs:#04x}"
                ));
            }
        }
        None
    }
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// Start, end and the rest of each line of a memory map.
fn mappings(maps: &str) -> impl Iterator<Item = (u64, u64, &str)> {
    maps.lines().filter_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        Some((
            u64::from_str_radix(start, 16).ok()?,
            u64::from_str_radix(end, 16).ok()?,
            rest,
        ))
    })
}

fn main_ram(maps: &str) -> Option<u64> {
    let is_ram =
        |rest: &str| rest.contains("memory-backend-memfd") || rest.contains("memfd:ft-ram");
    mappings(maps)
        .find(|(_, _, rest)| is_ram(rest))
        .map(|(start, ..)| start)
}

/// QEMU aligns RAM blocks for huge pages, small ones too.
const ALIGNMENT: u64 = 2 << 20;

/// The only anonymous mapping of this length that lies as QEMU lays RAM blocks: aligned, and with a
/// guard page behind it (`qemu_ram_mmap`, util/mmap-alloc.c). A small mapping of somebody else may have
/// either by chance.
fn unique(maps: &str, bytes: u64) -> Option<u64> {
    let anonymous = |rest: &str| rest.starts_with("rw-p") && rest.trim_end().ends_with(" 0");
    let next = mappings(maps).skip(1);
    let mut fits = mappings(maps)
        .zip(next)
        .filter(|((start, end, rest), (next_start, _, next_rest))| {
            let guarded = next_start == end && next_rest.starts_with("---p");
            end - start == bytes && start % ALIGNMENT == 0 && anonymous(rest) && guarded
        })
        .map(|((start, ..), _)| start);
    let found = fits.next();
    found.filter(|_| fits.next().is_none())
}

/// The file, if it is one, that is mapped at an address.
fn inode_at(maps: &str, address: u64) -> Option<u64> {
    let (_, _, rest) = mappings(maps).find(|(start, end, _)| (*start..*end).contains(&address))?;
    let inode = rest.split_whitespace().nth(3)?.parse().ok()?;
    (inode != 0).then_some(inode)
}
