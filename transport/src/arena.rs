//! Slot memory.

/// Replaced at once by the transport helper.
#[derive(Debug)]
pub struct Arena;
#[derive(Debug)]
pub struct Chunk;
#[derive(Debug)]
pub struct ChunkMut;
