//! The device state in fewer bytes: a record for each page of it, as for pages of RAM, the last one
//! padded with zeros. None needs a base: most of a state is zeros, the same in every epoch.

use super::packed::{PackedPages, RECORD_BYTES_MAX, Unpacked};
use crate::limits::DEVICE_STATE_BYTES_MAX;
use crate::types::{BlockId, PAGE_BYTES};

/// All of the device state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedState<'a> {
    pub(super) records: &'a [u8],
    /// Bytes of the state.
    pub(super) bytes: u64,
}

impl<'a> PackedState<'a> {
    /// Appends the state to `out`.
    ///
    /// # Panics
    /// If the chunk wasn't checked.
    pub fn unpack(&self, out: &mut Vec<u8>) {
        let end = out.len() + self.bytes as usize; // at most DEVICE_STATE_BYTES_MAX
        for packed in self.pages().iter() {
            let mut page = [0; PAGE_BYTES];
            assert!(packed.unpack(&mut page), "the chunk was checked");
            out.extend_from_slice(&page);
        }
        out.truncate(end);
    }

    /// Whether the records make a state of so many bytes. Allocates nothing.
    pub(super) fn is_whole(&self) -> bool {
        if self.bytes > DEVICE_STATE_BYTES_MAX as u64 {
            return false;
        }
        (0..).zip(self.pages().records()).all(|(place, packed)| {
            packed.is_ok_and(|packed| {
                let is_next = packed.block == BlockId(0) && packed.page == place;
                is_next && !packed.needs_base() && packed.unpack(&mut [0; PAGE_BYTES])
            })
        })
    }

    fn pages(&self) -> PackedPages<'a> {
        PackedPages {
            bytes: self.records,
            count: self.bytes.div_ceil(PAGE_BYTES as u64),
        }
    }
}

/// Packs a device state into `out`, whatever that had before. `false`: it is not worth it.
pub fn pack_state(state: &[u8], out: &mut Vec<u8>) -> bool {
    out.clear();
    let mut record = [0; RECORD_BYTES_MAX];
    for (place, piece) in (0..).zip(state.chunks(PAGE_BYTES)) {
        let mut page = [0; PAGE_BYTES];
        page[..piece.len()].copy_from_slice(piece);
        let page = Unpacked {
            block: BlockId(0),
            page: place,
            bytes: &page,
        };
        let used = match page.lz4(&mut record) {
            Some(used) => used,
            None => page.raw(&mut record),
        };
        out.extend_from_slice(&record[..used]);
    }
    out.len() < state.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(bytes: u64, records: &[u8]) -> PackedState<'_> {
        PackedState { records, bytes }
    }

    /// Text, zeros, and noise at the end.
    fn a_state() -> Vec<u8> {
        let mut state = b"QEVM".repeat(2000);
        state.resize(60_000, 0);
        let noise = (0..1000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]);
        state.extend(noise);
        state
    }

    #[test]
    fn a_state_comes_out_as_it_went_in() {
        let whole = a_state();
        let mut packed = vec![7; 3];
        assert!(pack_state(&whole, &mut packed));
        assert!(packed.len() < whole.len() / 10, "{}", packed.len());
        assert!(state(61_000, &packed).is_whole());
        let mut out = vec![1];
        state(61_000, &packed).unpack(&mut out);
        assert_eq!((out[0], &out[1..]), (1, &whole[..]));
    }

    #[test]
    fn records_that_are_not_the_state_s_make_none() {
        let (whole, mut packed) = (a_state(), Vec::new());
        assert!(pack_state(&whole, &mut packed));
        let pages = 61_000_u64.div_ceil(PAGE_BYTES as u64) * PAGE_BYTES as u64;
        for bytes in [0, 61_000 - PAGE_BYTES as u64, pages + 1, u64::MAX] {
            assert!(!state(bytes, &packed).is_whole(), "{bytes}");
        }
        for at in 0..packed.len() {
            let mut other = packed.clone();
            other[at] ^= 1;
            // Other copies of what repeats may make the same bytes.
            if state(61_000, &other).is_whole() {
                let mut out = Vec::new();
                state(61_000, &other).unpack(&mut out);
                assert!(out == whole, "byte {at}");
            }
        }
        let page = [5; PAGE_BYTES];
        let page = Unpacked {
            block: BlockId(0),
            page: 0,
            bytes: &page,
        };
        let mut record = [0; RECORD_BYTES_MAX];
        let used = page.delta(&[1, 0, 0, 0, 0, 0, 0, 0], &mut record);
        let used = used.expect("one word");
        assert!(!state(4096, &record[..used]).is_whole(), "a delta");
    }

    #[test]
    fn what_does_not_get_shorter_is_left_as_it_is() {
        let noise: Vec<u8> = (0..=255).collect();
        assert!(!pack_state(&noise, &mut Vec::new()));
        assert!(!pack_state(&[], &mut Vec::new()));
    }
}
