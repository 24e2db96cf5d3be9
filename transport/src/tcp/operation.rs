//! What an operation is called in its completion, and what its result says.

use std::io;

use crate::link::LossKind;

/// Names an operation in its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Token {
    Cancel = 0,
    ControlReceive = 1,
    ControlSend = 2,
    BulkReceive = 3,
    BulkSend = 4,
    BulkHeader = 5,
    BulkBody = 6,
    BulkReceiveHeader = 7,
}

impl Token {
    const ALL: [Token; 8] = [
        Token::Cancel,
        Token::ControlReceive,
        Token::ControlSend,
        Token::BulkReceive,
        Token::BulkSend,
        Token::BulkHeader,
        Token::BulkBody,
        Token::BulkReceiveHeader,
    ];

    /// The completion's `user_data`: the token in the low byte, `serial` above.
    pub(super) fn with_serial(self, serial: u64) -> u64 {
        self as u64 | serial << 8
    }

    pub(super) fn serial(user_data: u64) -> u64 {
        user_data >> 8
    }

    pub(super) fn of(user_data: u64) -> Token {
        Token::ALL[(user_data & 0xff) as usize]
    }
}

/// What a completed send or receive says, its errors aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Bytes(usize),
    /// Interrupted: to be started again.
    Again,
}

/// Reads an operation's result.
pub(super) fn outcome(result: i32) -> Result<Outcome, LossKind> {
    match result {
        0.. => Ok(Outcome::Bytes(result as usize)),
        _ if matches!(-result, libc::EINTR | libc::EAGAIN) => Ok(Outcome::Again),
        _ => Err(LossKind::Error(
            io::Error::from_raw_os_error(-result).to_string(),
        )),
    }
}
