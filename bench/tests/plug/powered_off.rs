//! A host is powered off under a database: its clients, on the other host, notice nothing.
//!
//! As `scripts/transparency`, with the host's death a real one. The guest is reached through a bridge
//! on each host with the cable as a port of both. A Linux would take minutes to boot in emulation in
//! emulation: so it boots on the machine itself, and moves to host A as a saved state.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bench::cache;
use bench::guest::words;
use bench::lab::{Command, Ended, Host};
use bench::process::{Process, Workplace};
use bench::qmp::Qmp;
use bench::transparency::checker::{acknowledged_within, judge};
use bench::transparency::clients::STOP_FILE;
use bench::transparency::log::{Record, read_all};

use serde_json::json;

use crate::lab::{Hosts, PORT};

const ADDRESS: &str = "10.77.0.9";
const CLIENTS: u64 = 4;
/// Before the host dies, and after it.
const WRITES: u64 = 20;
/// Heartbeats have to share a processor with a guest.
const FAILOVER_AFTER_MS: u64 = 2500;
/// Between two boundaries of 100 ms each: or it would hardly run at all.
const GUEST_RUNS_MS: u64 = 300;
/// How long an answer may take: emulation in emulation has to translate the survivor's code anew.
const ANSWER_SECONDS: u64 = 120;
const FOLDER: &str = "clients";
const TAP: &str = "tap,id=n0,ifname=tap0,script=no,downscript=no,vhost=on";
/// A guest boots in some five seconds where nobody else works.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn clients_notice_nothing_when_a_host_is_powered_off() -> Result<()> {
    let hosts = Hosts::up()?;
    for host in Host::BOTH {
        hosts.say(host, &network(host))?;
    }
    boot(&hosts.shared().join("state"))?;
    let tap = guest(TAP, "null")?;
    let qemu = hosts.spawn(
        Host::A,
        &Command::shell(&format!(
            "exec {tap} -qmp unix:/run/qmp,server=on,wait=off -incoming 'exec:cat /lab/state'"
        )),
    )?;
    let peer = format!("{}:{PORT}", Host::B.address());
    let backup = hosts.daemon(Host::B, &format!("--listen {peer} -- {tap}"))?;
    hosts.wait("the guest on host A", || {
        let asked = hosts.run(Host::B, &Command::shell(&warm_up()))?;
        Ok(asked.ended == Ended::Exit(0))
    })?;
    let primary = hosts.daemon(
        Host::A,
        &format!(
            "--peer {peer} --failover-after-ms {FAILOVER_AFTER_MS} --min-epoch-ms {GUEST_RUNS_MS} \
             --epoch-ms {GUEST_RUNS_MS} --qmp /run/qmp"
        ),
    )?;
    hosts.wait("an epoch", || Ok(hosts.event(Host::A, "synced")?.is_some()))?;
    hosts.check_gate()?;

    let dir = hosts.shared().join(FOLDER);
    std::fs::create_dir(&dir)?;
    let clients = format!(
        "exec {} clients --dir /lab/{FOLDER} --run lab --host {ADDRESS} --redis {CLIENTS} --postgres 0 \
         --patience {ANSWER_SECONDS}",
        cache::built("transparency")?.display()
    );
    let clients = hosts.spawn(Host::B, &Command::shell(&clients))?;
    let writes = || -> Result<u64> { Ok(acknowledged_within(&read_all(&dir)?, 0, u64::MAX)) };
    hosts.wait("the clients", || Ok(writes()? >= WRITES))?;
    hosts.kill(Host::A);
    let before = writes()?;
    hosts.wait("the takeover", || {
        Ok(hosts.event(Host::B, "failover")?.is_some())
    })?;
    hosts.wait("the clients, after it", || Ok(writes()? >= before + WRITES))?;
    File::create(dir.join(STOP_FILE))?;
    let ended = clients.wait()?;
    let errors = String::from_utf8_lossy(&ended.errors);
    ensure!(ended.ended == Ended::Exit(0), "{:?}: {errors}", ended.ended);

    let failover = hosts.event(Host::B, "failover")?.context("failover")?;
    let logs = read_all(&dir)?;
    let mut records = logs.iter().flatten();
    let failure = records.find(|record| matches!(record, Record::Failed { .. }));
    ensure!(failure.is_none(), "{failover}: {failure:?}");
    // How long they had to wait is told below.
    let verdict = judge(&logs);
    let (lost, stale) = (verdict.lost_writes, verdict.stale_reads);
    ensure!(
        (lost, stale) == (0, 0),
        "{failover}: {:?}",
        verdict.violations
    );
    ensure!(verdict.connections == CLIENTS, "{verdict:?}");
    println!(
        "{} writes acknowledged, {before} before the power went; none lost, none stale, no \
         connection broken; longest silence {} ms, of it {} ms until the death was seen",
        verdict.acknowledged_writes,
        verdict.silences_us.iter().max().unwrap_or(&0) / 1000,
        failover["detect_us"].as_u64().unwrap_or(0) / 1000,
    );
    drop((qemu, primary, backup));
    Ok(())
}

/// The cable becomes a port of a bridge, which takes over the host's address on it.
fn network(host: Host) -> String {
    format!(
        "ip link add br0 type bridge && ip address flush dev eth0 && ip link set eth0 master br0 && \
         ip link set br0 up && ip address add {}/24 dev br0 && \
         ip tuntap add tap0 mode tap && ip link set tap0 master br0 up",
        host.address()
    )
}

/// Writes as the clients will. Emulation takes ten seconds and more for the first answers, as it has
/// seen nothing of that code yet, and clients give up then.
fn warm_up() -> String {
    let write = "echo RPUSH warm 1 >&3 && read -t 60 -u 3 || exit 1";
    format!(
        "timeout 120 bash -c 'exec 3<>/dev/tcp/{ADDRESS}/6379 && for i in 1 2 3 4; do {write}; done'"
    )
}

/// Boots the guest on this machine, and saves it to a file.
fn boot(state: &Path) -> Result<()> {
    let place = Workplace::new("boot")?;
    let dir = place.path();
    let (console, socket) = (dir.join("console"), dir.join("qmp"));
    let line = format!(
        "exec {} -qmp unix:{},server=on,wait=off",
        guest(
            "hubport,id=n0,hubid=0",
            &format!("file:{}", console.display())
        )?,
        socket.display()
    );
    let qemu = Process::start(dir, "qemu", "sh", &["-c".to_owned(), line])?;
    let deadline = Instant::now() + BOOT_PATIENCE;
    let wait = |what: &str, is_there: &mut dyn FnMut() -> Result<bool>| -> Result<()> {
        while !is_there()? {
            ensure!(Instant::now() < deadline, "{what}: {}", qemu.said());
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    wait("the guest does not boot", &mut || {
        let said = std::fs::read_to_string(&console).unwrap_or_default();
        Ok(said.contains("guest: READY"))
    })?;
    let mut qmp = Qmp::connect(&socket)?;
    let uri = format!("exec:cat >{}", state.display());
    qmp.call("migrate", json!({ "uri": uri }))?;
    wait("the guest is not saved", &mut || {
        Ok(qmp.call("query-migrate", json!({}))?["status"] == "completed")
    })
}

/// The command line of a guest with Redis, for a shell.
fn guest(netdev: &str, serial: &str) -> Result<String> {
    let mut line = words(
        "qemu-system-x86_64 -accel tcg -cpu max -m 192 -nodefaults -display none \
         -object memory-backend-memfd,id=ram,size=192M,share=on \
         -machine pc,memory-backend=ram,suppress-vmdesc=on \
         -device virtio-net-pci,netdev=n0,mac=52:54:00:12:34:57,romfile= \
         -device virtio-blk-pci,drive=disk",
    );
    let disk = cache::database_guest("debian.squashfs")?;
    let disk = format!(
        "if=none,id=disk,file={},format=raw,read-only=on",
        disk.display()
    );
    let kernel = cache::kernel()?.display().to_string();
    let initramfs = cache::database_guest("debian.cpio.gz")?;
    let initramfs = initramfs.display().to_string();
    let append =
        format!("console=ttyS0 quiet panic=-1 guest.address={ADDRESS}/24 guest.databases=redis");
    for (option, value) in [
        ("-netdev", netdev),
        ("-serial", serial),
        ("-drive", &disk),
        ("-kernel", &kernel),
        ("-initrd", &initramfs),
        ("-append", &append),
    ] {
        line.extend([option.to_owned(), format!("'{value}'")]);
    }
    Ok(line.join(" "))
}
