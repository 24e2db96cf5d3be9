//! Tests of the links as their users see them.

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
