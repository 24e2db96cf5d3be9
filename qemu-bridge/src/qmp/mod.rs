//! QMP, QEMU's control protocol: one JSON object a line, in both directions.
//!
//! [`codec`] turns bytes into messages and back; [`client`] is a non-blocking socket around it.

mod client;
mod codec;

pub(crate) use client::dial;
pub use client::{Incoming, PENDING_MAX, Qmp, QmpError, RequestId};
pub use codec::{CodecError, Command, Decoder, LINE_BYTES_MAX, Message, QmpFailure};
