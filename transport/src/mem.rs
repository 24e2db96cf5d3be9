//! A link inside one process, for tests.
