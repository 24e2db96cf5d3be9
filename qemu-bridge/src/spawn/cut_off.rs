//! The command line of a rehearsal: the same machine, with no way to the host or a network.

use super::options::{Keys, QemuOption, parse_options};

/// Options that only open ways out, or files of the host, and that the guest can't see.
const DROPPED: [&str; 12] = [
    "qmp",
    "qmp-pretty",
    "mon",
    "pidfile",
    "vnc",
    "spice",
    "display",
    "D",
    "trace",
    "gdb",
    "s",
    "incoming",
];

/// Makes a command line safe to run beside the VM itself: consoles and character devices go
/// nowhere, networks are restricted to themselves, disks are not written, the main RAM is left
/// for the caller to add.
pub fn cut_off(argv: &[String]) -> Vec<String> {
    let Some((program, words)) = argv.split_first() else {
        return Vec::new();
    };
    let mut options: Vec<QemuOption> = parse_options(words).into_iter().filter_map(cut).collect();
    options.push(QemuOption::new("display", "none"));
    options.push(QemuOption::flag("snapshot"));
    let words = options.iter().flat_map(QemuOption::words);
    std::iter::once(program.clone()).chain(words).collect()
}

/// What becomes of one option.
fn cut(option: QemuOption) -> Option<QemuOption> {
    if DROPPED.contains(&option.name.as_str()) {
        return None;
    }
    Some(match option.name.as_str() {
        "serial" | "parallel" | "debugcon" => QemuOption::new(&option.name, "null"),
        "monitor" => QemuOption::new("monitor", "none"),
        "chardev" => QemuOption::new(
            "chardev",
            &format!("null,id={}", id(&option.keys("backend"))),
        ),
        "netdev" => QemuOption::new(
            "netdev",
            &format!("user,id={},restrict=on", id(&option.keys("type"))),
        ),
        "machine" | "M" => {
            let mut keys = option.keys("type");
            keys.remove("memory-backend");
            QemuOption::new("machine", &keys.to_text("type"))
        }
        // The main RAM's backend, and whatever hangs on a chardev's or a netdev's other end.
        "object" => {
            let keys = option.keys("qom-type");
            let kind = keys.get("qom-type").unwrap_or_default();
            if kind.starts_with("memory-backend-") || kind.starts_with("filter-") {
                return None;
            }
            option
        }
        _ => option,
    })
}

fn id(keys: &Keys) -> String {
    keys.get("id").unwrap_or("unnamed").to_owned()
}
