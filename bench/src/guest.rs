//! Guests and their command lines.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cache;
use crate::process::Process;

/// What runs in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Linux with a counter and a steady number of written pages.
    Tick,
    /// A boot sector that writes 16 pages per loop: for KVM, and for quick tests.
    BootSector,
    /// A boot sector that writes 2 MiB per round, and whose RAM tells whether it is of one moment.
    Rounds,
}

/// One kind of guest; both QEMUs of a pair are made from it.
#[derive(Clone, Debug)]
pub struct Guest {
    pub qemu: PathBuf,
    pub machine: String,
    pub accel: String,
    pub vcpus: u32,
    pub ram_mib: u64,
    pub work: Work,
    pub workload_pages: u32,
    /// Broadcast the counter every so many counts; 0 is never.
    pub say_every: u32,
    /// Work without a break beside that: `cpu` or `memory`.
    pub job: Option<&'static str>,
    /// A Linux guest's network cards.
    pub nics: u32,
    /// Where the first one's packets go, one UDP datagram on loopback for each; nowhere without.
    pub listener: Option<u16>,
    pub vga: bool,
    /// More of what the guest sees.
    pub devices: Vec<String>,
}

impl Guest {
    /// # Errors
    /// The cache folder is not set up.
    pub fn tick(qemu: &Path) -> Result<Guest> {
        Ok(Guest {
            qemu: qemu.to_owned(),
            machine: "pc".to_owned(),
            accel: "tcg".to_owned(),
            vcpus: 1,
            ram_mib: 256,
            work: Work::Tick,
            workload_pages: 900,
            say_every: 0,
            job: None,
            nics: 1,
            listener: None,
            vga: false,
            devices: Vec::new(),
        })
    }

    /// The guest-visible options: the same on both sides.
    ///
    /// # Errors
    /// The cache folder is not set up.
    pub fn visible(&self) -> Result<Vec<String>> {
        let cpu = if self.accel == "kvm" { "qemu64" } else { "max" };
        let accel = if self.accel == "kvm" {
            "kvm"
        } else {
            "tcg,thread=multi"
        };
        let mut line = words(&format!(
            "-accel {accel} -cpu {cpu} -m {} -smp {} -nodefaults -display none",
            self.ram_mib, self.vcpus
        ));
        if self.vga {
            line.extend(words("-device VGA"));
        }
        for device in &self.devices {
            line.extend(["-device".to_owned(), device.clone()]);
        }
        match self.work {
            Work::Tick => {
                for nic in 0..self.nics {
                    line.extend(["-netdev".into(), self.netdev(nic)]);
                    line.extend(words(&format!(
                        "-device virtio-net-pci,netdev=n{nic},romfile="
                    )));
                }
                line.extend(["-kernel".into(), cache::kernel()?.display().to_string()]);
                line.extend([
                    "-initrd".into(),
                    cache::tick_initramfs()?.display().to_string(),
                ]);
                line.push("-append".into());
                let job = self.job.map_or(String::new(), |job| format!(" job={job}"));
                line.push(format!(
                    "console=ttyS0 quiet panic=-1 workload_pages={} say_every={}{job}",
                    self.workload_pages, self.say_every
                ));
            }
            Work::BootSector | Work::Rounds => {
                let image = match self.work {
                    Work::Rounds => cache::boot_sector("boot32"),
                    _ => cache::boot_sector("boot16"),
                }?;
                // An IDE disk can't be read-only, and a writable one would be refused.
                line.extend(words("-device virtio-blk-pci,drive=boot -drive"));
                let file = image.display();
                line.push(format!(
                    "if=none,id=boot,file={file},format=raw,read-only=on"
                ));
            }
        }
        Ok(line)
    }

    fn netdev(&self, nic: u32) -> String {
        match self.listener {
            Some(port) if nic == 0 => format!(
                "dgram,id=n0,remote.type=inet,remote.host=127.0.0.1,remote.port={port},\
                 local.type=inet,local.host=127.0.0.1,local.port=0"
            ),
            _ => format!("user,id=n{nic}"),
        }
    }

    /// Starts a QEMU of our own, for attaching to: `role` is its name in `dir`.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(&self, dir: &Path, role: &str, standby: bool) -> Result<Process> {
        let mut line = self.line(dir, role, "memory-backend-memfd,share=on", standby)?;
        if standby {
            line.extend(words(
                "-incoming defer -S -global migration.send-configuration=off",
            ));
        }
        Process::start(dir, role, &self.qemu, &line)
    }

    /// The command line of a QEMU with its sockets in `dir`, on RAM of this backend. With `plain`
    /// it takes a migration stream that says nothing of the machine.
    ///
    /// # Errors
    /// The cache folder is not set up.
    pub fn line(&self, dir: &Path, role: &str, backend: &str, plain: bool) -> Result<Vec<String>> {
        let mut line = words("-machine");
        let plain = if plain { ",suppress-vmdesc=on" } else { "" };
        line.push(format!("{},memory-backend=ram{plain}", self.machine));
        line.extend(self.visible()?);
        line.push("-object".into());
        line.push(format!("{backend},id=ram,size={}M", self.ram_mib));
        for name in ["qmp", "test"] {
            line.push("-qmp".into());
            line.push(format!(
                "unix:{}/{role}.{name},server=on,wait=off",
                dir.display()
            ));
        }
        line.push("-serial".into());
        line.push(format!(
            "unix:{}/{role}.serial,server=on,wait=off,logfile={}/{role}.console",
            dir.display(),
            dir.display()
        ));
        Ok(line)
    }
}

/// Splits a plain line into words.
pub fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}
