//! Bytes to QMP messages and back. Nothing here does I/O.

use std::fmt;

use serde_json::{Map, Value};

/// Bytes of one line from QEMU. The largest answer known, `qom-list` or `info mtree` of a big
/// machine, stays well under 1 MiB.
pub const LINE_BYTES_MAX: usize = 4 << 20;

/// One command. It has no `id`: QEMU answers in order (docs/interop/qmp-spec), and reads byte by byte.
#[derive(Clone, Debug, PartialEq)]
pub struct Command {
    name: String,
    arguments: Map<String, Value>,
}

impl Command {
    pub fn new(name: &str) -> Command {
        Command {
            name: name.to_owned(),
            arguments: Map::new(),
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, key: &str, value: impl Into<Value>) -> Command {
        self.arguments.insert(key.to_owned(), value.into());
        self
    }

    /// A line for the human monitor, for what QMP can't say.
    pub fn human(line: &str) -> Command {
        Command::new("human-monitor-command").arg("command-line", line)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Appends the command as one compact line: QEMU spends up to 4.5 µs a byte.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"execute\":");
        append_json(out, &self.name);
        if !self.arguments.is_empty() {
            out.extend_from_slice(b",\"arguments\":");
            append_json(out, &self.arguments);
        }
        out.extend_from_slice(b"}\n");
    }
}

fn append_json(out: &mut Vec<u8>, value: &impl serde::Serialize) {
    serde_json::to_writer(out, value)
        .expect("strings and JSON values always serialise into memory");
}

/// An error that QEMU answered with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{desc} ({class})")]
pub struct QmpFailure {
    pub class: String,
    pub desc: String,
}

/// One line from QEMU.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// The first line of a connection.
    Greeting {
        /// The `version` object: `qemu.{major,minor,micro}` and `package`.
        version: Value,
        /// QEMU offers out-of-band execution.
        oob: bool,
    },
    /// To the oldest command that has none yet.
    Reply(Result<Value, QmpFailure>),
    Event {
        name: String,
        data: Value,
        /// QEMU's wall clock, in microseconds since 1970; 0 if it could not tell.
        at_us: u64,
    },
}

/// What is wrong with bytes that came from QEMU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("a QMP line is longer than {LINE_BYTES_MAX} bytes")]
    LineTooLong,
    #[error("a QMP line is not a JSON object: {0}")]
    NotJson(String),
    #[error("a QMP line is neither a greeting, a reply nor an event: {0}")]
    Unknown(Excerpt),
}

/// The beginning of a line, for an error message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excerpt(String);

impl Excerpt {
    const CHARS: usize = 160;

    fn of(text: &str) -> Excerpt {
        Excerpt(text.chars().take(Excerpt::CHARS).collect())
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Splits a stream of bytes into messages.
///
/// Feed it what came, then call [`Decoder::next`] until it returns `None`. After an error the
/// stream can't be trusted any more: close the connection.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Where the first line that was not handed out yet begins.
    start: usize,
    /// `buffer[start..scanned]` holds no line feed.
    scanned: usize,
}

impl Decoder {
    /// Takes bytes from the socket. Call [`Decoder::next`] until `None` before the next feed.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete message.
    ///
    /// # Errors
    /// The line is not a message of the protocol, or longer than [`LINE_BYTES_MAX`].
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator can't be fed in between"
    )]
    pub fn next(&mut self) -> Result<Option<Message>, CodecError> {
        loop {
            let Some(length) = self.buffer[self.scanned..].iter().position(|b| *b == b'\n') else {
                self.scanned = self.buffer.len();
                return match self.scanned - self.start > LINE_BYTES_MAX {
                    true => Err(CodecError::LineTooLong),
                    false => Ok(None),
                };
            };
            let line = self.start..self.scanned + length;
            self.start = line.end + 1;
            self.scanned = self.start;
            let line = self.buffer[line].trim_ascii();
            if !line.is_empty() {
                return parse(line).map(Some);
            }
        }
    }
}

fn parse(line: &[u8]) -> Result<Message, CodecError> {
    let mut object: Map<String, Value> =
        serde_json::from_slice(line).map_err(|e| CodecError::NotJson(e.to_string()))?;
    if let Some(value) = object.remove("return") {
        return Ok(Message::Reply(Ok(value)));
    }
    if let Some(error) = object.get("error") {
        return Ok(Message::Reply(Err(QmpFailure {
            class: text(error, "class"),
            desc: text(error, "desc"),
        })));
    }
    if let Some(Value::String(name)) = object.remove("event") {
        let at_us = object.get("timestamp").map_or(0, timestamp_us);
        let data = object.remove("data").unwrap_or(Value::Null);
        return Ok(Message::Event { name, data, at_us });
    }
    if let Some(greeting) = object.get("QMP") {
        let offers = |c: &Value| c.as_array().is_some_and(|c| c.iter().any(|c| c == "oob"));
        return Ok(Message::Greeting {
            version: greeting["version"].clone(),
            oob: offers(&greeting["capabilities"]),
        });
    }
    Err(CodecError::Unknown(Excerpt::of(&String::from_utf8_lossy(
        line,
    ))))
}

fn text(object: &Value, key: &str) -> String {
    object[key].as_str().unwrap_or("unknown").to_owned()
}

/// QEMU writes -1 in both fields when it can't read its clock.
fn timestamp_us(timestamp: &Value) -> u64 {
    let field = |key| timestamp[key].as_u64().unwrap_or(0);
    field("seconds")
        .saturating_mul(1_000_000)
        .saturating_add(field("microseconds"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn decode_all(bytes: &[u8]) -> Result<Vec<Message>, CodecError> {
        let mut decoder = Decoder::default();
        decoder.feed(bytes);
        let mut messages = Vec::new();
        while let Some(message) = decoder.next()? {
            messages.push(message);
        }
        Ok(messages)
    }

    #[test]
    fn command_is_one_compact_line() {
        let mut out = Vec::new();
        Command::new("stop").encode(&mut out);
        Command::new("add-fd").arg("fdset-id", 3).encode(&mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "{\"execute\":\"stop\"}\n{\"execute\":\"add-fd\",\"arguments\":{\"fdset-id\":3}}\n"
        );
    }

    #[test]
    fn every_kind_of_message_is_told_apart() {
        let text = concat!(
            r#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7},"package":""},"capabilities":["oob"]}}"#,
            "\r\n",
            r#"{"return":{"a":1}}"#,
            "\r\n\r\n",
            r#"{"error":{"class":"GenericError","desc":"no"}}"#,
            "\n",
            r#"{"timestamp":{"seconds":3,"microseconds":5},"event":"NEVER_HEARD_OF","data":{"x":[]}}"#,
            "\n",
        );
        let messages = decode_all(text.as_bytes()).unwrap();
        assert!(
            matches!(&messages[0], Message::Greeting { oob: true, version } if version["qemu"]["major"] == 7)
        );
        assert_eq!(messages[1], Message::Reply(Ok(json!({"a": 1}))));
        assert!(matches!(&messages[2], Message::Reply(Err(f)) if f.desc == "no"));
        assert!(
            matches!(&messages[3], Message::Event { name, at_us: 3_000_005, .. } if name == "NEVER_HEARD_OF")
        );
    }

    #[test]
    fn same_messages_however_the_bytes_are_cut() {
        let text = b"{\"return\":{}}\n{\"event\":\"STOP\"}\n{\"return\":[]}\n";
        let whole = decode_all(text).unwrap();
        for step in 1..text.len() {
            let mut decoder = Decoder::default();
            let mut messages = Vec::new();
            for piece in text.chunks(step) {
                decoder.feed(piece);
                while let Some(message) = decoder.next().unwrap() {
                    messages.push(message);
                }
            }
            assert_eq!(messages, whole, "in pieces of {step}");
        }
    }

    #[test]
    fn endless_line_is_refused() {
        let mut decoder = Decoder::default();
        let piece = vec![b'x'; 1 << 20];
        for _ in 0..4 {
            decoder.feed(&piece);
            assert_eq!(decoder.next(), Ok(None));
        }
        decoder.feed(b"y");
        assert_eq!(decoder.next(), Err(CodecError::LineTooLong));
    }

    #[test]
    fn garbage_is_an_error_by_name() {
        assert!(matches!(
            decode_all(b"hello\n"),
            Err(CodecError::NotJson(_))
        ));
        assert!(matches!(
            decode_all(b"{\"a\":1}\n"),
            Err(CodecError::Unknown(_))
        ));
        let deep = [vec![b'['; 100_000], b"\n".to_vec()].concat();
        assert!(matches!(decode_all(&deep), Err(CodecError::NotJson(_))));
    }
}
