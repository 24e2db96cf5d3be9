//! Actions as `--trace` shows them: messages by their meaning, not their bytes.

use ft_core::{backup, primary, wire};

pub(crate) fn primary_action(action: &primary::Action) -> String {
    match action {
        primary::Action::Send(bytes) => message(bytes),
        other => format!("{other:?}"),
    }
}

pub(crate) fn backup_action(action: &backup::Action) -> String {
    match action {
        backup::Action::Send(link, bytes) => format!("{link:?} {}", message(bytes)),
        other => format!("{other:?}"),
    }
}

fn message(bytes: &[u8]) -> String {
    match wire::decode(bytes) {
        Ok((frame, wire::Message::Grant(batch))) => {
            format!("Send Grant of {} for {}", batch.grants.len(), frame.epoch)
        }
        Ok((frame, wire::Message::Hello(hello))) => format!(
            "Send Hello {{ {:?}, attempt {}, last {}, activated {} }} term {}",
            hello.role, hello.attempt, hello.last_epoch, hello.activated, frame.term
        ),
        Ok((frame, message)) => {
            format!("Send {message:?} epoch {} term {}", frame.epoch, frame.term)
        }
        Err(error) => format!("Send {error}"),
    }
}
