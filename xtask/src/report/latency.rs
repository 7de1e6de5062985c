//! Short times: a sum of two ranks of this machine, loading a checkpoint, and the way to the first
//! token.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Section;
use super::lab::{Lab, Ranks, median};
use crate::workspace;

/// Bytes of the sums that are shown: of one token, of a few, of a prompt.
const BYTES: [usize; 3] = [4 << 10, 16 << 10, 2 << 20];

/// A way to add, as the example calls it, with microseconds for each of [`BYTES`].
#[derive(Clone, Debug, PartialEq)]
struct Way {
    name: String,
    times: [f64; BYTES.len()],
}

/// Whole processes: what they do, what is asked of them and what they took, in seconds.
struct Times {
    what: String,
    asked: f64,
    seconds: Vec<f64>,
}

/// Measures the section.
pub fn measure(lab: &mut Lab) -> Result<Section> {
    let (runs, times) = if lab.quick { (1, 1) } else { (3, 5) };
    let example = lab.example("comm", "allreduce")?;
    let mut places = vec![Ranks::Threads(2)];
    if lab.has_mpi()? {
        places.push(Ranks::Mpi(2));
    }
    let mut text = String::from(
        "An Allreduce of two ranks of this machine, each on a core of its own, in f32: microseconds of a call, the median of many in each of the runs \
         below and of those runs. `threads` are ranks of one process; `memory` are MPI processes by shared memory, which is what the program takes \
         within a machine, `messages` the same algorithms by MPI's messages.\n\n",
    );
    if places.len() < 2 {
        text.push_str("There is no MPI on this machine.\n\n");
    }
    let mut found = Vec::new();
    for ranks in places {
        let answers: Result<Vec<_>> =
            (0..runs).map(|_| ways(&lab.example_on(ranks, &example)?)).collect();
        found.extend(middle(&answers?));
    }
    text.push_str(&sums(&found));
    let processes = [loading(lab, times)?, first_token(lab, times)?];
    let _ = write!(
        text,
        "\nSeconds of whole processes that write one token, from their start to their end, the files in the page cache: the median of {times} \
         after one that warms up. Loading is what remains without the pass over a prompt of one token, whose time the program gives; \
         starting and ending are in it.\n\n{}",
        table(&processes)
    );
    text.push_str(&lab.take_commands());
    Ok(Section { text, charts: Vec::new() })
}

fn loading(lab: &mut Lab, times: usize) -> Result<Times> {
    let layers = lab.quick.then_some(4);
    let model = lab.synth("0.6b", layers)?.to_string_lossy().into_owned();
    let args = [
        "generate",
        "--json",
        "--model",
        &model,
        "--weights",
        "bf16",
        "--tokens",
        "1",
        "--max-new-tokens",
        "1",
    ];
    let seconds: Result<_> = lab
        .timed(&args, times)?
        .into_iter()
        .map(|(whole, answer)| Ok(whole - prompt_seconds(&answer)?))
        .collect();
    let layers = layers.map_or(String::new(), |layers| format!(" with {layers} layers"));
    Ok(Times { what: format!("load 0.6b{layers}, bf16"), asked: 1.5, seconds: seconds? })
}

/// How long the prompt took by the program's own account.
fn prompt_seconds(answer: &str) -> Result<f64> {
    let answer: Value = serde_json::from_str(answer).context("qwen3 generate printed no JSON")?;
    let number = |name: &str| {
        answer[name].as_f64().with_context(|| format!("qwen3 generate gave no {name}"))
    };
    Ok(number("prompt_tokens")? / number("prefill_tokens_per_s")?)
}

fn first_token(lab: &mut Lab, times: usize) -> Result<Times> {
    let model = workspace::root().join("models/austen").to_string_lossy().into_owned();
    let args = ["generate", "--model", &model, "--max-new-tokens", "1", "--prompt", "Hi"];
    let seconds = lab.timed(&args, times)?.into_iter().map(|(whole, _)| whole).collect();
    Ok(Times { what: "start to first token of `models/austen`".to_owned(), asked: 0.3, seconds })
}

/// The ways of a run that send f32. The example's table has a column of 10 for the bytes and one of
/// 15 for each way.
fn ways(answer: &str) -> Result<Vec<Way>> {
    let cell = |line: &str, index: usize| -> Option<String> {
        Some(line.get(15 * index + 10..15 * index + 25)?.trim().to_owned())
    };
    let mut lines =
        answer.lines().skip_while(|line| line.split_whitespace().next() != Some("bytes"));
    let head = lines.next().context("the example allreduce printed no table")?;
    let rows: Vec<&str> = lines.collect();
    let mut ways = Vec::new();
    for (index, name) in (0..).map_while(|index| Some((index, cell(head, index)?))) {
        if !name.ends_with("f32") && name != "MPI_Allreduce" {
            continue;
        }
        let mut times = [0.0; BYTES.len()];
        for (bytes, time) in BYTES.iter().zip(&mut times) {
            let fits = |row: &&&str| row.split_whitespace().next() == Some(&bytes.to_string());
            let row = rows
                .iter()
                .find(fits)
                .with_context(|| format!("allreduce has no row of {bytes} bytes"))?;
            let found = cell(row, index).and_then(|text| text.parse().ok());
            *time = found.with_context(|| format!("allreduce has no time of {name} in: {row}"))?;
        }
        ways.push(Way { name: name.trim_end_matches(" f32").to_owned(), times });
    }
    Ok(ways)
}

/// The median of each time over runs that have the same ways.
fn middle(runs: &[Vec<Way>]) -> Vec<Way> {
    let mut middle = runs[0].clone();
    for (index, way) in middle.iter_mut().enumerate() {
        for (place, time) in way.times.iter_mut().enumerate() {
            *time = median(&runs.iter().map(|run| run[index].times[place]).collect::<Vec<_>>());
        }
    }
    middle
}

fn sums(ways: &[Way]) -> String {
    let mut out = String::from("| ranks add by | 4 KB | 16 KB | 2 MB |\n|---|---|---|---|\n");
    for Way { name, times: [token, few, prompt] } in ways {
        let _ = writeln!(out, "| {name} | {token:.2} | {few:.2} | {prompt:.1} |");
    }
    out
}

fn table(processes: &[Times]) -> String {
    let mut out = String::from(
        "| what | seconds | fastest | slowest | asked at most |\n|---|---|---|---|---|\n",
    );
    for Times { what, asked, seconds } in processes {
        let (least, most) =
            seconds.iter().fold((f64::INFINITY, 0.0), |(a, b), &s| (s.min(a), s.max(b)));
        let _ =
            writeln!(out, "| {what} | {:.3} | {least:.3} | {most:.3} | {asked} |", median(seconds));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = "2 ranks, median us of an Allreduce
     bytes     memory f32    memory bf16      memory q8   messages f32  messages bf16    messages q8  MPI_Allreduce
      1024           0.65           0.81           1.08           1.65           1.81           2.08           3.00
      4096           1.17           2.04           2.67           2.17           3.04           3.67           4.00
     16384           2.92           5.02           7.63           3.92           6.02           8.63           5.00
   2097152         220.32         501.40         829.31         320.32         601.40         929.31         600.00
";

    #[test]
    fn the_table_of_the_example_is_read() {
        let ways = ways(ANSWER).unwrap();
        let names: Vec<&str> = ways.iter().map(|way| way.name.as_str()).collect();
        assert_eq!(names, ["memory", "messages", "MPI_Allreduce"]);
        assert_eq!(ways[1].times, [2.17, 3.92, 320.32]);
        assert!(
            sums(&ways).ends_with("| MPI_Allreduce | 4.00 | 5.00 | 600.0 |\n"),
            "{}",
            sums(&ways)
        );
        let short = ANSWER.lines().take(4).collect::<Vec<_>>().join("\n");
        assert!(super::ways(&short).unwrap_err().to_string().contains("16384"));
        assert!(super::ways("").is_err());
    }

    #[test]
    fn runs_have_their_median() {
        let way = |time: f64| {
            vec![Way { name: "threads".to_owned(), times: [time, 2.0 * time, 3.0 * time] }]
        };
        assert_eq!(middle(&[way(1.0), way(9.0), way(2.0)]), way(2.0));
    }

    #[test]
    fn loading_has_no_share_of_the_prompt() {
        let answer = r#"{"prompt_tokens":1,"ids":[7],"text":"","prefill_tokens_per_s":8.0,"decode_tokens_per_s":0.0}"#;
        assert_eq!(prompt_seconds(answer).unwrap(), 0.125);
        assert!(prompt_seconds("{}").is_err());
        let table =
            table(&[Times { what: "load".to_owned(), asked: 1.5, seconds: vec![1.0, 3.0, 1.25] }]);
        assert!(table.ends_with("| load | 1.250 | 1.000 | 3.000 | 1.5 |\n"), "{table}");
    }
}
