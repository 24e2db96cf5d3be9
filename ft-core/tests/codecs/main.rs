//! The wire format, the layout of an epoch and the dirty set, from outside.

#[path = "../common/mod.rs"]
mod common;
mod dirty;
mod golden;
mod image;
mod model;
mod packed;
mod wire;
