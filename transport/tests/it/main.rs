//! Tests of the links as their users see them.

use std::io::Write;

mod choice;
mod conformance;
mod fuzz;
mod garbage;
mod kernel;
mod mem;
mod noise;
mod pairing;
mod partition;
#[cfg(feature = "rdma")]
mod rdma;
#[cfg(feature = "rdma")]
mod rdma_pair;
mod speed;
mod tcp;
mod tcp_pair;

/// Says that something can't be tested here, past the harness, which shows nothing of a test that
/// passes. `scripts/test` counts these lines.
fn not_run(what: &str, why: &str) {
    let line = format!("\n--- {what}: NOT RUN: {why}\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}
