//! The first bytes on each connection of a pairing, as pure functions.
//!
//! The connecting side sends a [`Preamble`] on each of its three connections; the accepting side
//! answers each with a [`Reply`] when all three are there, or earlier if it refuses.

use crate::link::Lane;

/// Bytes of a [`Preamble`].
pub const PREAMBLE_BYTES: usize = 32;
/// Bytes of a [`Reply`] without the reason's text.
pub const REPLY_BYTES: usize = 16;
/// Bytes of the text that says why a connection is refused; a longer one is cut.
pub const REASON_BYTES_MAX: usize = 256;
/// Rises when the framing of any lane changes.
pub const PREAMBLE_VERSION: u16 = 1;

const PREAMBLE_MAGIC: [u8; 8] = *b"CURLRDMA";
const REPLY_MAGIC: [u8; 8] = *b"CURLREPL";
const ACCEPTED: u8 = 1;
const REFUSED: u8 = 2;

/// 16 random bytes that the connecting side draws: its three connections carry the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PairingId(pub [u8; 16]);

/// Says which lane of which pairing a fresh connection wants to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    pub pairing: PairingId,
    pub lane: Lane,
}

/// The fixed part of the accepting side's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    Accepted,
    /// `reason_bytes` bytes of UTF-8 follow: at most [`REASON_BYTES_MAX`].
    Refused {
        reason_bytes: usize,
    },
}

/// A connection began with something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreambleError {
    #[error("not the start of a curling-rdma connection")]
    Magic,
    #[error("preamble version {0}, this side speaks {PREAMBLE_VERSION}")]
    Version(u16),
    #[error("unknown lane {0}")]
    Lane(u8),
    #[error("reserved bytes are not zero")]
    Reserved,
    #[error("unknown status {0}")]
    Status(u8),
    #[error("reason of {0} bytes is longer than {REASON_BYTES_MAX}")]
    ReasonLength(u16),
}

impl Preamble {
    pub fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[..8].copy_from_slice(&PREAMBLE_MAGIC);
        bytes[8..10].copy_from_slice(&PREAMBLE_VERSION.to_le_bytes());
        bytes[10] = self.lane as u8;
        bytes[16..].copy_from_slice(&self.pairing.0);
        bytes
    }

    pub fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Preamble, PreambleError> {
        if bytes[..8] != PREAMBLE_MAGIC {
            return Err(PreambleError::Magic);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != PREAMBLE_VERSION {
            return Err(PreambleError::Version(version));
        }
        if bytes[11..16] != [0; 5] {
            return Err(PreambleError::Reserved);
        }
        let lane = match bytes[10] {
            1 => Lane::Control,
            2 => Lane::Bulk,
            3 => Lane::Proof,
            other => return Err(PreambleError::Lane(other)),
        };
        let mut pairing = [0; 16];
        pairing.copy_from_slice(&bytes[16..]);
        Ok(Preamble {
            pairing: PairingId(pairing),
            lane,
        })
    }
}

impl Reply {
    pub fn encode(&self) -> [u8; REPLY_BYTES] {
        let mut bytes = [0; REPLY_BYTES];
        bytes[..8].copy_from_slice(&REPLY_MAGIC);
        bytes[8..10].copy_from_slice(&PREAMBLE_VERSION.to_le_bytes());
        match *self {
            Reply::Accepted => bytes[10] = ACCEPTED,
            Reply::Refused { reason_bytes } => {
                assert!(reason_bytes <= REASON_BYTES_MAX, "a reason is cut before");
                bytes[10] = REFUSED;
                bytes[12..14].copy_from_slice(&(reason_bytes as u16).to_le_bytes());
            }
        }
        bytes
    }

    pub fn decode(bytes: &[u8; REPLY_BYTES]) -> Result<Reply, PreambleError> {
        if bytes[..8] != REPLY_MAGIC {
            return Err(PreambleError::Magic);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        let reason_bytes = u16::from_le_bytes([bytes[12], bytes[13]]);
        if bytes[11] != 0 || bytes[14..] != [0; 2] {
            return Err(PreambleError::Reserved);
        }
        match bytes[10] {
            // A refusal is read whatever its version: it is how versions are told apart.
            REFUSED if usize::from(reason_bytes) > REASON_BYTES_MAX => {
                Err(PreambleError::ReasonLength(reason_bytes))
            }
            REFUSED => Ok(Reply::Refused {
                reason_bytes: reason_bytes.into(),
            }),
            _ if version != PREAMBLE_VERSION => Err(PreambleError::Version(version)),
            ACCEPTED if reason_bytes != 0 => Err(PreambleError::Reserved),
            ACCEPTED => Ok(Reply::Accepted),
            other => Err(PreambleError::Status(other)),
        }
    }
}

/// A refusal as it is sent: the fixed part and `reason`, cut at [`REASON_BYTES_MAX`].
pub fn encode_refusal(reason: &str) -> Vec<u8> {
    let text = &reason.as_bytes()[..reason.floor_char_boundary(REASON_BYTES_MAX)];
    let reply = Reply::Refused {
        reason_bytes: text.len(),
    };
    [&reply.encode()[..], text].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREAMBLE: Preamble = Preamble {
        pairing: PairingId([7; 16]),
        lane: Lane::Bulk,
    };

    #[test]
    fn preambles_round_trip() {
        for lane in [Lane::Control, Lane::Bulk, Lane::Proof] {
            let preamble = Preamble { lane, ..PREAMBLE };
            assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
        }
    }

    #[test]
    fn every_bit_outside_the_pairing_id_counts() {
        for bit in 0..16 * 8 {
            let mut bytes = PREAMBLE.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            // Flipping bit 0 of lane 2 makes lane 3, which is another valid preamble.
            if let Ok(other) = Preamble::decode(&bytes) {
                assert_ne!(other, PREAMBLE, "bit {bit} is ignored");
            }
        }
    }

    #[test]
    fn refusals_carry_a_bounded_reason() {
        let bytes = encode_refusal(&"ä".repeat(1000));
        let head = bytes[..REPLY_BYTES].try_into().expect("a whole head");
        let Ok(Reply::Refused { reason_bytes }) = Reply::decode(head) else {
            panic!("not a refusal");
        };
        assert_eq!(bytes.len(), REPLY_BYTES + reason_bytes);
        assert!(reason_bytes <= REASON_BYTES_MAX);
        assert!(std::str::from_utf8(&bytes[REPLY_BYTES..]).is_ok());
    }

    #[test]
    fn replies_round_trip_and_refuse_long_reasons() {
        assert_eq!(
            Reply::decode(&Reply::Accepted.encode()),
            Ok(Reply::Accepted)
        );
        let mut long = Reply::Refused { reason_bytes: 256 }.encode();
        assert!(Reply::decode(&long).is_ok());
        long[12] = 1;
        assert_eq!(Reply::decode(&long), Err(PreambleError::ReasonLength(257)));
    }
}
