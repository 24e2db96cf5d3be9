//! Whole epochs, written as the worker writes them.

use ft_core::image::{
    AuditDigest, CheckedChunk, ChunkBuilder, ChunkHead, EpochDigest, Expect, ImageError, Trailer,
    Unpacked, check_chunk, pack_state, packed::RECORD_BYTES_MAX,
};
use ft_core::limits::CHUNK_BYTES;
use ft_core::wire::Frame;
use ft_core::{BlockId, Epoch, EpochKind, PAGE_BYTES, PageRun, RunState, Session, Term, VmTag};

/// Pages per block of the VM that all of these epochs are of.
pub(crate) const BLOCKS: [u64; 4] = [1 << 20, 600, 1, 65];

pub(crate) fn test_frame() -> Frame {
    Frame {
        vm: VmTag(0x1122_3344_5566_7788),
        session: Session(0x99aa_bbcc_ddee_ff00),
        term: Term(3),
        epoch: Epoch(4711),
    }
}

/// What goes into an epoch, in this order.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// Pages whose bytes all are `fill`.
    Data {
        run: PageRun,
        fill: u8,
    },
    /// The same, each page in a record.
    Packed {
        run: PageRun,
        fill: u8,
        lz4: bool,
    },
    Zero {
        run: PageRun,
    },
}

#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) kind: EpochKind,
    pub(crate) steps: Vec<Step>,
    pub(crate) device: Vec<u8>,
    /// If that makes it shorter, and it fits into one chunk.
    pub(crate) pack_device: bool,
    pub(crate) run_state: RunState,
    pub(crate) audit: Option<Vec<u64>>,
}

/// Writes the script's epoch into as many chunks as it takes. `garbage` is what was in their
/// memory before, which must not show.
pub(crate) fn write_epoch(frame: Frame, script: &Script, garbage: u8) -> Vec<Vec<u8>> {
    let mut rest = Rest {
        steps: &script.steps,
        done: 0,
        device_done: 0,
    };
    let mut chunks = Vec::new();
    let mut digest = EpochDigest::default();
    let (mut data_pages, mut zero_pages) = (0, 0);
    loop {
        let index = u32::try_from(chunks.len()).expect("few chunks");
        let mut memory = vec![garbage; CHUNK_BYTES];
        let head = ChunkHead {
            frame,
            kind: script.kind,
            index,
        };
        let mut builder = ChunkBuilder::new(&mut memory, head);
        let filled = rest.fill(&mut builder, script);
        let trailer = Trailer {
            chunks: index + 1,
            data_pages: data_pages + u64::from(builder.data_pages()),
            zero_pages: zero_pages + builder.zero_pages(),
            device_bytes: script.device.len() as u64,
            run_state: script.run_state,
            base: Epoch(frame.epoch.0.saturating_sub(1)),
            digest: digest.value(),
            audit: script.audit.clone().map(AuditDigest),
        };
        let last = filled && builder.push_trailer(&trailer);
        assert!(last || !builder.is_empty(), "no progress");
        let sealed = builder.seal(last);
        data_pages += u64::from(sealed.data_pages);
        zero_pages += sealed.zero_pages;
        digest.push(sealed.body_crc);
        memory.truncate(sealed.used_bytes);
        chunks.push(memory);
        if last {
            return chunks;
        }
    }
}

/// What of a script has not been written yet.
struct Rest<'a> {
    steps: &'a [Step],
    /// Pages of the first step that are written.
    done: u64,
    device_done: usize,
}

impl Rest<'_> {
    /// Whether everything fitted.
    fn fill(&mut self, builder: &mut ChunkBuilder<&mut Vec<u8>>, script: &Script) -> bool {
        while let Some(step) = self.steps.first() {
            match *step {
                Step::Zero { run } => {
                    if !builder.push_zero(run) {
                        return false;
                    }
                }
                Step::Data { run, fill } => {
                    while self.done < run.count {
                        let want = usize::try_from(run.count - self.done).expect("64 bits");
                        let Some(room) = builder.next_pages(want) else {
                            assert!(builder.is_full());
                            return false;
                        };
                        let count = room.len() / PAGE_BYTES;
                        room.fill(fill);
                        builder.commit_data_run(run.block, run.first + self.done, count);
                        self.done += count as u64;
                    }
                }
                Step::Packed { run, fill, lz4 } => {
                    while self.done < run.count {
                        let page = run.first + self.done;
                        let record = uniform_record(run.block, page, fill, lz4);
                        let roomy = builder.has_room_for_record();
                        let pushed = builder.push_packed(&record);
                        assert!(pushed || !roomy, "there was room");
                        if !pushed {
                            return false;
                        }
                        self.done += 1;
                    }
                }
            }
            self.done = 0;
            self.steps = &self.steps[1..];
        }
        let device = &script.device;
        let mut packed = Vec::new();
        if self.device_done == 0
            && script.pack_device
            && pack_state(device, &mut packed)
            && packed.len() <= builder.device_room()
        {
            builder.push_packed_device(device.len(), &packed);
            self.device_done = device.len();
        }
        let left = &device[self.device_done..];
        let piece = &left[..left.len().min(builder.device_room())];
        builder.push_device(self.device_done as u64, piece);
        self.device_done += piece.len();
        self.device_done == device.len()
    }
}

/// A page whose bytes all are `fill`.
pub(crate) fn uniform_record(block: BlockId, page: u64, fill: u8, lz4: bool) -> Vec<u8> {
    let bytes = &[fill; PAGE_BYTES];
    let mut record = [0; RECORD_BYTES_MAX];
    let page = Unpacked { block, page, bytes };
    let used = match lz4 {
        true => page.lz4(&mut record).expect("nothing compresses better"),
        false => page.raw(&mut record),
    };
    record[..used].to_vec()
}

pub(crate) fn check(chunk: &[u8]) -> Result<CheckedChunk, ImageError> {
    check_chunk(
        chunk,
        &Expect {
            frame: test_frame(),
            blocks: &BLOCKS,
        },
    )
}
