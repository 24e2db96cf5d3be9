//! What travels on the lanes, as pure functions over bytes: nothing here reads a socket.
//!
//! All integers are little-endian. Bulk: a [`FrameHeader`], then `length` bytes of chunk.
//! Control: a `u32` length, then that many bytes of message. Proof: nothing at all.

pub use crate::grants::GrantIndex;
use crate::link::{CHUNK_BYTES, MESSAGE_BYTES_MAX};

/// Bytes of a [`FrameHeader`].
pub const FRAME_HEADER_BYTES: usize = 24;
/// Bytes of the length that precedes a control message.
pub const MESSAGE_PREFIX_BYTES: usize = 4;

const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"CRbf");

/// Precedes a chunk's bytes on the bulk lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    pub grant: GrantIndex,
    /// Bytes that follow: 1 to [`CHUNK_BYTES`].
    pub length: u32,
    pub tag: u32,
}

/// The peer sent bytes that aren't what this lane carries.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("bulk frame begins with {0:#010x} instead of the magic number")]
    Magic(u32),
    #[error("bulk frame has {0:#x} in its reserved bytes")]
    Reserved(u32),
    #[error("bulk frame of {0} bytes: a chunk has 1 to {CHUNK_BYTES}")]
    ChunkLength(u32),
    #[error("control message of {0} bytes: the longest has {MESSAGE_BYTES_MAX}")]
    MessageLength(u32),
}

impl FrameHeader {
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let words = [
            FRAME_MAGIC,
            self.grant.index,
            self.grant.generation,
            self.length,
            self.tag,
            0,
        ];
        let mut bytes = [0; FRAME_HEADER_BYTES];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<FrameHeader, FrameError> {
        let word = |index| word_at(bytes, index);
        if word(0) != FRAME_MAGIC {
            return Err(FrameError::Magic(word(0)));
        }
        if word(5) != 0 {
            return Err(FrameError::Reserved(word(5)));
        }
        let length = word(3);
        if length == 0 || length as usize > CHUNK_BYTES {
            return Err(FrameError::ChunkLength(length));
        }
        Ok(FrameHeader {
            grant: GrantIndex {
                index: word(1),
                generation: word(2),
            },
            length,
            tag: word(4),
        })
    }
}

/// The length of the control message that `prefix` announces.
pub fn decode_message_length(prefix: [u8; MESSAGE_PREFIX_BYTES]) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(prefix);
    if length as usize > MESSAGE_BYTES_MAX {
        return Err(FrameError::MessageLength(length));
    }
    Ok(length as usize)
}

fn word_at(bytes: &[u8], index: usize) -> u32 {
    let at = index * 4;
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: FrameHeader = FrameHeader {
        grant: GrantIndex {
            index: 7,
            generation: 9,
        },
        length: 4096,
        tag: 0xdead_beef,
    };

    #[test]
    fn frame_header_round_trips() {
        assert_eq!(FrameHeader::decode(&HEADER.encode()), Ok(HEADER));
    }

    #[test]
    fn frame_header_refuses_what_it_did_not_write() {
        let mut magic = HEADER.encode();
        magic[0] ^= 1;
        assert!(matches!(
            FrameHeader::decode(&magic),
            Err(FrameError::Magic(_))
        ));
        let mut reserved = HEADER.encode();
        reserved[23] = 1;
        assert!(matches!(
            FrameHeader::decode(&reserved),
            Err(FrameError::Reserved(_))
        ));
        for length in [0, CHUNK_BYTES as u32 + 1, u32::MAX] {
            let bytes = FrameHeader { length, ..HEADER }.encode();
            assert_eq!(
                FrameHeader::decode(&bytes),
                Err(FrameError::ChunkLength(length))
            );
        }
    }

    #[test]
    fn message_length_is_bounded() {
        let longest = MESSAGE_BYTES_MAX as u32;
        assert_eq!(
            decode_message_length(longest.to_le_bytes()),
            Ok(MESSAGE_BYTES_MAX)
        );
        assert_eq!(
            decode_message_length((longest + 1).to_le_bytes()),
            Err(FrameError::MessageLength(longest + 1))
        );
    }
}
