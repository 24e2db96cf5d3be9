//! What chance does to bytes that began as valid ones.

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::dice::Dice;

/// Numbers that are as wrong as can be.
const INTERESTING: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

impl Dice {
    /// A value that the strategy generates.
    pub(crate) fn draw<S: Strategy>(&mut self, strategy: &S) -> S::Value {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&self.next().to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let tree = strategy.new_tree(&mut runner);
        tree.expect("no strategy here filters").current()
    }

    /// Changes a few things in the first `reach` bytes, or where they end.
    pub(crate) fn change(&mut self, bytes: &mut Vec<u8>, reach: usize) {
        for _ in 0..=self.below(3) {
            self.change_once(bytes, reach);
        }
    }

    fn change_once(&mut self, bytes: &mut Vec<u8>, reach: usize) {
        let at = self.below(reach.min(bytes.len()) as u64) as usize;
        let number = *self.pick(&INTERESTING);
        match self.below(8) {
            0 => bytes.truncate(at),
            1 => bytes.extend(std::iter::repeat_n(number as u8, 1 + at % 5000)),
            2 => bytes.insert(at, number as u8),
            3 if at < bytes.len() => drop(bytes.remove(at)),
            4 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            5 if at < bytes.len() => bytes[at] = self.next() as u8,
            6 => self.copy_within(bytes, at),
            _ => {
                let width = *self.pick(&[2, 4, 8]);
                if let Some(field) = bytes.get_mut(at..at + width) {
                    field.copy_from_slice(&number.to_le_bytes()[..width]);
                }
            }
        }
    }

    /// Repeats a field's worth of bytes from somewhere else.
    fn copy_within(&mut self, bytes: &mut [u8], to: usize) {
        let width = *self.pick(&[1, 2, 8, 16]);
        if let Some(last) = bytes.len().checked_sub(width) {
            let from = self.below(last as u64 + 1) as usize;
            bytes.copy_within(from..from + width, to.min(last));
        }
    }
}
