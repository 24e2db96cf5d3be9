//! Each machine against a peer that says anything in any order, with a driver that answers as it
//! must, at any time: no panic, nothing that grows.
//!
//! A target runs for `CURLING_FUZZ_SECONDS` (1) from a seed that it prints; a failure prints the
//! one line that repeats it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant, SystemTime};

use crate::dice::Dice;
use crate::rig::{BackupRig, Image, Pair, PrimaryRig, backup_config, primary_config};
use ft_core::backup::{self, LinkId};
use ft_core::primary::{self, Command, QemuEvent};
use ft_core::wire::{
    self, ChunkTag, Farewell, Frame, GrantBatch, Hello, Message, PROTOCOL_VERSION, RefusalCode,
    Role,
};
use ft_core::{Epoch, EpochKind, GrantToken, Micros, RunState, Session, Term, VmShape, VmTag};

/// Inputs of one run.
const STEPS: u64 = 400;
/// Chunks of an epoch of a VM without RAM, twice, and a window of live ones.
const CHUNKS_MAX: usize = 2 * 128 + 48;
const GRANTS_MAX: usize = 96;
/// Jobs and replies that a driver may have under way.
const ANSWERS_MAX: usize = 400;

#[test]
fn backup() {
    fuzz("backup", |dice| {
        // Half of the runs begin where everything is well.
        let (mut rig, mut now, mut links) = if dice.chance(2) {
            let pair = Pair::protected();
            (pair.backup, pair.now, pair.link.into())
        } else {
            (BackupRig::new(backup_config()), Micros(0), 0u64)
        };
        let begun = rig.machine.status().last_flipped;
        let mut deep = false;
        for _ in 0..STEPS {
            let link = LinkId(u32::try_from(dice.below(links + 1)).expect("few links"));
            match dice.below(16) {
                0 => {
                    links += 1;
                    let link = LinkId(u32::try_from(links).expect("few links"));
                    rig.machine.handle(now, backup::Input::LinkUp(link));
                }
                1 => {
                    let down = match dice.chance(3) {
                        true => backup::LinkDown::PeerDead,
                        false => backup::LinkDown::Broken("reset".to_owned()),
                    };
                    rig.machine.handle(now, backup::Input::LinkDown(link, down));
                }
                2..=5 => {
                    let term = rig.machine.status().term;
                    let bytes =
                        a_message(dice, Role::Primary, term, rig.machine.status().last_flipped);
                    rig.machine
                        .handle(now, backup::Input::Message(link, &bytes));
                }
                6..=9 => {
                    let tokens: Vec<[u8; 24]> = rig.granted.keys().copied().collect();
                    if !tokens.is_empty() {
                        let to = GrantToken(*dice.pick(&tokens));
                        let next = rig.machine.status().last_flipped.next();
                        let odd = *dice.pick(&[Epoch::NONE, Epoch(next.0 + 1)]);
                        let epoch = if dice.chance(8) { odd } else { next };
                        let index = u32::try_from(dice.below(3)).expect("small");
                        let tag = ChunkTag::new(epoch, index, dice.chance(2));
                        rig.arrive(now, to, tag, an_image(dice, Epoch(next.0 - 1)));
                    }
                }
                10 => now = pass(dice, now),
                11 => {
                    let command = backup::Input::Command(backup::Command::Rehearse);
                    rig.machine.handle(now, command);
                }
                _ => {
                    for _ in 0..dice.below(4) {
                        if let Some(answer) = rig.answers.pop_front() {
                            rig.machine.handle(now, answer);
                            rig.drain();
                        }
                    }
                }
            }
            if rig.machine.poll_timeout().is_some_and(|at| at <= now) {
                rig.machine.handle_timeout(now);
            }
            rig.drain();
            deep |= rig.machine.status().last_flipped > begun;
            rig.done.clear();
            rig.sent.clear();
            assert!(
                rig.images.len() <= CHUNKS_MAX,
                "{} chunks are held",
                rig.images.len()
            );
            assert!(
                rig.granted.len() <= GRANTS_MAX,
                "{} grants are out",
                rig.granted.len()
            );
            assert!(
                rig.answers.len() <= ANSWERS_MAX,
                "{} jobs wait",
                rig.answers.len()
            );
        }
        deep
    });
}

#[test]
fn primary() {
    fuzz("primary", |dice| {
        let (mut rig, mut now) = if dice.chance(2) {
            let pair = Pair::protected();
            (pair.primary, pair.now)
        } else {
            (PrimaryRig::new(primary_config(), Micros(0)), Micros(0))
        };
        let begun = rig.machine.status().last_acknowledged;
        rig.done.clear();
        let mut connecting = false;
        let mut deep = false;
        for _ in 0..STEPS {
            rig.drain();
            for action in rig.done.drain(..) {
                match action {
                    primary::Action::Connect => connecting = true,
                    primary::Action::CloseLink => connecting = false,
                    _ => {}
                }
            }
            deep |= rig.machine.status().last_acknowledged > begun;
            rig.sent.clear();
            rig.pushed.clear();
            assert!(
                rig.answers.len() <= ANSWERS_MAX,
                "{} commands wait",
                rig.answers.len()
            );
            match dice.below(20) {
                0..=1 if connecting => {
                    connecting = false;
                    rig.machine.handle(now, primary::Input::LinkUp);
                }
                2 => {
                    let down = match dice.chance(3) {
                        true => primary::LinkDown::PeerDead,
                        false => primary::LinkDown::Broken("reset".to_owned()),
                    };
                    connecting = false;
                    rig.machine.handle(now, primary::Input::LinkDown(down));
                }
                3..=9 => {
                    let status = rig.machine.status();
                    let epoch = status.last_acknowledged;
                    let bytes = a_message(dice, Role::Backup, status.term, epoch);
                    rig.machine.handle(now, primary::Input::Message(&bytes));
                }
                10 => now = pass(dice, now),
                11 if dice.chance(10) => {
                    let commands = [Command::Continue, Command::Rehearse, Command::Switchover];
                    let command = *dice.pick(&commands);
                    rig.machine.handle(now, primary::Input::Command(command));
                }
                12 if dice.chance(4) => {
                    rig.vm_runs = !rig.vm_runs;
                    let event = match rig.vm_runs {
                        true => QemuEvent::Resumed,
                        false => QemuEvent::Stopped,
                    };
                    // It comes behind what QEMU has said before.
                    rig.answers.push_back(primary::Input::Qemu(event));
                }
                _ => {
                    if let Some(answer) = rig.answers.pop_front() {
                        rig.machine.handle(now, answer);
                    }
                }
            }
            if rig.machine.poll_timeout().is_some_and(|at| at <= now) {
                rig.machine.handle_timeout(now);
            }
        }
        deep
    });
}

fn pass(dice: &mut Dice, now: Micros) -> Micros {
    let longest = *dice.pick(&[1_000, 50_000, 3_000_000]);
    now + Duration::from_micros(dice.below(longest))
}

fn an_image(dice: &mut Dice, base: Epoch) -> Image {
    let kinds = [
        EpochKind::Delta,
        EpochKind::Delta,
        EpochKind::Full,
        EpochKind::SyncRound,
    ];
    Image {
        kind: *dice.pick(&kinds),
        base: if dice.chance(8) {
            Epoch(base.0 + 1)
        } else {
            base
        },
        run_state: *dice.pick(&[RunState::Running, RunState::Stopped]),
    }
}

/// A message that is nearly right, or not at all.
fn a_message(dice: &mut Dice, role: Role, term: Term, epoch: Epoch) -> Vec<u8> {
    if !dice.chance(8) {
        return an_honest_message(dice, role, term, epoch);
    }
    let near = [epoch, epoch.next(), Epoch::NONE, Epoch(epoch.0 + 2)];
    let frame = Frame {
        vm: VmTag(if dice.chance(20) { 2 } else { 1 }),
        session: Session(if dice.chance(20) { 8 } else { 7 }),
        term: Term(if dice.chance(40) {
            term.0 + dice.below(3)
        } else {
            term.0
        }),
        epoch: *dice.pick(&near),
    };
    let text = "any text".to_owned();
    let message = match dice.below(18) {
        0..=2 => Message::Hello(Hello {
            role: if dice.chance(20) { Role::Primary } else { role },
            versions: (PROTOCOL_VERSION, PROTOCOL_VERSION),
            features: 0,
            vm_id: "vm".to_owned(),
            attempt: u32::try_from(dice.below(200)).expect("small"),
            last_epoch: *dice.pick(&near),
            activated: dice.chance(20),
            heartbeat_us: dice.below(100_000),
            lease_us: *dice.pick(&[0, 400_000, 400_000, u64::MAX]),
            shape: VmShape::default(),
        }),
        3 if dice.chance(8) => Message::Refused {
            code: RefusalCode::Busy,
            text,
        },
        4..=6 => Message::Grant(GrantBatch {
            grants: vec![GrantToken([1; 24]); usize::try_from(dice.below(100)).expect("small")],
        }),
        7..=8 => Message::Ack,
        9 => Message::Heartbeat {
            sent_us: dice.next(),
        },
        10 => Message::HeartbeatReply {
            sent_us: dice.next(),
        },
        11 => Message::AuditResult {
            mismatched_blocks: vec![0; usize::from(dice.chance(2))],
        },
        12 => Message::Resync {
            kind: EpochKind::Full,
            text,
        },
        13 if dice.chance(4) => Message::QemuDied { text },
        14 if dice.chance(4) => Message::Switchover,
        14 => Message::Rehearse,
        15 if dice.chance(4) => Message::Farewell {
            why: *dice.pick(&[Farewell::Detach, Farewell::StandDown]),
            run_state: RunState::Running,
        },
        15 => Message::FarewellAck,
        16 => Message::Rehearsed {
            ok: dice.chance(2),
            text,
        },
        _ => Message::Heartbeat { sent_us: 1 },
    };
    let mut bytes = wire::encode(frame, &message);
    if dice.chance(30) {
        let place = usize::try_from(dice.below(bytes.len() as u64)).expect("small");
        bytes[place] ^= 1;
    }
    bytes
}

/// A message as the real peer sends it, though perhaps not now.
fn an_honest_message(dice: &mut Dice, role: Role, term: Term, last: Epoch) -> Vec<u8> {
    let hello = Message::Hello(Hello {
        role,
        versions: (PROTOCOL_VERSION, PROTOCOL_VERSION),
        features: 0,
        vm_id: "vm".to_owned(),
        attempt: u32::try_from(dice.below(200)).expect("small"),
        last_epoch: last,
        activated: false,
        heartbeat_us: 50_000,
        lease_us: 400_000,
        shape: VmShape::default(),
    });
    let grants = vec![GrantToken([1; 24]); 4];
    let (epoch, message) = match (role, dice.below(6)) {
        (_, 0) => (last, hello),
        (Role::Backup, 1) => (Epoch::NONE, Message::Grant(GrantBatch { grants })),
        (Role::Backup, 2..=3) => (last.next(), Message::Grant(GrantBatch { grants })),
        (Role::Backup, 4) => (last.next(), Message::Ack),
        _ => (Epoch::NONE, Message::Heartbeat { sent_us: 1 }),
    };
    let frame = Frame {
        vm: VmTag(1),
        session: Session(7),
        term,
        epoch,
    };
    wire::encode(frame, &message)
}

/// Runs `one` with seed after seed; it says whether it came as far as an epoch that counts.
fn fuzz(target: &str, one: impl Fn(&mut Dice) -> bool) {
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let only: Option<u64> = variable("CURLING_FUZZ_SEED");
    let seconds = variable("CURLING_FUZZ_SECONDS").unwrap_or(1);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let first = only.unwrap_or(now.map_or(0, |since| since.as_nanos() as u64));
    let start = Instant::now();
    let (mut seed, mut deep) = (first, 0u64);
    loop {
        let result = catch_unwind(AssertUnwindSafe(|| one(&mut Dice::new(seed))));
        deep += u64::from(*result.as_ref().unwrap_or(&false));
        if let Err(panic) = result {
            eprintln!(
                "repeat with: CURLING_FUZZ_SEED={seed} \
                 cargo test -p ft-core --test machines -- --exact fuzz::{target}"
            );
            resume_unwind(panic);
        }
        seed = seed.wrapping_add(1);
        if only.is_some() || start.elapsed() >= Duration::from_secs(seconds) {
            break;
        }
    }
    let runs = seed.wrapping_sub(first);
    println!("fuzz {target}: {runs} runs from seed {first}, {deep} of them reached an epoch");
    assert!(
        only.is_some() || deep > 0,
        "no run reached an epoch: this tests nothing"
    );
}
