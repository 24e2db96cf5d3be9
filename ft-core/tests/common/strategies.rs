//! Valid frames and messages, of every kind and size.

use ft_core::limits::{
    BLOCK_PAGES_MAX, BLOCKS_MAX, GRANTS_PER_MESSAGE_MAX, STRING_BYTES_MAX, VM_ID_BYTES_MAX,
};
use ft_core::shape::{BlockShape, VmShape};
use ft_core::wire::{Farewell, Frame, GrantBatch, Hello, Message, RefusalCode, Role};
use ft_core::{Epoch, EpochKind, GrantToken, PAGE_BYTES, RunState, Session, Term, VmTag};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

pub(crate) fn frame() -> impl Strategy<Value = Frame> {
    any::<[u64; 4]>().prop_map(|[vm, session, term, epoch]| Frame {
        vm: VmTag(vm),
        session: Session(session),
        term: Term(term),
        epoch: Epoch(epoch),
    })
}

pub(crate) fn epoch_kind() -> impl Strategy<Value = EpochKind> {
    prop::sample::select(vec![
        EpochKind::SyncRound,
        EpochKind::Delta,
        EpochKind::Full,
    ])
}

pub(crate) fn run_state() -> impl Strategy<Value = RunState> {
    prop::sample::select(vec![RunState::Running, RunState::Stopped])
}

pub(crate) fn message() -> impl Strategy<Value = Message> {
    let token = any::<[u8; 24]>().prop_map(GrantToken);
    prop_oneof![
        4 => hello().prop_map(Message::Hello),
        1 => (refusal_code(), text()).prop_map(|(code, text)| Message::Refused { code, text }),
        1 => vec(token, 0..=GRANTS_PER_MESSAGE_MAX)
            .prop_map(|grants| Message::Grant(GrantBatch { grants })),
        1 => vec(any::<u16>(), 0..=BLOCKS_MAX)
            .prop_map(|mismatched_blocks| Message::AuditResult { mismatched_blocks }),
        1 => any::<u64>().prop_map(|sent_us| Message::Heartbeat { sent_us }),
        1 => any::<u64>().prop_map(|sent_us| Message::HeartbeatReply { sent_us }),
        1 => (epoch_kind(), text()).prop_map(|(kind, text)| Message::Resync { kind, text }),
        1 => text().prop_map(|text| Message::QemuDied { text }),
        1 => (farewell(), run_state())
            .prop_map(|(why, run_state)| Message::Farewell { why, run_state }),
        1 => (any::<bool>(), text()).prop_map(|(ok, text)| Message::Rehearsed { ok, text }),
        1 => prop::sample::select(vec![
            Message::Ack,
            Message::Switchover,
            Message::Activated,
            Message::FarewellAck,
            Message::Rehearse,
        ]),
    ]
}

pub(crate) fn hello() -> impl Strategy<Value = Hello> {
    let identity = (
        role(),
        any::<(u16, u16)>(),
        any::<u64>(),
        string(VM_ID_BYTES_MAX),
        any::<u32>(),
    );
    let position = (
        any::<u64>(),
        any::<bool>(),
        any::<u64>(),
        any::<u64>(),
        shape(),
    );
    (identity, position).prop_map(|(identity, position)| {
        let (role, versions, features, vm_id, attempt) = identity;
        let (last_epoch, activated, heartbeat_us, lease_us, shape) = position;
        Hello {
            role,
            versions,
            features,
            vm_id,
            attempt,
            last_epoch: Epoch(last_epoch),
            activated,
            heartbeat_us,
            lease_us,
            shape,
        }
    })
}

fn shape() -> impl Strategy<Value = VmShape> {
    let block = (0..=BLOCK_PAGES_MAX * PAGE_BYTES as u64, any::<bool>());
    (
        btree_map(string(40), string(80), 0..60),
        btree_map(string(40), block, 0..40),
    )
        .prop_map(|(properties, blocks)| VmShape {
            properties: properties.into_iter().collect(),
            blocks: blocks
                .into_iter()
                .map(|(name, (bytes, read_only))| BlockShape {
                    name,
                    bytes,
                    read_only,
                })
                .collect(),
        })
}

fn role() -> impl Strategy<Value = Role> {
    prop::sample::select(vec![Role::Primary, Role::Backup])
}

fn refusal_code() -> impl Strategy<Value = RefusalCode> {
    prop::sample::select(vec![
        RefusalCode::Version,
        RefusalCode::Features,
        RefusalCode::OtherVm,
        RefusalCode::Shape,
        RefusalCode::Busy,
        RefusalCode::Role,
        RefusalCode::Replay,
        RefusalCode::Malformed,
        RefusalCode::Other,
    ])
}

fn farewell() -> impl Strategy<Value = Farewell> {
    prop::sample::select(vec![
        Farewell::Detach,
        Farewell::PoweredOff,
        Farewell::StandDown,
    ])
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![3 => string(60), 1 => string(STRING_BYTES_MAX)]
}

/// Letters of one to four bytes, `max_bytes` at most.
fn string(max_bytes: usize) -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..=max_bytes / 4).prop_map(|letters| letters.into_iter().collect())
}
