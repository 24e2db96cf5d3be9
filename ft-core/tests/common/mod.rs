//! What the tests of the codecs and the fuzz drivers share.

pub(crate) mod allocations;
pub(crate) mod epochs;
pub(crate) mod strategies;

use ft_core::wire::{HEADER_BYTES, crc32c};

/// Where the header's fields are, as the outside sees them.
pub(crate) const BODY_BYTES_AT: usize = 44;
const BODY_CRC_AT: usize = 48;
const HEADER_CRC_AT: usize = 60;

/// Makes the checksums of a frame right again, so that what lies behind them is reached.
pub(crate) fn fix_checksums(frame: &mut [u8]) {
    if frame.len() < HEADER_BYTES {
        return;
    }
    let body_bytes = u32::from_le_bytes(
        frame[BODY_BYTES_AT..BODY_BYTES_AT + 4]
            .try_into()
            .expect("four bytes"),
    );
    if let Some(body) = frame[HEADER_BYTES..].get(..body_bytes as usize) {
        let crc = crc32c(body);
        frame[BODY_CRC_AT..BODY_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }
    fix_header_checksum(frame);
}

pub(crate) fn fix_header_checksum(frame: &mut [u8]) {
    let crc = crc32c(&frame[..HEADER_CRC_AT]);
    frame[HEADER_CRC_AT..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}
