//! The bridge against real QEMUs.

mod blocks;
mod guardian;
mod qmp;
mod standby;
mod support;
