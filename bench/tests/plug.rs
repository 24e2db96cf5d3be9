//! The plug with vhost-net, and an old primary that comes back: what it had held never leaves.
//!
//! Two hosts of the lab. The guest has no disk: its firmware asks the network for one (DHCP, by
//! broadcast), gives up, and begins anew. So it sends packets that nobody has to answer.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::cache;
use bench::lab::{Command, Ended, Host, Lab, Running, Settings};
use serde_json::Value;

const PORT: u16 = 7000;
/// Emulation in emulation, on a machine that others use.
const PATIENCE: Duration = Duration::from_secs(240);
const LOOK_EVERY: Duration = Duration::from_millis(500);
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
    let lab = Lab::up(Settings::new()?)?;
    for host in Host::BOTH {
        say(&lab, host, NETWORK)?;
    }
    let backup = daemon(
        &lab,
        Host::B,
        &format!("--listen {}:{PORT}", Host::B.address()),
    )?;
    let options = format!(
        "--peer {}:{PORT} --gate auto --failover-after-ms {LEASE_MS} --max-unacked-ms {LEASE_MS}",
        Host::B.address()
    );
    let primary = daemon(&lab, Host::A, &options)?;
    wait(&lab, "an epoch", |lab| {
        Ok(event(lab, Host::A, "synced")?.is_some())
    })?;
    let attached = event(&lab, Host::A, "attached")?.context("attached")?;
    ensure!(attached["gate"] == "plug on n0 (tap0)", "{attached}");
    let files = say(&lab, Host::A, "ls -l /proc/$(pgrep -f ^qemu-system)/fd")?;
    ensure!(files.contains("/dev/vhost-net"), "{files}");
    let before = seen(&lab, Host::A)?;
    wait(&lab, "acknowledged output", |lab| {
        Ok(seen(lab, Host::A)?.out > before.out)
    })?;

    Host::BOTH.into_iter().for_each(|host| lab.cut(host));
    sleep(SETTLE);
    let cut = seen(&lab, Host::A)?;
    wait(&lab, "output that is held", |lab| {
        Ok(seen(lab, Host::A)?.sent > cut.sent)
    })?;
    wait(&lab, "the takeover", |lab| {
        Ok(event(lab, Host::B, "failover")?.is_some())
    })?;
    let failover = event(&lab, Host::B, "failover")?.context("failover")?;
    ensure!(
        failover["reason"] != "proof-of-death",
        "both hosts live: {failover}"
    );
    let taken_over = seen(&lab, Host::B)?;
    wait(&lab, "output of the survivor", |lab| {
        Ok(seen(lab, Host::B)?.out > taken_over.out)
    })?;

    Host::BOTH.into_iter().for_each(|host| lab.mend(host));
    let ended = primary.wait()?;
    let errors = String::from_utf8_lossy(&ended.errors);
    ensure!(ended.ended == Ended::Exit(4), "{:?}: {errors}", ended.ended);
    let last = seen(&lab, Host::A)?;
    ensure!(
        last.out == cut.out,
        "{cut:?} at the cut and {last:?} at the end"
    );
    let left = say(
        &lab,
        Host::A,
        "pgrep -f ^qemu-system || true; ip -br link | grep ftplug || true; \
         tc qdisc show dev tap0 | grep clsact || true",
    )?;
    ensure!(left.is_empty(), "left behind: {left}");
    println!(
        "{} frames were held when the cable was cut, and never left",
        last.sent - cut.sent
    );
    drop(backup);
    Ok(())
}

fn daemon(lab: &Lab, host: Host, options: &str) -> Result<Running> {
    let mode = match host {
        Host::A => "primary",
        Host::B => "backup",
    };
    let line = format!(
        "exec {} --mode {mode} --vm-id v --transport tcp --allow-unauthenticated \
         --state-dir /run/state --control /run/control --events /lab/{host}.events {options} -- {GUEST}",
        cache::program()?.display()
    );
    lab.spawn(host, &Command::shell(&line))
}

fn seen(lab: &Lab, host: Host) -> Result<Seen> {
    let text = say(
        lab,
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

/// The last event of that name that a host's daemon has written.
fn event(lab: &Lab, host: Host, name: &str) -> Result<Option<Value>> {
    let path = lab.shared().join(format!("{host}.events"));
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines().rev();
    let mut events = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(events.find(|event| event["event"] == name))
}

fn wait(lab: &Lab, what: &str, mut is_there: impl FnMut(&Lab) -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_there(lab)? {
        if Instant::now() > deadline {
            let told = |host| {
                let path = lab.shared().join(format!("{host}.events"));
                let text = std::fs::read_to_string(path).unwrap_or_default();
                let end = text.lines().rev().take(5).collect::<Vec<_>>().join("\n");
                format!("\n{host}: {:?}\n{end}", seen(lab, host))
            };
            bail!(
                "waited in vain for {what}{}{}",
                told(Host::A),
                told(Host::B)
            );
        }
        sleep(LOOK_EVERY);
    }
    Ok(())
}

fn say(lab: &Lab, host: Host, line: &str) -> Result<String> {
    let output = lab.run(host, &Command::shell(line))?;
    let text = String::from_utf8_lossy(&output.output).into_owned();
    let errors = String::from_utf8_lossy(&output.errors);
    ensure!(
        output.ended == Ended::Exit(0),
        "{host}: {line}: {text}{errors}"
    );
    Ok(text.trim().to_owned())
}
