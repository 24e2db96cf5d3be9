//! Where `scripts/setup` has put things.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The repository's root.
pub fn repo() -> PathBuf {
    let bench = Path::new(env!("CARGO_MANIFEST_DIR"));
    bench.parent().unwrap_or(bench).to_owned()
}

fn cached(name: &str) -> Result<PathBuf> {
    let cache =
        std::env::var_os("CURLING_CACHE").map_or_else(|| repo().join(".cache"), PathBuf::from);
    let path = cache.join(name);
    ensure!(
        path.exists(),
        "{} is missing: run scripts/setup",
        path.display()
    );
    Ok(path)
}

/// # Errors
/// `scripts/setup` has not run.
pub fn kernel() -> Result<PathBuf> {
    cached("kernel/vmlinuz")
}

/// # Errors
/// `scripts/setup` has not run.
pub fn tick_initramfs() -> Result<PathBuf> {
    cached("tick.cpio.gz")
}

/// The disk of a boot sector: `boot16` of `scripts/setup`, or `boot32` of `scripts/setup lab`.
///
/// # Errors
/// It has not run.
pub fn boot_sector(name: &str) -> Result<PathBuf> {
    cached(&format!("{name}.img"))
}

/// The unpacked QEMU 10.0.
///
/// # Errors
/// `scripts/setup` has not run.
pub fn qemu_10() -> Result<PathBuf> {
    cached("qemu-10.0/run/qemu-system-x86_64")
}

/// What `scripts/setup lab` has put at NAME.
///
/// # Errors
/// It has not run.
pub fn lab(name: &str) -> Result<PathBuf> {
    cached(&format!("lab/{name}")).context("run scripts/setup lab")
}

/// What `scripts/setup transparency` has put at NAME.
///
/// # Errors
/// It has not run.
pub fn database_guest(name: &str) -> Result<PathBuf> {
    cached(name).context("run scripts/setup transparency")
}

/// The program under test: `CURLING_RDMA`, or the one that was built beside this one.
///
/// # Errors
/// It was not built.
pub fn program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("CURLING_RDMA") {
        return Ok(path.into());
    }
    built("curling-rdma")
}

/// A program of this workspace, built beside this one.
///
/// # Errors
/// It was not built.
pub fn built(name: &str) -> Result<PathBuf> {
    let mut path = std::env::current_exe()?;
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    let path = path.join(name);
    ensure!(
        path.exists(),
        "{} is missing: run cargo build first",
        path.display()
    );
    Ok(path)
}
