//! Buffers that the kernel picks for a multishot receive (IORING_REGISTER_PBUF_RING).

use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;
use memmap2::MmapMut;

use crate::tcp::TcpError;
use crate::tcp::ring::Ring;

/// Buffers of a group: a power of two.
const BUFFERS: u16 = 8;
/// Bytes of one buffer.
pub(super) const BUFFER_BYTES: usize = 16 << 10;
/// The only group of its ring.
pub(super) const GROUP: u16 = 0;

/// A group of buffers of which each is with the kernel, or with this side between a completion
/// that names it and [`Provided::give_back`].
pub(super) struct Provided {
    /// The descriptors that the kernel reads: an array of `BUFFERS` entries on a page of its own.
    entries: MmapMut,
    buffers: MmapMut,
    /// Where the next buffer is given back: it wraps as the kernel's copy does.
    tail: u16,
}

impl Provided {
    /// Registers a group with `ring` and gives it all of its buffers. The group must outlive every
    /// operation that uses it.
    pub(super) fn new(ring: &Ring) -> Result<Provided, TcpError> {
        let map = |bytes| {
            MmapMut::map_anon(bytes).map_err(|source| TcpError::io("mapping buffers", source))
        };
        let mut provided = Provided {
            entries: map(usize::from(BUFFERS) * size_of::<BufRingEntry>())?,
            buffers: map(usize::from(BUFFERS) * BUFFER_BYTES)?,
            tail: 0,
        };
        // SAFETY: the address is that of a mapping with room for `BUFFERS` entries, which lives
        // until every operation has ended: the link leaks it if it can't wait for that.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(
                provided.entries.as_mut_ptr() as u64,
                BUFFERS,
                GROUP,
                0,
            )
        }
        .map_err(|source| TcpError::io("IORING_REGISTER_PBUF_RING", source))?;
        for buffer in 0..BUFFERS {
            provided.give_back(buffer);
        }
        Ok(provided)
    }

    /// The first `bytes` of a buffer that a completion named.
    pub(super) fn bytes(&self, buffer: u16, bytes: usize) -> &[u8] {
        let start = usize::from(buffer) * BUFFER_BYTES;
        &self.buffers[start..start + bytes.min(BUFFER_BYTES)]
    }

    /// Lets the kernel fill `buffer` again.
    pub(super) fn give_back(&mut self, buffer: u16) {
        assert!(buffer < BUFFERS, "there is no buffer {buffer}");
        let entries: *mut BufRingEntry = self.entries.as_mut_ptr().cast();
        // SAFETY: the start stays inside `buffers`, by the assertion.
        let start = unsafe {
            self.buffers
                .as_mut_ptr()
                .add(usize::from(buffer) * BUFFER_BYTES)
        };
        // SAFETY: the index is less than `BUFFERS`, and the mapping is page-aligned and zeroed, a
        // valid value for entries. The kernel only reads entries before the tail, and this one is
        // behind it: at most `BUFFERS` are given.
        let entry = unsafe { &mut *entries.add(usize::from(self.tail % BUFFERS)) };
        entry.set_addr(start as u64);
        entry.set_len(BUFFER_BYTES as u32);
        entry.set_bid(buffer);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: `entries` is the address of the first entry, whose reserved bytes are the tail:
        // two aligned bytes that this side only uses atomically, and the kernel only reads.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(entries).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}
