//! The bridge against real QEMUs.

mod blocks;
mod guardian;
mod qmp;
mod shape;
mod standby;
mod support;
