//! As much of the Redis protocol as the clients need (RESP2: redis.io/docs, "protocol spec").

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::clients::{Database, dial};

const PORT: u16 = 6379;
/// Of one string and of one array: what a peer says about lengths is not believed beyond it.
const LENGTH_MAX: u64 = 1 << 20;

#[derive(Debug)]
pub struct Redis {
    stream: BufReader<TcpStream>,
}

#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Number(i64),
    Text(Option<String>),
    List(Vec<Reply>),
}

impl Redis {
    /// # Errors
    /// Nobody listens.
    pub fn connect(host: &str, patience: Duration) -> io::Result<Redis> {
        let stream = BufReader::new(dial(host, PORT, patience)?);
        Ok(Redis { stream })
    }

    /// The server's clock: microseconds since 1970.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn time_us(&mut self) -> io::Result<u64> {
        let Reply::List(parts) = self.call(&["TIME"])? else {
            return Err(nonsense("TIME has no list"));
        };
        match parts.as_slice() {
            [seconds, micros] => Ok(number(seconds)? * 1_000_000 + number(micros)?),
            _ => Err(nonsense("TIME has other than two parts")),
        }
    }

    /// # Errors
    /// The connection is broken.
    pub fn set(&mut self, key: &str, value: &[u8]) -> io::Result<()> {
        match self.call_bytes(&[b"SET", key.as_bytes(), value])? {
            Reply::Text(Some(_)) => Ok(()),
            other => Err(nonsense(&format!("SET was answered by {other:?}"))),
        }
    }

    fn call(&mut self, words: &[&str]) -> io::Result<Reply> {
        let words: Vec<_> = words.iter().map(|word| word.as_bytes()).collect();
        self.call_bytes(&words)
    }

    fn call_bytes(&mut self, words: &[&[u8]]) -> io::Result<Reply> {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend(format!("${}\r\n", word.len()).as_bytes());
            request.extend_from_slice(word);
            request.extend(b"\r\n");
        }
        self.stream.get_mut().write_all(&request)?;
        read_reply(&mut self.stream)
    }
}

impl Database for Redis {
    fn write(&mut self, key: &str, n: u64) -> io::Result<()> {
        match self.call(&["RPUSH", key, &n.to_string()])? {
            Reply::Number(_) => Ok(()),
            other => Err(nonsense(&format!("RPUSH was answered by {other:?}"))),
        }
    }

    fn last(&mut self, key: &str) -> io::Result<u64> {
        match self.call(&["LINDEX", key, "-1"])? {
            Reply::Text(None) => Ok(0),
            reply => number(&reply),
        }
    }

    fn all(&mut self, key: &str) -> io::Result<Vec<u64>> {
        match self.call(&["LRANGE", key, "0", "-1"])? {
            Reply::List(items) => items.iter().map(number).collect(),
            other => Err(nonsense(&format!("LRANGE was answered by {other:?}"))),
        }
    }
}

fn read_reply(stream: &mut impl BufRead) -> io::Result<Reply> {
    let line = read_line(stream)?;
    let (kind, rest) = line
        .split_at_checked(1)
        .ok_or_else(|| nonsense("an empty line"))?;
    let count = || rest.parse::<i64>().map_err(|_| nonsense(&line));
    match kind {
        "+" => Ok(Reply::Text(Some(rest.to_owned()))),
        "-" => Err(io::Error::other(format!("the server refuses: {rest}"))),
        ":" => Ok(Reply::Number(count()?)),
        "$" => match count()? {
            -1 => Ok(Reply::Text(None)),
            bytes => read_text(stream, bounded(bytes)?).map(|text| Reply::Text(Some(text))),
        },
        "*" => {
            let items = bounded(count()?)?;
            let items = (0..items).map(|_| read_reply(stream));
            Ok(Reply::List(items.collect::<io::Result<_>>()?))
        }
        _ => Err(nonsense(&line)),
    }
}

fn read_line(stream: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    stream.take(LENGTH_MAX).read_line(&mut line)?;
    match line.strip_suffix("\r\n") {
        Some(line) => Ok(line.to_owned()),
        None => Err(ErrorKind::UnexpectedEof.into()),
    }
}

fn read_text(stream: &mut impl Read, bytes: u64) -> io::Result<String> {
    let mut text = vec![0; bytes as usize + 2];
    stream.read_exact(&mut text)?;
    text.truncate(bytes as usize);
    String::from_utf8(text).map_err(|_| nonsense("text that is no UTF-8"))
}

fn bounded(count: i64) -> io::Result<u64> {
    let count = u64::try_from(count)
        .ok()
        .filter(|count| *count <= LENGTH_MAX);
    count.ok_or_else(|| nonsense("a length out of bounds"))
}

fn number(reply: &Reply) -> io::Result<u64> {
    match reply {
        Reply::Text(Some(text)) => text.parse().map_err(|_| nonsense(text)),
        other => Err(nonsense(&format!("{other:?} in place of a number"))),
    }
}

fn nonsense(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("not of Redis: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(mut bytes: &[u8]) -> io::Result<Reply> {
        read_reply(&mut bytes)
    }

    #[test]
    fn replies_are_understood() {
        assert_eq!(parse(b":7\r\n").unwrap(), Reply::Number(7));
        assert_eq!(parse(b"$-1\r\n").unwrap(), Reply::Text(None));
        let list = parse(b"*2\r\n$1\r\n1\r\n$2\r\n22\r\n").unwrap();
        let text = |text: &str| Reply::Text(Some(text.to_owned()));
        assert_eq!(list, Reply::List(vec![text("1"), text("22")]));
    }

    #[test]
    fn nonsense_is_an_error() {
        for bytes in [
            &b""[..],
            b"+OK",
            b"-ERR no\r\n",
            b"$9999999999\r\n",
            b"*-2\r\n",
            b"?\r\n",
        ] {
            assert!(parse(bytes).is_err(), "{bytes:?}");
        }
    }
}
