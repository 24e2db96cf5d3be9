//! The protocol of `curling-rdma`, without input or output.
//!
//! Two state machines ([`primary::Primary`] and [`backup::Backup`]) decide everything that two
//! hosts have to agree on; [`wire`] is what they say to each other; [`image`] is how an epoch
//! is laid out in chunks. Nothing in here opens a socket, reads a clock, starts a thread or
//! draws a random number: time comes in as an argument, effects go out as values. So the same
//! machines run in production, in the simulator and in a fuzzer.
#![forbid(unsafe_code)]

pub mod backup;
pub mod detector;
pub mod dirty;
pub mod image;
pub mod limits;
pub mod primary;
pub mod shape;
pub mod types;
pub mod wire;

pub use dirty::DirtySet;
pub use shape::VmShape;
pub use types::*;
