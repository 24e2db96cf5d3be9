//! The loops that feed the machines and carry out what they decide.
//!
//! One thread per daemon does all waiting, in one `ppoll`. What takes longer than a few
//! milliseconds is the worker's, a second thread with two bounded queues: otherwise an audit of
//! all of RAM would delay heartbeats into a false failover.

pub(crate) mod backup;
pub(crate) mod clock;
mod poller;
pub(crate) mod primary;
mod proof;
pub(crate) mod report;
pub(crate) mod worker;
