//! One host: its QEMU, and its agent's orders connection.

use std::fs::File;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, getppid};

use super::prompt::make_prompt;
use super::wire::{Order, Pong, read_line, write_line};
use super::{Host, Settings};
use crate::cache;

/// Between two pings of an agent.
const PING_EVERY: Duration = Duration::from_secs(5);
/// The descriptor on which QEMU finds its end of the cable.
const CABLE_FD: i32 = 3;
/// Of a serial console, in an error message.
const CONSOLE_LINES: usize = 8;

/// A host that is on, or off.
#[derive(Debug)]
pub(super) struct Machine {
    host: Host,
    console: PathBuf,
    /// A host that takes longer to boot, or to answer, is thrown away.
    patience: Duration,
    state: Arc<Watched>,
}

#[derive(Debug, Default)]
struct Watched {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// While QEMU is there. It is not reaped before this is `None`.
    pid: Option<Pid>,
    /// Of this boot.
    token: String,
    orders: Option<TcpStream>,
    boots: u64,
    /// Why it is off.
    off_because: String,
}

/// What `lab status` tells of a host.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct MachineStatus {
    /// Of its QEMU, while it is on.
    pub pid: Option<i32>,
    pub boots: u64,
    pub off_because: String,
}

impl Machine {
    pub(super) fn new(host: Host, folder: &Path, patience: Duration) -> Machine {
        let state = Arc::new(Watched::default());
        state.lock().off_because = "it was never on".into();
        Machine {
            host,
            console: folder.join(format!("{host}.console")),
            patience,
            state,
        }
    }

    /// Starts QEMU. The host is up when its agent has called, see [`Machine::wait`].
    pub(super) fn start(&self, settings: &Settings, wiring: Wiring<'_>) -> Result<()> {
        self.refuse_if_on()?;
        let mut state = self.state.lock();
        let token = token()?;
        let command = self.command(settings, &wiring, &token)?;
        let (sender, receiver) = std::sync::mpsc::channel();
        let (host, watched) = (self.host, self.state.clone());
        let cable = wiring.cable;
        // The kernel kills QEMU when the thread that started it ends, so this one lives as long as
        // QEMU does, or until our process is killed.
        thread::Builder::new()
            .name(format!("host-{host}"))
            .spawn(move || match spawn(command, cable) {
                Ok(child) => {
                    let _ = sender.send(Ok(Pid::from_raw(child.id().cast_signed())));
                    watched.see_to_its_end(child);
                }
                Err(error) => drop(sender.send(Err(error))),
            })?;
        let pid = receiver.recv().context("starting QEMU")??;
        *state = State {
            pid: Some(pid),
            token,
            orders: None,
            boots: state.boots + 1,
            off_because: String::new(),
        };
        Ok(())
    }

    /// Waits until the agent has called.
    pub(super) fn wait(&self) -> Result<()> {
        let patience = self.patience;
        let deadline = Instant::now() + patience;
        let mut state = self.state.lock();
        while state.orders.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.pid.is_none() {
                let why = &state.off_because;
                bail!(
                    "host {} did not boot: {why}; {}",
                    self.host,
                    self.last_words()
                );
            }
            if left.is_zero() {
                drop(state);
                let words = self.last_words();
                self.kill(&format!("it did not boot within {} s", patience.as_secs()));
                bail!(
                    "host {} did not boot within {patience:?}; {words}",
                    self.host
                );
            }
            state = self.state.wait(state, left);
        }
        Ok(())
    }

    /// Takes an agent's first connection, if it is from this boot of this host.
    pub(super) fn greet(&self, token: &str, connection: &mut Option<TcpStream>) {
        let mut state = self.state.lock();
        if state.token != token || state.pid.is_none() || connection.is_none() {
            return;
        }
        // Its main loop only: the threads that it has made by now, its vCPUs, are not meant.
        if let Some(Err(error)) = state.pid.map(make_prompt) {
            eprintln!(
                "lab: host {} goes on without a short time slice: {error:#}",
                self.host
            );
        }
        state.orders = connection.take();
        self.state.changed.notify_all();
        let (host, watched, token) = (self.host, self.state.clone(), token.to_owned());
        let patience = self.patience;
        thread::spawn(move || watched.watch_over(host, &token, patience));
    }

    pub(super) fn refuse_if_on(&self) -> Result<()> {
        let pid = self.state.lock().pid;
        match pid {
            Some(pid) => bail!(
                "host {} is on already, its QEMU is process {pid}",
                self.host
            ),
            None => Ok(()),
        }
    }

    pub(super) fn knows(&self, token: &str) -> bool {
        let state = self.state.lock();
        state.pid.is_some() && state.token == token
    }

    pub(super) fn order(&self, order: &Order) -> Result<()> {
        let state = self.state.lock();
        let host = self.host;
        let Some(orders) = &state.orders else {
            bail!(
                "host {host} is not up ({}): boot it first",
                state.off_because
            );
        };
        write_line(orders, order).with_context(|| format!("giving an order to host {host}"))
    }

    /// Kills QEMU without warning, and returns when it is gone. A host that is off stays off.
    pub(super) fn kill(&self, why: &str) {
        self.state.kill(None, why);
        let mut state = self.state.lock();
        while state.pid.is_some() {
            state = self.state.wait(state, Duration::from_secs(1));
        }
    }

    pub(super) fn status(&self) -> MachineStatus {
        let state = self.state.lock();
        MachineStatus {
            pid: state.pid.map(Pid::as_raw),
            boots: state.boots,
            off_because: state.off_because.clone(),
        }
    }

    fn last_words(&self) -> String {
        let bytes = std::fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n");
        format!(
            "the end of its console ({}):\n{tail}",
            self.console.display()
        )
    }

    fn command(&self, settings: &Settings, wiring: &Wiring<'_>, token: &str) -> Result<Command> {
        let host = self.host;
        let kernel = cache::lab("kernel/vmlinuz")?;
        let modules = kernel.with_file_name("lib/modules");
        ensure!(
            modules.is_dir(),
            "{} is missing: run scripts/setup lab",
            modules.display()
        );
        let fresh = settings.fresh.iter().map(|path| path.display().to_string());
        let fresh: Vec<String> = fresh.collect();
        let mut command = Command::new(&settings.qemu);
        let mut add = |option: &str, value: String| {
            command.arg(option).arg(value);
        };
        add("-name", format!("lab-{host}"));
        add("-machine", "pc".into());
        add("-accel", "tcg,thread=multi".into());
        add("-cpu", "max".into());
        add("-smp", settings.vcpus.to_string());
        add("-m", settings.ram_mib.to_string());
        add("-display", "none".into());
        add("-monitor", "none".into());
        add("-serial", format!("file:{}", self.console.display()));
        add("-kernel", kernel.display().to_string());
        add(
            "-initrd",
            cache::lab("initramfs.cpio.gz")?.display().to_string(),
        );
        add(
            "-append",
            format!(
                "console=ttyS0 quiet panic=-1 lab.host={host} lab.address={} lab.port={} \
                 lab.token={token} lab.agent={} lab.modules={} lab.fresh={}",
                host.address(),
                wiring.port,
                settings.agent.display(),
                modules.display(),
                fresh.join(":")
            ),
        );
        add(
            "-netdev",
            format!("stream,id=link,addr.type=fd,addr.str={CABLE_FD}"),
        );
        let mac = format!("52:54:00:4c:41:0{}", host.index() + 1);
        add(
            "-device",
            format!("virtio-net-pci,netdev=link,romfile=,mac={mac}"),
        );
        add("-netdev", "user,id=lab,ipv6=off".into());
        add("-device", "virtio-net-pci,netdev=lab,romfile=".into());
        add("-device", "virtio-rng-pci".into());
        let mut tree = |tag: &str, path: &Path, mode: &str| {
            let path = path.display();
            add(
                "-fsdev",
                format!("local,id={tag},path={path},security_model=none,multidevs=remap{mode}"),
            );
            add(
                "-device",
                format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
            );
        };
        tree("machine", Path::new("/"), ",readonly=on");
        tree("shared", wiring.shared, "");
        for (number, path) in settings.fresh.iter().enumerate() {
            tree(&format!("fresh{number}"), path, ",readonly=on");
        }
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        let log = File::create(self.console.with_extension("qemu"))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(command)
    }
}

/// What a host is connected to.
#[derive(Debug)]
pub(super) struct Wiring<'a> {
    pub(super) cable: OwnedFd,
    /// Where agents call, on the machine's loopback.
    pub(super) port: u16,
    pub(super) shared: &'a Path,
}

fn spawn(mut command: Command, cable: OwnedFd) -> Result<Child> {
    let parent = nix::unistd::getpid();
    let cable_fd = cable.as_raw_fd();
    // SAFETY: between fork and exec this makes async-signal-safe system calls only (prctl, getppid,
    // dup2, fcntl), allocates nothing and takes no lock. `cable_fd` is open: `cable` lives until
    // `spawn` has returned, and so until after the exec.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            if getppid() != parent {
                return Err(nix::errno::Errno::ESRCH.into());
            }
            if cable_fd == CABLE_FD {
                // dup2 onto itself would leave it to be closed by exec.
                nix::errno::Errno::result(nix::libc::fcntl(cable_fd, nix::libc::F_SETFD, 0))?;
            } else {
                nix::errno::Errno::result(nix::libc::dup2(cable_fd, CABLE_FD))?;
            }
            Ok(())
        });
    }
    let program = command.get_program().to_owned();
    let child = command.spawn();
    drop(cable);
    child.with_context(|| format!("starting {}", program.display()))
}

impl Watched {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, at_most: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, at_most);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Kills QEMU, of one boot only if a token is given.
    fn kill(&self, token: Option<&str>, why: &str) {
        let mut state = self.lock();
        if let Some(pid) = state.pid
            && token.is_none_or(|token| token == state.token)
        {
            let _ = kill(pid, Signal::SIGKILL);
            why.clone_into(&mut state.off_because);
        }
    }

    fn see_to_its_end(&self, mut child: Child) {
        let id = Id::Pid(Pid::from_raw(child.id().cast_signed()));
        let _ = waitid(id, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        let mut state = self.lock();
        let status = child.wait();
        state.pid = None;
        state.orders = None;
        if state.off_because.is_empty() {
            state.off_because = match status {
                Ok(status) if status.success() => "it was powered off".into(),
                Ok(status) => format!("its QEMU ended: {status}"),
                Err(error) => format!("its QEMU ended: {error}"),
            };
        }
        self.changed.notify_all();
    }

    /// Throws a host away whose agent does not answer.
    fn watch_over(&self, host: Host, token: &str, patience: Duration) {
        loop {
            let orders = {
                let state = self.lock();
                match &state.orders {
                    // With the lock held, so that it does not end up inside another order.
                    Some(orders) if state.token == token => {
                        write_line(orders, &Order::Ping).and_then(|()| orders.try_clone())
                    }
                    _ => return,
                }
            };
            let answered = orders.and_then(|orders| {
                orders.set_read_timeout(Some(patience))?;
                read_line::<Pong>(&orders)
            });
            if !matches!(answered, Ok(Some(Pong))) {
                let why = match answered {
                    Ok(_) => "its agent ended".to_owned(),
                    Err(_) => format!("it did not answer for {} s", patience.as_secs()),
                };
                eprintln!("lab: host {host} is thrown away: {why}");
                return self.kill(Some(token), &why);
            }
            thread::sleep(PING_EVERY);
        }
    }
}

/// A number that nobody guesses: anyone on the machine may dial a loopback port.
fn token() -> Result<String> {
    use std::io::Read;
    let mut bytes = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .context("reading /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
