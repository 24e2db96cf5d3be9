//! Two hosts and a switch in network namespaces: `scripts/namespaces`.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns};

use crate::cache::repo;

/// Where `ip netns` has them (ip-netns(8)).
const NAMESPACES: &str = "/run/netns";

/// A host that can die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    A,
    B,
}

impl Host {
    pub fn other(self) -> Host {
        match self {
            Host::A => Host::B,
            Host::B => Host::A,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Host::A => "a",
            Host::B => "b",
        }
    }

    /// Where the other host reaches it.
    pub fn address(self) -> &'static str {
        match self {
            Host::A => "10.79.0.1",
            Host::B => "10.79.0.2",
        }
    }
}

/// The namespaces, until it is dropped.
#[derive(Debug)]
pub struct Network {
    name: String,
}

impl Network {
    /// Makes them, and takes those away that a run which was killed has left.
    ///
    /// # Errors
    /// They can't be made: not root, or the kernel lacks something.
    pub fn up() -> Result<Network> {
        for entry in std::fs::read_dir(NAMESPACES)
            .into_iter()
            .flatten()
            .flatten()
        {
            let owner = owner_of(&entry.file_name().to_string_lossy());
            if let Some(pid) = owner.filter(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                drop(Network { name: name_of(pid) });
            }
        }
        let name = name_of(std::process::id());
        script("up", &name)?;
        Ok(Network { name })
    }

    /// The namespace of a host.
    pub fn of(&self, host: Host) -> String {
        format!("{}-{}", self.name, host.name())
    }

    /// The namespace of those who talk to the guest.
    pub fn outside(&self) -> String {
        format!("{}-out", self.name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Err(error) = script("down", &self.name) {
            eprintln!("{error:#}");
        }
    }
}

fn script(what: &str, name: &str) -> Result<()> {
    let script = repo().join("scripts/namespaces");
    let status = Command::new(&script).args([what, name]).status();
    let status = status.with_context(|| format!("running {}", script.display()))?;
    ensure!(
        status.success(),
        "scripts/namespaces {what} {name}: {status}"
    );
    Ok(())
}

fn name_of(pid: u32) -> String {
    format!("ft{pid}")
}

/// The process that has made the namespace of this name.
fn owner_of(namespace: &str) -> Option<u32> {
    let (owner, _) = namespace.strip_prefix("ft")?.split_once('-')?;
    owner.parse().ok()
}

/// Runs something on a thread of its own in a namespace: sockets made by it belong there.
///
/// # Errors
/// There is no such namespace, or what it runs fails.
pub fn inside<T: Send>(namespace: &str, run: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let path = format!("{NAMESPACES}/{namespace}");
    let file = File::open(&path).with_context(|| format!("opening {path}"))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering {path}"))?;
            run()
        });
        thread.join().map_err(|_| anyhow!("it panicked"))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_namespaces_have_an_owner() {
        assert_eq!(owner_of("ft4711-out"), Some(4711));
        assert_eq!(owner_of(&format!("{}-a", name_of(7))), Some(7));
        for foreign in ["ftp-a", "ft12", "cni-12", "lab-a"] {
            assert_eq!(owner_of(foreign), None, "{foreign}");
        }
    }
}
