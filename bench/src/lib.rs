//! The test bed: real QEMUs, real daemons, and everything that watches them from outside.
//!
//! It knows the product by its command line, its event log and its QMP traffic, and shares no
//! code with it: what it says about the product is a second opinion.

pub mod cache;
pub mod daemon;
pub mod draw;
pub mod floor;
pub mod guest;
pub mod kill;
pub mod lab;
pub mod listener;
pub mod measure;
pub mod memory;
pub mod pair;
pub mod process;
pub mod proxy;
pub mod qmp;
pub mod relay;
pub mod report;
pub mod transparency;
