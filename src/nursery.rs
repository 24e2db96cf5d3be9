//! Where QEMUs come from: the guest's, its standby, a fresh standby on the same RAM, and the
//! throw-away one of a rehearsal.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::Context;
use ft_core::shape::MAIN_RAM;
use qemu_bridge::blocks::{Backing, RamBlock, ram_blocks, ram_blocks_of_copy};
use qemu_bridge::qmp::Qmp;
use qemu_bridge::spawn::{
    GuestOutput, Prepared, Purpose, QemuProcess, QemuVersion, RamSource, Role, SpawnOptions,
    cut_off, prepare,
};
use qemu_bridge::standby::prepare_standby;

use crate::driver::backup::Standby;
use crate::driver::worker::Desk;
use crate::exit;
use crate::runtime_dir::RuntimeDir;

/// A QEMU that starts opens its QMP socket and answers in this time, or not at all.
pub(crate) const START_PATIENCE: Duration = Duration::from_secs(20);
/// For one QMP command at set-up.
pub(crate) const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// A QEMU that answers.
pub(crate) struct Born {
    pub(crate) process: QemuProcess,
    pub(crate) qmp: Qmp,
}

/// What the backup's loop asks of the nursery's thread.
#[derive(Debug)]
pub(crate) enum Wish {
    /// A fresh standby on the RAM of the one before.
    Standby,
    Rehearsal,
}

/// What it gets: a QEMU that waits for a state, and its RAM blocks, or why not.
pub(crate) enum Newborn {
    Standby(Result<(Standby, Vec<RamBlock>), String>),
    Rehearsal(Result<(Standby, Vec<RamBlock>), String>),
}

/// Makes QEMUs of one command line.
pub(crate) struct Nursery {
    argv: Vec<String>,
    version: QemuVersion,
    /// For QMP sockets of our own.
    runtime_dir: RuntimeDir,
    /// The standby's main RAM, once there is one.
    main_ram: Option<OwnedFd>,
    made: u32,
}

impl Nursery {
    /// # Errors
    /// The program is no QEMU, or the runtime directory can't be made.
    pub(crate) fn new(argv: Vec<String>) -> anyhow::Result<Nursery> {
        let program = argv.first().context("the command line of QEMU is empty")?;
        let version = QemuVersion::probe(program)?;
        let runtime_dir = RuntimeDir::make()?;
        Ok(Nursery {
            argv,
            version,
            runtime_dir,
            main_ram: None,
            made: 0,
        })
    }

    /// For a standby that somebody else has started: its own command line is the recipe.
    ///
    /// # Errors
    /// The process is gone or not ours to look into.
    pub(crate) fn of_process(pid: i32, blocks: &[RamBlock]) -> anyhow::Result<Nursery> {
        let line = fs::read(format!("/proc/{pid}/cmdline"))
            .with_context(|| format!("reading the command line of process {pid}"))?;
        let words = line
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty());
        let mut argv: Vec<String> = words
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        let program = fs::read_link(format!("/proc/{pid}/exe"))
            .with_context(|| format!("finding the program of process {pid}"))?;
        if let Some(first) = argv.first_mut() {
            *first = program.to_string_lossy().into_owned();
        }
        // A standby waits for its state; one that is made of its line is told so by us.
        if let Some(at) = argv
            .iter()
            .position(|word| word == "-incoming" || word == "--incoming")
        {
            argv.drain(at..argv.len().min(at + 2));
        }
        let mut nursery = Nursery::new(argv)?;
        nursery.keep_main_ram(blocks)?;
        Ok(nursery)
    }

    /// A QEMU of ours runs on without us, and can be attached to again by its socket.
    pub(crate) fn keep_sockets(&mut self) {
        self.runtime_dir.keep();
    }

    /// What would be run.
    ///
    /// # Errors
    /// The command line has something that can't be protected.
    pub(crate) fn prepare(&mut self, role: Role, ram: RamSource<'_>) -> anyhow::Result<Prepared> {
        self.made += 1;
        let socket = self.runtime_dir.path().join(format!("{}.qmp", self.made));
        Ok(prepare(&self.argv, role, &self.version, &socket, ram)?)
    }

    /// Starts a QEMU.
    ///
    /// # Errors
    /// It does not start, or ends at once: with its last words.
    pub(crate) fn bear(&mut self, role: Role) -> anyhow::Result<Born> {
        let prepared = match (role, self.main_ram.as_ref().map(OwnedFd::try_clone)) {
            (Role::Backup, Some(ram)) => {
                let ram = ram.context("copying the RAM's descriptor")?;
                self.prepare(role, RamSource::Existing(ram.as_fd()))?
            }
            _ => self.prepare(role, RamSource::Fresh)?,
        };
        let born = self.start(&prepared, GuestOutput::Inherit, false)?;
        tracing::info!(
            "QEMU's QMP socket: {} (it serves one at a time, and us as long as this daemon runs)",
            prepared.qmp_socket.display()
        );
        Ok(born)
    }

    /// Remembers the main RAM of the first standby: it outlives its QEMU.
    ///
    /// # Errors
    /// The main RAM is not in shared memory.
    pub(crate) fn keep_main_ram(&mut self, blocks: &[RamBlock]) -> anyhow::Result<()> {
        let main = blocks
            .iter()
            .find(|b| b.name == MAIN_RAM)
            .context("no main RAM was found")?;
        match &main.backing {
            Backing::Shared { fd, .. } => {
                self.main_ram = Some(fd.try_clone().context("copying the RAM's descriptor")?);
                Ok(())
            }
            Backing::Private { .. } => {
                let text = "the standby's main RAM is private to its QEMU: add -object \
                            memory-backend-memfd,id=ram,size=…,share=on -machine memory-backend=ram";
                Err(exit::Refusal(text.to_owned()).into())
            }
        }
    }

    /// A QEMU of this line that runs nothing and has no way out: to be asked, for `--dry-run`.
    ///
    /// # Errors
    /// QEMU does not take the line.
    pub(crate) fn trial(&mut self) -> anyhow::Result<Born> {
        let mut argv = cut_off(&self.argv, Purpose::Ask);
        // Disks are looked at as they are; nothing runs that could write them.
        argv.retain(|word| word != "-snapshot");
        argv.push("-S".to_owned());
        let all = std::mem::replace(&mut self.argv, argv);
        let prepared = self.prepare(Role::Primary, RamSource::Fresh);
        self.argv = all;
        self.start(&prepared?, GuestOutput::Discard, true)
    }

    /// Fulfils wishes until the loop is gone.
    pub(crate) fn run(mut self, desk: &Desk<Wish, Newborn>) {
        while let Some(wish) = desk.next() {
            desk.report(match wish {
                Wish::Standby => Newborn::Standby(self.respawn().map_err(|e| format!("{e:#}"))),
                Wish::Rehearsal => {
                    Newborn::Rehearsal(self.rehearsal().map_err(|e| format!("{e:#}")))
                }
            });
        }
    }

    fn respawn(&mut self) -> anyhow::Result<(Standby, Vec<RamBlock>)> {
        let Born { process, mut qmp } = self.bear(Role::Backup)?;
        prepare_standby(&mut qmp, ANSWER_PATIENCE)?;
        let blocks = ram_blocks(&mut qmp, process.pid(), ANSWER_PATIENCE)?;
        Ok((Standby::new(qmp, process), blocks))
    }

    /// A throw-away standby on a private copy of the RAM, with no way out to the host.
    fn rehearsal(&mut self) -> anyhow::Result<(Standby, Vec<RamBlock>)> {
        let ram = self
            .main_ram
            .as_ref()
            .context("there is no RAM to rehearse on")?;
        let ram = ram.try_clone().context("copying the RAM's descriptor")?;
        let all = std::mem::take(&mut self.argv);
        self.argv = cut_off(&all, Purpose::Load);
        let prepared = self.prepare(Role::Backup, RamSource::PrivateCopy(ram.as_fd()));
        self.argv = all;
        let Born { process, mut qmp } = self.start(&prepared?, GuestOutput::Discard, true)?;
        prepare_standby(&mut qmp, ANSWER_PATIENCE)?;
        let blocks = ram_blocks_of_copy(&mut qmp, process.pid(), ANSWER_PATIENCE)?;
        Ok((Standby::new(qmp, process), blocks))
    }

    fn start(
        &self,
        prepared: &Prepared,
        output: GuestOutput,
        dies_with_thread: bool,
    ) -> anyhow::Result<Born> {
        // While QEMU lives, nobody takes the folder of its socket for a left-over.
        let mut inherited = vec![self.runtime_dir.lock()];
        inherited.extend(prepared.ram.iter().map(AsFd::as_fd));
        let options = SpawnOptions {
            inherited: &inherited,
            output,
            dies_with_thread,
        };
        let mut process = QemuProcess::spawn(&prepared.argv, &options)?;
        match process.connect_qmp(&prepared.qmp_socket, START_PATIENCE) {
            Ok(qmp) => Ok(Born { process, qmp }),
            Err(error) => {
                let _ = process.kill();
                let _ = process.wait(Duration::from_secs(2));
                Err(error).context("starting QEMU")
            }
        }
    }
}
