//! The tests.

use std::os::fd::AsFd;

use transport::link::{LinkError, MESSAGE_BYTES_MAX};
use transport::{Arena, Grant, Lane, Link, LossKind};

use super::{
    Cut, End, Network, Seen, WHOLE, arena, drive, drive_one, filled, is_error, pattern, settle,
    small,
};

fn pair<N: Network>() -> (End<N::Link>, End<N::Link>) {
    let (a, b) = N::pair();
    (End::new(a), End::new(b))
}

fn grant<L: Link>(end: &mut End<L>, arena: &Arena, slot: u8) -> Grant {
    let chunk = arena.alloc().expect("the arena is large enough");
    end.link.grant(chunk, slot).expect("grant")
}

pub(crate) fn messages_arrive_whole_and_in_order<N: Network>() {
    let (mut a, mut b) = pair::<N>();
    let lengths = [0, 1, 3, 4, 64, 1000, 4096, 40_000, MESSAGE_BYTES_MAX];
    for round in 0..20 {
        for length in lengths {
            let message = pattern(length, round);
            // The queue is bounded: let it drain when it is full.
            while let Err(error) = a.link.send(&message) {
                assert!(matches!(error, LinkError::ControlQueueFull { .. }));
                a.flush();
                let before = b.seen.len();
                drive(&mut a, &mut b, |_, b| b.seen.len() > before);
            }
            a.flush();
        }
    }
    let expected = 20 * lengths.len();
    drive(&mut a, &mut b, |_, b| b.seen.len() == expected);
    let messages = b.take_messages();
    for (index, message) in messages.iter().enumerate() {
        let (round, length) = (index / lengths.len(), lengths[index % lengths.len()]);
        assert_eq!(message, &pattern(length, round as u32));
    }
}

pub(crate) fn message_length_and_queue_are_bounded<N: Network>() {
    let (mut a, mut b) = pair::<N>();
    let long = vec![0; MESSAGE_BYTES_MAX + 1];
    assert!(matches!(
        a.link.send(&long),
        Err(LinkError::MessageTooLong { bytes }) if bytes == long.len()
    ));
    // Nobody reads at the other end: sooner or later the queue is full, and stays bounded.
    let message = vec![7; MESSAGE_BYTES_MAX];
    let mut accepted = 0;
    let refused = loop {
        match a.link.send(&message) {
            Ok(()) => accepted += 1,
            Err(error) => break error,
        }
        a.flush();
        a.progress();
        assert!(accepted < 10_000, "the queue has no bound");
    };
    assert!(matches!(refused, LinkError::ControlQueueFull { .. }));
    drive(&mut a, &mut b, |_, b| b.seen.len() == accepted);
    assert!(b.take_messages().iter().all(|it| *it == message));
    a.send(b"again");
    drive(&mut a, &mut b, |_, b| b.take_messages() == [b"again"]);
}

pub(crate) fn chunks_of_every_size_arrive_with_their_bytes<N: Network>() {
    let (mut a, mut b) = pair::<N>();
    let arena = arena();
    let sizes = [1, 64, 65, 4095, 4096, 65_536, 300_001, WHOLE - 1, WHOLE];
    for (tag, bytes) in sizes.into_iter().enumerate() {
        let tag = tag as u32;
        let to = grant(&mut b, &arena, 0);
        a.push(filled(&arena, bytes, tag), to, tag);
        N::tell_grants(&mut a, &mut b);
        a.flush();
        drive(&mut a, &mut b, |a, b| {
            !a.seen.is_empty() && !b.seen.is_empty()
        });
        let arrived = b.take_arrived();
        assert_eq!(arrived.len(), 1, "{:?} {:?}", a.seen, b.seen);
        assert_eq!(arrived[0].1, tag);
        assert_eq!(arrived[0].0.bytes(), pattern(bytes, tag), "{bytes} bytes");
        let pushed = a.take_pushed();
        assert_eq!(pushed.len(), 1);
        assert_eq!(pushed[0].bytes(), pattern(bytes, tag));
    }
}

pub(crate) fn grants_can_be_used_out_of_order<N: Network>() {
    let (mut a, mut b) = pair::<N>();
    let arena = arena();
    let mut grants: Vec<_> = (0..16).map(|_| grant(&mut b, &arena, 0)).collect();
    grants.reverse();
    grants.swap(3, 9);
    for (tag, to) in grants.into_iter().enumerate() {
        a.push(filled(&arena, 5000, tag as u32), to, tag as u32);
    }
    N::tell_grants(&mut a, &mut b);
    a.flush();
    drive(&mut a, &mut b, |a, b| {
        a.seen.len() == 16 && b.seen.len() == 16
    });
    for (chunk, tag) in b.take_arrived() {
        assert_eq!(chunk.bytes(), pattern(5000, tag));
    }
}

pub(crate) fn many_chunks_and_messages_at_once<N: Network>() {
    const CHUNKS: u32 = 200;
    let (mut a, mut b) = pair::<N>();
    let (arena_a, arena_b) = (Arena::new(32), Arena::new(32));
    let size = |tag: u32| 1 + (tag as usize * 7919 * 31) % WHOLE;
    let mut grants = Vec::new();
    let (mut pushed, mut arrived, mut messages) = (0, 0, 0);
    while arrived < CHUNKS {
        while let Some(chunk) = arena_b.alloc() {
            grants.push(b.link.grant(chunk, (arrived % 2) as u8).expect("grant"));
        }
        while pushed < CHUNKS
            && !grants.is_empty()
            && let Some(mut chunk) = arena_a.alloc()
        {
            let bytes = size(pushed);
            chunk.as_mut_slice()[..bytes].copy_from_slice(&pattern(bytes, pushed));
            let to = grants.pop().expect("there is one");
            a.push(chunk.freeze(bytes), to, pushed);
            a.link.send(&pushed.to_le_bytes()).expect("send");
            b.link.send(&pushed.to_le_bytes()).expect("send");
            pushed += 1;
        }
        N::tell_grants(&mut a, &mut b);
        a.flush();
        b.flush();
        drive(&mut a, &mut b, |_, b| {
            b.count(|seen| matches!(seen, Seen::Arrived { .. })) > 0
        });
        for (chunk, tag) in b.take_arrived() {
            assert_eq!(chunk.bytes(), pattern(size(tag), tag));
            arrived += 1;
        }
        a.take_pushed();
        for message in b.take_messages() {
            assert_eq!(message, u32::to_le_bytes(messages));
            messages += 1;
        }
    }
    drive(&mut a, &mut b, |a, _| {
        a.count(|seen| matches!(seen, Seen::Message(_))) == CHUNKS as usize
    });
    settle(&mut a, &mut b);
    assert_eq!(messages + b.take_messages().len() as u32, CHUNKS);
}

pub(crate) fn messages_are_not_delayed_by_chunks<N: Network>() {
    let (mut a, mut b) = pair::<N>();
    let arena = arena();
    for tag in 0..100 {
        let to = grant(&mut b, &arena, 0);
        a.push(filled(&arena, WHOLE, tag), to, tag);
    }
    N::tell_grants(&mut a, &mut b);
    a.flush();
    a.send(b"heartbeat");
    drive(&mut a, &mut b, |_, b| {
        b.count(|seen| matches!(seen, Seen::Message(_))) == 1
    });
    let before = b.count(|seen| matches!(seen, Seen::Arrived { .. }));
    assert!(before < 100, "the message came after all {before} chunks");
    drive(&mut a, &mut b, |_, b| {
        b.count(|seen| matches!(seen, Seen::Arrived { .. })) == 100
    });
}

pub(crate) fn a_foreign_grant_is_refused<N: Network>() {
    let (mut a, mut b) = pair::<N>();
    let (_c, mut d) = pair::<N>();
    let arena = arena();
    let foreign = grant(&mut d, &arena, 0);
    let garbage = Grant([0xa5; 24]);
    for grant in [foreign, garbage, Grant([0; 24])] {
        let refused = a.link.push(small(&arena, 1), grant, 0);
        assert!(matches!(refused, Err(LinkError::BadGrant)), "{refused:?}");
    }
    let good = grant(&mut b, &arena, 0);
    a.push(small(&arena, 2), good, 5);
    N::tell_grants(&mut a, &mut b);
    a.flush();
    drive(&mut a, &mut b, |_, b| {
        b.take_arrived()
            .iter()
            .any(|(chunk, tag)| *tag == 5 && chunk.bytes() == pattern(64, 2))
    });
}

pub(crate) fn a_grant_that_is_used_twice_ends_the_lane<N: Network>() {
    let (mut a, mut b) = pair::<N>();
    let arena = arena();
    let to = grant(&mut b, &arena, 0);
    a.push(small(&arena, 1), to, 1);
    a.push(small(&arena, 2), to, 2);
    N::tell_grants(&mut a, &mut b);
    a.flush();
    drive(&mut a, &mut b, |_, b| {
        b.count(|seen| matches!(seen, Seen::Lost(_))) == 1
    });
    let arrived = b.take_arrived();
    assert_eq!(arrived.len(), 1);
    assert_eq!(arrived[0].0.bytes(), pattern(64, 1));
    let loss = b.take_losses().remove(0);
    assert_eq!(loss.lane, Lane::Bulk);
    assert!(matches!(loss.kind, LossKind::Protocol(_)), "{loss:?}");
    // The other lanes go on.
    a.send(b"still here");
    drive(&mut a, &mut b, |_, b| {
        b.take_messages() == [b"still here".to_vec()]
    });
}

pub(crate) fn pushes_wait_for_a_slow_receiver<N: Network>() {
    let (mut a, mut b) = pair::<N>();
    let arena = arena();
    for tag in 0..64 {
        let to = grant(&mut b, &arena, 0);
        a.push(filled(&arena, WHOLE, tag), to, tag);
    }
    N::tell_grants(&mut a, &mut b);
    a.flush();
    // Only the sender runs: it must stop by itself, blocked by nothing.
    while a.is_ready() {
        a.progress();
    }
    assert!(b.seen.is_empty());
    drive(&mut a, &mut b, |a, b| {
        a.seen.len() == 64 && b.seen.len() == 64
    });
    for (chunk, tag) in b.take_arrived() {
        assert_eq!(chunk.bytes(), pattern(WHOLE, tag));
    }
}

pub(crate) fn revoked_chunks_come_back_and_late_writes_are_dropped<N: Network>() {
    let (mut a, mut b) = pair::<N>();
    let arena = arena();
    let revoked: Vec<_> = (0..4).map(|_| grant(&mut b, &arena, 0)).collect();
    let kept = grant(&mut b, &arena, 1);
    b.link.revoke(0).expect("revoke");
    drive_one(&mut b, |b| b.seen.len() == 4);
    let mut back = b.take_revoked();
    assert_eq!(back.len(), 4);
    for chunk in &mut back {
        chunk.as_mut_slice().fill(0x11);
    }
    // The same chunks are granted anew: a write for the old grant must not end up in one.
    let again = b
        .link
        .grant(back.pop().expect("there are four"), 2)
        .expect("grant");
    for (tag, to) in revoked.into_iter().enumerate() {
        a.push(filled(&arena, 100_000, 1), to, tag as u32);
    }
    a.push(small(&arena, 2), kept, 7);
    a.push(small(&arena, 3), again, 8);
    N::tell_grants(&mut a, &mut b);
    a.flush();
    drive(&mut a, &mut b, |a, b| {
        a.seen.len() == 6 && b.seen.len() == 2
    });
    let arrived = b.take_arrived();
    let tags: Vec<_> = arrived.iter().map(|(_, tag)| *tag).collect();
    assert_eq!(tags, [7, 8]);
    assert_eq!(arrived[0].0.bytes(), pattern(64, 2));
    assert_eq!(arrived[1].0.bytes(), pattern(64, 3));
    for chunk in &back {
        assert!(chunk.as_slice().iter().all(|&byte| byte == 0x11));
    }
    let (chunk, _) = arrived.into_iter().next_back().expect("there are two");
    assert!(chunk.thaw().as_slice()[64..].iter().all(|&it| it == 0x11));
}

pub(crate) fn revoking_in_mid_chunk_takes_the_chunk_back<N: Network>() {
    // Where in the chunk the revocation hits is up to the kernel: try several times.
    for round in 0..12 {
        let (mut a, mut b) = pair::<N>();
        let arena = arena();
        let count = 16;
        for tag in 0..count {
            let to = grant(&mut b, &arena, (tag % 2) as u8);
            a.push(filled(&arena, WHOLE, tag), to, tag);
        }
        N::tell_grants(&mut a, &mut b);
        a.flush();
        for _ in 0..=round {
            if b.is_ready() {
                b.progress();
            }
            if a.is_ready() {
                a.progress();
            }
        }
        b.link.revoke(0).expect("revoke");
        let odd = (count / 2) as usize;
        let is_even = |seen: &Seen| match seen {
            Seen::Arrived { tag, .. } => tag % 2 == 0,
            Seen::Revoked(_) => true,
            _ => false,
        };
        drive(&mut a, &mut b, |a, b| {
            a.seen.len() == count as usize && b.count(is_even) == odd && b.seen.len() == 2 * odd
        });
        let mut revoked = b.take_revoked();
        for chunk in &mut revoked {
            chunk.as_mut_slice().fill(0x22);
        }
        settle(&mut a, &mut b);
        for chunk in &revoked {
            assert!(
                chunk.as_slice().iter().all(|&byte| byte == 0x22),
                "a revoked chunk was written"
            );
        }
        for (chunk, tag) in b.take_arrived() {
            assert_eq!(chunk.bytes(), pattern(WHOLE, tag));
        }
        // The lane is still in step.
        let to = grant(&mut b, &arena, 0);
        a.push(small(&arena, 99), to, 99);
        N::tell_grants(&mut a, &mut b);
        a.flush();
        drive(&mut a, &mut b, |_, b| {
            b.take_arrived()
                .iter()
                .any(|(chunk, tag)| *tag == 99 && chunk.bytes() == pattern(64, 99))
        });
    }
}

pub(crate) fn each_lane_ends_alone_and_says_how<N: Network>() {
    for lane in [Lane::Control, Lane::Bulk, Lane::Proof] {
        for how in [Cut::Fin, Cut::Reset] {
            let (mut a, mut b) = pair::<N>();
            N::cut(&mut a.link, &mut b.link, lane, how);
            drive_one(&mut a, |a| !a.seen.is_empty());
            let losses = a.take_losses();
            assert_eq!(losses.len(), 1, "{lane:?} {how:?}");
            assert_eq!(losses[0].lane, lane);
            match how {
                Cut::Fin => assert_eq!(losses[0].kind, LossKind::Fin, "{lane:?}"),
                Cut::Reset => assert!(is_error(&losses[0]), "{lane:?}: {:?}", losses[0]),
            }
            // A lost lane stays usable as a word without effect, and is reported once.
            a.send(b"anybody there?");
            a.progress();
            assert!(a.take_losses().iter().all(|loss| loss.lane != lane));
        }
    }
}

pub(crate) fn a_lost_bulk_lane_gives_chunks_back<N: Network>() {
    let (mut a, mut b) = pair::<N>();
    let (arena_a, arena_b) = (Arena::new(32), Arena::new(36));
    let grants: Vec<_> = (0..32).map(|_| grant(&mut b, &arena_b, 3)).collect();
    for _ in 0..4 {
        grant(&mut a, &arena_b, 0);
    }
    for (tag, to) in grants.into_iter().enumerate() {
        a.push(filled(&arena_a, WHOLE, 1), to, tag as u32);
    }
    N::tell_grants(&mut a, &mut b);
    a.flush();
    N::cut(&mut a.link, &mut b.link, Lane::Bulk, Cut::Reset);
    drive_one(&mut a, |a| {
        a.count(|seen| matches!(seen, Seen::Pushed(_))) == 32
    });
    assert_eq!(a.take_losses().len(), 1);
    drop(a.take_pushed());
    assert_eq!(arena_a.stats().free_chunks, 32);
    a.link.revoke(0).expect("revoke");
    drive_one(&mut a, |a| a.take_revoked().len() == 4);
}

pub(crate) fn the_proof_lane_ends_with_its_last_copy<N: Network>() {
    let (mut a, b) = pair::<N>();
    let copy = b
        .link
        .proof_fd()
        .expect("this link has a proof lane")
        .as_fd()
        .try_clone_to_owned()
        .expect("dup");
    drop(b);
    drive_one(&mut a, |a| {
        a.count(|seen| matches!(seen, Seen::Lost(_))) == 2
    });
    let lanes: Vec<_> = a.take_losses().iter().map(|loss| loss.lane).collect();
    assert!(!lanes.contains(&Lane::Proof), "{lanes:?}");
    std::thread::sleep(std::time::Duration::from_millis(50));
    a.progress();
    assert!(a.seen.is_empty(), "the proof lane has another copy");
    drop(copy);
    drive_one(&mut a, |a| !a.seen.is_empty());
    let loss = a.take_losses().remove(0);
    assert_eq!((loss.lane, loss.kind), (Lane::Proof, LossKind::Fin));
}

pub(crate) fn dropping_a_busy_link_returns_every_chunk<N: Network>() {
    for drop_receiver_first in [false, true] {
        let (mut a, mut b) = pair::<N>();
        let (arena_a, arena_b) = (Arena::new(40), Arena::new(40));
        for tag in 0..40 {
            let to = grant(&mut b, &arena_b, 0);
            a.push(filled(&arena_a, WHOLE, tag), to, tag);
        }
        N::tell_grants(&mut a, &mut b);
        a.flush();
        a.send(&[1; 1000]);
        for _ in 0..3 {
            a.progress();
            b.progress();
        }
        if drop_receiver_first {
            drop(b);
            drop(a);
        } else {
            drop(a);
            drop(b);
        }
        assert_eq!(arena_a.stats().free_chunks, 40);
        assert_eq!(arena_b.stats().free_chunks, 40);
    }
}

pub(crate) fn an_idle_link_is_not_ready<N: Network>() {
    let (mut a, mut b) = pair::<N>();
    settle(&mut a, &mut b);
    assert!(!a.is_ready() && !b.is_ready());
    a.send(b"x");
    drive(&mut a, &mut b, |_, b| !b.seen.is_empty());
    settle(&mut a, &mut b);
    assert!(!a.is_ready() && !b.is_ready());
}
