//! The bridge against real QEMUs.

mod blocks;
mod qmp;
mod support;
