//! The link's speed beside that of perftest, between the same hosts, one after the other.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cache;
use crate::lab::check::{listening, say};
use crate::lab::{Command, Ended, Host, Lab};

/// Where transport/examples/link_speed.rs listens.
const PORT: u16 = 7071;
const PERFTEST_PORT: u16 = 18515;

/// What one alternation has seen.
#[derive(Clone, Copy, Debug)]
struct Round {
    write_bw: f64,
    write_lat: f64,
    push_checked: f64,
    push_plain: f64,
    commit_p50: f64,
    commit_p99: f64,
}

/// Measures perftest and the link in turns.
///
/// # Errors
/// One of them does not run.
pub(super) fn measure(lab: &Lab, alternations: usize, mib: usize) -> Result<Value> {
    let rounds: Vec<Round> = (0..alternations)
        .map(|_| round(lab, mib))
        .collect::<Result<_>>()?;
    let median = |of: fn(&Round) -> f64| {
        let mut numbers: Vec<f64> = rounds.iter().map(of).collect();
        numbers.sort_by(f64::total_cmp);
        (numbers[numbers.len() / 2] * 1e3).round() / 1e3
    };
    let ratio = |of: fn(&Round) -> f64, target: Value| {
        let all: Vec<f64> = rounds
            .iter()
            .map(|it| (of(it) * 1e3).round() / 1e3)
            .collect();
        json!({"median": median(of), "all": all, "target": target})
    };
    Ok(json!({
        // MB are of 2^20 bytes, as perftest's are.
        "perftest": {
            "write_bw_mb_s": median(|it| it.write_bw),
            "write_lat_us": median(|it| it.write_lat),
        },
        "curling": {
            "push_mb_s": median(|it| it.push_checked),
            "push_mb_s_without_checksum": median(|it| it.push_plain),
            "chunk_commit_us": {
                "p50": median(|it| it.commit_p50),
                "p99": median(|it| it.commit_p99),
            },
        },
        "ratios": {
            "push": ratio(|it| it.push_checked / it.write_bw, json!({"at_least": 0.80})),
            "push_without_checksum":
                ratio(|it| it.push_plain / it.write_bw, json!({"at_least": 0.90})),
            "commit_to_twice_write_lat":
                ratio(|it| it.commit_p50 / (2.0 * it.write_lat), json!({"at_most": 2.5})),
        },
        "alternations": alternations,
    }))
}

fn round(lab: &Lab, mib: usize) -> Result<Round> {
    let bandwidth = format!("ib_write_bw -d rxe0 -x 1 -F -s 1048576 -n {mib}");
    let latency = "ib_write_lat -d rxe0 -x 1 -F -s 4096 -n 500";
    let write_bw = perftest(lab, &bandwidth, "1048576", 3)?;
    // The median, one way.
    let write_lat = perftest(lab, latency, "4096", 4)?;
    let program = cache::built("examples/link_speed").context(
        "cargo build --release -p transport --example link_speed, which scripts/lab test does",
    )?;
    let (program, at) = (program.display(), format!("{}:{PORT}", Host::B.address()));
    let said = pair(
        lab,
        &format!("{program} serve {at} --transport rdma"),
        PORT,
        &format!("{program} call {at} --transport rdma --mib {mib} --commits 200"),
    )?;
    let said: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
    let sentence = said["said"].as_str().unwrap_or_default();
    ensure!(sentence.starts_with("transport: RDMA"), "{sentence}");
    let number = |value: &Value| value.as_f64().with_context(|| said.to_string());
    Ok(Round {
        write_bw,
        write_lat,
        push_checked: number(&said["push_mb_s"])?,
        push_plain: number(&said["push_mb_s_without_checksum"])?,
        commit_p50: number(&said["chunk_commit_us"]["p50"])?,
        commit_p99: number(&said["chunk_commit_us"]["p99"])?,
    })
}

/// The figure at a column of the line that begins with `size`.
fn perftest(lab: &Lab, line: &str, size: &str, column: usize) -> Result<f64> {
    let call = format!("{line} {}", Host::B.address());
    let said = pair(lab, line, PERFTEST_PORT, &call)?;
    let mut lines = said
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let figures = lines.find(|words| words.first() == Some(&size));
    let figure = figures.and_then(|words| words.get(column)?.parse().ok());
    figure.with_context(|| format!("no figures: {said}"))
}

/// Runs a server on B and its client on A; gives what the client says.
fn pair(lab: &Lab, serve: &str, port: u16, call: &str) -> Result<String> {
    let server = lab.spawn(Host::B, &Command::shell(serve))?;
    listening(lab, Host::B, "ss -Hltn", &format!(":{port} "))?;
    let said = say(lab, Host::A, call)?;
    let ended = server.wait()?.ended;
    ensure!(ended == Ended::Exit(0), "{serve}: {ended:?}");
    Ok(said)
}
