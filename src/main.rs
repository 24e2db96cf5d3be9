//! `curling-rdma`: keeps a QEMU virtual machine alive through the death of its host.

mod cli;
mod config;
mod control;
mod driver;
mod events;
mod exit;
mod guard;
mod nursery;
mod random;
mod setup;
mod signals;
mod state_store;

use std::process::ExitCode;

use qemu_bridge::guardian;
use tracing_subscriber::EnvFilter;

use cli::Invocation;
use config::Mode;
use exit::Exit;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(guardian::ARGUMENT) {
        guardian::main();
    }
    let filter = EnvFilter::try_from_env("CURLING_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let invocation = match cli::parse() {
        Ok(invocation) => invocation,
        Err(error) => {
            eprintln!("curling-rdma: {error:#}");
            return Exit::Usage.into();
        }
    };
    let result = match &invocation {
        Invocation::Control { command, socket, json } => control::ask(command, socket, *json),
        Invocation::Run(settings) => match settings.mode {
            Mode::Primary { .. } => setup::run_primary(settings),
            Mode::Backup { .. } => setup::run_backup(settings),
        },
    };
    match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("curling-rdma: {error:#}");
            Exit::of(&error).into()
        }
    }
}
