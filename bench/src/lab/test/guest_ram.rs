//! What is known of a guest's RAM at one moment, small enough to be kept elsewhere: a number for
//! each page. And whether a guest that writes rounds (bench/guest/boot32.S) is whole.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::memory::{Copy, PAGE};

/// Where bench/guest/boot32.S has its counter, and what it writes.
pub(super) const COUNTER: u64 = 0x8000;
pub(super) const FIRST: u64 = 0x10_0000;
const PAGES: u64 = 512;

/// A number for each page of each RAM block. Equal RAM has equal numbers; other RAM has them with a
/// probability of 2⁻⁶⁴ a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Digest(Vec<u8>);

impl Digest {
    pub(super) fn of(copy: &Copy) -> Digest {
        let mut numbers = Vec::new();
        for (name, bytes) in &copy.blocks {
            numbers.extend(number(name.as_bytes()).to_le_bytes());
            numbers.extend((bytes.len() as u64).to_le_bytes());
            numbers.extend(bytes.chunks(PAGE).flat_map(|p| number(p).to_le_bytes()));
        }
        Digest(numbers)
    }

    /// # Errors
    /// The file can't be written.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        // Readers see all of it or nothing.
        let new = path.with_extension("new");
        std::fs::write(&new, &self.0).with_context(|| format!("writing {}", new.display()))?;
        std::fs::rename(&new, path).with_context(|| format!("naming {}", path.display()))
    }

    /// # Errors
    /// There is no such file.
    pub(super) fn read(path: &Path) -> Result<Digest> {
        let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        Ok(Digest(bytes))
    }

    /// How many numbers differ.
    pub(super) fn differences(&self, other: &Digest) -> usize {
        let each = |digest: &Digest| digest.0.as_chunks::<8>().0.to_vec();
        let (ours, theirs) = (each(self), each(other));
        let common = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
        common + ours.len().abs_diff(theirs.len())
    }
}

/// Mixes 64 bits at a time: on an emulated processor each byte of RAM counts.
fn number(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let mix = |state: u64, word: &[u8; 8]| {
        let mixed = (state ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^ mixed >> 32
    };
    let state = words.iter().fold(bytes.len() as u64, mix);
    mix(state, &last)
}

/// What the counter of a guest of rounds says, after a look at all pages that it writes.
///
/// # Errors
/// They are not of one moment.
pub(super) fn whole(copy: &Copy) -> Result<u64> {
    let main = copy.blocks.iter();
    let mut main = main.filter(|(name, _)| name == "ram" || name.ends_with("/ram"));
    let (_, ram) = main.next().context("no main RAM")?;
    let word = |at: u64| -> Result<u32> {
        let bytes = ram.get(at as usize..).and_then(<[u8]>::first_chunk);
        Ok(u32::from_le_bytes(
            *bytes.context("the guest has too little RAM")?,
        ))
    };
    let count = u64::from(word(COUNTER)?) | u64::from(word(COUNTER + 4)?) << 32;
    let before = count as u32;
    let after = before.wrapping_add(1);
    let mut expected = after;
    for page in 0..PAGES {
        for at in [0, PAGE as u64 - 4] {
            let found = word(FIRST + page * PAGE as u64 + at)?;
            if found != expected {
                // Once, the number changes to the round's before.
                ensure!(
                    (expected, found) == (after, before),
                    "page {page} of the guest's round {after} has {found} at {at}, not {expected}"
                );
                expected = before;
            }
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE_BYTES: u64 = PAGE as u64;

    fn at_page(rewritten: u64, count: u64) -> Copy {
        let mut ram = vec![0; (FIRST + PAGES * PAGE_BYTES) as usize];
        ram[COUNTER as usize..][..8].copy_from_slice(&count.to_le_bytes());
        for page in 0..PAGES {
            let value = (count as u32 + u32::from(page < rewritten)).to_le_bytes();
            for at in [0, PAGE_BYTES - 4] {
                let at = (FIRST + page * PAGE_BYTES + at) as usize;
                ram[at..][..4].copy_from_slice(&value);
            }
        }
        Copy {
            blocks: vec![("ram".to_owned(), ram)],
        }
    }

    #[test]
    fn a_mixture_of_two_moments_is_seen() {
        for rewritten in [0, 1, 100, PAGES] {
            assert_eq!(whole(&at_page(rewritten, 77)).unwrap(), 77);
        }
        let (old, new) = (at_page(10, 77), at_page(200, 78));
        let mut torn = old.clone_of();
        let page = (FIRST + 100 * PAGE_BYTES) as usize;
        torn.blocks[0].1[page..page + PAGE].copy_from_slice(&new.blocks[0].1[page..page + PAGE]);
        assert!(whole(&torn).is_err());
        assert_eq!(Digest::of(&old).differences(&Digest::of(&torn)), 1);
        assert_eq!(Digest::of(&old).differences(&Digest::of(&old)), 0);
    }

    impl Copy {
        fn clone_of(&self) -> Copy {
            Copy {
                blocks: self.blocks.clone(),
            }
        }
    }
}
