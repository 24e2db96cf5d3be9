//! What zero-copy sends need: chunks registered with the ring, and a word from the kernel that
//! it really doesn't copy.

use std::io;

use crate::arena::{Chunk, MappingWatch, unmapped_count};
use crate::tcp::ring::Ring;

/// Registered chunks of one ring, the kernel's most (IORING_MAX_REG_BUFFERS). A chunk with a
/// higher id is sent all the same, at the price of pinning its pages each time.
const TABLE_ENTRIES: u32 = 1 << 14;

/// When chunks are sent without copying them into the socket's buffers (IORING_OP_SEND_ZC).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroCopy {
    /// Until the kernel reports that it copied after all, as it does on loopback, where that is
    /// slower than a plain send.
    #[default]
    WhileNotCopied,
    /// Even if the kernel copies: for tests and measurements.
    Always,
    Never,
}

/// The decision of one link, and what it has registered.
#[derive(Debug)]
pub(super) struct ZeroCopyState {
    policy: ZeroCopy,
    active: bool,
    /// By chunk id; empty until the first chunk is registered.
    registered: Vec<Option<MappingWatch>>,
    /// What [`unmapped_count`] was when `registered` was last looked through.
    unmapped_seen: u64,
}

impl ZeroCopyState {
    pub(super) fn new(policy: ZeroCopy, ring: &Ring) -> ZeroCopyState {
        ZeroCopyState {
            policy,
            active: policy != ZeroCopy::Never && ring.has_zero_copy(),
            registered: Vec::new(),
            unmapped_seen: unmapped_count(),
        }
    }

    pub(super) fn is_active(&self) -> bool {
        self.active
    }

    /// The kernel says that it copied.
    pub(super) fn copied(&mut self) {
        if self.active && self.policy == ZeroCopy::WhileNotCopied {
            tracing::debug!("the kernel copies zero-copy sends here: sending plainly from now on");
            self.active = false;
        }
    }

    /// The kernel can't do it here.
    pub(super) fn failed(&mut self, error: &io::Error) {
        if self.active {
            tracing::warn!(%error, "zero-copy sends don't work here: sending plainly from now on");
            self.active = false;
        }
    }

    /// The index under which `chunk` is registered, after registering it if it wasn't; `None` if
    /// its id is beyond the table. An error ends zero-copy sends for this link.
    pub(super) fn register(&mut self, ring: &Ring, chunk: &Chunk) -> io::Result<Option<u16>> {
        self.forget_unmapped(ring)?;
        let id = chunk.id();
        if id >= TABLE_ENTRIES {
            return Ok(None);
        }
        if self.registered.is_empty() {
            ring.submitter().register_buffers_sparse(TABLE_ENTRIES)?;
            self.registered.resize(TABLE_ENTRIES as usize, None);
        }
        let entry = &mut self.registered[id as usize];
        if !entry.as_ref().is_some_and(|watch| watch.is_of(chunk)) {
            let mapping = chunk.mapping();
            let buffer = libc::iovec {
                iov_base: mapping.as_ptr() as *mut libc::c_void,
                iov_len: mapping.len(),
            };
            // SAFETY: the range is the chunk's whole mapping. The kernel pins its pages, so that
            // they outlive even the mapping; `forget_unmapped` then lets go of them, and `is_of`
            // keeps them from being taken for those of a later mapping.
            unsafe {
                ring.submitter()
                    .register_buffers_update(id, &[buffer], None)
            }
            .map_err(explain)?;
            *entry = Some(chunk.watch());
        }
        Ok(Some(id as u16))
    }

    /// Unpins chunks that were given back to the system: their memory isn't free before.
    fn forget_unmapped(&mut self, ring: &Ring) -> io::Result<()> {
        let unmapped = unmapped_count();
        if unmapped == self.unmapped_seen {
            return Ok(());
        }
        self.unmapped_seen = unmapped;
        for (id, entry) in self.registered.iter_mut().enumerate() {
            if entry.as_ref().is_some_and(|watch| !watch.is_alive()) {
                let nothing = libc::iovec {
                    iov_base: std::ptr::null_mut(),
                    iov_len: 0,
                };
                // SAFETY: an empty buffer names no memory.
                unsafe {
                    ring.submitter()
                        .register_buffers_update(id as u32, &[nothing], None)
                }?;
                *entry = None;
            }
        }
        Ok(())
    }
}

/// Puts the cure beside the error.
fn explain(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => io::Error::new(
            error.kind(),
            "chunks can't be locked in memory: raise RLIMIT_MEMLOCK (ulimit -l) or grant \
             CAP_IPC_LOCK",
        ),
        _ => error,
    }
}
