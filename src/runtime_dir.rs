//! The folder of a daemon's own QMP sockets.
//!
//! A lock on the folder says that it is in use. The daemon and every QEMU that it starts share the
//! lock's open file (flock(2)), so it lasts until the last of them has ended, whichever that is.
//! Asking the sockets instead would disturb other guests: QEMU takes one client at a time.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

const PREFIX: &str = "curling-rdma-qemu-";
/// Folders of one name that may be in use by others.
const TRIES: u32 = 100;

/// Removed when it is dropped, unless it is kept.
#[derive(Debug)]
pub(crate) struct RuntimeDir {
    path: PathBuf,
    lock: File,
    keep: bool,
}

impl RuntimeDir {
    /// Makes one, and removes those that nobody uses any more.
    ///
    /// # Errors
    /// There is no place for it.
    pub(crate) fn make() -> anyhow::Result<RuntimeDir> {
        let base =
            std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        RuntimeDir::make_in(&base)
    }

    fn make_in(base: &Path) -> anyhow::Result<RuntimeDir> {
        remove_unused(base);
        let pid = std::process::id();
        for try_number in 0..TRIES {
            let path = match try_number {
                0 => base.join(format!("{PREFIX}{pid}")),
                // A process that had our number before has left a QEMU.
                n => base.join(format!("{PREFIX}{pid}-{n}")),
            };
            if DirBuilder::new().mode(0o700).create(&path).is_err() && path.is_dir() {
                continue;
            }
            let lock = File::open(&path).with_context(|| format!("making {}", path.display()))?;
            // Somebody who tidies up may have come in between.
            if lock.try_lock().is_ok() && is_at(&lock, &path) {
                let keep = false;
                return Ok(RuntimeDir { path, lock, keep });
            }
        }
        bail!(
            "{} has {TRIES} folders {PREFIX}{pid} that are in use",
            base.display()
        );
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// For a QEMU to inherit.
    pub(crate) fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// A QEMU runs on without us, and is reached by its socket.
    pub(crate) fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        if !self.keep {
            // QEMU unlinks its own socket; a killed one can't.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Folders whose daemon and QEMUs have all ended.
fn remove_unused(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else {
        return;
    };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let Ok(folder) = File::open(entry.path()) else {
            continue; // another user's
        };
        match folder.try_lock() {
            Ok(()) => drop(fs::remove_dir_all(entry.path())),
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}

fn is_at(open: &File, path: &Path) -> bool {
    match (open.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(there)) => open.ino() == there.ino() && open.dev() == there.dev(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Base(PathBuf);

    impl Base {
        fn new(name: &str) -> Base {
            let path = std::env::temp_dir().join(format!("cr-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Base(path)
        }

        fn names(&self) -> Vec<String> {
            let names = fs::read_dir(&self.0).unwrap();
            names
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect()
        }
    }

    impl Drop for Base {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_folder_stays_as_long_as_anyone_has_its_lock() {
        let base = Base::new("locks");
        let mut first = RuntimeDir::make_in(&base.0).unwrap();
        // As QEMU has it: the same open file, under another descriptor.
        let inherited = first.lock().try_clone_to_owned().unwrap();
        let path = first.path().to_owned();
        first.keep();
        drop(first);

        let second = RuntimeDir::make_in(&base.0).unwrap();
        assert_ne!(second.path(), path);
        assert_eq!(base.names().len(), 2);

        drop(second);
        assert_eq!(base.names().len(), 1, "the second takes its own away");
        drop(inherited);
        let third = RuntimeDir::make_in(&base.0).unwrap();
        assert_eq!(third.path(), path);
        assert_eq!(base.names().len(), 1);
    }

    #[test]
    fn what_is_not_ours_stays() {
        let base = Base::new("others");
        fs::create_dir(base.0.join("curling-rdma-0")).unwrap();
        drop(RuntimeDir::make_in(&base.0).unwrap());
        assert_eq!(base.names(), ["curling-rdma-0"]);
    }
}
