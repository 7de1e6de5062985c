//! A trace that Chrome (chrome://tracing) and Perfetto (ui.perfetto.dev) show: a process for each
//! rank, a row for each thread.
//!
//! The format is that of the Trace Event Format's JSON object: complete events (`"ph":"X"`) in
//! microseconds and metadata events (`"ph":"M"`) that name the rows.

use std::time::Duration;

use qwen3_model::comm::{CommError, Communicator, CommunicatorExt as _};
use serde_json::json;

use crate::bench_profile::Recording;

/// The row of the operations as a whole; that of thread i is i + 1, and that of the collectives
/// comes last.
const OPERATIONS: usize = 0;

/// The events of this rank, separated by commas: the recordings one after the other, without what
/// lay between them.
pub fn events(rank: usize, threads: usize, recordings: &[Recording]) -> String {
    let mut events = Vec::new();
    let name = |kind: &str, row: usize, name: String| json!({"ph": "M", "name": kind, "pid": rank, "tid": row, "args": {"name": name}});
    let collectives = threads + 1;
    events.push(name("process_name", OPERATIONS, format!("rank {rank}")));
    events.push(name("thread_name", OPERATIONS, "operations".to_owned()));
    for thread in 0..threads {
        events.push(name("thread_name", thread + 1, format!("thread {thread}")));
    }
    events.push(name("thread_name", collectives, "collectives".to_owned()));
    let mut offset = Duration::ZERO;
    for recording in recordings {
        let at = |start: Duration| micros(offset + start);
        events.push(json!({
            "ph": "X", "name": recording.title(), "cat": "phase", "pid": rank, "tid": OPERATIONS,
            "ts": at(Duration::ZERO), "dur": micros(recording.length),
        }));
        for span in &recording.spans {
            let row = span.thread.map_or(OPERATIONS, |thread| thread + 1);
            let mut event = json!({
                "ph": "X", "name": span.name, "cat": "compute", "pid": rank, "tid": row,
                "ts": at(span.start), "dur": micros(span.length),
            });
            if span.work.flops > 0.0 || span.work.bytes > 0.0 {
                event["args"] = json!({"flops": span.work.flops, "bytes": span.work.bytes});
            }
            events.push(event);
        }
        for (start, call) in &recording.calls {
            events.push(json!({
                "ph": "X", "name": call.collective.name(), "cat": "collective", "pid": rank, "tid": collectives,
                "ts": at(*start), "dur": micros(call.length),
                "args": {"payload_bytes": call.payload_bytes, "waited_us": micros(call.waited)},
            }));
        }
        offset += recording.length;
    }
    events.iter().map(ToString::to_string).collect::<Vec<_>>().join(",\n")
}

/// The trace of all ranks, from the events of each.
pub fn file(ranks: &[String]) -> String {
    format!("{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{}\n]}}\n", ranks.join(",\n"))
}

/// Every rank's `text`, in rank order, on all ranks.
pub fn gather(comm: &dyn Communicator, text: &str) -> Result<Vec<String>, CommError> {
    let counts: Vec<usize> =
        comm.all_gather_one(text.len() as u64)?.iter().map(|&length| length as usize).collect();
    let mut all = vec![0_u8; counts.iter().sum()];
    comm.all_gather_v(text.as_bytes(), &counts, &mut all)?;
    let mut rest = &all[..];
    let take = |count: &usize| {
        let (text, after) = rest.split_at(*count);
        rest = after;
        String::from_utf8_lossy(text).into_owned()
    };
    Ok(counts.iter().map(take).collect())
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 * 1e-3
}

#[cfg(test)]
mod tests {
    use qwen3_model::comm::ThreadComm;
    use serde_json::Value;

    use super::*;
    use crate::bench_profile::tests::recording;

    #[test]
    fn rows_are_named_and_spans_lie_on_them() {
        let text = file(&[events(0, 2, &[recording(), recording()]), events(1, 2, &[recording()])]);
        let trace: Value = serde_json::from_str(&text).expect("the trace is JSON");
        let all = trace["traceEvents"].as_array().expect("a list of events");
        let rows = |rank: u64| {
            let names = all
                .iter()
                .filter(|e| e["ph"] == "M" && e["name"] == "thread_name" && e["pid"] == rank);
            names.map(|e| e["args"]["name"].as_str().expect("a name")).collect::<Vec<_>>()
        };
        assert_eq!(rows(0), ["operations", "thread 0", "thread 1", "collectives"]);
        assert_eq!(rows(1), rows(0));
        let on = |rank: u64, row: u64| {
            all.iter()
                .filter(|e| e["ph"] == "X" && e["pid"] == rank && e["tid"] == row)
                .collect::<Vec<_>>()
        };
        assert_eq!([0, 1, 2, 3].map(|row| on(1, row).len()), [3, 1, 1, 3]);
        // The second recording starts where the first one ends, at 100 us.
        let second = on(0, 3)[4];
        assert_eq!(
            (&second["name"], &second["ts"], &second["dur"]),
            (&"Allreduce".into(), &165.0.into(), &10.0.into())
        );
    }

    #[test]
    fn texts_of_unequal_length_are_gathered_in_rank_order() {
        let all: Vec<Vec<String>> = std::thread::scope(|scope| {
            let ranks: Vec<_> = ThreadComm::group(3)
                .into_iter()
                .map(|comm| {
                    scope.spawn(move || {
                        gather(&comm, &"ab".repeat(comm.rank())).expect("no rank is lost")
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
        });
        assert!(all.iter().all(|texts| texts == &["", "ab", "abab"]), "{all:?}");
    }
}
