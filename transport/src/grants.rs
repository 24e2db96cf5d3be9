//! The receiver's table of granted chunks, for links whose frames name a grant by its index.

use crate::arena::ChunkMut;
use crate::link::Grant;

/// Entries of the table, and so grants that can be out at once: 1 TiB of chunks.
const ENTRIES_MAX: usize = 1 << 20;
/// How many of an entry's past grants are remembered.
const HISTORY: u32 = u64::BITS;

const MAGIC: [u8; 8] = *b"CRgrant1";

/// Which grant a frame uses: an entry of the receiver's table, and which of the grants that the
/// entry has had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantIndex {
    pub index: u32,
    pub generation: u32,
}

/// Chunks that the peer may fill, by the index that travels in a frame.
#[derive(Debug, Default)]
pub(crate) struct Grants {
    entries: Vec<Entry>,
    vacant: Vec<u32>,
}

/// A chunk that the peer may fill once.
#[derive(Debug)]
pub(crate) struct Granted {
    pub(crate) chunk: ChunkMut,
    pub(crate) slot: u8,
}

/// What a frame's grant turned out to be.
#[derive(Debug)]
pub(crate) enum Claim {
    Granted(Granted),
    /// It was revoked while the frame was on its way: not the peer's fault.
    Revoked,
    /// It was used before.
    Filled,
    /// It was never given.
    Unknown,
}

#[derive(Debug)]
struct Entry {
    /// Of the grant that is out, or else of the next one.
    generation: u32,
    /// Bit n: the grant n + 1 generations ago ended by being revoked, not by being filled.
    revoked: u64,
    granted: Option<Granted>,
}

impl GrantIndex {
    /// The opaque form. `link` tells links apart, so that a grant of another one is noticed by the
    /// sender already.
    pub(crate) fn encode(self, link: u64) -> Grant {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.index.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..].copy_from_slice(&link.to_le_bytes());
        Grant(bytes)
    }

    /// `None` if the bytes aren't a grant of `link`. The peer chose them, so index and generation
    /// are still only a claim that the peer will judge.
    pub(crate) fn decode(grant: &Grant, link: u64) -> Option<GrantIndex> {
        let (head, rest) = grant.0.split_first_chunk::<8>()?;
        let (index, rest) = rest.split_first_chunk::<4>()?;
        let (generation, of) = rest.split_first_chunk::<4>()?;
        (*head == MAGIC && of == link.to_le_bytes()).then(|| GrantIndex {
            index: u32::from_le_bytes(*index),
            generation: u32::from_le_bytes(*generation),
        })
    }
}

impl Grants {
    /// `None` if too many grants are out.
    pub(crate) fn add(&mut self, chunk: ChunkMut, slot: u8) -> Option<GrantIndex> {
        let index = match self.vacant.pop() {
            Some(index) => index,
            None if self.entries.len() < ENTRIES_MAX => {
                self.entries.push(Entry {
                    generation: 0,
                    revoked: 0,
                    granted: None,
                });
                (self.entries.len() - 1) as u32
            }
            None => return None,
        };
        let entry = &mut self.entries[index as usize];
        entry.granted = Some(Granted { chunk, slot });
        Some(GrantIndex {
            index,
            generation: entry.generation,
        })
    }

    /// Takes the chunk that a frame wants to fill; the grant is used up.
    pub(crate) fn claim(&mut self, grant: GrantIndex) -> Claim {
        let Some(entry) = self.entries.get_mut(grant.index as usize) else {
            return Claim::Unknown;
        };
        let age = entry.generation.wrapping_sub(grant.generation);
        if age == 0 {
            return match entry.end(false) {
                Some(granted) => {
                    self.vacant.push(grant.index);
                    Claim::Granted(granted)
                }
                None => Claim::Unknown,
            };
        }
        // Generations wrap after 2^32 grants of one entry: half of the circle is the past.
        if age > u32::MAX / 2 {
            return Claim::Unknown;
        }
        // Beyond what is remembered the kinder answer: its frame is dropped, never stored.
        if age > HISTORY || entry.revoked >> (age - 1) & 1 == 1 {
            Claim::Revoked
        } else {
            Claim::Filled
        }
    }

    /// Takes back every grant of `slot`.
    pub(crate) fn revoke(&mut self, slot: u8, mut take: impl FnMut(ChunkMut)) {
        for (index, entry) in self.entries.iter_mut().enumerate() {
            if entry.granted.as_ref().is_some_and(|it| it.slot == slot) {
                let granted = entry.end(true).expect("it was granted");
                self.vacant.push(index as u32);
                take(granted.chunk);
            }
        }
    }
}

impl Entry {
    fn end(&mut self, revoked: bool) -> Option<Granted> {
        let granted = self.granted.take()?;
        self.generation = self.generation.wrapping_add(1);
        self.revoked = self.revoked << 1 | u64::from(revoked);
        Some(granted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Arena;

    fn chunk(arena: &Arena) -> ChunkMut {
        arena.alloc().expect("the arena is large enough")
    }

    #[test]
    fn opaque_grants_belong_to_one_link() {
        let index = GrantIndex {
            index: 7,
            generation: 9,
        };
        let grant = index.encode(5);
        assert_eq!(GrantIndex::decode(&grant, 5), Some(index));
        assert_eq!(GrantIndex::decode(&grant, 6), None);
        assert_eq!(GrantIndex::decode(&Grant([0; 24]), 0), None);
    }

    #[test]
    fn a_grant_is_used_once() {
        let arena = Arena::new(4);
        let mut grants = Grants::default();
        let grant = grants.add(chunk(&arena), 1).expect("room");
        assert!(matches!(grants.claim(grant), Claim::Granted(it) if it.slot == 1));
        assert!(matches!(grants.claim(grant), Claim::Filled));
        let again = grants.add(chunk(&arena), 1).expect("room");
        assert_eq!(again.index, grant.index, "the entry is used again");
        assert!(matches!(grants.claim(grant), Claim::Filled));
        assert!(matches!(grants.claim(again), Claim::Granted(_)));
    }

    #[test]
    fn a_revoked_grant_is_told_from_a_filled_and_an_unknown_one() {
        let arena = Arena::new(4);
        let mut grants = Grants::default();
        let first = grants.add(chunk(&arena), 0).expect("room");
        let other = grants.add(chunk(&arena), 1).expect("room");
        let mut back = 0;
        grants.revoke(0, |_| back += 1);
        assert_eq!(back, 1);
        assert!(matches!(grants.claim(first), Claim::Revoked));
        assert!(matches!(grants.claim(other), Claim::Granted(_)));
        let future = GrantIndex {
            generation: first.generation + 2,
            ..first
        };
        assert!(matches!(grants.claim(future), Claim::Unknown));
        let not_given_yet = GrantIndex {
            generation: first.generation + 1,
            ..first
        };
        assert!(matches!(grants.claim(not_given_yet), Claim::Unknown));
        let outside = GrantIndex {
            index: 99,
            generation: 0,
        };
        assert!(matches!(grants.claim(outside), Claim::Unknown));
    }

    #[test]
    fn history_tells_each_past_grant_apart() {
        let arena = Arena::new(4);
        let mut grants = Grants::default();
        let past: Vec<_> = (0..100)
            .map(|round| {
                let grant = grants.add(chunk(&arena), 0).expect("room");
                if round % 3 == 0 {
                    grants.revoke(0, drop);
                } else {
                    grants.claim(grant);
                }
                (grant, round)
            })
            .collect();
        for (grant, round) in past {
            match grants.claim(grant) {
                Claim::Revoked => assert!(round % 3 == 0 || round < 36, "round {round}"),
                Claim::Filled => assert!(round % 3 != 0, "round {round}"),
                other => panic!("round {round}: {other:?}"),
            }
        }
    }
}
