//! Seeded noise.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "not every test file uses all of it"
)]

pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Noise {
        Noise(seed)
    }

    /// splitmix64 (Steele, Lea, Flood 2014).
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(crate) fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.next() as u8)
    }

    pub(crate) fn vec(&mut self, bytes: usize) -> Vec<u8> {
        (0..bytes).map(|_| self.next() as u8).collect()
    }

    /// `good` with none, some or all of its bytes changed.
    pub(crate) fn mutated<const N: usize>(&mut self, mut good: [u8; N]) -> [u8; N] {
        self.mutate(&mut good);
        good
    }

    pub(crate) fn mutate(&mut self, bytes: &mut [u8]) {
        match self.below(5) {
            0 => {}
            1 => bytes[self.below(bytes.len())] ^= 1 << self.below(8),
            2 => bytes[self.below(bytes.len())] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
            3 => {
                let from = self.below(bytes.len());
                bytes[from..].fill_with(|| self.next() as u8);
            }
            _ => bytes.fill_with(|| self.next() as u8),
        }
    }
}
