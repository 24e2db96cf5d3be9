//! The command line of a rehearsal: the same machine, with no way to the host or a network.

use super::options::{Keys, QemuOption, escape_commas, parse_options};

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
        "nic" => cut_nic(&option.keys("type")),
        "net" if option.keys("type").get("type") != Some("nic") => {
            QemuOption::new("net", "user,restrict=on")
        }
        "machine" | "M" => {
            let mut keys = option.keys("type");
            keys.remove("memory-backend");
            match keys.to_text("type") {
                empty if empty.is_empty() => return None,
                text => QemuOption::new("machine", &text),
            }
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

/// A NIC in one word with its netdev: what the guest sees of it stays.
fn cut_nic(keys: &Keys) -> QemuOption {
    if keys.get("type") == Some("none") {
        return QemuOption::new("nic", "none");
    }
    let seen = ["id", "model", "mac", "macaddr", "addr"];
    let kept = seen
        .iter()
        .filter_map(|key| Some(format!(",{key}={}", escape_commas(keys.get(key)?))));
    let kept: String = kept.collect();
    QemuOption::new("nic", &format!("user,restrict=on{kept}"))
}

fn id(keys: &Keys) -> String {
    keys.get("id").unwrap_or("unnamed").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut_line(line: &str) -> String {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        cut_off(&words).join(" ")
    }

    #[test]
    fn every_way_out_is_closed_and_the_machine_stays() {
        let cases = [
            ("-m 64 -smp 2 -device VGA", "-m 64 -smp 2 -device VGA"),
            (
                "-nic user,model=e1000,mac=1:2,hostfwd=tcp::1-:2",
                "-nic user,restrict=on,model=e1000,mac=1:2",
            ),
            (
                "-nic none -net nic -net tap,ifname=t",
                "-nic none -net nic -net user,restrict=on",
            ),
            (
                "-netdev tap,id=n0,ifname=t",
                "-netdev user,id=n0,restrict=on",
            ),
            (
                "-serial file:x -monitor stdio -qmp unix:q,server=on -vnc :1",
                "-serial null -monitor none",
            ),
            (
                "-chardev socket,id=c,path=p,server=on",
                "-chardev null,id=c",
            ),
            (
                "-M q35,memory-backend=r -object memory-backend-memfd,id=r,size=1G",
                "-machine q35",
            ),
            ("-M pc -M memory-backend=r", "-machine pc"),
            (
                "-object iothread,id=i -object filter-dump,id=f,netdev=n0",
                "-object iothread,id=i",
            ),
        ];
        for (line, expected) in cases {
            let expected = format!("qemu {expected} -display none -snapshot");
            assert_eq!(cut_line(&format!("qemu {line}")), expected);
        }
    }
}
