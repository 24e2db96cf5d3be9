//! The two machines without a world around them.

mod dice;
mod failure_table;
mod fuzz;
mod rig;
