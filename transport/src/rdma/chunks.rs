//! What is registered of slot memory: each chunk when it is first used, for as long as its mapping
//! lives.

use std::collections::HashMap;
use std::io;
use std::rc::Rc;

use super::device::ProtectionDomain;
use super::region::{MemoryRegion, Piece};
use super::window::{Binding, MemoryWindow, RemoteWindow};
use crate::arena::{Chunk, ChunkMut, MappingWatch, unmapped_count};
use crate::link::CHUNK_BYTES;

/// The registered chunks of one link, by address: several arenas may be in use.
#[derive(Debug)]
pub(super) struct Chunks {
    registered: HashMap<usize, Registered>,
    /// What [`unmapped_count`] was when `registered` was last looked through.
    unmapped_seen: u64,
}

#[derive(Debug)]
struct Registered {
    /// Made at the first grant. Goes before the region that it is on.
    window: Option<MemoryWindow>,
    region: Rc<MemoryRegion>,
    watch: MappingWatch,
}

impl Chunks {
    pub(super) fn new() -> Chunks {
        Chunks {
            registered: HashMap::new(),
            unmapped_seen: unmapped_count(),
        }
    }

    /// The used bytes of a chunk that is to be pushed.
    pub(super) fn piece(&mut self, pd: &Rc<ProtectionDomain>, chunk: &Chunk) -> io::Result<Piece> {
        let registered = self.register(pd, chunk)?;
        Ok(registered.region.piece(0, chunk.bytes().len()))
    }

    /// Prepares a chunk for being written by the peer.
    pub(super) fn bind(
        &mut self,
        pd: &Rc<ProtectionDomain>,
        chunk: ChunkMut,
    ) -> io::Result<(ChunkMut, Binding, RemoteWindow)> {
        let chunk = chunk.freeze(CHUNK_BYTES);
        let registered = self.register(pd, &chunk)?;
        let window = match &mut registered.window {
            Some(window) => window,
            vacant => vacant.insert(MemoryWindow::new(&registered.region)?),
        };
        let (binding, remote) = window.next_binding();
        Ok((chunk.thaw(), binding, remote))
    }

    /// The key of the last binding of a chunk's window.
    pub(super) fn rkey(&self, chunk: &ChunkMut) -> Option<u32> {
        let registered = self.registered.get(&address(chunk.as_slice()))?;
        Some(registered.window.as_ref()?.rkey())
    }

    /// Ends a chunk's window: when this returns, the peer can't write it.
    pub(super) fn drop_window(&mut self, chunk: &ChunkMut) {
        if let Some(registered) = self.registered.get_mut(&address(chunk.as_slice())) {
            registered.window = None;
        }
    }

    /// Ends all windows, bound or not, so that their queue pair can go.
    pub(super) fn drop_windows(&mut self) {
        for registered in self.registered.values_mut() {
            registered.window = None;
        }
    }

    fn register(
        &mut self,
        pd: &Rc<ProtectionDomain>,
        chunk: &Chunk,
    ) -> io::Result<&mut Registered> {
        self.forget_unmapped();
        let at = address(chunk.mapping());
        if !self
            .registered
            .get(&at)
            .is_some_and(|it| it.watch.is_of(chunk))
        {
            // SAFETY: it is the chunk's whole mapping, private and writable. Chunks that requests or
            // grants use are kept by the link, and nobody else sees them; `is_of` keeps a later
            // mapping at the same address from being taken for this one.
            let region = unsafe {
                MemoryRegion::register(pd, chunk.mapping().as_ptr().cast_mut(), CHUNK_BYTES)
            }?;
            self.registered.insert(
                at,
                Registered {
                    window: None,
                    region,
                    watch: chunk.watch(),
                },
            );
        }
        Ok(self.registered.get_mut(&at).expect("it was just put there"))
    }

    /// Unpins chunks that were given back to the system: their memory isn't free before.
    fn forget_unmapped(&mut self) {
        let unmapped = unmapped_count();
        if unmapped != self.unmapped_seen {
            self.unmapped_seen = unmapped;
            self.registered.retain(|_, it| it.watch.is_alive());
        }
    }
}

fn address(mapping: &[u8]) -> usize {
    mapping.as_ptr().addr()
}
