//! A lab that stays while commands of a shell come and go: `lab up` starts this process, the others
//! talk to it over a Unix socket. The hosts are its children and end with it, however it ends.

use std::fs::{DirBuilder, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::wire::{read_line, write_line};
use super::{Cable, Command, Host, Lab, Running, Settings, Status};

/// What a shell's command asks for, a line of JSON on a connection of its own.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    Status,
    Boot(Vec<Host>),
    Kill(Host),
    Cable(Host, Cable),
    /// After its answer the connection carries frames.
    Run(Host, Command),
    Down,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done,
    Status(Box<Report>),
    Failed(String),
}

/// Of a lab that is up.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub supervisor: u32,
    pub shared: PathBuf,
    pub folder: PathBuf,
    pub status: Status,
}

/// A lab by its name, from outside of its supervisor.
#[derive(Debug)]
pub struct Client {
    name: String,
    folder: PathBuf,
}

impl Client {
    /// # Errors
    /// The name is none, or the folder for labs is somebody else's.
    pub fn new(name: &str) -> Result<Client> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        ensure!(
            (1..=32).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('.'),
            "a lab's name has 1 to 32 letters, digits, '-', '_' and '.': {name:?}"
        );
        let uid = nix::unistd::getuid();
        let base = std::env::temp_dir().join(format!("curling-lab-{uid}"));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&base)
            .with_context(|| format!("making {}", base.display()))?;
        let owner = std::fs::symlink_metadata(&base)?.uid();
        ensure!(
            owner == uid.as_raw(),
            "{} belongs to user {owner}",
            base.display()
        );
        Ok(Client {
            name: name.to_owned(),
            folder: base.join(name),
        })
    }

    /// Starts the supervisor, and waits until both hosts are up. ARGUMENTS make `program` call
    /// [`Client::supervise`].
    ///
    /// # Errors
    /// The lab is up already, or a host does not boot.
    pub fn up(&self, program: &Path, arguments: &[String]) -> Result<()> {
        let mut supervisor = std::process::Command::new(program)
            .args(arguments)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .context("starting the lab's supervisor")?;
        let said = supervisor.stdout.take().context("no standard output")?;
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line)?;
        if line != "ready\n" {
            supervisor.wait()?;
            bail!("lab {} was not started", self.name);
        }
        Ok(())
    }

    /// Is the supervisor until the lab is taken down. Says "ready" on standard output.
    ///
    /// # Errors
    /// As [`Client::up`].
    pub fn supervise(&self, settings: Settings) -> Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        // Held as long as this process lives. The file itself stays: who waits for it would
        // otherwise hold a lock that is nobody's.
        let lock = File::create(self.folder.with_extension("lock"))?;
        let Ok(lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
            bail!(
                "lab {0} is up: use it, take it down, or give another --name",
                self.name
            );
        };
        // What a supervisor that was killed has left.
        std::fs::remove_dir_all(&self.folder)?;
        std::fs::create_dir_all(&self.folder)?;
        let outcome = self.serve(settings);
        let _ = std::fs::remove_dir_all(&self.folder);
        // Before the answer: who hears that the lab is down may start it again.
        drop(lock);
        Ok(write_line(outcome?, &Answer::Done)?)
    }

    /// Gives the connection on which the lab was asked to end.
    fn serve(&self, settings: Settings) -> Result<UnixStream> {
        // The terminal may go, and its Ctrl-C is not for the lab.
        nix::unistd::setsid().context("leaving the terminal")?;
        let lab = Arc::new(Lab::new(settings, Some(&self.folder))?);
        let listener = UnixListener::bind(self.socket()).context("listening for commands")?;
        lab.boot(&Host::BOTH)?;
        let mut starter = std::io::stdout();
        // A starter that was killed gets no lab.
        starter
            .write_all(b"ready\n")
            .and_then(|()| starter.flush())?;
        let log = File::create(self.folder.join("log"))?;
        nix::unistd::dup2_stdout(log.as_fd())?;
        nix::unistd::dup2_stderr(log.as_fd())?;
        for connection in listener.incoming() {
            let connection = connection.context("accepting a command")?;
            let request = match read_line(&connection) {
                Ok(Some(Request::Down)) => {
                    for host in Host::BOTH {
                        lab.kill(host);
                    }
                    return Ok(connection);
                }
                Ok(Some(request)) => request,
                Ok(None) => continue,
                Err(error) => {
                    let _ = write_line(&connection, &Answer::Failed(error.to_string()));
                    continue;
                }
            };
            let (lab, folder) = (lab.clone(), self.folder.clone());
            thread::spawn(move || {
                if let Err(error) = answer(&lab, &folder, request, &connection) {
                    let _ = write_line(&connection, &Answer::Failed(format!("{error:#}")));
                }
            });
        }
        bail!("the lab's socket takes no more commands")
    }

    /// # Errors
    /// The lab is not up.
    pub fn status(&self) -> Result<Report> {
        match self.ask(&Request::Status)? {
            (Answer::Status(report), _) => Ok(*report),
            (other, _) => bail!("the supervisor answered {other:?}"),
        }
    }

    /// # Errors
    /// As [`Lab::boot`].
    pub fn boot(&self, hosts: &[Host]) -> Result<()> {
        self.ask(&Request::Boot(hosts.to_vec())).map(drop)
    }

    /// # Errors
    /// The lab is not up.
    pub fn kill(&self, host: Host) -> Result<()> {
        self.ask(&Request::Kill(host)).map(drop)
    }

    /// # Errors
    /// The lab is not up.
    pub fn set_cable(&self, from: Host, cable: Cable) -> Result<()> {
        self.ask(&Request::Cable(from, cable)).map(drop)
    }

    /// # Errors
    /// As [`Lab::spawn`].
    pub fn spawn(&self, host: Host, command: &Command) -> Result<Running> {
        let (_, connection) = self.ask(&Request::Run(host, command.clone()))?;
        Running::new(connection)
    }

    /// Ends the lab and waits until nothing of it is left.
    ///
    /// # Errors
    /// The lab is not up.
    pub fn down(&self) -> Result<()> {
        self.ask(&Request::Down).map(drop)
    }

    fn ask(&self, request: &Request) -> Result<(Answer, UnixStream)> {
        let connection = UnixStream::connect(self.socket())
            .with_context(|| format!("lab {} is not up: `lab up` starts it", self.name))?;
        write_line(&connection, request)?;
        match read_line(&connection)? {
            Some(Answer::Failed(why)) => bail!(why),
            Some(answer) => Ok((answer, connection)),
            None => bail!("the supervisor of lab {} has died", self.name),
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("control")
    }
}

fn answer(lab: &Lab, folder: &Path, request: Request, connection: &UnixStream) -> Result<()> {
    let mut answer = Answer::Done;
    match request {
        Request::Status => {
            answer = Answer::Status(Box::new(Report {
                supervisor: std::process::id(),
                shared: lab.shared().to_owned(),
                folder: folder.to_owned(),
                status: lab.status(),
            }));
        }
        Request::Boot(hosts) => lab.boot(&hosts)?,
        Request::Kill(host) => lab.kill(host),
        Request::Cable(from, cable) => lab.set_cable(from, cable),
        Request::Run(host, command) => {
            let running = lab.spawn(host, &command)?;
            write_line(connection, &answer)?;
            // From here on the connection carries frames: no answer can follow.
            let _ = running.splice(connection.try_clone()?);
            return Ok(());
        }
        Request::Down => bail!("down is not answered here"),
    }
    Ok(write_line(connection, &answer)?)
}
