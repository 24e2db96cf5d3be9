//! The conformance suite on the link inside one process.

use crate::conformance::{Cut, Network};
use transport::mem::{self, MemLink};
use transport::{Lane, LossKind};

struct InProcess;

impl Network for InProcess {
    type Link = MemLink;

    fn pair() -> (MemLink, MemLink) {
        mem::pair().expect("eventfds and a socket pair")
    }

    fn cut(link: &mut MemLink, _: &mut MemLink, lane: Lane, how: Cut) {
        let kind = match how {
            Cut::Fin => LossKind::Fin,
            Cut::Reset => LossKind::Error("cut by the test".to_owned()),
        };
        link.cut(lane, kind);
    }
}

crate::conformance::conformance!(InProcess);

#[test]
fn an_end_can_live_in_another_thread() {
    use crate::conformance::{End, drive_one};

    let (a, b) = InProcess::pair();
    let echo = std::thread::spawn(move || {
        let mut b = End::new(b);
        for _ in 0..1000 {
            drive_one(&mut b, |b| !b.seen.is_empty());
            for message in b.take_messages() {
                b.send(&message);
            }
        }
    });
    let mut a = End::new(a);
    for round in 0..1000u32 {
        a.send(&round.to_le_bytes());
        drive_one(&mut a, |a| a.take_messages() == [round.to_le_bytes()]);
    }
    echo.join().expect("the echo ends");
}
