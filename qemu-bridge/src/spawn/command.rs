//! From a user's QEMU command line to the one that can be protected.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::options::{Keys, QemuOption, escape_commas, parse_options, parse_size};
use super::version::QemuVersion;

/// What `pc` and `q35` get without `-m`.
const DEFAULT_RAM_BYTES: u64 = 128 << 20;
/// Our memory backend's id. The guest can't see it.
const RAM_ID: &str = "ft-ram";
/// The oldest QEMU that this program was tried with.
pub const OLDEST_QEMU: (u64, u64) = (7, 2);
/// From here on *all* RAM blocks can be put into shared memory.
const AUX_RAM_SHARE_SINCE: (u64, u64) = (10, 0);

#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("asking {program} for its version failed: is it installed, and the path right?")]
    Probe { program: String, source: io::Error },
    #[error(
        "{program} --version says {said:?}, which names no QEMU version: the command after `--` must begin with a QEMU"
    )]
    NotQemu { program: String, said: String },
    #[error("QEMU {0} is older than 7.2, the oldest one supported: install a newer one")]
    TooOld(QemuVersion),
    #[error(
        "no QEMU command line: put it after `--`, for instance `-- qemu-system-x86_64 -m 512 ...`"
    )]
    Empty,
    #[error("{option} can't be used here: {cure}")]
    Option { option: String, cure: &'static str },
    #[error("the RAM size {0:?} can't be understood: write it like -m 512 or -m 2G")]
    RamSize(String),
    #[error(
        "the machine's memory backend {0:?} is not on the command line: add -object memory-backend-memfd,id={0},size=...,share=on"
    )]
    NoBackend(String),
    #[error("making the guest's RAM failed")]
    Ram(#[source] io::Error),
}

/// What the QEMU is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Primary,
    /// Waits for a device state, on RAM that is filled from outside.
    Backup,
}

/// Where the main RAM's memory comes from, unless the user's line has a backend for it.
#[derive(Clone, Copy, Debug)]
pub enum RamSource<'a> {
    /// A new memfd.
    Fresh,
    /// A memfd that outlived another QEMU.
    Existing(BorrowedFd<'a>),
    /// The same bytes, but what this QEMU writes stays its own.
    PrivateCopy(BorrowedFd<'a>),
}

/// An option that was added, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    pub option: QemuOption,
    pub why: &'static str,
}

/// A command line that is ready to be run.
#[derive(Debug)]
pub struct Prepared {
    pub argv: Vec<String>,
    /// In the order in which they stand in `argv`.
    pub added: Vec<Added>,
    /// Our own QMP socket; the user's stay as they are.
    pub qmp_socket: PathBuf,
    /// The main RAM, if it is ours: inherit it under this very number.
    pub ram: Option<OwnedFd>,
}

impl Prepared {
    /// The command line for a shell.
    pub fn shell_line(&self) -> String {
        let words: Vec<String> = self.argv.iter().map(|w| shell_quote(w)).collect();
        words.join(" ")
    }

    /// One line for each option that was added or changed: what and why.
    pub fn explanation(&self) -> Vec<String> {
        let explain = |added: &Added| {
            let words: Vec<String> = added.option.words().map(|w| shell_quote(&w)).collect();
            format!("{}: {}", words.join(" "), added.why)
        };
        self.added.iter().map(explain).collect()
    }
}

/// Adds to a user's command line what protection needs.
///
/// # Errors
/// The line has something that can't be protected, or can't be understood.
pub fn prepare(
    argv: &[String],
    role: Role,
    version: &QemuVersion,
    qmp_socket: &Path,
    ram: RamSource<'_>,
) -> Result<Prepared, CommandError> {
    let (program, words) = argv.split_first().ok_or(CommandError::Empty)?;
    if !version.is_at_least(OLDEST_QEMU) {
        return Err(CommandError::TooOld(version.clone()));
    }
    let mut options = parse_options(words);
    refuse_options(&options, role)?;
    let mut additions = Additions::default();
    let memory = share_main_ram(&mut options, &mut additions, ram)?;
    additions.for_role(role, &options);
    if version.is_at_least(AUX_RAM_SHARE_SINCE) {
        let why = "all other RAM (video memory, firmware) is put into shared memory as well";
        additions.add(QemuOption::new("machine", "aux-ram-share=on"), why);
    }
    let address = format!(
        "unix:{},server=on,wait=off",
        escape_commas(&qmp_socket.display().to_string())
    );
    additions.add(
        QemuOption::new("qmp", &address),
        "a control socket of our own",
    );
    let added_words = additions
        .list
        .iter()
        .filter(|a| !a.replaces)
        .flat_map(|a| a.added.option.words());
    Ok(Prepared {
        argv: std::iter::once(program.clone())
            .chain(options.iter().flat_map(QemuOption::words))
            .chain(added_words)
            .collect(),
        added: additions.list.iter().map(|a| a.added.clone()).collect(),
        qmp_socket: qmp_socket.to_owned(),
        ram: memory,
    })
}

fn refuse_options(options: &[QemuOption], role: Role) -> Result<(), CommandError> {
    for option in options {
        let cure = match option.name.as_str() {
            "daemonize" => "leave it out; QEMU must stay a child of this program",
            "incoming" => {
                "leave it out; a VM is protected from its start, or attached to with --qmp once it runs"
            }
            "readconfig" => {
                "put what the file says on the command line, so that it can be looked at"
            }
            "preconfig" => "leave it out; nobody would end the preconfiguration",
            "loadvm" if role == Role::Backup => {
                "leave it out on the standby; its state comes from the primary"
            }
            "h" | "help" | "version" => "it only prints something",
            _ => continue,
        };
        return Err(CommandError::Option {
            option: format!("-{}", option.name),
            cure,
        });
    }
    Ok(())
}

/// What is added, in order; replaced options stay in their place of the line.
#[derive(Debug, Default)]
struct Additions {
    list: Vec<Addition>,
}

#[derive(Debug)]
struct Addition {
    added: Added,
    replaces: bool,
}

impl Additions {
    fn add(&mut self, option: QemuOption, why: &'static str) {
        self.list.push(Addition {
            added: Added { option, why },
            replaces: false,
        });
    }

    fn replaced(&mut self, option: QemuOption, why: &'static str) {
        self.list.push(Addition {
            added: Added { option, why },
            replaces: true,
        });
    }

    fn for_role(&mut self, role: Role, options: &[QemuOption]) {
        let has = |name: &str| options.iter().any(|o| o.name == name);
        match role {
            Role::Primary if has("only-migratable") => {}
            Role::Primary => {
                let why = "saving a device that can't be migrated would crash QEMU";
                self.add(QemuOption::flag("only-migratable"), why);
            }
            Role::Backup => {
                let waits = "it waits for the state of the primary's devices";
                self.add(QemuOption::new("incoming", "defer"), waits);
                if !has("S") {
                    self.add(QemuOption::flag("S"), "it starts only when we say so");
                }
                let plain = "the saved state has no configuration section";
                self.add(
                    QemuOption::new("global", "migration.send-configuration=off"),
                    plain,
                );
                let plain = "the saved state has no description of itself";
                self.add(QemuOption::new("machine", "suppress-vmdesc=on"), plain);
            }
        }
    }
}

/// Sees to it that the machine's main RAM can be mapped by another process; the descriptor if the
/// memory is ours.
fn share_main_ram(
    options: &mut Vec<QemuOption>,
    additions: &mut Additions,
    ram: RamSource<'_>,
) -> Result<Option<OwnedFd>, CommandError> {
    let machine = |option: &QemuOption| matches!(option.name.as_str(), "machine" | "M");
    let backend = options
        .iter()
        .filter(|o| machine(o))
        .filter_map(|o| o.keys("type").get("memory-backend").map(str::to_owned))
        .next_back();
    let numa = options
        .iter()
        .filter(|o| o.name == "numa")
        .filter_map(|o| o.keys("type").get("memdev").map(str::to_owned));
    let backends: Vec<String> = numa.chain(backend).collect();
    for id in &backends {
        share_backend(options, additions, id)?;
    }
    if !backends.is_empty() {
        return Ok(None);
    }
    let mut size = options
        .iter()
        .filter(|o| o.name == "m")
        .filter_map(|o| o.keys("size").get("size").map(str::to_owned));
    let bytes = match size.next_back() {
        None => DEFAULT_RAM_BYTES,
        // QEMU rounds up to 8 KiB.
        Some(text) => parse_size(&text, 1 << 20)
            .filter(|bytes| *bytes > 0)
            .and_then(|bytes| bytes.checked_next_multiple_of(8 << 10))
            .ok_or(CommandError::RamSize(text))?,
    };
    // The RAM is ours now, and `-mem-path` would be ignored with a complaint.
    options.retain(|o| o.name != "mem-path");
    let (memory, share) = match ram {
        RamSource::Fresh => (make_memory(bytes)?, "on"),
        RamSource::Existing(fd) => (fd.try_clone_to_owned().map_err(CommandError::Ram)?, "on"),
        RamSource::PrivateCopy(fd) => (fd.try_clone_to_owned().map_err(CommandError::Ram)?, "off"),
    };
    let number = memory.as_fd().as_raw_fd();
    let object = format!(
        "memory-backend-file,id={RAM_ID},size={bytes},mem-path=/proc/self/fd/{number},share={share}"
    );
    additions.add(
        QemuOption::new("object", &object),
        "the guest's RAM lies in memory that we share with QEMU",
    );
    additions.add(
        QemuOption::new("machine", &format!("memory-backend={RAM_ID}")),
        "and is the machine's main RAM",
    );
    Ok(Some(memory))
}

/// Adds `share=on` to a backend that the user chose, if it isn't there.
fn share_backend(
    options: &mut [QemuOption],
    additions: &mut Additions,
    id: &str,
) -> Result<(), CommandError> {
    let is_backend = |keys: &Keys| {
        keys.get("id") == Some(id)
            && keys
                .get("qom-type")
                .is_some_and(|t| t.starts_with("memory-backend-"))
    };
    let object = options
        .iter_mut()
        .find(|o| o.name == "object" && is_backend(&o.keys("qom-type")))
        .ok_or_else(|| CommandError::NoBackend(id.to_owned()))?;
    let mut keys = object.keys("qom-type");
    // A memfd is shared unless it is told otherwise.
    let is_memfd = keys.get("qom-type") == Some("memory-backend-memfd");
    if keys.is_on("share") || (is_memfd && keys.get("share").is_none()) {
        return Ok(());
    }
    keys.set("share", "on");
    *object = QemuOption::new("object", &keys.to_text("qom-type"));
    additions.replaced(
        object.clone(),
        "share=on, so that we can map the guest's RAM",
    );
    Ok(())
}

fn make_memory(bytes: u64) -> Result<OwnedFd, CommandError> {
    let failed = |e: nix::errno::Errno| CommandError::Ram(e.into());
    let memory = memfd_create(RAM_ID, MFdFlags::MFD_CLOEXEC).map_err(failed)?;
    let length = i64::try_from(bytes).map_err(|_| CommandError::RamSize(bytes.to_string()))?;
    nix::unistd::ftruncate(&memory, length).map_err(failed)?;
    Ok(memory)
}

/// A word as a shell reads it back.
pub fn shell_quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+.,:/@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    fn version(text: &str) -> QemuVersion {
        QemuVersion::parse(&format!("QEMU emulator version {text}")).unwrap()
    }

    fn prepared(text: &str, role: Role) -> Result<Prepared, CommandError> {
        prepare(
            &line(text),
            role,
            &version("7.2.22 (Debian 1)"),
            Path::new("/run/x/qmp"),
            RamSource::Fresh,
        )
    }

    #[test]
    fn plain_line_gets_what_a_primary_needs() {
        let p = prepared("qemu -m 64 -machine pc", Role::Primary).unwrap();
        let number = p.ram.as_ref().unwrap().as_raw_fd();
        let expected = format!(
            "qemu -m 64 -machine pc -object memory-backend-file,id=ft-ram,size=67108864,mem-path=/proc/self/fd/{number},share=on \
             -machine memory-backend=ft-ram -only-migratable -qmp unix:/run/x/qmp,server=on,wait=off"
        );
        assert_eq!(p.shell_line(), expected);
        assert_eq!(p.added.len(), 4);
        assert!(p.explanation()[2].starts_with("-only-migratable: "));
    }

    #[test]
    fn standby_waits_and_newer_qemu_shares_all_ram() {
        let argv = line("qemu -nographic");
        let p = prepare(
            &argv,
            Role::Backup,
            &version("10.0.2"),
            Path::new("/q"),
            RamSource::Fresh,
        )
        .unwrap();
        for words in [
            "-incoming defer",
            "-S",
            "-global migration.send-configuration=off",
            "suppress-vmdesc=on",
            "aux-ram-share=on",
            "size=134217728",
        ] {
            assert!(
                p.shell_line().contains(words),
                "{words}: {}",
                p.shell_line()
            );
        }
    }

    #[test]
    fn own_backend_is_kept_and_shared() {
        let shared =
            "qemu -m 64 -M q35,memory-backend=r -object memory-backend-memfd,id=r,size=64M";
        let p = prepared(shared, Role::Primary).unwrap();
        assert!(p.ram.is_none() && p.shell_line().starts_with(shared));
        let private = "qemu -m 64 -M q35,memory-backend=r -object memory-backend-file,id=r,size=64M,mem-path=/dev/shm/x,share=off";
        let p = prepared(private, Role::Primary).unwrap();
        assert!(p.shell_line().contains("mem-path=/dev/shm/x,share=on"));
        assert!(p.explanation()[0].contains("share=on"));
        assert!(
            matches!(prepared("qemu -M q35,memory-backend=r", Role::Primary), Err(CommandError::NoBackend(id)) if id == "r")
        );
    }

    #[test]
    fn what_can_not_be_protected_is_refused_by_name() {
        for (text, role) in [
            ("qemu -daemonize", Role::Primary),
            ("qemu -incoming tcp:0:1", Role::Primary),
            ("qemu -readconfig x", Role::Primary),
            ("qemu -loadvm x", Role::Backup),
        ] {
            let error = prepared(text, role).unwrap_err().to_string();
            assert!(
                error.starts_with(text.split(' ').nth(1).unwrap()),
                "{error}"
            );
        }
        assert!(matches!(
            prepared("qemu -m lots", Role::Primary),
            Err(CommandError::RamSize(_))
        ));
        let old = prepare(
            &line("qemu"),
            Role::Primary,
            &version("6.2.0"),
            Path::new("/q"),
            RamSource::Fresh,
        );
        assert!(matches!(old, Err(CommandError::TooOld(_))));
        let empty = prepare(
            &[],
            Role::Primary,
            &version("7.2.0"),
            Path::new("/q"),
            RamSource::Fresh,
        );
        assert!(matches!(empty, Err(CommandError::Empty)));
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(shell_quote("a=b,c"), "a=b,c");
        assert_eq!(shell_quote("it's"), r"'it'\''s'");
        assert_eq!(shell_quote(""), "''");
    }
}
