//! Every decoder of what QEMU says, against bytes that began as valid ones.
//!
//! A target runs for `CURLING_FUZZ_SECONDS` (1) from a seed that it prints; a failure prints the
//! one line that repeats it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant, SystemTime};

use qemu_bridge::blocks::parse_listing;
use qemu_bridge::device_state::sections;
use qemu_bridge::qmp::{CodecError, Decoder, Message};
use qemu_bridge::shape::parse_network;
use qemu_bridge::spawn::{Purpose, cut_off, find_collisions, parse_options};

const SESSION: &str = concat!(
    r#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7},"package":"x"},"capabilities":["oob"]}}"#,
    "\r\n",
    r#"{"return":{},"id":1}"#,
    "\r\n",
    r#"{"timestamp":{"seconds":1796000000,"microseconds":-1},"event":"STOP","data":{"a":[1,2.5e3,null]}}"#,
    "\r\n",
    r#"{"id":2,"error":{"class":"GenericError","desc":"n\u00e4in \"\\"}}"#,
    "\r\n\r\n",
    r#"{"return":[{"name":"x","type":"child<VGA>"},true],"id":18446744073709551615}"#,
    "\n",
);

const BLOCKS: &str = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n\
                          pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f8f4e600000  rw\n\
            /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000 0x00007f8f4e600000  ro\n\
                         pc.bios    4 KiB  0x0000000004000000 0x0000000000040000 0x0000000000040000\n";

const NETWORK: &str = "lone: index=0,type=user,net=10.0.2.0,restrict=off\r\n\
    e1000e.0: index=0,type=nic,model=e1000e,macaddr=52:54:00:12:34:56\r\n \
    \\ #net076: index=0,type=user,net=10.0.2.0,restrict=off\r\n";

const LINE: &str = "qemu -m 64,slots=2 -nic user,hostfwd=tcp:127.0.0.1:0-:22 -machine pc,memory-backend=r \
    -object memory-backend-file,id=r,mem-path=/nonexistent/a,,b -serial mon:telnet:[::1]:0,server \
    -chardev file,id=c,path=/nonexistent/x -vnc :99999 -device {\"driver\":\"VGA\",\"id\":7}";

#[test]
fn qmp() {
    fuzz("qmp", |dice| {
        let bytes = dice.change(SESSION.as_bytes());
        let whole = decode(&bytes, usize::MAX);
        let step = 1 + dice.below(40);
        assert_eq!(decode(&bytes, step), whole, "in pieces of {step}");
        whole.1.is_none()
    });
}

/// All messages up to the first error, and the error.
fn decode(bytes: &[u8], step: usize) -> (Vec<Message>, Option<CodecError>) {
    let mut decoder = Decoder::default();
    let mut messages = Vec::new();
    for piece in bytes.chunks(step.min(bytes.len().max(1))) {
        decoder.feed(piece);
        loop {
            match decoder.next() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}

#[test]
fn device_state() {
    let mut valid = b"QEVM\0\0\0\x03".to_vec();
    for (id, name) in [
        (1u32, "timer"),
        (2, "cpu_common"),
        (0x7e7e_7e7e, "0000:00:03.0/virtio-net"),
    ] {
        valid.push(4);
        valid.extend(id.to_be_bytes());
        valid.push(u8::try_from(name.len()).unwrap());
        valid.extend(name.as_bytes());
        valid.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        valid.extend([0x7e; 40]);
        valid.push(0x7e);
        valid.extend(id.to_be_bytes());
    }
    valid.push(0);
    assert_eq!(sections(&valid).unwrap().len(), 3);
    fuzz("device_state", |dice| {
        let bytes = dice.change(&valid);
        let found = sections(&bytes);
        if let Ok(found) = &found {
            let inside: usize = found.iter().map(|s| s.bytes).sum();
            assert_eq!(
                inside + 9,
                bytes.len(),
                "sections, header and end are all there is"
            );
        }
        found.is_ok()
    });
}

#[test]
fn block_listing() {
    fuzz("block_listing", |dice| {
        let bytes = dice.change(BLOCKS.as_bytes());
        let found = parse_listing(&String::from_utf8_lossy(&bytes));
        if let Ok(blocks) = &found {
            assert!(
                blocks
                    .iter()
                    .all(|b| !b.name.is_empty() && (1..=b.max_bytes).contains(&b.used_bytes))
            );
        }
        found.is_ok()
    });
}

#[test]
fn network_listing() {
    fuzz("network_listing", |dice| {
        let bytes = dice.change(NETWORK.as_bytes());
        !parse_network(&String::from_utf8_lossy(&bytes)).is_empty()
    });
}

#[test]
fn command_line() {
    fuzz("command_line", |dice| {
        let bytes = dice.change(LINE.as_bytes());
        let argv: Vec<String> = String::from_utf8_lossy(&bytes)
            .split(' ')
            .map(str::to_owned)
            .collect();
        let options = parse_options(&argv[1..]);
        let again: Vec<String> = options.iter().flat_map(|o| o.words()).collect();
        assert_eq!(
            parse_options(&again),
            options,
            "words and options say the same"
        );
        for option in &options {
            let keys = option.keys("first");
            let text = keys.to_text("first");
            let once_more = qemu_bridge::spawn::QemuOption::new("x", &text).keys("first");
            assert_eq!(once_more.to_text("first"), text, "{option:?}");
        }
        cut_off(&cut_off(&argv, Purpose::Ask), Purpose::Load);
        // Looks at real ports and processes, so not each time.
        if dice.below(200) == 0 {
            find_collisions(&argv);
        }
        true
    });
}

/// Runs `one` with seed after seed; it returns whether its changed input was accepted.
fn fuzz(target: &str, one: impl Fn(&mut Dice) -> bool) {
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let only: Option<u64> = variable("CURLING_FUZZ_SEED");
    let seconds = variable("CURLING_FUZZ_SECONDS").unwrap_or(1);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let first = only.unwrap_or(now.map_or(0, |since| since.as_nanos() as u64));
    let start = Instant::now();
    let (mut seed, mut accepted) = (first, 0u64);
    loop {
        match catch_unwind(AssertUnwindSafe(|| one(&mut Dice::new(seed)))) {
            Ok(was_accepted) => accepted += u64::from(was_accepted),
            Err(panic) => {
                eprintln!(
                    "repeat with: CURLING_FUZZ_SEED={seed} \
                     cargo test -p qemu-bridge --test fuzz_decoders -- --exact {target}"
                );
                resume_unwind(panic);
            }
        }
        seed = seed.wrapping_add(1);
        if only.is_some() || start.elapsed() >= Duration::from_secs(seconds) {
            break;
        }
    }
    let inputs = seed.wrapping_sub(first);
    println!("fuzz {target}: {inputs} inputs from seed {first}, {accepted} accepted");
}

/// SplitMix64: all that a seed has to decide.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).expect("below a usize")
    }

    /// A copy with up to four changes: bytes replaced, cut out, inserted or repeated.
    fn change(&mut self, valid: &[u8]) -> Vec<u8> {
        let mut bytes = valid.to_vec();
        for _ in 0..self.below(5) {
            let at = self.below(bytes.len());
            let end = (at + self.below(12)).min(bytes.len());
            match self.below(4) {
                0 if at < bytes.len() => {
                    bytes[at] = *self.pick(b"\0\n\r {}[]\",:=-0x9\xff~\x04\x7e")
                }
                1 => drop(bytes.drain(at..end)),
                2 => {
                    let piece = bytes[at..end].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, piece);
                }
                _ => bytes.insert(at, self.next() as u8),
            }
        }
        bytes
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}
