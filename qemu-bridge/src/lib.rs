//! Everything that talks to a QEMU process.
