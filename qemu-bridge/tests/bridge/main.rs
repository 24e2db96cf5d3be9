//! The bridge against real QEMUs.

mod blocks;
mod costs;
mod guardian;
mod guests;
mod inject;
mod qmp;
mod ram;
mod refusals;
mod shape;
mod standby;
mod support;
mod tracker;
