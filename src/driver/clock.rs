//! The driver's clock.

use std::time::{Duration, Instant};

use ft_core::Micros;
use nix::time::{ClockId, clock_gettime};

/// `CLOCK_BOOTTIME`: it goes on while the host is suspended, as the peer's does.
pub(crate) fn now() -> Micros {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME is in every kernel");
    let micros = time.tv_sec() * 1_000_000 + time.tv_nsec() / 1_000;
    Micros(u64::try_from(micros).expect("the boot clock is never negative"))
}

/// How long to wait from `now` until `at`; at most an hour, because `ppoll` must not overflow.
pub(crate) fn until(now: Micros, at: Option<Micros>) -> Duration {
    const LONGEST: Duration = Duration::from_secs(3600);
    at.map_or(LONGEST, |at| at.since(now).min(LONGEST))
}

/// A deadline of a library that counts on the monotonic clock, on ours.
pub(crate) fn from_instant(at: Instant) -> Micros {
    now() + at.saturating_duration_since(Instant::now())
}
