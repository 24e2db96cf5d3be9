//! Messages of rtnetlink, as rtnetlink(7) and netlink(7) have them: a header of 16 bytes, a fixed
//! part, attributes; all in the machine's byte order, padded to 4 bytes.
//!
//! Own code: rtnetlink brings an async runtime, and neither it nor neli knows `plug`.

const HEADER_BYTES: usize = 16;
const ATTRIBUTE_BYTES: usize = 4;
/// `NLMSG_ERROR`: also the acknowledgement, with error 0.
const ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST_ACK: u16 = 0x1 | 0x4;
/// `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`, which are part of an attribute's type.
const TYPE_FLAGS: u16 = 0xc000;

/// A request that the kernel acknowledges.
#[derive(Debug)]
pub(super) struct Request(Vec<u8>);

impl Request {
    /// `kind` is an `RTM_…`, `flags` are added to those that every request has.
    pub(super) fn new(kind: u16, flags: u16, sequence: u32, fixed: &[u8]) -> Request {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | REQUEST_ACK).to_ne_bytes());
        bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes.extend(fixed);
        Request(bytes)
    }

    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Request {
        let begin = self.begin(kind);
        self.0.extend(value);
        self.end(begin);
        self
    }

    /// A name: with a zero byte behind it.
    pub(super) fn string(self, kind: u16, value: &str) -> Request {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    pub(super) fn nested(mut self, kind: u16, inside: impl FnOnce(Request) -> Request) -> Request {
        let begin = self.begin(kind);
        self = inside(self);
        self.end(begin);
        self
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).expect("a request is small");
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }

    fn begin(&mut self, kind: u16) -> usize {
        let begin = self.0.len();
        self.0.extend([0, 0]);
        self.0.extend(kind.to_ne_bytes());
        begin
    }

    fn end(&mut self, begin: usize) {
        let length = u16::try_from(self.0.len() - begin).expect("an attribute is small");
        self.0[begin..begin + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// What the kernel answers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply<'a> {
    /// The end of the answer: 0, or an errno.
    Done { errno: i32 },
    /// What follows the header.
    Message { kind: u16, body: &'a [u8] },
}

/// The messages to the request `sequence` in one datagram. One that is cut off ends them.
pub(super) fn replies(datagram: &[u8], sequence: u32) -> impl Iterator<Item = Reply<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        loop {
            let header = rest.get(..HEADER_BYTES)?;
            let length = usize::try_from(u32_at(header, 0)?).ok()?;
            let kind = u16_at(header, 4)?;
            let of = u32_at(header, 8)?;
            let body = rest.get(HEADER_BYTES..length)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
            if of != sequence {
                continue;
            }
            return Some(match kind {
                ERROR => Reply::Done {
                    errno: -i32::from_ne_bytes(body.get(..4)?.try_into().ok()?),
                },
                kind => Reply::Message { kind, body },
            });
        }
    })
}

/// The value of the first attribute of that type.
pub(super) fn attribute(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    let mut rest = attributes;
    loop {
        let length = usize::from(u16_at(rest, 0)?);
        let value = rest.get(ATTRIBUTE_BYTES..length)?;
        if u16_at(rest, 2)? & !TYPE_FLAGS == kind {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(four.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let two = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_ne_bytes(two.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_can_be_read() {
        let bytes = Request::new(36, 0, 7, &[9; 20])
            .string(1, "plug")
            .nested(2, |r| r.attribute(5, &[1, 2, 3]).attribute(6, &[4]))
            .finish();
        assert_eq!(bytes.len() % 4, 0);
        assert!(replies(&bytes, 8).next().is_none(), "another request's");
        let mut found = replies(&bytes, 7);
        let Some(Reply::Message { kind: 36, body }) = found.next() else {
            panic!("one message")
        };
        let attributes = &body[20..];
        assert_eq!(attribute(attributes, 1), Some(&b"plug\0"[..]));
        let nested = attribute(attributes, 2).unwrap();
        assert_eq!(attribute(nested, 5), Some(&[1, 2, 3][..]));
        assert_eq!(attribute(nested, 6), Some(&[4][..]));
        assert_eq!(attribute(nested, 7), None);
        assert!(found.next().is_none());
    }

    #[test]
    fn nothing_that_is_cut_off_or_wrong_panics() {
        let bytes = Request::new(ERROR, 0, 7, &(-17_i32).to_ne_bytes())
            .attribute(3, &[0; 5])
            .finish();
        assert_eq!(replies(&bytes, 7).next(), Some(Reply::Done { errno: 17 }));
        for length in 0..bytes.len() {
            assert!(replies(&bytes[..length], 7).next().is_none());
            attribute(&bytes[..length], 3);
        }
        for at in 0..bytes.len() {
            for value in [0, 1, 3, 15, 17, 0xff] {
                let mut wrong = bytes.clone();
                wrong[at] = value;
                assert!(replies(&wrong, 7).count() <= 2);
                attribute(&wrong, 3);
            }
        }
        // A length of zero must not go round for ever.
        assert_eq!(attribute(&[0; 64], 3), None);
        assert!(replies(&[0; 64], 0).next().is_none());
    }
}
