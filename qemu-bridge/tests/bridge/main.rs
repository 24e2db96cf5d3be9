//! The bridge against real QEMUs.

mod blocks;
mod guardian;
mod qmp;
mod refusals;
mod shape;
mod standby;
mod support;
