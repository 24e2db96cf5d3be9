//! The bridge against real QEMUs.

mod blocks;
mod guardian;
mod guests;
mod qmp;
mod refusals;
mod shape;
mod standby;
mod support;
mod tracker;
