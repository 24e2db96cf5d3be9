//! `info network`, the human monitor's list of NICs and what they are connected to.

/// A NIC, or a netdev that no NIC uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nic {
    /// The NIC's name, or the netdev's.
    pub name: String,
    /// `model` and `macaddr`; empty if it is a netdev alone.
    pub model: String,
    pub mac: String,
    pub netdevs: Vec<Netdev>,
}

/// A host side of a NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netdev {
    /// Drawn at random by QEMU and beginning with `#` if the user gave none.
    pub id: String,
    /// `user`, `tap`, `vhost-user`, …
    pub kind: String,
    /// Of a tap that QEMU has opened by name.
    pub ifname: Option<String>,
    /// Of a tap that QEMU was given.
    pub fd: Option<i32>,
}

impl Nic {
    pub(super) fn shape_name(&self) -> String {
        match (self.model.is_empty(), self.name.starts_with('#')) {
            (false, _) => format!("nic {}", self.name),
            (true, false) => format!("netdev {}", self.name),
            (true, true) => "netdev without a name".to_owned(),
        }
    }

    /// A netdev's type is part of the device state; its id and where it leads to are not.
    pub(super) fn shape_value(&self) -> String {
        let kinds: Vec<&str> = self.netdevs.iter().map(|n| n.kind.as_str()).collect();
        format!("{} {} {}", self.model, self.mac, kinds.join(","))
            .trim()
            .to_owned()
    }
}

/// Parses what `info network` printed. Lines that say nothing about a NIC or netdev (hubs' ports have
/// both, filters neither) are skipped.
pub fn parse_network(text: &str) -> Vec<Nic> {
    let mut nics: Vec<Nic> = Vec::new();
    for line in text.lines() {
        let peer = line.strip_prefix(" \\ ");
        let Some((name, details)) = peer.unwrap_or(line).split_once(": ") else {
            continue;
        };
        let value = |key: &str| {
            details
                .split(',')
                .find_map(|d| d.strip_prefix(key)?.strip_prefix('='))
        };
        let (Some(kind), Some(_)) = (value("type"), value("index")) else {
            continue;
        };
        let netdev = Netdev {
            id: name.to_owned(),
            kind: kind.to_owned(),
            ifname: value("ifname").map(str::to_owned),
            fd: value("fd").and_then(|fd| fd.parse().ok()),
        };
        match (peer, nics.last_mut()) {
            (Some(_), Some(nic)) if kind != "nic" => nic.netdevs.push(netdev),
            _ if kind == "nic" => nics.push(Nic {
                name: name.to_owned(),
                model: value("model").unwrap_or("nic").to_owned(),
                mac: value("macaddr").unwrap_or("").to_owned(),
                netdevs: Vec::new(),
            }),
            _ => nics.push(Nic {
                name: name.to_owned(),
                netdevs: vec![netdev],
                ..Nic::default()
            }),
        }
    }
    // A NIC with several queues has a line for each of them.
    nics.dedup_by(|later, first| {
        let same = later.name == first.name;
        if same {
            first.netdevs.append(&mut later.netdevs);
        }
        same
    });
    nics
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nics_peers_and_lone_netdevs() {
        let text = "lone: index=0,type=user,net=10.0.2.0,restrict=off\r\n\
                    e1000e.0: index=0,type=nic,model=e1000e,macaddr=52:54:00:12:34:56\r\n \
                    \\ #net076: index=0,type=user,net=10.0.2.0,restrict=off\r\n\
                    filters:\r\n  - commit: type=filter-buffer,interval=4\r\n\
                    n1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:58\r\n";
        let nics = parse_network(text);
        let shape: Vec<_> = nics
            .iter()
            .map(|n| (n.shape_name(), n.shape_value()))
            .collect();
        let expected = [
            ("netdev lone", "user"),
            ("nic e1000e.0", "e1000e 52:54:00:12:34:56 user"),
            ("nic n1", "virtio-net-pci 52:54:00:12:34:58"),
        ];
        assert_eq!(shape, expected.map(|(n, v)| (n.to_owned(), v.to_owned())));
        assert_eq!(nics[1].netdevs[0].id, "#net076");
    }
}
