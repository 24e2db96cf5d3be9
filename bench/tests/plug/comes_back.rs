//! An old primary that comes back: what it had held never leaves.
//!
//! The guest has no disk: its firmware asks the network for one (DHCP, by broadcast), gives up, and
//! begins anew. So it sends packets that nobody has to answer.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bench::lab::{Ended, Host};

use crate::lab::{Hosts, PORT};

/// Its firmware is silent for up to half a minute, and has to say something while nothing is
/// acknowledged.
const LEASE_MS: u64 = 60_000;
/// For acknowledgements that had arrived when the cable was cut.
const SETTLE: Duration = Duration::from_secs(3);

const GUEST: &str = "qemu-system-x86_64 -accel tcg -machine pc -m 64 -nodefaults -display none \
    -netdev tap,id=n0,ifname=tap0,script=no,downscript=no,vhost=on \
    -device virtio-net-pci,netdev=n0,disable-modern=on -boot reboot-timeout=500";
/// A broadcast that leaves the tap reaches the bridge's own device.
const NETWORK: &str = "ip link add br0 type bridge; ip link set br0 up; \
    ip tuntap add tap0 mode tap; ip link set tap0 master br0 up";

/// Frames of the guest on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// By the tap, whether held or not.
    sent: u64,
    /// By the bridge.
    out: u64,
}

#[test]
fn an_old_primary_that_comes_back_says_nothing_and_ends_its_guest() -> Result<()> {
    let hosts = Hosts::up()?;
    for host in Host::BOTH {
        hosts.say(host, NETWORK)?;
    }
    let peer = format!("{}:{PORT}", Host::B.address());
    let backup = hosts.daemon(Host::B, &format!("--listen {peer} -- {GUEST}"))?;
    let primary = hosts.daemon(
        Host::A,
        &format!(
            "--peer {peer} --gate auto --failover-after-ms {LEASE_MS} \
             --max-unacked-ms {LEASE_MS} -- {GUEST}"
        ),
    )?;
    hosts.wait("an epoch", || Ok(hosts.event(Host::A, "synced")?.is_some()))?;
    hosts.check_gate()?;
    let before = seen(&hosts, Host::A)?;
    hosts.wait("acknowledged output", || {
        Ok(seen(&hosts, Host::A)?.out > before.out)
    })?;

    Host::BOTH.into_iter().for_each(|host| hosts.cut(host));
    sleep(SETTLE);
    let cut = seen(&hosts, Host::A)?;
    hosts.wait("output that is held", || {
        Ok(seen(&hosts, Host::A)?.sent > cut.sent)
    })?;
    hosts.wait("the takeover", || {
        Ok(hosts.event(Host::B, "failover")?.is_some())
    })?;
    let failover = hosts.event(Host::B, "failover")?.context("failover")?;
    ensure!(
        failover["reason"] != "proof-of-death",
        "both hosts live: {failover}"
    );
    let taken_over = seen(&hosts, Host::B)?;
    hosts.wait("output of the survivor", || {
        Ok(seen(&hosts, Host::B)?.out > taken_over.out)
    })?;

    Host::BOTH.into_iter().for_each(|host| hosts.mend(host));
    let ended = primary.wait()?;
    let errors = String::from_utf8_lossy(&ended.errors);
    ensure!(ended.ended == Ended::Exit(4), "{:?}: {errors}", ended.ended);
    let last = seen(&hosts, Host::A)?;
    ensure!(
        last.out == cut.out,
        "{cut:?} at the cut and {last:?} at the end"
    );
    // A tool that is missing fails here.
    for (look, ours) in [
        ("ps -e -o args", "\nqemu-system"),
        ("ip -br link", "ftplug"),
        ("tc qdisc show dev tap0", "clsact"),
    ] {
        let all = hosts.say(Host::A, look)?;
        ensure!(!all.contains(ours), "left behind: {all}");
    }
    println!(
        "{} frames were held when the cable was cut, and never left",
        last.sent - cut.sent
    );
    drop(backup);
    Ok(())
}

fn seen(hosts: &Hosts, host: Host) -> Result<Seen> {
    let text = hosts.say(
        host,
        "cat /sys/class/net/tap0/statistics/rx_packets /sys/class/net/br0/statistics/rx_packets",
    )?;
    let mut counts = text.lines().map(str::parse);
    match (counts.next(), counts.next()) {
        (Some(sent), Some(out)) => Ok(Seen {
            sent: sent?,
            out: out?,
        }),
        _ => bail!("no counts: {text}"),
    }
}
