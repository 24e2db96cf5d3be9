//! The conformance suite on RDMA, and what is different there: a write that comes too late ends
//! the lane.

use crate::conformance::{
    Cut, End, Network, Seen, WHOLE, arena, drive, drive_one, filled, is_error, pattern, settle,
    small,
};
use crate::rdma_pair::address;
use transport::rdma::RdmaLink;
use transport::{Arena, Grant, Lane, Link, LossKind};

struct Rdma;

impl Network for Rdma {
    type Link = RdmaLink;

    fn pair() -> (RdmaLink, RdmaLink) {
        crate::rdma_pair::pair()
    }

    fn cut(link: &mut RdmaLink, peer: &mut RdmaLink, lane: Lane, how: Cut) {
        if (lane, how) == (Lane::Bulk, Cut::Reset) {
            // As the end of the device does.
            link.fail_bulk().expect("ibv_modify_qp");
        } else {
            crate::tcp_pair::cut(peer.tcp(), lane, how == Cut::Reset);
        }
    }

    fn tell_grants(a: &mut End<RdmaLink>, b: &mut End<RdmaLink>) {
        const GRANTS: &[u8] = b"some grants";
        b.send(GRANTS);
        let told = |seen| match seen {
            Seen::Message(bytes) if bytes == GRANTS => Ok(()),
            other => Err(other),
        };
        drive(a, b, |a, _| !a.take(told).is_empty());
    }
}

macro_rules! suite {
    ($($test:ident),* $(,)?) => {
        $(
            #[test]
            fn $test() {
                if address().is_some() {
                    crate::conformance::suite::$test::<Rdma>();
                }
            }
        )*
    };
}

// Without those that late writes be dropped, or told from the first one: see below.
suite!(
    messages_arrive_whole_and_in_order,
    message_length_and_queue_are_bounded,
    chunks_of_every_size_arrive_with_their_bytes,
    grants_can_be_used_out_of_order,
    many_chunks_and_messages_at_once,
    messages_are_not_delayed_by_chunks,
    a_foreign_grant_is_refused,
    pushes_wait_for_a_slow_receiver,
    each_lane_ends_alone_and_says_how,
    a_lost_bulk_lane_gives_chunks_back,
    the_proof_lane_ends_with_its_last_copy,
    dropping_a_busy_link_returns_every_chunk,
    an_idle_link_is_not_ready,
);

fn pair() -> Option<(End<RdmaLink>, End<RdmaLink>)> {
    address()?;
    let (a, b) = crate::rdma_pair::pair();
    Some((End::new(a), End::new(b)))
}

fn grant(end: &mut End<RdmaLink>, arena: &Arena, slot: u8) -> Grant {
    let chunk = arena.alloc().expect("the arena is large enough");
    end.link.grant(chunk, slot).expect("grant")
}

/// The other lanes go on without the bulk lane.
fn still_talking(a: &mut End<RdmaLink>, b: &mut End<RdmaLink>) {
    a.send(b"still here");
    drive(a, b, |_, b| b.take_messages() == [b"still here".to_vec()]);
}

fn loses_bulk(end: &mut End<RdmaLink>) -> LossKind {
    let mut losses = end.take_losses();
    assert_eq!(losses.len(), 1);
    assert_eq!(losses[0].lane, Lane::Bulk);
    losses.remove(0).kind
}

fn has_lost(end: &End<RdmaLink>) -> bool {
    end.count(|seen| matches!(seen, Seen::Lost(_))) > 0
}

#[test]
fn an_old_key_gets_a_remote_access_error() {
    let Some((mut a, mut b)) = pair() else { return };
    let arena = arena();
    let revoked = grant(&mut b, &arena, 0);
    b.link.revoke(0).expect("revoke");
    drive_one(&mut b, |b| b.seen.len() == 1);
    let mut back = b.take_revoked();
    back[0].as_mut_slice().fill(0x11);
    a.push(filled(&arena, 100_000, 1), revoked, 1);
    a.flush();
    drive(&mut a, &mut b, |a, b| has_lost(a) && has_lost(b));
    let LossKind::Error(text) = loses_bulk(&mut a) else {
        panic!("not an error");
    };
    assert!(text.contains("remote access error"), "{text}");
    assert_eq!(a.take_pushed().len(), 1);
    assert!(!matches!(loses_bulk(&mut b), LossKind::Protocol(_)));
    assert!(back[0].as_slice().iter().all(|&byte| byte == 0x11));
    assert!(b.take_arrived().is_empty());
    still_talking(&mut a, &mut b);
}

#[test]
fn what_has_arrived_can_not_be_written_again() {
    let Some((mut a, mut b)) = pair() else { return };
    let arena = arena();
    let to = grant(&mut b, &arena, 0);
    Rdma::tell_grants(&mut a, &mut b);
    a.push(filled(&arena, WHOLE, 1), to, 1);
    a.flush();
    drive(&mut a, &mut b, |a, b| a.seen.len() + b.seen.len() == 2);
    let arrived = b.take_arrived();
    a.take_pushed();
    a.push(filled(&arena, WHOLE, 2), to, 2);
    a.flush();
    drive(&mut a, &mut b, |a, _| has_lost(a));
    let LossKind::Error(text) = loses_bulk(&mut a) else {
        panic!("not an error");
    };
    assert!(text.contains("remote access error"), "{text}");
    settle(&mut a, &mut b);
    assert_eq!(arrived[0].0.bytes(), pattern(WHOLE, 1));
    assert!(b.take_arrived().is_empty());
}

#[test]
fn a_chunk_that_was_revoked_is_granted_anew_under_another_key() {
    let Some((mut a, mut b)) = pair() else { return };
    let arena = arena();
    let mut chunk = arena.alloc().expect("one chunk");
    // More often than a window has keys.
    for round in 0..300 {
        let to = b.link.grant(chunk, 0).expect("grant");
        if round % 3 == 0 {
            b.link.revoke(0).expect("revoke");
            drive_one(&mut b, |b| b.seen.len() == 1);
            chunk = b.take_revoked().remove(0);
        } else {
            // The message carries the grant: it is held until the window is bound.
            b.send(b"granted");
            drive(&mut a, &mut b, |a, _| a.seen.len() == 1);
            a.take_messages();
            a.push(small(&arena, round), to, round);
            a.flush();
            drive(&mut a, &mut b, |a, b| a.seen.len() + b.seen.len() == 2);
            a.take_pushed();
            let (arrived, tag) = b.take_arrived().remove(0);
            assert_eq!((arrived.bytes(), tag), (&pattern(64, round)[..], round));
            chunk = arrived.thaw();
        }
    }
}

#[test]
fn revoking_in_mid_chunk_stores_nothing_and_returns_every_chunk() {
    for round in 0..6 {
        let Some((mut a, mut b)) = pair() else { return };
        let (arena_a, arena_b) = (Arena::new(16), Arena::new(16));
        for tag in 0..16 {
            let to = grant(&mut b, &arena_b, (tag % 2) as u8);
            a.push(filled(&arena_a, WHOLE, tag), to, tag);
        }
        Rdma::tell_grants(&mut a, &mut b);
        a.flush();
        for _ in 0..round {
            b.progress();
            a.progress();
        }
        b.link.revoke(0).expect("revoke");
        drive(&mut a, &mut b, |a, b| {
            let pushed = a.count(|seen| matches!(seen, Seen::Pushed(_))) == 16;
            let back = |seen: &Seen| match seen {
                Seen::Arrived { tag, .. } => tag % 2 == 0,
                Seen::Revoked(_) => true,
                _ => false,
            };
            pushed && b.count(back) == 8
        });
        let mut revoked = b.take_revoked();
        for chunk in &mut revoked {
            chunk.as_mut_slice().fill(0x22);
        }
        settle(&mut a, &mut b);
        for chunk in &revoked {
            assert!(chunk.as_slice().iter().all(|&byte| byte == 0x22));
        }
        for (chunk, tag) in b.take_arrived() {
            assert_eq!(chunk.bytes(), pattern(WHOLE, tag));
        }
        if has_lost(&a) {
            println!("round {round}: {:?}", a.take_losses());
        }
        drop((a, b, revoked));
        assert_eq!(arena_a.stats().free_chunks, 16);
        assert_eq!(arena_b.stats().free_chunks, 16);
    }
}

#[test]
fn a_grant_that_is_used_twice_ends_the_lane() {
    let Some((mut a, mut b)) = pair() else { return };
    let arena = arena();
    let to = grant(&mut b, &arena, 0);
    Rdma::tell_grants(&mut a, &mut b);
    a.push(small(&arena, 1), to, 1);
    a.push(small(&arena, 2), to, 2);
    a.flush();
    drive(&mut a, &mut b, |a, b| has_lost(a) && has_lost(b));
    let arrived = b.take_arrived();
    assert_eq!(arrived.len(), 1);
    assert_eq!(arrived[0].0.bytes(), pattern(64, 1));
    loses_bulk(&mut b);
    still_talking(&mut a, &mut b);
}

#[test]
fn a_failed_queue_pair_takes_no_more_writes() {
    let Some((mut a, mut b)) = pair() else { return };
    let arena = arena();
    let to = grant(&mut b, &arena, 0);
    Rdma::tell_grants(&mut a, &mut b);
    b.link.fail_bulk().expect("ibv_modify_qp");
    a.push(filled(&arena, WHOLE, 1), to, 1);
    a.flush();
    drive(&mut a, &mut b, |a, b| has_lost(a) && has_lost(b));
    assert!(b.take_losses().iter().all(is_error));
    assert_eq!(a.take_pushed().len(), 1);
    b.link.revoke(0).expect("revoke");
    drive_one(&mut b, |b| !b.seen.is_empty());
    let chunk = b.take_revoked().remove(0);
    assert!(chunk.as_slice().iter().all(|&byte| byte == 0));
}
