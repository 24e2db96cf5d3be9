//! Looking for a while before sleeping, as long as that pays off: being woken takes the kernel
//! longer than most peers need to answer.

use std::time::{Duration, Instant};

/// Looking in vain about this often ends it, until it has been passed over as often.
const VAIN_MAX: u32 = 8;

#[derive(Debug)]
pub struct Spin {
    patience: Duration,
    vain: u32,
}

impl Spin {
    /// Looks for so long; not at all if that is zero.
    pub fn new(patience: Duration) -> Spin {
        Spin { patience, vain: 0 }
    }

    /// Looks until there is something, or `limit` or its own patience is over.
    ///
    /// # Errors
    /// That of `look`.
    pub fn until<T, E>(
        &mut self,
        limit: Duration,
        mut look: impl FnMut() -> Result<Option<T>, E>,
    ) -> Result<Option<T>, E> {
        let patience = self.patience.min(limit);
        if patience.is_zero() {
            return Ok(None);
        }
        if self.vain >= VAIN_MAX {
            self.vain -= 1;
            return Ok(None);
        }
        let began = Instant::now();
        loop {
            if let Some(found) = look()? {
                self.vain = 0;
                return Ok(Some(found));
            }
            if began.elapsed() >= patience {
                self.vain = (self.vain + 1) * 2;
                return Ok(None);
            }
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn looking_in_vain_ends_and_begins_again() {
        let mut spin = Spin::new(Duration::from_nanos(1));
        let mut looks = 0;
        for _ in 0..1000 {
            let found: Result<Option<()>, ()> = spin.until(LONG, || {
                looks += 1;
                Ok(None)
            });
            assert_eq!(found, Ok(None));
        }
        assert!((10..500).contains(&looks), "{looks} looks in 1000 waits");
        // One that finds something makes it look every time.
        let there = || Ok::<_, ()>(Some(7));
        while spin.until(LONG, there) != Ok(Some(7)) {}
        assert_eq!(spin.until(LONG, there), Ok(Some(7)));
        assert_eq!(spin.until(Duration::ZERO, there), Ok(None));
    }
}
