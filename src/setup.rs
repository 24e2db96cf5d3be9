//! From settings to a running loop: QEMU, its RAM, a tracker, the machine.

use std::fs::File;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ft_core::backup::{Backup, BackupConfig, CheckWhen};
use ft_core::limits::CHUNK_BYTES;
use ft_core::primary::{Primary, PrimaryConfig, PrimaryVm};
use ft_core::wire::{Frame, Hello, PROTOCOL_VERSION, Role as PeerRole, features};
use ft_core::{Epoch, Session, VmShape, VmTag};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use qemu_bridge::blocks::{RamBlock, ram_blocks};
use qemu_bridge::device_state::StateSink;
use qemu_bridge::gate::{FilterGate, Gate, GateError, NoGate, Output, PlugGate, outputs};
use qemu_bridge::guest_ram::GuestRam;
use qemu_bridge::qmp::{Command, Qmp};
use qemu_bridge::refusals::{Allowances, Refusal, refusals};
use qemu_bridge::shape::{ShapeWatch, parse_network, query_shape};
use qemu_bridge::spawn::{QemuProcess, RamSource, Role, find_collisions};
use qemu_bridge::standby::prepare_standby;
use qemu_bridge::standby_ram::StandbyRam;
use qemu_bridge::tracker::{self, Tracker, self_test};
use transport::choice::{TransportError, check_choice};
use transport::{Arena, TransportConfig, TransportListener};

use crate::cli::GateName;
use crate::config::{Mode, QemuSource, Settings};
use crate::control::ControlServer;
use crate::doctor;
use crate::driver::backup::{self, BackupWorker, Standby};
use crate::driver::clock;
use crate::driver::primary::{self, PrimaryWorker, Qemu, Workshop};
use crate::driver::report::Facts;
use crate::driver::worker::{JOBS, Worker};
use crate::events::{Attached, Events};
use crate::exit::{self, Exit};
use crate::guard::Guard;
use crate::nursery::{ANSWER_PATIENCE, Born, Nursery};
use crate::signals::Signals;
use crate::state_store::StateStore;

/// Chunks that a live round may have filled and not pushed.
const SYNC_CHUNKS: u32 = 16;
/// Fewer dirty pages are copied while QEMU saves its devices.
const PRECOPY_PAGES_MIN: u64 = 256;
/// Chunks beside those of one epoch: windows, and what a merge may leave.
const SPARE_CHUNKS: usize = 64;

/// A QEMU that is about to be protected, or to be a standby.
struct Subject {
    process: QemuProcess,
    qmp: Qmp,
    blocks: Vec<RamBlock>,
    shape: VmShape,
    watch: ShapeWatch,
}

impl Subject {
    fn look(process: QemuProcess, mut qmp: Qmp) -> anyhow::Result<Subject> {
        // Watching first: nothing can then change unseen between the two.
        let watch = ShapeWatch::begin(&mut qmp, process.pid(), ANSWER_PATIENCE)?;
        let blocks = ram_blocks(&mut qmp, process.pid(), ANSWER_PATIENCE)?;
        let shape = query_shape(&mut qmp, &blocks, ANSWER_PATIENCE)?;
        Ok(Subject {
            process,
            qmp,
            blocks,
            shape,
            watch,
        })
    }
}

/// Where a daemon speaks. Opened before a QEMU is started or touched: what can't be opened then leaves
/// nothing behind.
struct Outlets {
    events: Events,
    control: ControlServer,
}

impl Outlets {
    fn open(settings: &Settings, mode: &'static str) -> anyhow::Result<Outlets> {
        Ok(Outlets {
            events: Events::open(settings.events.as_deref(), mode)?,
            control: ControlServer::bind(&settings.control)?,
        })
    }
}

/// Protects a guest until something ends that.
///
/// # Errors
/// What is missing, and what to do: QEMU, a privilege, a device that can't be protected.
pub(crate) fn run_primary(settings: &Settings) -> anyhow::Result<Exit> {
    let Mode::Primary { peer } = settings.mode else {
        bail!("not a primary's settings")
    };
    check_choice(peer, &transport(settings)).map_err(no_link)?;
    let signals = Signals::block()?;
    let store = StateStore::open(&settings.state_dir, &settings.vm_id, "primary")?;
    let open_outlets = || Outlets::open(settings, "primary");
    let (outlets, nursery, born) = match &settings.source {
        QemuSource::Attach { qmp, .. } => (open_outlets()?, None, attach(qmp)?),
        QemuSource::Spawn { argv } => {
            let mut nursery = Nursery::new(argv.clone())?;
            refuse_all(&find_collisions(argv))?;
            if settings.dry_run {
                return show(&mut nursery, Role::Primary, settings);
            }
            refuse_second_copy(&store, settings)?;
            let outlets = open_outlets()?;
            let born = nursery.bear(Role::Primary)?;
            (outlets, Some(nursery), born)
        }
    };
    let pid = Pid::from_raw(born.process.pid());
    let spawned = nursery.is_some();
    let parts = prepare_primary(settings, peer, signals, store, outlets, nursery, born);
    if spawned && parts.is_err() {
        // It was started to be protected; nobody would know of it. Nobody has waited for it, so
        // the number is still its own.
        let _ = kill(pid, Signal::SIGKILL);
    }
    primary::run(parts?)
}

/// From a QEMU to everything that the loop needs.
fn prepare_primary(
    settings: &Settings,
    peer: SocketAddr,
    signals: Signals,
    store: StateStore,
    outlets: Outlets,
    nursery: Option<Nursery>,
    born: Born,
) -> anyhow::Result<primary::Parts> {
    let Outlets {
        mut events,
        control,
    } = outlets;
    let Subject {
        process,
        mut qmp,
        blocks,
        shape,
        watch,
    } = Subject::look(born.process, born.qmp)?;
    refuse(&mut qmp, settings)?;
    let hello = check_hello(&settings.vm_id, &shape, settings)?;

    let running = is_running(&mut qmp)?;
    let ram = GuestRam::open(process.pid(), &blocks)?;
    let (tracker, said, scan) = prove_tracker(settings, &ram, &mut qmp, running)?;
    tracing::info!("{said}");
    let tracker_name = tracker.name().to_owned();
    if tracker.arms_live() && watch.direct_io() {
        tracing::info!(
            "no pages are copied before a pause: data may come into the guest's RAM past the page cache \
             (a disk with cache.direct=on, or a file of QEMU on another file system than ext4, XFS, \
             Btrfs, tmpfs, NFS)"
        );
    }
    let precopy_pages_min = tracker.arms_live().then_some(PRECOPY_PAGES_MIN);
    let guard = Guard::start(process.pidfd())?;
    let session = Session(random_number()?);
    // First what may be refused: then nothing of ours is in QEMU yet.
    let (mut gate, gate_name) = install_gate(settings, &mut qmp, process.pid())?;
    let arena = arena_for(&shape);
    let (deltas, cache_bytes) = (settings.deltas, settings.delta_cache_bytes);
    let worker = |state| PrimaryWorker::new(ram, tracker, arena, state, deltas, cache_bytes);
    let installed = install_sink(&mut qmp, |state| Workshop::start(worker(state), scan));
    let (sink, workshop) = match installed {
        Ok(installed) => installed,
        Err(error) => {
            let rest = gate.remove();
            undo(&mut qmp, rest);
            return Err(error);
        }
    };
    // What the guest does in a moment that is forgotten would stay on a disk that isn't replicated.
    let release_needs_guest = gate.releases_by_qemu() && !settings.allow_unreplicated_disks;
    // Without a gate that tells of waiting output, every epoch is the longest that may be.
    let epoch_idle = match gate.waiting_fd() {
        Some(_) => settings.epoch_idle,
        None => settings.epoch,
    };

    events.attached(&Attached {
        qemu_pid: process.pid(),
        qemu_version: version_of(&shape),
        accel: accel_of(&shape),
        ram_bytes: shape.ram_bytes(),
        tracker: tracker_name,
        gate: Some(gate_name),
        expected_pause_us: Some(
            u64::try_from(expected_pause(scan).as_micros()).unwrap_or(u64::MAX),
        ),
    });
    let term = store.load().term;
    let vm = vm_tag(&settings.vm_id);
    let config = PrimaryConfig {
        vm_id: hello.vm_id,
        vm,
        session,
        term,
        epoch_interval: settings.epoch,
        epoch_min: settings.epoch_min,
        epoch_idle,
        heartbeat: settings.heartbeat,
        lease: settings.lease,
        on_backup_loss: settings.on_backup_loss,
        max_unacked: settings.max_unacked,
        audit_every: settings.audit_every,
        sync_chunks: SYNC_CHUNKS,
        precopy_pages_min,
        release_needs_guest,
    };
    let machine = Primary::new(config, PrimaryVm { shape, running }, clock::now());
    Ok(primary::Parts {
        machine,
        frame: Frame {
            vm,
            session,
            term,
            epoch: Epoch::NONE,
        },
        qemu: Qemu::new(qmp, process, sink, watch, gate),
        workshop,
        peer,
        transport: transport(settings),
        busy_poll: settings.busy_poll.unwrap_or_default(),
        events,
        facts: Facts::new(settings.vm_id.clone()),
        control,
        signals,
        store,
        guard,
        nursery,
    })
}

/// Hands QEMU the memory for its devices' state, and starts `work` on that.
///
/// # Errors
/// QEMU refuses, or `work` can't be started. Nothing is left in QEMU.
fn install_sink<W>(
    qmp: &mut Qmp,
    work: impl FnOnce(File) -> anyhow::Result<W>,
) -> anyhow::Result<(StateSink, W)> {
    let sink = StateSink::install(qmp, ANSWER_PATIENCE)?;
    let set_action = |action| Command::new("set-action").arg("shutdown", action);
    // A guest that powers off must not take QEMU with it before the backup knows.
    let stays = qmp.call(set_action("pause"), ANSWER_PATIENCE);
    let begun = stays
        .context("telling QEMU to stay when the guest powers off")
        .and_then(|_| {
            let state = sink.memory().try_clone_to_owned();
            work(state.context("copying a descriptor")?.into())
        });
    match begun {
        Ok(work) => Ok((sink, work)),
        Err(error) => {
            undo(qmp, vec![sink.remove_command(), set_action("poweroff")]);
            Err(error)
        }
    }
}

/// For a QEMU that was running before us, and runs on.
fn undo(qmp: &mut Qmp, commands: Vec<Command>) {
    for command in commands {
        let name = command.name().to_owned();
        if let Err(error) = qmp.call(command, ANSWER_PATIENCE) {
            tracing::warn!("leaving QEMU as it was: {name} failed: {error}");
        }
    }
}

/// Waits for a primary, and takes over when it dies.
///
/// # Errors
/// As [`run_primary`].
pub(crate) fn run_backup(settings: &Settings) -> anyhow::Result<Exit> {
    let Mode::Backup { listen } = settings.mode else {
        bail!("not a backup's settings")
    };
    let signals = Signals::block()?;
    let store = StateStore::open(&settings.state_dir, &settings.vm_id, "backup")?;
    let listener = TransportListener::bind(listen, &transport(settings))
        .map_err(no_link)
        .with_context(|| format!("listening on {listen}"))?;
    let open_outlets = || Outlets::open(settings, "backup");
    let (outlets, mut nursery, mut born) = match &settings.source {
        QemuSource::Attach { qmp, .. } => (open_outlets()?, None, attach(qmp)?),
        QemuSource::Spawn { argv } => {
            let mut nursery = Nursery::new(argv.clone())?;
            refuse_all(&find_collisions(argv))?;
            if settings.dry_run {
                return show(&mut nursery, Role::Backup, settings);
            }
            let outlets = open_outlets()?;
            let born = nursery.bear(Role::Backup)?;
            (outlets, Some(nursery), born)
        }
    };
    let Outlets {
        mut events,
        control,
    } = outlets;
    prepare_standby(&mut born.qmp, ANSWER_PATIENCE)?;
    let subject = Subject::look(born.process, born.qmp)?;
    let Subject {
        process,
        qmp,
        blocks,
        shape,
        ..
    } = subject;
    let nursery = match nursery.take() {
        Some(mut nursery) => {
            nursery.keep_main_ram(&blocks)?;
            nursery
        }
        None => Nursery::of_process(process.pid(), &blocks)?,
    };
    let ram = StandbyRam::open(process.pid(), &blocks)?;
    events.attached(&Attached {
        qemu_pid: process.pid(),
        qemu_version: version_of(&shape),
        accel: accel_of(&shape),
        ram_bytes: shape.ram_bytes(),
        tracker: "none".to_owned(),
        expected_pause_us: None,
        gate: None,
    });
    let arena = arena_for(&shape);
    let mut guard = Guard::start(process.pidfd())?;
    // Until it is active a standby is worth nothing without its daemon.
    guard.set(true)?;
    let worker = BackupWorker::new(ram);
    // While an epoch is applied, chunks of the next one may come, as many as there are, to be checked.
    let jobs = arena.stats().limit_chunks + JOBS;
    let worker = Worker::start("apply", jobs, move |desk| worker.run(&desk))?;
    let nursery = Worker::start("nursery", JOBS, move |desk| nursery.run(&desk))?;
    let config = BackupConfig {
        vm_id: settings.vm_id.clone(),
        vm: vm_tag(&settings.vm_id),
        term: store.load().term,
        shape,
        check: CheckWhen::OnArrival,
    };
    let machine = Backup::new(config, clock::now());
    backup::run(backup::Parts {
        machine,
        listener,
        arena,
        standby: Standby::new(qmp, process),
        nursery,
        worker,
        events,
        facts: Facts::new(settings.vm_id.clone()),
        control,
        signals,
        store,
        guard,
        busy_poll: settings.busy_poll.unwrap_or_default(),
    })
}

/// Everything in the running VM that can't be protected, by name.
fn refuse(qmp: &mut Qmp, settings: &Settings) -> anyhow::Result<()> {
    let allowed = Allowances {
        unreplicated_disks: settings.allow_unreplicated_disks,
    };
    let mut found = refusals(qmp, allowed, ANSWER_PATIENCE)?;
    if matches!(settings.mode, Mode::Primary { .. }) && settings.gate != GateName::Off {
        let ways_out = outputs(qmp, ANSWER_PATIENCE)?;
        for output in &ways_out {
            tracing::info!("a way out that no gate holds: {output}");
        }
        let far = |output: &Output| output.leaves_host && !settings.allow_ungated;
        found.extend(ways_out.into_iter().filter(far).map(|output| Refusal {
            name: output.name,
            why: format!(
                "the guest reaches other machines by it ({}), and what it says there can't be held \
                 until the backup has it",
                output.what
            ),
            cure: "bind it to loopback or a Unix socket, or take the risk with --allow-ungated".to_owned(),
        }));
    }
    refuse_all(&found)
}

/// Holds the output of every NIC.
fn install_gate(
    settings: &Settings,
    qmp: &mut Qmp,
    pid: i32,
) -> anyhow::Result<(Box<dyn Gate>, String)> {
    if settings.gate == GateName::Off {
        return Ok((Box::new(NoGate), "off".to_owned()));
    }
    let mut nics = parse_network(&qmp.human("info network", ANSWER_PATIENCE)?);
    // A netdev that no NIC uses has nothing of the guest's to send.
    nics.retain(|nic| !nic.model.is_empty());
    let netdevs: Vec<_> = nics
        .iter()
        .flat_map(|nic| nic.netdevs.iter().map(|netdev| netdev.id.clone()))
        .collect();
    if netdevs.is_empty() {
        return Ok((
            Box::new(NoGate),
            "not needed, the VM has no network".to_owned(),
        ));
    }
    let no_filter = match settings.gate {
        GateName::Plug => None,
        _ => match FilterGate::install(qmp, &netdevs, ANSWER_PATIENCE) {
            Ok(gate) => {
                let name = gate.name();
                return Ok((Box::new(gate), name));
            }
            Err(error @ GateError::Unsupported { .. }) => Some(error.to_string()),
            Err(error) => return Err(error.into()),
        },
    };
    let no_plug = match settings.gate {
        GateName::Filter => None,
        _ => match PlugGate::install(&nics, pid) {
            Ok(gate) => {
                let name = gate.name();
                return Ok((Box::new(gate), name));
            }
            Err(error @ GateError::NoPlug { .. }) => Some(anyhow::Error::new(error)),
            Err(error) => return Err(error.into()),
        },
    };
    match (no_filter, no_plug) {
        // It may be had: the VM and this kernel could do it.
        (no_filter, Some(error)) if Exit::of_error(&error) == Exit::Privilege => {
            Err(match no_filter {
                Some(why) => error.context(why),
                None => error,
            })
        }
        (no_filter, no_plug) => {
            let no_plug = no_plug.map(|error| format!("{error:#}"));
            let reasons: Vec<_> = no_filter.into_iter().chain(no_plug).collect();
            Err(exit::Refusal(reasons.join("; ")).into())
        }
    }
}

fn refuse_all(found: &[Refusal]) -> anyhow::Result<()> {
    let line = |r: &Refusal| format!("\n  {}: {}; {}", r.name, r.why, r.cure);
    if found.is_empty() {
        return Ok(());
    }
    let found = found.iter().map(line).collect::<String>();
    Err(exit::Refusal(format!("this VM can't be protected as it is:{found}")).into())
}

fn attach(socket: &std::path::Path) -> anyhow::Result<Born> {
    let mut qmp = Qmp::connect(socket, ANSWER_PATIENCE)?;
    let process = QemuProcess::attach(&mut qmp, socket, ANSWER_PATIENCE)?;
    Ok(Born { process, qmp })
}

/// A host that died while its guest was protected must not start a second copy of it.
fn refuse_second_copy(store: &StateStore, settings: &Settings) -> anyhow::Result<()> {
    if !store.load().protected {
        return Ok(());
    }
    let text = format!(
        "the VM {} was protected when its daemon on this host ended, or its backup had taken over: so the \
         backup may run it now, look there (curling-rdma status --mode backup). If it runs nowhere, \
         remove {} and start again",
        settings.vm_id,
        store.path().display()
    );
    Err(exit::Refusal(text).into())
}

/// `--dry-run`: the command line, why it is as it is, and whether its VM could be protected.
fn show(nursery: &mut Nursery, role: Role, settings: &Settings) -> anyhow::Result<Exit> {
    let prepared = nursery.prepare(role, RamSource::Fresh)?;
    println!("{}", prepared.shell_line());
    for line in prepared.explanation() {
        println!("# {line}");
    }
    // The devices are QEMU's to know: one is started that runs nothing, and asked.
    let Born { process, mut qmp } = nursery.trial().context("trying the command line")?;
    let found = refuse(&mut qmp, settings);
    let blocks = ram_blocks(&mut qmp, process.pid(), ANSWER_PATIENCE);
    // A device that is refused may crash QEMU when it is saved.
    let devices = found.is_ok().then(|| doctor::examine(&mut qmp));
    process.kill()?;
    found?;
    blocks?;
    if let Some(devices) = devices {
        print!("{}", devices.context("saving the devices")?);
    }
    println!("# nothing in this VM stands in the way");
    Ok(Exit::Clean)
}

/// A tracker that has proven itself, what to say about it, and how long it takes to scan this RAM.
fn prove_tracker(
    settings: &Settings,
    ram: &GuestRam,
    qmp: &mut Qmp,
    running: bool,
) -> anyhow::Result<(Box<dyn Tracker>, String, Duration)> {
    let (mut tracker, said) = tracker::choose(settings.tracker, ram)?;
    if running && let Err(error) = qmp.call(Command::new("stop"), ANSWER_PATIENCE) {
        // It may be carried out all the same, when QEMU comes to it.
        undo(qmp, vec![Command::new("cont")]);
        return Err(error).context(
            "trying a tracker: QEMU may stop the guest when it answers again; look, and say cont",
        );
    }
    let tested = self_test(tracker.as_mut(), ram);
    let began = Instant::now();
    let mut nothing = ft_core::DirtySet::new(&ram.pages_per_block());
    let collected = tracker.collect(ram, &mut nothing);
    let scan = began.elapsed();
    if running {
        qmp.call(Command::new("cont"), ANSWER_PATIENCE)?;
    }
    tested?;
    collected?;
    // The STOP and RESUME of this were our own.
    qmp.progress(&mut |_| {})?;
    let said = format!(
        "{said}; a scan of this RAM takes {:.2} ms",
        scan.as_secs_f64() * 1e3
    );
    Ok((tracker, said, scan))
}

/// Of an idle epoch: the save takes QEMU about a millisecond, the scan overlaps it, and stopping
/// and resuming take another.
fn expected_pause(scan: Duration) -> Duration {
    scan.max(Duration::from_millis(1)) + Duration::from_millis(1)
}

fn is_running(qmp: &mut Qmp) -> anyhow::Result<bool> {
    let status = qmp.call(Command::new("query-status"), ANSWER_PATIENCE)?;
    match status["status"].as_str() {
        Some("running") => Ok(true),
        Some("paused" | "prelaunch" | "debug" | "suspended") => Ok(false),
        other => {
            let state = other.unwrap_or("in an unknown state");
            let text =
                format!("the guest is {state}: only a running or paused one can be protected");
            Err(exit::Refusal(text).into())
        }
    }
}

/// What is demanded and can't be had is refused.
fn no_link(error: TransportError) -> anyhow::Error {
    match error {
        TransportError::NoRdma(_) => {
            exit::Refusal(format!("{error}; or leave it: --transport tcp")).into()
        }
        error => error.into(),
    }
}

fn transport(settings: &Settings) -> TransportConfig {
    #[cfg_attr(not(feature = "rdma"), allow(unused_mut, reason = "it is for RDMA"))]
    let mut config = TransportConfig {
        choice: settings.transport,
        ..TransportConfig::default()
    };
    #[cfg(feature = "rdma")]
    if let Some(busy_poll) = settings.busy_poll {
        config.rdma.busy_poll = busy_poll;
    }
    config
}

/// The hello of this VM must fit into a message.
fn check_hello(vm_id: &str, shape: &VmShape, settings: &Settings) -> anyhow::Result<Hello> {
    let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    let hello = Hello {
        role: PeerRole::Primary,
        versions: (PROTOCOL_VERSION, PROTOCOL_VERSION),
        features: features::SUPPORTED,
        vm_id: vm_id.to_owned(),
        attempt: 0,
        last_epoch: Epoch::NONE,
        activated: false,
        heartbeat_us: micros(settings.heartbeat),
        lease_us: micros(settings.lease),
        shape: shape.clone(),
    };
    match hello.check() {
        Ok(()) => Ok(hello),
        Err(error) => {
            let text = format!("this VM can't be described to a peer: {error}");
            Err(exit::Refusal(text).into())
        }
    }
}

fn arena_for(shape: &VmShape) -> Arena {
    // An epoch can be as large as all of RAM, each page in an entry of its own at worst.
    let chunks = shape.ram_bytes() as usize / CHUNK_BYTES * 17 / 16;
    Arena::new(2 * chunks + SPARE_CHUNKS)
}

fn vm_tag(vm_id: &str) -> VmTag {
    // FNV-1a: it only has to differ between the VMs of one site, and the hello names it in full.
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    VmTag(vm_id.bytes().fold(0xcbf2_9ce4_8422_2325, hash))
}

fn random_number() -> anyhow::Result<u64> {
    let bytes = crate::random::bytes().context("drawing a random number")?;
    let (first, _) = bytes.split_at(8);
    Ok(u64::from_le_bytes(first.try_into().expect("eight bytes")))
}

fn property(shape: &VmShape, name: &str) -> String {
    let found = shape.properties.iter().find(|(key, _)| key == name);
    found.map_or_else(|| "unknown".to_owned(), |(_, value)| value.clone())
}

fn version_of(shape: &VmShape) -> String {
    property(shape, "qemu-version")
}

/// The shape says whether it is KVM: the two differ in the device state. Else it is emulation.
fn accel_of(shape: &VmShape) -> String {
    let is_kvm = property(shape, "accelerator") == "kvm";
    if is_kvm { "kvm" } else { "tcg" }.to_owned()
}
