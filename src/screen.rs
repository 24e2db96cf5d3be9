//! Standard error: log lines, and on a terminal a progress bar or one live line below them.
//!
//! A thread owns it, because a terminal that was stopped with Ctrl-S, or a pipe that nobody
//! reads, blocks whoever writes.

use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::background::Background;

/// Lines and drawings that may wait for a slow terminal.
const QUEUE: usize = 1024;
/// At the end a terminal gets this long to take what is left.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);

static SCREEN: OnceLock<Background<Show>> = OnceLock::new();
static LOST: AtomicU64 = AtomicU64::new(0);

/// Something to be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Show {
    /// Stays, above whatever is live.
    Line(Vec<u8>),
    /// Of the first synchronisation.
    Progress { round: u32, done: u64, total: u64 },
    /// Replaces the live line.
    Live(String),
    /// Nothing is live any more.
    Clear,
}

/// While it is there, [`show`] works. Its end waits for what is queued, a moment.
#[derive(Debug)]
pub(crate) struct Screen(());

impl Screen {
    /// Once in a process, before anything is logged.
    ///
    /// # Errors
    /// The kernel refuses a thread.
    pub(crate) fn start() -> io::Result<Screen> {
        let mut canvas = Canvas::default();
        let background = Background::start("screen", QUEUE, move |item| canvas.draw(item))?;
        assert!(
            SCREEN.set(background).is_ok(),
            "there is one screen in a process"
        );
        Ok(Screen(()))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        show(Show::Clear);
        if let Some(screen) = SCREEN.get() {
            screen.flush(FLUSH_PATIENCE);
        }
    }
}

/// Never blocks. What a slow terminal doesn't take is lost, and counted.
pub(crate) fn show(item: Show) {
    if SCREEN.get().is_some_and(|screen| !screen.offer(item)) {
        LOST.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whether something live can be shown.
pub(crate) fn is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// For `tracing`: each write is a line.
pub(crate) fn writer() -> impl Write {
    struct Lines;
    impl Write for Lines {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            show(Show::Line(line.to_vec()));
            Ok(line.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    Lines
}

/// The thread's side.
#[derive(Default)]
struct Canvas {
    bar: Option<(Shape, ProgressBar)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Progress,
    Line,
}

impl Shape {
    fn template(self) -> &'static str {
        match self {
            Shape::Progress => "{msg} {bar:30} {percent}% {pos}/{len} pages, {eta} left",
            Shape::Line => "{wide_msg}",
        }
    }
}

impl Canvas {
    fn draw(&mut self, item: Show) {
        let lost = LOST.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let text = format!("({lost} lines are missing here: standard error was full)\n");
            self.line(text.as_bytes());
        }
        match item {
            Show::Line(line) => self.line(&line),
            Show::Progress { round, done, total } => {
                let bar = self.bar(Shape::Progress);
                bar.set_length(total);
                bar.set_position(done.min(total));
                bar.set_message(format!("first synchronisation, round {round}"));
            }
            Show::Live(text) => self.bar(Shape::Line).set_message(text),
            Show::Clear => self.clear(),
        }
    }

    /// The bar, in this shape.
    fn bar(&mut self, shape: Shape) -> &ProgressBar {
        if self.bar.as_ref().is_some_and(|(is, _)| *is != shape) {
            self.clear();
        }
        let (_, bar) = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template(shape.template());
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            (
                shape,
                bar.with_style(style.expect("our templates are right")),
            )
        });
        bar
    }

    fn clear(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn line(&self, line: &[u8]) {
        // There is no other place to complain at.
        let write = || drop(io::stderr().write_all(line));
        match &self.bar {
            Some((_, bar)) => bar.suspend(write),
            None => write(),
        }
    }
}
