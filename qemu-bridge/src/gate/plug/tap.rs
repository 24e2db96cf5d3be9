//! Which tap a NIC is on.

use std::fs::{read_link, read_to_string};

use super::Unfit;
use crate::gate::GateError;
use crate::shape::{Netdev, Nic};

/// The tap behind a netdev.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tap {
    pub(super) netdev: String,
    pub(super) tap: String,
}

/// The taps of all NICs. One with several queues has several netdevs and one tap.
///
/// # Errors
/// A NIC has no tap, or one whose name can't be learned.
pub(super) fn find_taps(nics: &[Nic], pid: i32) -> Result<Vec<Tap>, GateError> {
    let mut found: Vec<Tap> = Vec::new();
    for netdev in nics.iter().flat_map(|nic| &nic.netdevs) {
        let tap = tap_of(netdev, pid).map_err(|unfit| unfit.error(&netdev.id))?;
        if found.iter().all(|other| other.tap != tap) {
            found.push(Tap {
                netdev: netdev.id.clone(),
                tap,
            });
        }
    }
    Ok(found)
}

fn tap_of(netdev: &Netdev, pid: i32) -> Result<String, Unfit> {
    if netdev.kind != "tap" {
        return Err(format!("it is of type {}, not a tap", netdev.kind).into());
    }
    let namespace = |who: &str| {
        let path = format!("/proc/{who}/ns/net");
        read_link(&path).map_err(|error| Unfit::because(format!("reading {path}"), error))
    };
    if namespace(&pid.to_string())? != namespace("thread-self")? {
        let why = "QEMU is in another network namespace: run the daemon there";
        return Err(why.to_owned().into());
    }
    if let Some(name) = &netdev.ifname {
        return Ok(name.clone());
    }
    // QEMU was given the tap as a descriptor.
    let Some(fd) = netdev.fd else {
        let why = "its tap's name is not known: give QEMU ifname= or fd=";
        return Err(why.to_owned().into());
    };
    let path = format!("/proc/{pid}/fdinfo/{fd}");
    let text =
        read_to_string(&path).map_err(|error| Unfit::because(format!("reading {path}"), error))?;
    let no_tap = || format!("{path} names no interface: it is no tap (a macvtap?)").into();
    interface_of(&text).ok_or_else(no_tap)
}

/// The line `iff:` of a tun device's descriptor (`tun_chr_show_fdinfo`, drivers/net/tun.c).
fn interface_of(fdinfo: &str) -> Option<String> {
    let name = fdinfo.lines().find_map(|line| line.strip_prefix("iff:"))?;
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_names_its_tap() {
        let text = "pos:\t0\nflags:\t0104002\nmnt_id:\t13\nino:\t98\niff:\ttap0\n";
        assert_eq!(interface_of(text).as_deref(), Some("tap0"));
        assert_eq!(interface_of("pos:\t0\n"), None);
        assert_eq!(interface_of("iff:\t\n"), None);
    }
}
