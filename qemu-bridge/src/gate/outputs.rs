//! Ways out of a VM that no gate holds.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use serde_json::Value;

use crate::qmp::{Command, Qmp, QmpError};
use crate::shape::ShapeError;
use crate::shape::device_types;

/// Objects that send a netdev's packets somewhere else, before or after a gate.
const SIDE_WAYS: &[&str] = &[
    "filter-mirror",
    "filter-redirector",
    "filter-dump",
    "colo-compare",
];
/// Devices that hand data to the host beside the network.
const HOST_DEVICES: &[(&str, &str)] = &[
    ("virtio-9p", "a shared folder"),
    ("vhost-vsock", "vsock"),
    ("usb-redir", "USB redirection"),
];

/// One way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// As QEMU or the user calls it.
    pub name: String,
    pub what: String,
    /// Whether data can get to another machine by it.
    pub leaves_host: bool,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reach = if self.leaves_host {
            "reaches other machines"
        } else {
            "stays on this host"
        };
        write!(f, "{} ({}): {reach}", self.name, self.what)
    }
}

/// Everything that the guest can be seen by beside its NICs. Blocks.
///
/// # Errors
/// QEMU doesn't answer as expected.
pub fn outputs(qmp: &mut Qmp, timeout: Duration) -> Result<Vec<Output>, ShapeError> {
    let mut found = Vec::new();
    chardevs(
        &qmp.call(Command::new("query-chardev"), timeout)?,
        &mut found,
    );
    for (command, kind) in [("query-vnc-servers", "VNC"), ("query-spice", "SPICE")] {
        match qmp.call(Command::new(command), timeout) {
            Ok(answer) => displays(&answer, kind, &mut found),
            // Built without it.
            Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for (path, kind) in device_types(qmp, timeout)? {
        if let Some((_, what)) = HOST_DEVICES
            .iter()
            .find(|(prefix, _)| kind.starts_with(prefix))
        {
            found.push(Output {
                name: format!("device {path} ({kind})"),
                what: (*what).to_owned(),
                leaves_host: kind.starts_with("virtio-9p"),
            });
        }
    }
    objects(
        &qmp.call(Command::new("qom-list").arg("path", "/objects"), timeout)?,
        &mut found,
    );
    Ok(found)
}

/// `filename` is what QEMU calls a chardev's place (chardev/char-socket.c): `unix:/path,server=on`,
/// `disconnected:tcp:0.0.0.0:4444,server=on`, `udp:…`, `file`, `pty:/dev/pts/3`, `null`.
fn chardevs(answer: &Value, found: &mut Vec<Output>) {
    for chardev in answer.as_array().into_iter().flatten() {
        let label = chardev["label"].as_str().unwrap_or("?");
        let place = chardev["filename"].as_str().unwrap_or("?");
        let place = place.strip_prefix("disconnected:").unwrap_or(place);
        let (kind, rest) = place.split_once(':').unwrap_or((place, ""));
        let monitor = label.starts_with("compat_monitor") || label.starts_with("ftm");
        if monitor || matches!(kind, "null" | "mux" | "ringbuf" | "vc" | "?") {
            continue;
        }
        let network = matches!(
            kind,
            "tcp" | "telnet" | "tn3270" | "websocket" | "wss" | "tls" | "udp"
        );
        found.push(Output {
            name: format!("chardev {label}"),
            what: place.to_owned(),
            leaves_host: network && !is_local(host_of(rest)),
        });
    }
}

fn displays(answer: &Value, kind: &str, found: &mut Vec<Output>) {
    let servers: Vec<&Value> = match answer.as_array() {
        Some(servers) => servers
            .iter()
            .flat_map(|s| s["server"].as_array().into_iter().flatten())
            .collect(),
        None if answer["enabled"] == true => vec![answer],
        None => return,
    };
    for server in servers {
        let host = server["host"].as_str().unwrap_or("");
        let unix = server["family"] == "unix";
        found.push(Output {
            name: kind.to_owned(),
            what: format!("on {host}"),
            leaves_host: !unix && !is_local(host),
        });
    }
}

fn objects(answer: &Value, found: &mut Vec<Output>) {
    for object in answer.as_array().into_iter().flatten() {
        let name = object["name"].as_str().unwrap_or("?");
        let kind = object["type"].as_str().unwrap_or("");
        let kind = kind
            .strip_prefix("child<")
            .unwrap_or(kind)
            .trim_end_matches('>');
        if SIDE_WAYS.contains(&kind) && !name.starts_with("ftm") {
            found.push(Output {
                name: format!("object {name}"),
                what: kind.to_owned(),
                // What it is connected to is a chardev, which says that itself.
                leaves_host: false,
            });
        }
    }
}

/// Of `host:port,options` and `[v6]:port,options`; UDP has `remote@local`.
fn host_of(place: &str) -> &str {
    let address = place.split([',', '@', ' ']).next().unwrap_or(place);
    address
        .rsplit_once(':')
        .map_or(address, |(host, _)| host)
        .trim_matches(['[', ']'])
}

fn is_local(host: &str) -> bool {
    host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn chardevs_are_told_apart_by_where_they_lead() {
        let answer = json!([
            { "label": "compat_monitor0", "filename": "unix:/q,server=on" },
            { "label": "serial0", "filename": "file" },
            { "label": "serial1", "filename": "disconnected:tcp:0.0.0.0:4444,server=on" },
            { "label": "serial2", "filename": "disconnected:telnet:127.0.0.1:4445,server=on <-> …" },
            { "label": "agent", "filename": "unix:/a,server=on" },
            { "label": "log", "filename": "udp:192.0.2.1:514@0.0.0.0:0" },
            { "label": "six", "filename": "tcp:[::1]:9" },
            { "label": "nothing", "filename": "null" },
        ]);
        let mut found = Vec::new();
        chardevs(&answer, &mut found);
        let found: Vec<_> = found
            .iter()
            .map(|o| (o.name.as_str(), o.leaves_host))
            .collect();
        let expected = [
            ("chardev serial0", false),
            ("chardev serial1", true),
            ("chardev serial2", false),
            ("chardev agent", false),
            ("chardev log", true),
            ("chardev six", false),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_display_on_all_addresses_leaves_the_host() {
        let vnc = json!([{ "id": "default", "server": [
            { "host": "0.0.0.0", "family": "ipv4", "service": "5900" },
            { "host": "127.0.0.1", "family": "ipv4", "service": "5901" },
        ] }]);
        let mut found = Vec::new();
        displays(&vnc, "VNC", &mut found);
        displays(&json!({ "enabled": false }), "SPICE", &mut found);
        let leaving: Vec<_> = found.iter().map(|o| o.leaves_host).collect();
        assert_eq!(leaving, [true, false]);
    }
}
