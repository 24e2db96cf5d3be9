//! The command line of a throw-away QEMU: the same machine, with no way to the host or a network.

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

/// What a throw-away QEMU is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be asked about the machine. Needs no privilege.
    Ask,
    /// To load the guest's state. A NIC's features, and so its state, depend on what its netdev can
    /// do (`virtio-net: saved image requires vnet_hdr=on`), so a tap stays a tap: a new one that
    /// belongs to no bridge and is down. It goes with the QEMU, and to make it takes CAP_NET_ADMIN.
    Load,
}

/// Makes a command line safe to run beside the VM itself: consoles and character devices go
/// nowhere, networks are restricted to themselves, disks are not written, the main RAM is left
/// for the caller to add.
pub fn cut_off(argv: &[String], purpose: Purpose) -> Vec<String> {
    let Some((program, words)) = argv.split_first() else {
        return Vec::new();
    };
    let options = parse_options(words).into_iter();
    let mut options: Vec<QemuOption> = options.filter_map(|o| cut(o, purpose)).collect();
    options.push(QemuOption::new("display", "none"));
    options.push(QemuOption::flag("snapshot"));
    let words = options.iter().flat_map(QemuOption::words);
    std::iter::once(program.clone()).chain(words).collect()
}

/// What becomes of one option.
fn cut(option: QemuOption, purpose: Purpose) -> Option<QemuOption> {
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
        "netdev" => {
            let keys = option.keys("type");
            let netdev = format!("{},id={}", backend(&keys, purpose), id(&keys));
            QemuOption::new("netdev", &netdev)
        }
        "nic" => cut_nic(&option.keys("type"), purpose),
        "net" if option.keys("type").get("type") != Some("nic") => {
            QemuOption::new("net", &backend(&option.keys("type"), purpose))
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
fn cut_nic(keys: &Keys, purpose: Purpose) -> QemuOption {
    if keys.get("type") == Some("none") {
        return QemuOption::new("nic", "none");
    }
    let seen = ["id", "model", "mac", "macaddr", "addr"];
    let kept = seen
        .iter()
        .filter_map(|key| Some(format!(",{key}={}", escape_commas(keys.get(key)?))));
    let kept: String = kept.collect();
    let backend = backend(keys, purpose);
    QemuOption::new("nic", &format!("{backend}{kept}"))
}

/// A network that nobody else is in, of the same kind as far as the guest can tell.
fn backend(keys: &Keys, purpose: Purpose) -> String {
    let is_tap = matches!(keys.get("type"), Some("tap" | "bridge"));
    if purpose == Purpose::Ask || !is_tap {
        return "user,restrict=on".to_owned();
    }
    let queues = keys
        .get("queues")
        .map(|queues| format!(",queues={}", escape_commas(queues)));
    format!("tap,script=no,downscript=no{}", queues.unwrap_or_default())
}

fn id(keys: &Keys) -> String {
    keys.get("id").unwrap_or("unnamed").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut_line(line: &str, purpose: Purpose) -> String {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        cut_off(&words, purpose).join(" ")
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
                "-netdev user,restrict=on,id=n0",
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
            assert_eq!(cut_line(&format!("qemu {line}"), Purpose::Ask), expected);
        }
    }

    #[test]
    fn tap_stays_a_tap_for_a_load_and_leads_nowhere() {
        let cases = [
            (
                "-netdev tap,id=n0,ifname=t,vhost=on",
                "-netdev tap,script=no,downscript=no,id=n0",
            ),
            (
                "-netdev bridge,id=n0,br=b",
                "-netdev tap,script=no,downscript=no,id=n0",
            ),
            (
                "-netdev tap,id=n0,queues=4",
                "-netdev tap,script=no,downscript=no,queues=4,id=n0",
            ),
            (
                "-nic tap,ifname=t,mac=1:2",
                "-nic tap,script=no,downscript=no,mac=1:2",
            ),
            (
                "-net nic -net tap,ifname=t",
                "-net nic -net tap,script=no,downscript=no",
            ),
            (
                "-netdev user,id=n0,hostfwd=x",
                "-netdev user,restrict=on,id=n0",
            ),
        ];
        for (line, expected) in cases {
            let expected = format!("qemu {expected} -display none -snapshot");
            assert_eq!(cut_line(&format!("qemu {line}"), Purpose::Load), expected);
        }
    }
}
