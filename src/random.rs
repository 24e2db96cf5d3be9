//! Random numbers from the kernel.

use std::fs::File;
use std::io::{self, Read};

/// Sixteen bytes that nobody can guess: they tie the lanes of a pairing together.
///
/// # Errors
/// `/dev/urandom` can't be read.
pub(crate) fn bytes() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
