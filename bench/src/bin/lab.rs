//! `scripts/lab`: two hosts on one machine, to be run on, killed, and cut off.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use bench::lab::supervisor::Client;
use bench::lab::{
    Cable, Command, Ended, Event, Host, Running, Settings, agent, check, probe, test,
};
use clap::{Args, Parser, Subcommand};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

/// Two hosts with kernels of their own and soft-RoCE between them, on this machine.
///
/// They are called A (10.77.0.1) and B (10.77.0.2), have the machine's files, and share the folder
/// /lab with it. See docs/lab.md.
#[derive(Debug, Parser)]
struct Arguments {
    /// Which lab: any number can be up at a time
    #[arg(long, global = true, default_value = "default")]
    name: String,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Boot both hosts
    Up(Make),
    /// End the lab; what was written to /lab goes, unless `up` had --shared
    Down,
    /// Show hosts and cable
    Status,
    /// Run a command on A, B, or both; its exit status is this one's (255: the host died)
    Run {
        #[arg(value_parser = hosts)]
        on: Hosts,
        #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Open a shell on a host
    Shell { on: Host },
    /// Power a host off, as if its plug was pulled
    Kill { host: Host },
    /// Boot a host that is off, or both
    Boot {
        #[arg(value_parser = hosts)]
        on: Hosts,
    },
    /// Cut the cable, in one direction or both; the hosts see silence
    Cut {
        #[arg(value_parser = directions, default_value = "both")]
        direction: Hosts,
    },
    /// Make the cable whole: no cut, delay, or loss
    Mend {
        #[arg(value_parser = directions, default_value = "both")]
        direction: Hosts,
    },
    /// Make the cable slow or lossy
    Netem {
        #[arg(value_parser = directions, default_value = "both")]
        direction: Hosts,
        /// Of every packet, in each direction that is meant
        #[arg(long, value_name = "MS", default_value_t = 0.0, value_parser = at_most::<60_000>)]
        delay_ms: f64,
        /// Packets that are lost
        #[arg(long, value_name = "PERCENT", default_value_t = 0.0, value_parser = at_most::<100>)]
        loss: f64,
    },
    /// Boot a lab of its own and see whether all of this holds
    Check(Make),
    /// Test failovers, faults and speed on soft-RoCE in a lab of its own
    Test {
        #[command(flatten)]
        make: Make,
        /// Write the figures here, as JSON
        #[arg(long, value_name = "FILE")]
        report: Option<PathBuf>,
        /// Failovers on RDMA [default: 5, with --full 50]
        #[arg(long)]
        kills: Option<usize>,
        /// More of everything
        #[arg(long)]
        full: bool,
        /// One part alone: all whose names begin so
        #[arg(long, value_name = "PART")]
        only: Option<String>,
        /// Draws the moments of the kills
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    #[command(hide = true)]
    Supervise(Make),
    #[command(hide = true)]
    Agent {
        #[arg(long)]
        port: u16,
        #[arg(long)]
        token: String,
    },
    /// On a host, for `check`
    #[command(hide = true)]
    Probe,
    /// On a host, for `test`: one side of a protected guest
    #[command(hide = true)]
    Stand {
        #[arg(long)]
        role: test::Role,
        /// Where to write what happens
        #[arg(long)]
        to: PathBuf,
        #[arg(last = true)]
        options: Vec<String>,
    },
}

#[derive(Args, Clone, Debug)]
struct Make {
    /// RAM of each host
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    ram_mib: u32,
    /// Of each host
    #[arg(long, default_value_t = Settings::vcpus_here())]
    vcpus: u32,
    /// A folder whose files may change while the hosts run, beside this repository
    #[arg(long, value_name = "DIR")]
    fresh: Vec<PathBuf>,
    /// The folder to show as /lab; it stays when the lab goes
    #[arg(long, value_name = "DIR")]
    shared: Option<PathBuf>,
    /// Throw a host away that takes longer to boot, or to answer
    #[arg(long, value_name = "S", default_value_t = 120)]
    patience_s: u64,
    /// QEMU 10.0 from the cache if none is given
    #[arg(long)]
    qemu: Option<PathBuf>,
}

/// One host, or both; as a direction, where packets come from.
#[derive(Clone, Debug)]
struct Hosts(Vec<Host>);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let lab = Client::new(&arguments.name);
    match &arguments.action {
        Action::Agent { port, token } => agent::serve(*port, token)?,
        Action::Probe => println!("{}", probe::soft_dirty_by_pagemap_scan()?),
        Action::Check(make) => check::check(make.settings()?)?,
        Action::Test {
            make,
            report,
            kills,
            full,
            only,
            seed,
        } => {
            let options = test::Options {
                report: report.clone(),
                kills: kills.unwrap_or(if *full { 50 } else { 5 }),
                full: *full,
                only: only.clone(),
                seed: *seed,
            };
            test::test(make.settings()?, &options)?;
        }
        Action::Stand { role, to, options } => test::serve(*role, to, options)?,
        Action::Supervise(make) => lab?.supervise(make.settings()?)?,
        Action::Up(_) => {
            // The same words, for the supervisor.
            let words = std::env::args().skip(1);
            let words: Vec<String> = words
                .map(|word| {
                    if word == "up" {
                        "supervise".into()
                    } else {
                        word
                    }
                })
                .collect();
            let lab = lab?;
            lab.up(&std::env::current_exe()?, &words)?;
            println!(
                "lab {} is up; /lab is {}",
                arguments.name,
                lab.status()?.shared.display()
            );
        }
        Action::Down => lab?.down()?,
        Action::Status => status(&lab?)?,
        Action::Run { on, command } => return run_on(&lab?, &on.0, command),
        Action::Shell { on } => return shell(&lab?, *on),
        Action::Kill { host } => lab?.kill(*host)?,
        Action::Boot { on } => lab?.boot(&on.0)?,
        Action::Cut { direction } => {
            let lab = lab?;
            let now = lab.status()?.status.cable;
            for &from in &direction.0 {
                let (mut cable, _) = now[usize::from(from == Host::B)];
                cable.cut = true;
                lab.set_cable(from, cable)?;
            }
        }
        Action::Mend { direction } => set_cable(&lab?, direction, Cable::default())?,
        Action::Netem {
            direction,
            delay_ms,
            loss,
        } => {
            let cable = Cable {
                cut: false,
                delay_us: Duration::from_secs_f64(delay_ms / 1e3).as_micros() as u64,
                loss_percent: *loss,
            };
            set_cable(&lab?, direction, cable)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Make {
    fn settings(&self) -> Result<Settings> {
        let mut settings = Settings::new()?;
        settings.ram_mib = self.ram_mib;
        settings.vcpus = self.vcpus;
        settings.patience = Duration::from_secs(self.patience_s);
        if let Some(qemu) = &self.qemu {
            settings.qemu.clone_from(qemu);
        }
        for path in &self.fresh {
            let path = path
                .canonicalize()
                .with_context(|| format!("--fresh {}", path.display()))?;
            settings.fresh.push(path);
        }
        if let Some(path) = &self.shared {
            std::fs::create_dir_all(path)?;
            settings.shared = Some(path.canonicalize()?);
        }
        Ok(settings)
    }
}

fn set_cable(lab: &Client, direction: &Hosts, cable: Cable) -> Result<()> {
    direction
        .0
        .iter()
        .try_for_each(|&from| lab.set_cable(from, cable))
}

fn status(lab: &Client) -> Result<()> {
    let report = lab.status()?;
    for (host, machine) in Host::BOTH.into_iter().zip(&report.status.hosts) {
        let state = match machine.pid {
            Some(pid) => format!("on, boot {}, QEMU is process {pid}", machine.boots),
            None => format!("off: {}", machine.off_because),
        };
        println!("{host} {:<10} {state}", host.address());
    }
    for (from, (cable, traffic)) in Host::BOTH.into_iter().zip(report.status.cable) {
        let state = if cable.cut { "CUT" } else { "whole" };
        println!(
            "{from} to {}: {state}, delay {} ms, loss {} %; {} packets passed, {} lost, {} too many",
            from.peer(),
            cable.delay_us as f64 / 1e3,
            cable.loss_percent,
            traffic.passed,
            traffic.lost,
            traffic.overrun
        );
    }
    println!("/lab is {}", report.shared.display());
    println!(
        "consoles and logs: {} (supervisor: process {})",
        report.folder.display(),
        report.supervisor
    );
    Ok(())
}

fn command(words: &[String]) -> Command {
    Command {
        program: words[0].clone(),
        arguments: words[1..].to_vec(),
        environment: Vec::new(),
        directory: std::env::current_dir()
            .map_or_else(|_| "/".into(), |path| path.to_string_lossy().into_owned()),
    }
}

fn run_on(lab: &Client, hosts: &[Host], words: &[String]) -> Result<ExitCode> {
    let command = command(words);
    if let &[host] = hosts {
        let running = lab.spawn(host, &command)?;
        // A terminal stays the shell's: several commands may run at a time.
        send_input(&running, std::io::stdin().is_terminal())?;
        return relay(host, running, "");
    }
    let running: Vec<(Host, Running)> = hosts
        .iter()
        .map(|&host| Ok((host, lab.spawn(host, &command)?)))
        .collect::<Result<_>>()?;
    let threads: Vec<_> = running
        .into_iter()
        .map(|(host, running)| {
            std::thread::spawn(move || {
                running.input().end()?;
                relay(host, running, &format!("{host}: "))
            })
        })
        .collect();
    let mut code = ExitCode::SUCCESS;
    for thread in threads {
        let its_code = thread
            .join()
            .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        if its_code != ExitCode::SUCCESS {
            code = its_code;
        }
    }
    Ok(code)
}

fn send_input(running: &Running, none: bool) -> Result<()> {
    let input = running.input();
    if none {
        // One that has ended already needs no input.
        let _ = input.end();
        return Ok(());
    }
    std::thread::Builder::new().spawn(move || {
        let mut bytes = [0; 16 << 10];
        loop {
            match std::io::stdin().read(&mut bytes) {
                Ok(count) if count > 0 && input.send(&bytes[..count]).is_ok() => {}
                _ => return input.end(),
            }
        }
    })?;
    Ok(())
}

/// Shows what a command says, each line after PREFIX, and gives its exit status.
fn relay(host: Host, mut running: Running, prefix: &str) -> Result<ExitCode> {
    let mut lines = [Vec::new(), Vec::new()];
    loop {
        let (to, bytes) = match running.next_event()? {
            Event::Output(bytes) => (0, bytes),
            Event::Errors(bytes) => (1, bytes),
            Event::Ended(ended) => {
                for (to, rest) in lines
                    .iter()
                    .enumerate()
                    .filter(|(_, rest)| !rest.is_empty())
                {
                    show(to, &[prefix.as_bytes(), rest, b"\n"].concat())?;
                }
                match &ended {
                    Ended::NotStarted(why) => eprintln!("lab: host {host}: {why}"),
                    Ended::HostDied => eprintln!("lab: host {host} died"),
                    Ended::Exit(_) | Ended::Signal(_) => {}
                }
                return Ok(ended.code().into());
            }
        };
        if prefix.is_empty() {
            show(to, &bytes)?;
            continue;
        }
        lines[to].extend(bytes);
        while let Some(end) = lines[to].iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = lines[to].drain(..=end).collect();
            show(to, &[prefix.as_bytes(), &line].concat())?;
        }
    }
}

fn show(to: usize, bytes: &[u8]) -> std::io::Result<()> {
    if to == 0 {
        let mut output = std::io::stdout().lock();
        output.write_all(bytes)?;
        output.flush()
    } else {
        std::io::stderr().lock().write_all(bytes)
    }
}

/// A shell on a terminal of the host; `script` makes that.
fn shell(lab: &Client, host: Host) -> Result<ExitCode> {
    let terminal = std::io::stdin();
    let before = tcgetattr(&terminal).context("`lab shell` needs a terminal")?;
    let mut stty = std::process::Command::new("stty");
    let size = stty
        .arg("size")
        .stdin(std::process::Stdio::inherit())
        .output();
    let size = size.map(|said| String::from_utf8_lossy(&said.stdout).into_owned());
    let size = size.unwrap_or_default();
    let mut size = size.split_whitespace();
    let (rows, columns) = (size.next().unwrap_or("24"), size.next().unwrap_or("80"));
    let mut command = Command::new(
        "script",
        &[
            "-qec",
            &format!("stty rows {rows} cols {columns}; exec bash -i"),
            "/dev/null",
        ],
    );
    let kind = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
    command.environment.push(("TERM".into(), kind));
    let running = lab.spawn(host, &command)?;
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    tcsetattr(&terminal, SetArg::TCSADRAIN, &raw)?;
    let outcome = send_input(&running, false).and_then(|()| relay(host, running, ""));
    tcsetattr(&terminal, SetArg::TCSADRAIN, &before)?;
    outcome
}

fn hosts(word: &str) -> Result<Hosts, String> {
    match word {
        "both" => Ok(Hosts(Host::BOTH.to_vec())),
        one => Ok(Hosts(vec![one.parse().map_err(|_| "A, B, or both")?])),
    }
}

fn directions(word: &str) -> Result<Hosts, String> {
    match word {
        "both" => Ok(Hosts(Host::BOTH.to_vec())),
        "A-to-B" | "a-to-b" => Ok(Hosts(vec![Host::A])),
        "B-to-A" | "b-to-a" => Ok(Hosts(vec![Host::B])),
        _ => Err("A-to-B, B-to-A, or both".into()),
    }
}

fn at_most<const LIMIT: u32>(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.0..=f64::from(LIMIT)).contains(&number) {
        Ok(number)
    } else {
        Err(format!("0 to {LIMIT}"))
    }
}
