//! The backup side.
