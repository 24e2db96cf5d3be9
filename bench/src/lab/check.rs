//! `lab check`: whether the lab does what it promises, seen from inside its hosts.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{Cable, Command, Ended, Event, Host, Lab, Running, Settings};

/// Packets of a probe of the cable.
const PINGS: u64 = 3;
/// Of one direction, where delay is looked at.
const DELAY: Duration = Duration::from_millis(40);

/// Gives what it saw.
type Check = fn(&Lab) -> Result<String>;

/// Boots a lab of its own and says what it saw.
///
/// # Errors
/// Something is not as promised: all of it is said on standard output, the last is returned.
pub fn check(settings: Settings) -> Result<()> {
    let lab = Lab::up(settings).context("booting both hosts")?;
    let checks: [(&str, Check); 11] = [
        ("kernels", kernels),
        ("rdma links", rdma_links),
        ("devices and qdiscs", devices),
        ("rping, both ways", rping),
        ("ibv_rc_pingpong", pingpong),
        ("ib_write_bw", write_bandwidth),
        ("commands", commands),
        ("cut one way", cut_one_way),
        ("delay and loss", delay_and_loss),
        ("cut under RDMA, mend", cut_under_rdma),
        ("kill, boot", kill_and_boot),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        match check(&lab) {
            Ok(seen) => println!("ok      {name}: {seen}"),
            Err(error) => {
                println!("FAILED  {name}: {error:#}");
                failed.push(name);
            }
        }
        Host::BOTH.into_iter().for_each(|from| lab.mend(from));
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

fn kernels(lab: &Lab) -> Result<String> {
    let release = both(lab, "uname -r")?;
    // The agent is the program that has the probe.
    let probe = both(lab, "/run/lab-agent probe")?;
    Ok(format!("{release}; {probe}"))
}

fn rdma_links(lab: &Lab) -> Result<String> {
    let seen = both(lab, "rdma link show rxe0/1; cat /sys/class/net/eth0/mtu")?;
    ensure!(
        seen.contains("state ACTIVE") && seen.contains("4200"),
        "{seen}"
    );
    both(lab, "ibv_devinfo -d rxe0 | grep active_mtu")
}

fn devices(lab: &Lab) -> Result<String> {
    both(
        lab,
        "test -c /dev/vhost-net; test -c /dev/net/tun; \
         ip link add ifb9 type ifb; ip link add veth8 type veth peer name veth9; \
         ip link add bridge9 type bridge; ip tuntap add tap9 mode tap; \
         tc qdisc add dev ifb9 root handle 1: plug limit 100000; \
         tc qdisc add dev veth8 root netem delay 1ms; tc qdisc add dev veth9 clsact; \
         tc filter add dev veth9 egress matchall action mirred egress redirect dev ifb9; \
         ip link del ifb9; ip link del veth8; ip link del bridge9; ip link del tap9; \
         echo vhost-net, tun, plug on ifb, netem, mirred, bridge",
    )
}

fn rping(lab: &Lab) -> Result<String> {
    for host in Host::BOTH {
        let serve = format!("rping -s -a {} -C 20 -V", host.address());
        let call = format!("rping -c -a {} -C 20 -V", host.address());
        pair(lab, host, &serve, &call)?;
    }
    Ok("20 verified, each way".into())
}

fn pingpong(lab: &Lab) -> Result<String> {
    let line = "ibv_rc_pingpong -d rxe0 -g 1 -m 4096 -n 200 -c";
    let said = pair(lab, Host::B, line, &format!("{line} {}", Host::B.address()))?;
    Ok(said.lines().last().unwrap_or_default().into())
}

fn write_bandwidth(lab: &Lab) -> Result<String> {
    let line = "ib_write_bw -d rxe0 -x 1 -n 200 -s 65536";
    let said = pair(lab, Host::B, line, &format!("{line} {}", Host::B.address()))?;
    let figures = said
        .lines()
        .find(|line| line.trim_start().starts_with("65536"));
    let average = figures.and_then(|line| line.split_whitespace().nth(3));
    let average = average.with_context(|| format!("no figures: {said}"))?;
    Ok(format!(
        "{average} MB/s in writes of 64 KiB (what emulation gives, not a NIC)"
    ))
}

fn commands(lab: &Lab) -> Result<String> {
    let forever = lab.spawn(Host::A, &Command::new("sleep", &["infinity"]))?;
    let output = lab.run(
        Host::A,
        &Command::shell("head -c 5000000 /dev/zero; exit 7"),
    )?;
    ensure!(output.ended == Ended::Exit(7), "{:?}", output.ended);
    ensure!(
        output.output == vec![0; 5_000_000],
        "output of {} bytes",
        output.output.len()
    );
    let cat = lab.spawn(Host::B, &Command::new("cat", &[]))?;
    let bytes: Vec<u8> = (0..=255).collect();
    cat.input().send(&bytes)?;
    cat.input().end()?;
    let back = cat.wait()?.output;
    ensure!(back == bytes, "cat gave {back:?}");
    forever.input().signal(nix::sys::signal::Signal::SIGTERM)?;
    let ended = forever.wait()?.ended;
    ensure!(ended == Ended::Signal(15), "sleep: {ended:?}");
    std::fs::write(lab.shared().join("from-machine"), "machine")?;
    say(lab, Host::A, "cp /lab/from-machine /lab/from-A")?;
    let carried = say(lab, Host::B, "cat /lab/from-A")?;
    ensure!(carried == "machine", "/lab carried {carried:?}");
    Ok("several at a time, exit status, signal, 5 MB, binary, /lab".into())
}

fn cut_one_way(lab: &Lab) -> Result<String> {
    for from in Host::BOTH {
        let to = from.peer();
        know_each_other(lab)?;
        ensure!(
            ping(lab, from, to)? == (PINGS, PINGS),
            "the cable is not whole"
        );
        lab.cut(from);
        let heard = ping(lab, from, to)?;
        ensure!(
            heard == (0, 0),
            "{from} to {to} is cut, but {to} heard {} pings",
            heard.0
        );
        let heard = ping(lab, to, from)?;
        ensure!(
            heard == (PINGS, 0),
            "only {from} to {to} is cut: {from} heard {} of {PINGS} pings, {to} {} replies",
            heard.0,
            heard.1
        );
        lab.mend(from);
        ensure!(
            ping(lab, from, to)? == (PINGS, PINGS),
            "mending {from} to {to} did not mend"
        );
    }
    Ok("each way: pings do not arrive, the other way they do, their replies don't".into())
}

fn delay_and_loss(lab: &Lab) -> Result<String> {
    know_each_other(lab)?;
    for from in Host::BOTH {
        let delay_us = u64::try_from(DELAY.as_micros())?;
        lab.set_cable(
            from,
            Cable {
                delay_us,
                ..Cable::default()
            },
        );
    }
    let said = say(
        lab,
        Host::A,
        &format!("busybox ping -c 3 -w 30 {}", Host::B.address()),
    )?;
    let fastest = said
        .rsplit_once("min/avg/max = ")
        .and_then(|(_, figures)| figures.split('/').next()?.parse::<f64>().ok())
        .with_context(|| format!("ping said {said}"))?;
    let least_ms = 2.0 * DELAY.as_secs_f64() * 1e3;
    ensure!(
        fastest >= least_ms,
        "{fastest} ms there and back, with a delay of {least_ms} ms"
    );
    lab.set_cable(
        Host::A,
        Cable {
            loss_percent: 50.0,
            ..Cable::default()
        },
    );
    let (_, before) = lab.status().cable[0];
    say(
        lab,
        Host::A,
        &format!("busybox ping -A -c 60 -w 20 {} || true", Host::B.address()),
    )?;
    let (_, after) = lab.status().cable[0];
    let (passed, lost) = (after.passed - before.passed, after.lost - before.lost);
    ensure!(
        passed > 0 && lost > 0,
        "at a loss of 50 %: {passed} passed, {lost} lost"
    );
    Ok(format!(
        "{fastest} ms there and back with {least_ms} ms; at 50 % {passed} passed, {lost} lost"
    ))
}

/// A queue pair that has its cable cut and mended within its retries goes on.
fn cut_under_rdma(lab: &Lab) -> Result<String> {
    let line = format!("rping -s -a {} -C 400 -V", Host::B.address());
    let server = lab.spawn(Host::B, &Command::shell(&line))?;
    listening(lab, Host::B, "rdma resource show cm_id", "LISTEN")?;
    let line = format!("rping -c -v -a {} -C 400 -V", Host::B.address());
    let mut client = lab.spawn(Host::A, &Command::shell(&line))?;
    wait_for_output(&mut client)?;
    let (_, before) = lab.status().cable[0];
    lab.cut(Host::A);
    // RDMA's own retries make sure that something is lost, and stop after some seconds.
    while lab.status().cable[0].1.lost == before.lost {
        thread::sleep(Duration::from_millis(5));
    }
    lab.mend(Host::A);
    let ended = client.wait()?.ended;
    ensure!(ended == Ended::Exit(0), "rping on A: {ended:?}");
    server.wait()?;
    Ok("rping lost packets, and went on".into())
}

fn kill_and_boot(lab: &Lab) -> Result<String> {
    know_each_other(lab)?;
    let _server = lab.spawn(Host::B, &Command::shell("busybox nc -l -p 7000"))?;
    listening(lab, Host::B, "ss -Hltn", ":7000")?;
    let _client = lab.spawn(
        Host::A,
        &Command::new("busybox", &["nc", "10.77.0.2", "7000"]),
    )?;
    let established = "ss -Htn state established dport = :7000";
    listening(lab, Host::A, established, "7000")?;
    let victim = lab.spawn(Host::B, &Command::new("sleep", &["infinity"]))?;
    lab.kill(Host::B);
    let ended = victim.wait()?.ended;
    ensure!(ended == Ended::HostDied, "the command on B: {ended:?}");
    let refused = lab.run(Host::B, &Command::new("true", &[]));
    ensure!(
        refused.is_err(),
        "B was killed and runs commands: {refused:?}"
    );
    let (_, from_b) = lab.status().cable[1];
    let replies = say(lab, Host::A, &ping_line(Host::B))?;
    ensure!(replies == "0", "B was killed and answers {replies} pings");
    let (_, later) = lab.status().cable[1];
    ensure!(later.passed == from_b.passed, "B was killed and sends");
    // A FIN or RST would have ended it.
    ensure!(
        !say(lab, Host::A, established)?.is_empty(),
        "A's connection to B ended"
    );
    lab.boot(&[Host::B])?;
    know_each_other(lab)?;
    ensure!(
        ping(lab, Host::A, Host::B)? == (PINGS, PINGS),
        "B is not back on the cable"
    );
    rping(lab)?;
    Ok("silence, no FIN; its command reported; back, with RDMA".into())
}

/// Runs a line on both, which must give the same.
fn both(lab: &Lab, line: &str) -> Result<String> {
    let [a, b] = [say(lab, Host::A, line)?, say(lab, Host::B, line)?];
    ensure!(a == b, "A says {a}, B says {b}");
    Ok(a)
}

/// What a line for bash says; it must not fail.
pub(super) fn say(lab: &Lab, host: Host, line: &str) -> Result<String> {
    let output = lab.run(host, &Command::shell(line))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.ended != Ended::Exit(0) {
        let (said, errors) = (text(&output.output), text(&output.errors));
        bail!("{line} on {host}: {:?}: {said} {errors}", output.ended);
    }
    Ok(text(&output.output))
}

/// Runs a server on a host and its client on the other; gives what the client says.
fn pair(lab: &Lab, server: Host, serve: &str, call: &str) -> Result<String> {
    let before = lab.spawn(server, &Command::shell(serve))?;
    let socket = if serve.starts_with("rping") {
        ("rdma resource show cm_id", "LISTEN")
    } else {
        ("ss -Hltn", ":185")
    };
    listening(lab, server, socket.0, socket.1)?;
    let said = say(lab, server.peer(), call)?;
    let ended = before.wait()?.ended;
    ensure!(ended == Ended::Exit(0), "{serve} on {server}: {ended:?}");
    Ok(said)
}

/// Waits until a line says a word, as long as a slow host may take.
pub(super) fn listening(lab: &Lab, host: Host, line: &str, word: &str) -> Result<()> {
    for _ in 0..100 {
        if say(lab, host, line)?.contains(word) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
    }
    bail!("{line} on {host} never said {word}")
}

fn wait_for_output(running: &mut Running) -> Result<()> {
    match running.next_event()? {
        Event::Output(_) => Ok(()),
        other => bail!("no output, but {other:?}"),
    }
}

/// So that no probe in one direction needs an ARP answer in the other.
fn know_each_other(lab: &Lab) -> Result<()> {
    let address = |host| say(lab, host, "cat /sys/class/net/eth0/address");
    for host in Host::BOTH {
        let (peer, mac) = (host.peer().address(), address(host.peer())?);
        say(
            lab,
            host,
            &format!("ip neigh replace {peer} dev eth0 lladdr {mac} nud permanent"),
        )?;
    }
    Ok(())
}

/// How many pings arrived, and how many replies came back.
fn ping(lab: &Lab, from: Host, to: Host) -> Result<(u64, u64)> {
    // InEchos is the 10th field of the second line "Icmp:" (RFC 2011's icmpInEchos).
    let heard = "awk '/^Icmp:/ { if (!n++) { for (i = 1; i <= NF; i++) if ($i == \"InEchos\") at = i } \
                 else print $at }' /proc/net/snmp";
    let before: u64 = say(lab, to, heard)?.parse()?;
    let replies = say(lab, from, &ping_line(to))?.parse()?;
    let after: u64 = say(lab, to, heard)?.parse()?;
    Ok((after - before, replies))
}

/// Says how many replies came.
fn ping_line(to: Host) -> String {
    let address = to.address();
    format!(
        "(busybox ping -c {PINGS} -W 2 {address} || true) | sed -n 's/.* \\([0-9]*\\) packets received.*/\\1/p'"
    )
}
