//! Tests of the links as their users see them.

mod conformance;
mod fuzz;
mod garbage;
mod kernel;
mod mem;
mod noise;
mod pairing;
mod partition;
mod speed;
mod tcp;
mod tcp_pair;
