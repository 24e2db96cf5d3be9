//! An epoch image while it is made: its chunks are numbered and summed up for the trailer.

use ft_core::image::{AuditDigest, ChunkBuilder, ChunkHead, EpochDigest, Sealed, Trailer};
use ft_core::types::PAGE_BYTES;
use ft_core::wire::Frame;
use ft_core::{Epoch, EpochKind, RunState};
use transport::ChunkMut;

use super::work::Done;

/// What ends an epoch beside its device state.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) base: Epoch,
    pub(super) run_state: RunState,
    pub(super) audit: Option<AuditDigest>,
}

#[derive(Debug)]
pub(super) struct EpochImage {
    frame: Frame,
    kind: EpochKind,
    /// Chunks that were begun.
    begun: u32,
    /// Chunks that are sealed.
    index: u32,
    data_pages: u64,
    zero_pages: u64,
    digest: EpochDigest,
}

/// Bytes of room that a chunk needs to take device state of this length and the trailer.
pub(super) fn room_for_end(device_bytes: usize) -> usize {
    device_bytes.next_multiple_of(PAGE_BYTES) + PAGE_BYTES
}

impl EpochImage {
    pub(super) fn new(frame: Frame, kind: EpochKind) -> EpochImage {
        let digest = EpochDigest::default();
        EpochImage {
            frame,
            kind,
            begun: 0,
            index: 0,
            data_pages: 0,
            zero_pages: 0,
            digest,
        }
    }

    pub(super) fn is_of(&self, frame: Frame, kind: EpochKind) -> bool {
        (self.frame, self.kind) == (frame, kind)
    }

    /// An image of the same epoch with nothing in it.
    pub(super) fn anew(&self) -> EpochImage {
        EpochImage::new(self.frame, self.kind)
    }

    /// Begins the next chunk.
    pub(super) fn begin(&mut self, memory: ChunkMut) -> ChunkBuilder<ChunkMut> {
        let head = ChunkHead {
            frame: self.frame,
            kind: self.kind,
            index: self.begun,
        };
        self.begun += 1;
        ChunkBuilder::new(memory, head)
    }

    pub(super) fn chunks(&self) -> usize {
        self.index as usize
    }

    /// Puts the trailer into the last chunk. There must be room for it.
    pub(super) fn end(
        &mut self,
        mut builder: ChunkBuilder<ChunkMut>,
        end: &Ending,
        device_bytes: usize,
    ) -> Done {
        let fits = builder.push_trailer(&Trailer {
            chunks: self.index + 1,
            data_pages: self.data_pages + u64::from(builder.data_pages()),
            zero_pages: self.zero_pages + builder.zero_pages(),
            device_bytes: device_bytes as u64,
            run_state: end.run_state,
            base: end.base,
            digest: self.digest.value(),
            audit: end.audit.clone(),
        });
        assert!(fits, "room for the trailer was left");
        let (sealed, memory) = builder.finish(true);
        self.add(&sealed, memory, true)
    }

    /// Seals a chunk that isn't the last one. They are sealed in their order.
    pub(super) fn seal(&mut self, builder: ChunkBuilder<ChunkMut>) -> Done {
        let (sealed, memory) = builder.finish(false);
        self.add(&sealed, memory, false)
    }

    fn add(&mut self, sealed: &Sealed, memory: ChunkMut, last: bool) -> Done {
        let index = self.index;
        self.index += 1;
        self.data_pages += u64::from(sealed.data_pages);
        self.zero_pages += sealed.zero_pages;
        self.digest.push(sealed.body_crc);
        let chunk = memory.freeze(sealed.used_bytes);
        Done::Chunk { index, last, chunk }
    }
}
