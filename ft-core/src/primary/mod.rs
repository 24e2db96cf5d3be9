//! The primary side.
