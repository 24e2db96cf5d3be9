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

use clap::Parser;
use qemu_bridge::guardian;
use tracing_subscriber::EnvFilter;

use cli::{Cli, DaemonArgs, Operation, Target};
use config::{Mode, Settings, control_socket};
use exit::Exit;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(guardian::ARGUMENT) {
        guardian::main();
    }
    let filter = EnvFilter::try_from_env("CURLING_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let cli = Cli::parse();
    let result = match cli.command {
        Some(operation) => ask(operation),
        None => run(cli.daemon),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("curling-rdma: {error:#}");
            Exit::of_error(&error).into()
        }
    }
}

fn run(arguments: DaemonArgs) -> anyhow::Result<Exit> {
    let settings = match Settings::new(arguments) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("curling-rdma: {error}");
            return Ok(Exit::Usage);
        }
    };
    match settings.mode {
        Mode::Primary { .. } => setup::run_primary(&settings),
        Mode::Backup { .. } => setup::run_backup(&settings),
    }
}

fn ask(operation: Operation) -> anyhow::Result<Exit> {
    let (command, target, json) = match operation {
        Operation::Status { json, target } => ("status", target, json),
        Operation::Detach { target } => ("detach", target, false),
        Operation::Switchover { target } => ("switchover", target, false),
        Operation::Continue { target } => ("continue", target, false),
        Operation::Rehearse { target } => ("rehearse", target, false),
    };
    let Target { control, vm_id, mode } = target;
    let socket = control.unwrap_or_else(|| {
        control_socket(vm_id.as_deref().unwrap_or("vm"), mode.unwrap_or(cli::ModeName::Primary))
    });
    control::ask(command, &socket, json)
}
