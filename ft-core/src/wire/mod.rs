//! What travels.

pub mod message;

pub use message::*;
