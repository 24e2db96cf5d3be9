//! What figures were measured on.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::cache;

/// What a figure can't be read without: revision, kernel, processor, QEMUs and the command line.
/// What can't be found out is `null`.
pub fn describe(command: &str, qemus: &[&Path]) -> Value {
    let repo = cache::repo();
    let git = |arguments: &[&str]| said(Command::new("git").arg("-C").arg(&repo).args(arguments));
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let qemus: Vec<_> = qemus
        .iter()
        .filter_map(|qemu| said(Command::new(qemu).arg("--version")))
        .filter_map(|text| text.lines().next().map(str::to_owned))
        .collect();
    json!({
        "revision": git(&["rev-parse", "HEAD"]),
        "uncommitted_changes": changed.map(|text| !text.is_empty()),
        "kernel": said(Command::new("uname").arg("-sr")),
        "cpu": field(&cpuinfo, "model name"),
        "processors": cpuinfo.matches("processor\t").count(),
        "memory": field(&memory, "MemTotal"),
        "qemu": qemus,
        "date": said(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"])),
        "load_before": std::fs::read_to_string("/proc/loadavg").ok().map(|t| t.trim().to_owned()),
        "command": command,
    })
}

fn said(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The first `name: value` of a text as /proc has it.
fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
