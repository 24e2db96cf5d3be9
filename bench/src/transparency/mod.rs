//! Whether a failover is invisible to clients: databases in a guest, clients outside of it, hosts
//! that die, and a checker that knows nothing but what the clients have written down.
//!
//! [`network`] makes two hosts and a switch (docs/network.md), [`hosts`] runs the guest on them and
//! lets them die, [`traffic`] starts [`clients`] that write and read with [`redis`] and [`postgres`]
//! and keep a [`log`], [`checker`] judges it. [`latency`] has what a request costs, and what that is
//! compared with; [`load`] lets the databases work as much as they can, for `cargo bench`.

pub mod checker;
pub mod clients;
pub mod hosts;
pub mod latency;
pub mod load;
pub mod log;
pub mod network;
pub mod postgres;
pub mod redis;
pub mod traffic;

/// The guest, from the clients' network.
pub const GUEST: &str = "10.78.0.10";
