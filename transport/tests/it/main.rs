//! Tests of the links as their users see them.

mod conformance;
mod fuzz;
mod garbage;
mod mem;
mod noise;
mod speed;
mod tcp;
mod tcp_pair;
