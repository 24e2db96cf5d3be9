//! The two machines without a world around them.

#[path = "../common/dice.rs"]
mod dice;
mod failure_table;
mod fuzz;
mod pacing;
mod rig;
