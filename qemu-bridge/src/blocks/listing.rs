//! `info ramblock`, the human monitor's list of RAM blocks.

use super::{BLOCKS_MAX, BlocksError};

/// A line of `info ramblock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedBlock {
    pub name: String,
    /// Where it begins in QEMU's numbering of all blocks; tells nothing about the guest's view.
    pub ram_offset: u64,
    pub used_bytes: u64,
    /// What it may grow to, and what is mapped for it.
    pub max_bytes: u64,
    /// Where QEMU has it, if this version says.
    pub host_address: Option<u64>,
    pub read_only: Option<bool>,
}

/// Parses what `info ramblock` printed, without the blocks that are empty.
///
/// # Errors
/// A line has another form, there are too many blocks, or one has huge pages.
pub fn parse_listing(text: &str) -> Result<Vec<ListedBlock>, BlocksError> {
    let mut blocks = Vec::new();
    for line in text.lines().filter(|l| !l.trim().is_empty()).skip(1) {
        let unknown = || BlocksError::Listing {
            line: line.to_owned(),
        };
        let (block, page_size) = parse_line(line).ok_or_else(unknown)?;
        if block.used_bytes > block.max_bytes {
            return Err(unknown());
        }
        if page_size != "4 KiB" && block.used_bytes > 0 {
            return Err(BlocksError::HugePages {
                name: block.name,
                page_size,
            });
        }
        if block.used_bytes > 0 {
            blocks.push(block);
        }
        if blocks.len() > BLOCKS_MAX {
            return Err(BlocksError::TooMany);
        }
    }
    Ok(blocks)
}

/// `NAME  4 KiB  OFFSET USED TOTAL`, and since 8.1 ` ADDRESS ro|rw`; also the page size.
fn parse_line(line: &str) -> Option<(ListedBlock, String)> {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    let read_only = match *words.last()? {
        "ro" => Some(true),
        "rw" => Some(false),
        _ => None,
    };
    let mut host_address = None;
    if read_only.is_some() {
        words.pop();
        host_address = Some(parse_hex(words.pop()?)?);
    }
    let max_bytes = parse_hex(words.pop()?)?;
    let used_bytes = parse_hex(words.pop()?)?;
    let ram_offset = parse_hex(words.pop()?)?;
    let unit = words.pop()?;
    let size = words.pop()?;
    if words.is_empty() {
        return None;
    }
    let block = ListedBlock {
        name: words.join(" "),
        ram_offset,
        used_bytes,
        max_bytes,
        host_address,
        read_only,
    };
    Some((block, format!("{size} {unit}")))
}

fn parse_hex(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_the_listing_are_understood() {
        let old = "              Block Name    PSize              Offset               Used              Total\n\
                                     pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\n\
                       /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000\n";
        let blocks = parse_listing(old).unwrap();
        assert_eq!(blocks.len(), 2);
        assert_eq!(
            (blocks[1].used_bytes, blocks[1].max_bytes),
            (0x20000, 0x200000)
        );
        assert_eq!((blocks[1].host_address, blocks[1].read_only), (None, None));
        let new = "Block Name PSize Offset Used Total HVA RO\n\
                   pc.bios    4 KiB  0x0000000004000000 0x0000000000040000 0x0000000000040000 0x00007f8f4e600000  ro\n";
        let block = &parse_listing(new).unwrap()[0];
        assert_eq!(
            (block.host_address, block.read_only),
            (Some(0x7f8f_4e60_0000), Some(true))
        );
    }

    #[test]
    fn what_can_not_be_understood_is_an_error() {
        assert!(matches!(
            parse_listing("head\npc.ram 4 KiB 0x0 0x1000\n"),
            Err(BlocksError::Listing { .. })
        ));
        assert!(matches!(
            parse_listing("head\npc.ram 4 KiB 0x0 0x2000 0x1000\n"),
            Err(BlocksError::Listing { .. })
        ));
        assert!(matches!(
            parse_listing("head\nx 2 MiB 0x0 0x200000 0x200000\n"),
            Err(BlocksError::HugePages { .. })
        ));
        assert_eq!(
            parse_listing("head\nempty 4 KiB 0x0 0x0 0x1000\n").unwrap(),
            []
        );
        let many = "n 4 KiB 0x0 0x1000 0x1000\n".repeat(BLOCKS_MAX + 1);
        assert!(matches!(
            parse_listing(&format!("head\n{many}")),
            Err(BlocksError::TooMany)
        ));
    }
}
