//! As much of PostgreSQL's protocol as the clients need: simple queries, without a password
//! (postgresql.org/docs/15/protocol.html).

use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::clients::{Database, dial};

const PORT: u16 = 5432;
/// 3.0, as the first message says it.
const PROTOCOL: u32 = 3 << 16;
/// Of one message: what a peer says about lengths is not believed beyond it.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

#[derive(Debug)]
pub struct Postgres {
    stream: BufReader<TcpStream>,
}

impl Postgres {
    /// Connects, and makes the clients' table if there is none.
    ///
    /// # Errors
    /// Nobody listens, or the server wants a password.
    pub fn connect(host: &str, patience: Duration) -> io::Result<Postgres> {
        let stream = BufReader::new(dial(host, PORT, patience)?);
        let mut postgres = Postgres { stream };
        let mut start = PROTOCOL.to_be_bytes().to_vec();
        start.extend(b"user\0postgres\0database\0postgres\0\0");
        postgres.send(None, &start)?;
        postgres.rows()?;
        Ok(postgres)
    }

    /// # Errors
    /// The connection is broken.
    pub fn make_table(&mut self) -> io::Result<()> {
        let table = "CREATE TABLE IF NOT EXISTS records \
                     (key text, n bigint, PRIMARY KEY (key, n))";
        self.query(table).map(drop)
    }

    /// The first column of what the query returns.
    fn query(&mut self, query: &str) -> io::Result<Vec<u64>> {
        let text = format!("{query}\0");
        self.send(Some(b'Q'), text.as_bytes())?;
        self.rows()
    }

    fn send(&mut self, kind: Option<u8>, body: &[u8]) -> io::Result<()> {
        let mut message: Vec<u8> = kind.into_iter().collect();
        let length = u32::try_from(body.len() + 4).map_err(io::Error::other)?;
        message.extend(length.to_be_bytes());
        message.extend(body);
        self.stream.get_mut().write_all(&message)
    }

    /// Reads until the server waits for a query again.
    fn rows(&mut self) -> io::Result<Vec<u64>> {
        let mut rows = Vec::new();
        let mut refused = None;
        loop {
            let (kind, body) = read_message(&mut self.stream)?;
            match kind {
                b'D' => rows.push(first_column(&body)?),
                b'E' => refused = Some(message_of(&body)),
                b'R' if body != [0; 4] => return Err(nonsense("it wants a password")),
                b'Z' => break,
                _ => {}
            }
            // Before the first query an error ends the connection.
            if let Some(text) = &refused
                && text.starts_with("FATAL")
            {
                break;
            }
        }
        match refused {
            Some(text) => Err(io::Error::other(format!("the server refuses: {text}"))),
            None => Ok(rows),
        }
    }
}

impl Database for Postgres {
    fn write(&mut self, key: &str, n: u64) -> io::Result<()> {
        self.query(&format!("INSERT INTO records VALUES ('{key}', {n})"))
            .map(drop)
    }

    fn last(&mut self, key: &str) -> io::Result<u64> {
        let query = format!("SELECT coalesce(max(n), 0) FROM records WHERE key = '{key}'");
        let rows = self.query(&query)?;
        rows.first().copied().ok_or_else(|| nonsense("no row"))
    }

    fn all(&mut self, key: &str) -> io::Result<Vec<u64>> {
        self.query(&format!(
            "SELECT n FROM records WHERE key = '{key}' ORDER BY n"
        ))
    }
}

fn read_message(stream: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let length = length
        .checked_sub(4)
        .filter(|bytes| *bytes <= MESSAGE_BYTES_MAX);
    let length = length.ok_or_else(|| nonsense("a length out of bounds"))?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((head[0], body))
}

/// Of a row: 16 bits of columns, then each with 32 bits of length.
fn first_column(row: &[u8]) -> io::Result<u64> {
    let length = row.get(2..6).and_then(|bytes| bytes.try_into().ok());
    let length = length.map(u32::from_be_bytes).map(|length| length as usize);
    let column = length.and_then(|length| row.get(6..)?.get(..length));
    let text = column.and_then(|bytes| std::str::from_utf8(bytes).ok());
    let number = text.and_then(|text| text.parse().ok());
    number.ok_or_else(|| nonsense("a row without a number"))
}

/// Severity and text of an error: strings behind a letter each.
fn message_of(body: &[u8]) -> String {
    let fields = body
        .split(|byte| *byte == 0)
        .filter_map(<[u8]>::split_first);
    let wanted = fields.filter(|(kind, _)| matches!(kind, b'V' | b'M'));
    let texts: Vec<_> = wanted
        .map(|(_, text)| String::from_utf8_lossy(text))
        .collect();
    texts.join(": ")
}

fn nonsense(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("not of PostgreSQL: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_errors_are_understood() {
        assert_eq!(first_column(b"\0\x01\0\0\0\x0242").unwrap(), 42);
        for row in [
            &b""[..],
            b"\0\x01\0\0\0\x0942",
            b"\0\x01\xff\xff\xff\xff",
            b"\0\x01\0\0\0\x01x",
        ] {
            assert!(first_column(row).is_err(), "{row:?}");
        }
        assert_eq!(message_of(b"SX\0VFATAL\0C57P03\0Mno\0\0"), "FATAL: no");
    }

    #[test]
    fn lengths_are_not_believed() {
        for head in [b"Z\0\0\0\x03", b"Z\xff\xff\xff\xff"] {
            assert!(read_message(&mut &head[..]).is_err());
        }
        assert_eq!(
            read_message(&mut &b"Z\0\0\0\x05I"[..]).unwrap(),
            (b'Z', b"I".to_vec())
        );
    }
}
