//! Counting the packets in a stream of a filter-mirror.

/// Each packet comes behind its length, 32 bits, big-endian (net/filter-mirror.c,
/// `filter_send`).
#[derive(Debug, Default)]
pub(super) struct FrameCounter {
    /// Bytes of the current packet that are still to come.
    rest: usize,
    /// The beginning of a length.
    length: [u8; 4],
    have: usize,
}

impl FrameCounter {
    /// How many packets begin in these bytes, which follow those before.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) -> u64 {
        let mut packets = 0;
        while !bytes.is_empty() {
            if self.rest > 0 {
                let skip = self.rest.min(bytes.len());
                self.rest -= skip;
                bytes = &bytes[skip..];
                continue;
            }
            self.length[self.have] = bytes[0];
            self.have += 1;
            bytes = &bytes[1..];
            if self.have == self.length.len() {
                self.have = 0;
                self.rest = usize::try_from(u32::from_be_bytes(self.length)).unwrap_or(usize::MAX);
                packets += 1;
            }
        }
        packets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_counted_however_they_are_cut() {
        let mut stream = Vec::new();
        for length in [60_u32, 0, 1, 1514, 3] {
            stream.extend(length.to_be_bytes());
            stream.resize(stream.len() + length as usize, 0xff);
        }
        for piece in [1, 2, 3, 5, 64, stream.len()] {
            let mut counter = FrameCounter::default();
            let packets: u64 = stream.chunks(piece).map(|p| counter.feed(p)).sum();
            assert_eq!(packets, 5, "in pieces of {piece}");
        }
    }
}
