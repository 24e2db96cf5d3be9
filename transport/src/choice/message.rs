//! What the two sides tell each other to agree, as pure functions: the first messages on the
//! control lane.

use crate::choice::TransportChoice;
use crate::tcp::PairingId;

/// Bytes of the text that says why; a longer one is cut.
pub const REASON_BYTES_MAX: usize = 512;

const OFFER_MAGIC: [u8; 8] = *b"CRoffer1";
const ANSWER_MAGIC: [u8; 8] = *b"CRchose1";

/// The connecting side's first message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    pub wants: TransportChoice,
    /// Whether it can use RDMA, or why not.
    pub rdma: Result<(), String>,
    /// What its RDMA connection will show.
    pub pairing: PairingId,
}

/// The accepting side's choice; with [`Verdict::Rdma`], the connecting side's report of what came
/// of it in turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub verdict: Verdict,
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    Refused = 0,
    Tcp = 1,
    Rdma = 2,
}

/// The peer sent something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error("message of {0} bytes")]
    Length(usize),
    #[error("not the expected kind of message")]
    Magic,
    #[error("unknown value {0}")]
    Value(u8),
}

impl Offer {
    pub fn encode(&self) -> Vec<u8> {
        let (can, reason) = match &self.rdma {
            Ok(()) => (1, ""),
            Err(reason) => (0, reason.as_str()),
        };
        let mut bytes = OFFER_MAGIC.to_vec();
        bytes.push(self.wants as u8);
        bytes.push(can);
        bytes.extend_from_slice(&self.pairing.0);
        bytes.extend_from_slice(cut(reason).as_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Offer, MessageError> {
        let (wants, rest) = split(bytes, OFFER_MAGIC)?;
        let wants = match wants {
            0 => TransportChoice::Auto,
            1 => TransportChoice::Tcp,
            2 => TransportChoice::Rdma,
            other => return Err(MessageError::Value(other)),
        };
        let length = MessageError::Length(bytes.len());
        let (&can, rest) = rest.split_first().ok_or(length)?;
        let (pairing, reason) = rest.split_first_chunk().ok_or(length)?;
        let rdma = match can {
            0 => Err(text(reason)?),
            1 => Ok(()),
            other => return Err(MessageError::Value(other)),
        };
        Ok(Offer {
            wants,
            rdma,
            pairing: PairingId(*pairing),
        })
    }
}

impl Answer {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = ANSWER_MAGIC.to_vec();
        bytes.push(self.verdict as u8);
        bytes.extend_from_slice(cut(&self.reason).as_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Answer, MessageError> {
        let (verdict, reason) = split(bytes, ANSWER_MAGIC)?;
        let verdict = match verdict {
            0 => Verdict::Refused,
            1 => Verdict::Tcp,
            2 => Verdict::Rdma,
            other => return Err(MessageError::Value(other)),
        };
        Ok(Answer {
            verdict,
            reason: text(reason)?,
        })
    }

    /// The accepting side's choice, which `wants` this and can use RDMA or not for a reason.
    pub fn to(offer: &Offer, wants: TransportChoice, here: &Result<(), String>) -> Answer {
        let insists = [offer.wants, wants].contains(&TransportChoice::Rdma);
        let (verdict, reason) = match (&offer.rdma, here) {
            (Ok(()), Ok(())) => (Verdict::Rdma, "both hosts can".to_owned()),
            (Err(why), _) => (Verdict::Tcp, format!("on the connecting host {why}")),
            (_, Err(why)) => (Verdict::Tcp, format!("on the accepting host {why}")),
        };
        match verdict {
            Verdict::Tcp if insists => Answer {
                verdict: Verdict::Refused,
                reason: format!("RDMA is demanded, but {reason}"),
            },
            verdict => Answer { verdict, reason },
        }
    }
}

fn split(bytes: &[u8], magic: [u8; 8]) -> Result<(u8, &[u8]), MessageError> {
    match bytes.split_first_chunk::<8>() {
        Some((head, [first, rest @ ..])) if *head == magic => Ok((*first, rest)),
        Some((head, _)) if *head != magic => Err(MessageError::Magic),
        _ => Err(MessageError::Length(bytes.len())),
    }
}

fn cut(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(REASON_BYTES_MAX)]
}

/// The peer's text, fit for a terminal.
fn text(bytes: &[u8]) -> Result<String, MessageError> {
    if bytes.len() > REASON_BYTES_MAX {
        return Err(MessageError::Length(bytes.len()));
    }
    let text = String::from_utf8_lossy(bytes);
    Ok(text.chars().filter(|it| !it.is_control()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_round_trip_and_nothing_else_is_taken() {
        let offer = Offer {
            wants: TransportChoice::Auto,
            rdma: Err("no device".to_owned()),
            pairing: PairingId([7; 16]),
        };
        assert_eq!(Offer::decode(&offer.encode()), Ok(offer.clone()));
        for length in 0..26 {
            assert!(Offer::decode(&offer.encode()[..length]).is_err());
        }
        let long = [&offer.encode()[..], &[b'x'; REASON_BYTES_MAX]].concat();
        assert_eq!(
            Offer::decode(&long),
            Err(MessageError::Length(REASON_BYTES_MAX + 9))
        );
        let answer = Answer {
            verdict: Verdict::Rdma,
            reason: "ä".repeat(1000),
        };
        let decoded = Answer::decode(&answer.encode()).expect("it is cut");
        assert_eq!(decoded.reason.len(), REASON_BYTES_MAX);
        assert!(Answer::decode(&offer.encode()).is_err());
        assert!(Answer::decode(b"CRchose1\x03").is_err());
    }

    #[test]
    fn a_demand_is_met_or_refused() {
        use TransportChoice::{Auto, Rdma, Tcp};
        let no = || Err("it has none".to_owned());
        let choose = |wants, rdma, here_wants, here| {
            let offer = Offer {
                wants,
                rdma,
                pairing: PairingId([0; 16]),
            };
            Answer::to(&offer, here_wants, &here).verdict
        };
        assert_eq!(choose(Auto, Ok(()), Auto, Ok(())), Verdict::Rdma);
        assert_eq!(choose(Auto, no(), Auto, Ok(())), Verdict::Tcp);
        assert_eq!(choose(Auto, Ok(()), Tcp, no()), Verdict::Tcp);
        assert_eq!(choose(Rdma, Ok(()), Tcp, no()), Verdict::Refused);
        assert_eq!(choose(Auto, no(), Rdma, Ok(())), Verdict::Refused);
        assert_eq!(choose(Rdma, Ok(()), Rdma, Ok(())), Verdict::Rdma);
    }
}
