//! The bridge against real QEMUs.

mod blocks;
mod costs;
mod guardian;
mod guests;
mod inject;
mod plug;
mod qmp;
mod ram;
mod refusals;
mod shape;
mod standby;
mod support;
mod tracker;
