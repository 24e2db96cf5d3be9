//! A named bound for everything that a peer, QEMU or a file can make us hold.

/// Bytes of one chunk of an epoch image, header included.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Bytes of one control message, header included.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// RAM blocks of one VM.
pub const BLOCKS_MAX: usize = 256;
/// Properties in a VM's shape (devices, CPU, machine, …).
pub const SHAPE_PROPERTIES_MAX: usize = 512;
/// Bytes of one string in a message: a block's name, a shape's value, a reason.
pub const STRING_BYTES_MAX: usize = 4096;
/// Bytes of `--vm-id`.
pub const VM_ID_BYTES_MAX: usize = 128;
/// Grants in one message.
pub const GRANTS_PER_MESSAGE_MAX: usize = 512;
/// Pages of one RAM block: a page less than 16 TiB, so that every run's length fits in an entry.
pub const BLOCK_PAGES_MAX: u64 = (1 << 32) - 1;
/// Bytes of saved device state in one epoch.
pub const DEVICE_STATE_BYTES_MAX: usize = 64 << 20;
/// Chunks of one epoch: 1 TiB, and what fits in [`crate::wire::ChunkTag`].
pub const EPOCH_CHUNKS_MAX: u32 = 1 << 20;
