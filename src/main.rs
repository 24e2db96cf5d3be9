//! `curling-rdma`: keeps a QEMU virtual machine alive through the death of its host.

mod background;
mod cli;
mod config;
mod control;
mod doctor;
mod driver;
mod events;
mod exit;
mod guard;
mod nursery;
mod random;
mod runtime_dir;
mod screen;
mod setup;
mod signals;
mod state_store;
mod status_line;

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use qemu_bridge::guardian;
use tracing_subscriber::EnvFilter;

use cli::{Cli, DaemonArgs};
use config::{Mode, Settings};
use exit::Exit;
use screen::Screen;

/// What is logged, as `tracing-subscriber` has it: `debug`, `transport=trace`, …
const LOG_VARIABLE: &str = "CURLING_LOG";

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|first| first == guardian::ARGUMENT)
    {
        guardian::main();
    }
    let Cli { command, daemon } = Cli::parse();
    let result = match command {
        Some(operation) => control::run(operation),
        None => run(daemon),
    };
    let exit = result.unwrap_or_else(|error| {
        eprintln!("curling-rdma: {error:#}");
        Exit::of_error(&error)
    });
    exit.into()
}

/// The daemon. What is left to be shown is shown before it returns.
fn run(arguments: DaemonArgs) -> anyhow::Result<Exit> {
    let settings = Settings::new(arguments)?;
    let _screen = Screen::start().context("starting a thread failed")?;
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(screen::writer)
        .with_ansi(screen::is_terminal())
        .with_target(false)
        .init();
    match settings.mode {
        Mode::Primary { .. } => setup::run_primary(&settings),
        Mode::Backup { .. } => setup::run_backup(&settings),
    }
}
