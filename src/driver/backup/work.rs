//! The backup's worker: it checks chunks and applies epochs to the standby's RAM.

use std::sync::Arc;

use ft_core::image::{CheckedChunk, Expect, check_chunk};
use ft_core::wire::Frame;
use ft_core::{ChunkId, Epoch};
use qemu_bridge::audit::hash_blocks;
use qemu_bridge::blocks::RamBlock;
use qemu_bridge::guest_ram::RamError;
use qemu_bridge::standby_ram::StandbyRam;
use transport::Chunk;

use crate::driver::worker::Desk;

#[derive(Debug)]
pub(crate) enum Job {
    Check {
        id: ChunkId,
        chunk: Arc<Chunk>,
        frame: Frame,
    },
    ApplySync {
        id: ChunkId,
        chunk: Arc<Chunk>,
    },
    Apply {
        epoch: Epoch,
        chunks: Vec<Arc<Chunk>>,
        audit: Option<Vec<u64>>,
    },
    /// A fresh standby on the same RAM.
    Adopt {
        pid: i32,
        blocks: Vec<RamBlock>,
    },
    /// Give a rehearsal's QEMU the blocks that it can't map.
    Poke {
        pid: i32,
        blocks: Vec<RamBlock>,
    },
}

#[derive(Debug)]
pub(crate) enum Done {
    Checked {
        id: ChunkId,
        result: Result<CheckedChunk, String>,
    },
    SyncApplied(ChunkId),
    Applied {
        epoch: Epoch,
        audit: Option<Vec<u16>>,
        device_state: Vec<u8>,
    },
    ApplyFailed(String),
    Adopted(Result<(), String>),
    Poked(Result<(), String>),
}

pub(crate) struct BackupWorker {
    ram: StandbyRam,
    pages: Vec<u64>,
}

impl BackupWorker {
    pub(crate) fn new(ram: StandbyRam) -> BackupWorker {
        let pages = ram.pages_per_block();
        BackupWorker { ram, pages }
    }

    /// Works until the driver is gone.
    pub(crate) fn run(mut self, desk: &Desk<Job, Done>) {
        while let Some(job) = desk.next() {
            let done = self.step(job);
            desk.report(done);
        }
    }

    fn step(&mut self, job: Job) -> Done {
        match job {
            Job::Check { id, chunk, frame } => {
                let expect = Expect {
                    frame,
                    blocks: &self.pages,
                };
                let result = check_chunk(chunk.bytes(), &expect).map_err(|e| e.to_string());
                Done::Checked { id, result }
            }
            Job::ApplySync { id, chunk } => match self.ram.apply(chunk.bytes(), &mut Vec::new()) {
                Ok(()) => Done::SyncApplied(id),
                Err(error) => Done::ApplyFailed(error.to_string()),
            },
            Job::Apply {
                epoch,
                chunks,
                audit,
            } => match self.apply(&chunks, audit.as_deref()) {
                Ok((device_state, audit)) => Done::Applied {
                    epoch,
                    audit,
                    device_state,
                },
                Err(error) => Done::ApplyFailed(error.to_string()),
            },
            Job::Adopt { pid, blocks } => {
                Done::Adopted(self.ram.adopt(pid, &blocks).map_err(|e| e.to_string()))
            }
            Job::Poke { pid, blocks } => {
                Done::Poked(self.ram.poke(pid, &blocks).map_err(|e| e.to_string()))
            }
        }
    }

    fn apply(
        &self,
        chunks: &[Arc<Chunk>],
        audit: Option<&[u64]>,
    ) -> Result<(Vec<u8>, Option<Vec<u16>>), RamError> {
        let mut device_state = Vec::new();
        for chunk in chunks {
            self.ram.apply(chunk.bytes(), &mut device_state)?;
        }
        let Some(theirs) = audit else {
            return Ok((device_state, None));
        };
        let ours = hash_blocks(&self.ram)?;
        let mut mismatched: Vec<u16> = (0..)
            .zip(ours.iter().zip(theirs))
            .filter(|(_, (ours, theirs))| ours != theirs)
            .map(|(block, _)| block)
            .collect();
        if ours.len() != theirs.len() {
            let first_missing = ours.len().min(theirs.len());
            mismatched.push(u16::try_from(first_missing).unwrap_or(u16::MAX));
        }
        Ok((device_state, Some(mismatched)))
    }
}
