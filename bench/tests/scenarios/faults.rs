//! Writes that nobody can see, and garbage at the backup's port.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bench::draw::Draw;
use bench::pair::Watch;
use bench::process::Process;

use crate::on_both_qemus;
use crate::stage::{PATIENCE, Stage, check_survivor, ram_file, wait_epochs, wait_until};

on_both_qemus! {
    silent_write_is_found_and_mended,
    garbage_does_not_disturb,
}

/// A write to the RAM file goes past every page table, so that the tracker can't see it.
fn silent_write_is_found_and_mended(stage: &Stage) -> Result<()> {
    const WHERE: u64 = (48 << 20) + 123;
    let mut setup = stage.boot_sector()?;
    setup
        .options
        .extend(["--tracker", "uffd", "--audit-every", "10"].map(str::to_owned));
    let mut pair = stage.pair(&setup)?;
    let audits = |pair: &bench::pair::Pair, ok: bool| {
        let events = pair.primary.events();
        events
            .iter()
            .filter(|e| e["event"] == "audit" && e["ok"] == ok)
            .count()
    };
    wait_until("a first clean audit", PATIENCE, || {
        Ok(audits(&pair, true) > 0)
    })?;
    ensure!(
        audits(&pair, false) == 0,
        "an audit failed before anything was done"
    );

    let ram = ram_file(&pair.guest)?;
    let ram = OpenOptions::new()
        .write(true)
        .open(&ram)
        .context("opening the RAM file")?;
    ram.write_all_at(&[0x5a], WHERE)?;
    pair.primary.wait_event("tainted", PATIENCE)?;
    let mended = pair.primary.wait_event("untainted", PATIENCE)?;
    let mended = mended["epoch"].as_u64().context("no epoch")?;
    let is_clean = |e: &serde_json::Value| {
        e["event"] == "audit" && e["epoch"].as_u64().is_some_and(|epoch| epoch > mended)
    };
    let next = pair
        .primary
        .wait_for("an audit after that", PATIENCE, is_clean)?;
    ensure!(next["ok"] == true, "not mended: {next}");
    pair.kill_host()?;
    check_survivor(&mut pair)?;
    Ok(())
}

/// Ten thousand connections while the backup protects: random bytes, and the beginning of real
/// conversations, whole or with some bytes changed. The lanes of one link that are replayed whole
/// make one conversation, which is refused as one.
fn garbage_does_not_disturb(stage: &Stage) -> Result<()> {
    const CONNECTIONS: u64 = 10_000;
    /// What the backup's daemon may grow by: the allocator's leftovers.
    const GROWTH_MAX_KIB: u64 = 16 << 10;
    let mut setup = stage.boot_sector()?;
    setup.watch = Watch::Tick;
    let mut pair = stage.pair(&setup)?;
    wait_epochs(&mut pair.primary, 20)?;
    let heard = eavesdrop(stage, &setup)?;
    let lanes = heard.len() as u64;
    let mut draw = Draw(stage.dir().as_os_str().len() as u64 + 1);
    let mut throw = |pair: &bench::pair::Pair, count: u64| -> Result<()> {
        for n in 0..count {
            let mut bytes = if n % 3 == 0 {
                (0..=draw.below(511))
                    .map(|_| draw.number().to_le_bytes()[0])
                    .collect()
            } else {
                heard[draw.below(heard.len() as u64) as usize].clone()
            };
            if n % 3 == 2 && !bytes.is_empty() {
                for _ in 0..=draw.below(4) {
                    let at = draw.below(bytes.len() as u64) as usize;
                    bytes[at] = draw.number().to_le_bytes()[0];
                }
            }
            let mut stream = TcpStream::connect(&pair.peer).context("connecting with garbage")?;
            // The other side may have closed already.
            let _ = stream.write_all(&bytes);
        }
        Ok(())
    };
    throw(&pair, CONNECTIONS / 10)?;
    wait_epochs(&mut pair.primary, 20)?;
    let before = anonymous_kib(&pair.backup.process)?;
    throw(&pair, CONNECTIONS - CONNECTIONS / 10)?;
    wait_epochs(&mut pair.primary, 20)?;
    let after = anonymous_kib(&pair.backup.process)?;
    ensure!(
        after < before + GROWTH_MAX_KIB,
        "the backup grew from {before} to {after} KiB"
    );

    ensure!(
        pair.primary.numbers("backup_lost", "time_us").is_empty(),
        "protection was lost"
    );
    // A summary comes ten seconds after the first of its refusals.
    let refused = || pair.backup.numbers("refused", "count").iter().sum::<u64>();
    let all = wait_until("all were refused by name", PATIENCE, || {
        Ok(refused() + lanes >= CONNECTIONS)
    });
    all.with_context(|| format!("{} of {CONNECTIONS} were", refused()))?;
    let lines = pair.backup.numbers("refused", "count").len();
    ensure!(
        lines < 1000,
        "{lines} lines in the log for {CONNECTIONS} connections"
    );
    pair.kill_host()?;
    check_survivor(&mut pair)?;
    Ok(())
}

/// What a real primary says first, on each connection that it makes.
fn eavesdrop(stage: &Stage, setup: &bench::pair::Setup) -> Result<Vec<Vec<u8>>> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
    let peer = listener.local_addr()?.to_string();
    let folder = stage.dir().join("eavesdrop");
    std::fs::create_dir(&folder)?;
    let guest = setup.guest.start(&folder, "guest", false)?;
    bench::qmp::Qmp::connect(&folder.join("guest.test"))?;
    let primary = stage.new_primary("talker", setup, &peer, &folder.join("guest.qmp"))?;
    let mut heard = Vec::new();
    listener.set_nonblocking(true)?;
    wait_until("a primary speaks", PATIENCE, || {
        let Ok((mut stream, _)) = listener.accept() else {
            return Ok(false);
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut bytes = vec![0; 64 << 10];
        if let Ok(count) = stream.read(&mut bytes)
            && count > 0
        {
            bytes.truncate(count);
            heard.push(bytes);
        }
        Ok(heard.len() >= 3)
    })?;
    drop((primary, guest));
    Ok(heard)
}

/// A daemon's own memory: without the guest's RAM and the slots, which are shared.
fn anonymous_kib(process: &Process) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid()))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let text = line.context("no RssAnon")?.trim().trim_end_matches(" kB");
    Ok(text.parse()?)
}
