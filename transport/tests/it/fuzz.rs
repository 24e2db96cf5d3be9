//! Feeds the decoders what nobody would send: seeded mutations of good bytes, and noise.
//!
//! `CURLING_FUZZ_SECONDS` (default 1) says how long, `CURLING_FUZZ_SEED` repeats a run.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::noise::Noise;
use transport::choice::message::{Answer, Offer, Verdict};
use transport::link::{CHUNK_BYTES, MESSAGE_BYTES_MAX};
use transport::tcp::PairingId;
use transport::tcp::frame::{
    FRAME_HEADER_BYTES, FrameHeader, GrantIndex, MESSAGE_PREFIX_BYTES, decode_message_length,
};
use transport::tcp::preamble::{
    PREAMBLE_BYTES, Preamble, REASON_BYTES_MAX, REPLY_BYTES, Reply, encode_refusal,
};
use transport::{Lane, TransportChoice};

#[test]
fn decoders_survive_anything() {
    let seconds = variable("CURLING_FUZZ_SECONDS").unwrap_or(1);
    let seed = variable("CURLING_FUZZ_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.expect("it is after 1970").as_nanos() as u64
    });
    let mut noise = Noise::new(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut iterations = 0u64;
    println!("CURLING_FUZZ_SEED={seed}");
    while Instant::now() < end {
        for _ in 0..1000 {
            preamble(&mut noise);
            reply(&mut noise);
            frame_header(&mut noise);
            message_prefix(&mut noise);
            refusal(&mut noise);
            offer(&mut noise);
            answer(&mut noise);
            iterations += 1;
        }
    }
    println!("{iterations} iterations");
}

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is a number")),
    )
}

fn preamble(noise: &mut Noise) {
    let good = Preamble {
        pairing: PairingId(noise.bytes()),
        lane: [Lane::Control, Lane::Bulk, Lane::Proof][noise.below(3)],
    };
    let bytes: [u8; PREAMBLE_BYTES] = noise.mutated(good.encode());
    if let Ok(decoded) = Preamble::decode(&bytes) {
        assert_eq!(decoded.encode(), bytes, "a preamble has one form");
    }
}

fn reply(noise: &mut Noise) {
    let good = match noise.below(2) {
        0 => Reply::Accepted,
        _ => Reply::Refused {
            reason_bytes: noise.below(REASON_BYTES_MAX + 1),
        },
    };
    let bytes: [u8; REPLY_BYTES] = noise.mutated(good.encode());
    match Reply::decode(&bytes) {
        Ok(Reply::Refused { reason_bytes }) => assert!(reason_bytes <= REASON_BYTES_MAX),
        Ok(Reply::Accepted) => assert_eq!(Reply::Accepted.encode(), bytes),
        Err(_) => {}
    }
}

fn frame_header(noise: &mut Noise) {
    let good = FrameHeader {
        grant: GrantIndex {
            index: noise.next() as u32,
            generation: noise.next() as u32,
        },
        length: 1 + noise.below(CHUNK_BYTES) as u32,
        tag: noise.next() as u32,
    };
    let bytes: [u8; FRAME_HEADER_BYTES] = noise.mutated(good.encode());
    if let Ok(decoded) = FrameHeader::decode(&bytes) {
        assert!((1..=CHUNK_BYTES).contains(&(decoded.length as usize)));
        assert_eq!(decoded.encode(), bytes, "a frame header has one form");
    }
}

fn message_prefix(noise: &mut Noise) {
    let prefix: [u8; MESSAGE_PREFIX_BYTES] = match noise.below(2) {
        0 => noise.bytes(),
        _ => (noise.below(2 * MESSAGE_BYTES_MAX) as u32).to_le_bytes(),
    };
    if let Ok(length) = decode_message_length(prefix) {
        assert!(length <= MESSAGE_BYTES_MAX);
    }
}

fn refusal(noise: &mut Noise) {
    let reason: String = (0..noise.below(400))
        .filter_map(|_| char::from_u32(noise.next() as u32 & 0x1f_ffff))
        .collect();
    let bytes = encode_refusal(&reason);
    let head = bytes.first_chunk().expect("a whole head");
    assert_eq!(
        Reply::decode(head),
        Ok(Reply::Refused {
            reason_bytes: bytes.len() - REPLY_BYTES
        })
    );
}

fn offer(noise: &mut Noise) {
    use TransportChoice::{Auto, Rdma, Tcp};
    let good = Offer {
        wants: [Auto, Tcp, Rdma][noise.below(3)],
        rdma: match noise.below(2) {
            0 => Ok(()),
            _ => Err(words(noise)),
        },
        pairing: PairingId(noise.bytes()),
    };
    let bytes = cut_or_mutated(noise, good.encode());
    if let Ok(decoded) = Offer::decode(&bytes) {
        if let Err(reason) = &decoded.rdma {
            assert!(!reason.contains(char::is_control), "{reason:?}");
        }
        let again = Offer::decode(&decoded.encode()).expect("what was decoded is valid");
        assert_eq!(
            (again.wants, again.pairing),
            (decoded.wants, decoded.pairing)
        );
    }
}

fn answer(noise: &mut Noise) {
    let good = Answer {
        verdict: [Verdict::Refused, Verdict::Tcp, Verdict::Rdma][noise.below(3)],
        reason: words(noise),
    };
    let bytes = cut_or_mutated(noise, good.encode());
    if let Ok(decoded) = Answer::decode(&bytes) {
        assert!(!decoded.reason.contains(char::is_control), "{decoded:?}");
        let again = Answer::decode(&decoded.encode()).expect("what was decoded is valid");
        assert_eq!(again.verdict, decoded.verdict);
    }
}

fn words(noise: &mut Noise) -> String {
    let length = noise.below(700);
    (0..length)
        .map(|_| char::from(b' ' + noise.below(95) as u8))
        .collect()
}

fn cut_or_mutated(noise: &mut Noise, mut bytes: Vec<u8>) -> Vec<u8> {
    noise.mutate(&mut bytes);
    bytes.truncate(bytes.len() - noise.below(2) * noise.below(bytes.len()));
    bytes
}
