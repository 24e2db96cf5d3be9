//! Looking for completions for a while before sleeping, as long as that pays off.

use std::io;
use std::time::{Duration, Instant};

use super::completion::{Completion, CompletionQueue};

/// Looking in vain about this often ends it, until it has been passed over as often.
const VAIN_MAX: u32 = 8;

#[derive(Debug)]
pub(super) struct Spin {
    patience: Duration,
    vain: u32,
}

impl Spin {
    pub(super) fn new(patience: Duration) -> Spin {
        Spin { patience, vain: 0 }
    }

    /// The next completion, looked for a while if one is `expected`.
    pub(super) fn poll(
        &mut self,
        queue: &CompletionQueue,
        expected: bool,
    ) -> io::Result<Option<Completion>> {
        if let Some(completion) = queue.poll()? {
            return Ok(Some(completion));
        }
        if !expected || self.patience.is_zero() {
            return Ok(None);
        }
        if self.vain >= VAIN_MAX {
            self.vain -= 1;
            return Ok(None);
        }
        let end = Instant::now() + self.patience;
        while Instant::now() < end {
            if let Some(completion) = queue.poll()? {
                self.vain = 0;
                return Ok(Some(completion));
            }
            std::hint::spin_loop();
        }
        self.vain = (self.vain + 1) * 2;
        Ok(None)
    }
}
