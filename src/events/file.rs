//! The file of `--events`: it may fill up, be slow or go away, and nothing else suffers.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::event::{Event, Line};
use crate::background::Background;

/// Lines that may wait for a slow disk.
const QUEUE: usize = 4096;
/// At the end a disk gets this long to take what is left.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);
/// One warning in this time.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// The driver's side: it never blocks.
#[derive(Debug)]
pub(super) struct EventFile {
    writer: Background<Vec<u8>>,
    /// Lines that found no place in the queue.
    dropped: Arc<AtomicU64>,
}

impl EventFile {
    /// # Errors
    /// The file can't be opened for appending.
    pub(super) fn open(path: &Path, mode: &'static str) -> anyhow::Result<EventFile> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            // A FIFO's: a full one refuses a line instead of holding us.
            .custom_flags(libc::O_NONBLOCK)
            .open(path);
        let file = match file {
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Err(error).context(format!(
                "the events file {} is a FIFO that nobody reads: start its reader first",
                path.display()
            )),
            other => other.context(format!("opening the events file {} failed", path.display())),
        }?;
        let dropped = Arc::new(AtomicU64::new(0));
        let mut sink = Sink::new(file, path.to_owned(), mode, Arc::clone(&dropped));
        let writer = Background::start("events", QUEUE, move |line: Vec<u8>| sink.write(&line))
            .context("starting the thread that writes events failed")?;
        Ok(EventFile { writer, dropped })
    }

    pub(super) fn write(&self, line: &Line<'_>) {
        if !self.writer.offer(line.to_bytes()) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for EventFile {
    fn drop(&mut self) {
        self.writer.flush(FLUSH_PATIENCE);
    }
}

/// The thread's side.
struct Sink {
    file: File,
    path: PathBuf,
    mode: &'static str,
    dropped: Arc<AtomicU64>,
    lost: u64,
    /// The file ends in the middle of a line.
    torn: bool,
    warned: Option<Instant>,
}

impl Sink {
    fn new(file: File, path: PathBuf, mode: &'static str, dropped: Arc<AtomicU64>) -> Sink {
        Sink {
            file,
            path,
            mode,
            dropped,
            lost: 0,
            torn: false,
            warned: None,
        }
    }

    fn write(&mut self, line: &[u8]) {
        self.lost += self.dropped.swap(0, Ordering::Relaxed);
        if let Err(error) = self.try_write(line) {
            self.lost += 1;
            self.warn(&error);
        }
    }

    fn try_write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.lost > 0 {
            let lost = Line::new(self.mode, Event::EventsLost { count: self.lost }).to_bytes();
            self.append(&lost)?;
            self.lost = 0;
        }
        self.append(line)
    }

    /// A line is there as a whole, or the next one begins on a line of its own.
    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.torn {
            self.file.write_all(b"\n")?;
            self.torn = false;
        }
        let mut rest = line;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    rest = &rest[count..];
                    self.torn = !rest.is_empty();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn warn(&mut self, error: &io::Error) {
        if self.warned.is_some_and(|at| at.elapsed() < WARN_EVERY) {
            return;
        }
        self.warned = Some(Instant::now());
        tracing::warn!(
            "writing events to {} failed: {error}. Protection goes on, {} lines are lost so far",
            self.path.display(),
            self.lost
        );
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;

    use nix::sys::stat::Mode;
    use serde_json::Value;

    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            Scratch(std::env::temp_dir().join(format!("cr-events-{name}-{}", std::process::id())))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    fn note(text: &str) -> Line<'_> {
        Line::new("primary", Event::Note { text })
    }

    fn parse(text: &str) -> Vec<Value> {
        text.lines()
            .map(|line| serde_json::from_str(line).expect(line))
            .collect()
    }

    #[test]
    fn lines_are_appended() {
        let path = Scratch::new("append");
        for text in ["one", "two"] {
            EventFile::open(&path.0, "primary")
                .unwrap()
                .write(&note(text));
        }
        let lines = parse(&fs::read_to_string(&path.0).unwrap());
        assert_eq!(
            lines.iter().map(|l| &l["text"]).collect::<Vec<_>>(),
            ["one", "two"]
        );
    }

    #[test]
    fn a_full_disk_stops_nothing() {
        let file = EventFile::open(Path::new("/dev/full"), "primary").unwrap();
        for _ in 0..2 {
            for _ in 0..QUEUE {
                file.write(&note("into the void"));
            }
            file.writer.flush(Duration::from_secs(60));
        }
        let dropped = file.dropped.load(Ordering::Relaxed);
        assert_eq!(dropped, 0, "the thread goes on taking lines");
    }

    #[test]
    fn once_a_full_disk_has_room_again_what_was_lost_is_said() {
        let path = Scratch::new("room");
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut sink = Sink::new(full, "/dev/full".into(), "primary", Arc::default());
        for _ in 0..3 {
            sink.write(&note("into the void").to_bytes());
        }
        sink.file = File::create(&path.0).unwrap();
        sink.write(&note("after").to_bytes());
        let lines = parse(&fs::read_to_string(&path.0).unwrap());
        let [lost, after] = lines.as_slice() else {
            panic!("{lines:?}")
        };
        assert_eq!(lost["event"], "events_lost");
        assert_eq!(lost["count"], 3);
        assert_eq!(after["text"], "after");
    }

    #[test]
    fn a_file_that_can_not_be_opened_is_refused_at_once() {
        let error = EventFile::open(Path::new("/nonexistent/e"), "primary").unwrap_err();
        assert!(format!("{error:#}").contains("opening the events file /nonexistent/e"));
    }

    #[test]
    fn a_fifo_without_a_reader_is_refused_and_a_full_one_loses_lines_and_says_so() {
        let path = Scratch::new("fifo");
        nix::unistd::mkfifo(&path.0, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let error = EventFile::open(&path.0, "backup").unwrap_err();
        assert!(
            format!("{error:#}").contains("start its reader first"),
            "{error:#}"
        );

        let mut options = OpenOptions::new();
        let mut reader = options
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path.0)
            .unwrap();
        let file = EventFile::open(&path.0, "backup").unwrap();
        let text = "x".repeat(2000);
        for _ in 0..100 {
            file.write(&note(&text));
        }
        file.writer.flush(Duration::from_secs(60));
        let mut taken = vec![0; 1 << 20];
        let count = reader.read(&mut taken).unwrap();
        file.write(&note("after"));
        file.writer.flush(Duration::from_secs(60));
        let more = reader.read(&mut taken[count..]).unwrap();
        let lines = parse(std::str::from_utf8(&taken[..count + more]).unwrap());
        let [.., lost, after] = lines.as_slice() else {
            panic!("{} lines", lines.len())
        };
        assert_eq!(after["text"], "after");
        assert_eq!(lost["event"], "events_lost");
        assert_eq!(lost["count"], 100 - (lines.len() as u64 - 2));
    }

    #[test]
    fn after_a_torn_line_the_next_one_stands_alone() {
        let path = Scratch::new("torn");
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path.0)
            .unwrap();
        let mut sink = Sink::new(file, path.0.clone(), "primary", Arc::default());
        sink.file.write_all(b"{\"time_us\":1,\"ev").unwrap();
        (sink.torn, sink.lost) = (true, 1);
        sink.write(&note("whole").to_bytes());
        let text = fs::read_to_string(&path.0).unwrap();
        let lines = parse(text.split_once('\n').unwrap().1);
        assert_eq!(lines[0]["event"], "events_lost");
        assert_eq!(lines[1]["text"], "whole");
    }
}
