//! What a reader must know of the machine, the code and the moment of a measurement.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Instruction sets worth naming where a CPU has them.
const FLAGS: [&str; 7] =
    ["avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16"];

/// The machine and the code of `commit`, as a table.
pub fn describe(root: &Path, commit: &str) -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mut out = String::from("| | |\n|---|---|\n");
    for (name, value) in [
        ("processor", processor(&cpuinfo)),
        ("of its instruction sets", flags(&cpuinfo)),
        ("caches of a core", caches(Path::new("/sys/devices/system/cpu/cpu0/cache"))),
        ("memory", memory(&meminfo)),
        ("system", first_line("uname", &["-sr"], root)),
        ("compiler", first_line("rustc", &["--version"], root)),
        ("commit", commit.to_owned()),
    ] {
        let _ = writeln!(out, "| {name} | {value} |");
    }
    out
}

/// Whether the program has kernels of AVX-512 for this machine.
pub fn has_avx512() -> bool {
    all_of_avx512(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn all_of_avx512(cpuinfo: &str) -> bool {
    ["avx512f", "avx512bw", "avx512vl", "avx512_vnni"].into_iter().all(|flag| has(cpuinfo, flag))
}

/// Whether the processor has what the kernel calls `flag`.
fn has(cpuinfo: &str, flag: &str) -> bool {
    field(cpuinfo, "flags").is_some_and(|flags| flags.split(' ').any(|word| word == flag))
}

/// When and of what a part of the page was measured.
pub fn moment(commit: &str, quick: bool) -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let quick = if quick {
        ", with `--quick`: it shows that the section works, not how fast the program is"
    } else {
        ""
    };
    format!("at commit {commit} on {}{quick}", processor(&cpuinfo))
}

/// How far the figures can be trusted.
pub fn conditions(quick: bool, before: Option<f64>, after: Option<f64>) -> String {
    let mut out = String::from(
        "Figures are medians of the repetitions. Each share is one of the limit that `qwen3 bench` measured around the same \
         repetitions, on the same threads: f32 multiply-adds of AVX2 for prefill (also where AVX-512 computes, which can do \
         more), reads from memory for decode. A shared or virtual machine is noisy: compare shares and figures of one run, not those of two.\n",
    );
    if let (Some(before), Some(after)) = (before, after) {
        let _ = writeln!(
            out,
            "\nLoad average (1 min) before the first measurement: {before:.2}; after the last: {after:.2}."
        );
    }
    if quick {
        out.push_str("\nThis is a run with `--quick`: few layers, short prompts, one repetition. It shows that the report works, not how fast the program is.\n");
    }
    out
}

/// The load of the last minute, where the system tells.
pub fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
}

fn processor(cpuinfo: &str) -> String {
    let cores = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let mut out =
        format!("{}, {cores} logical cores", field(cpuinfo, "model name").unwrap_or("unknown"));
    if let (Some(family), Some(model)) = (field(cpuinfo, "cpu family"), field(cpuinfo, "model")) {
        let _ = write!(out, ", family {family}, model {model}");
    }
    if has(cpuinfo, "hypervisor") {
        out.push_str(", a virtual machine");
    }
    out
}

fn flags(cpuinfo: &str) -> String {
    FLAGS.into_iter().filter(|flag| has(cpuinfo, flag)).collect::<Vec<_>>().join(", ")
}

fn caches(folder: &Path) -> String {
    let read = |index: usize, name: &str| {
        fs::read_to_string(folder.join(format!("index{index}/{name}"))).ok()
    };
    let one = |index| {
        let (level, size) = (read(index, "level")?, read(index, "size")?);
        (read(index, "type")?.trim() != "Instruction")
            .then(|| format!("L{} {}", level.trim(), size.trim()))
    };
    (0..8).filter_map(one).collect::<Vec<_>>().join(", ")
}

fn memory(meminfo: &str) -> String {
    let kib = field(meminfo, "MemTotal")
        .and_then(|value| value.trim_end_matches("kB").trim().parse::<f64>().ok());
    kib.map_or("unknown".to_owned(), |kib| format!("{:.1} GiB", kib / f64::from(1 << 20)))
}

/// The commit of the working tree, and whether that has changes beside it.
pub fn commit(root: &Path) -> String {
    // Pages of earlier reports are not what is measured.
    let status =
        ["status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs/performance*"];
    let changed = !first_line("git", &status, root).is_empty();
    let commit = first_line("git", &["log", "-1", "--format=%h, %cs"], root);
    if changed { format!("{commit}, with changes") } else { commit }
}

/// The first line that a program prints, or nothing.
fn first_line(program: &str, args: &[&str], folder: &Path) -> String {
    let output = Command::new(program).args(args).current_dir(folder).output();
    let text = output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPUINFO: &str = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: Some CPU\nflags\t\t: fpu fma avx2 hypervisor\n\n\
                           processor\t: 1\nmodel name\t: Some CPU\n";

    #[test]
    fn the_processor_is_described_from_what_the_kernel_says() {
        assert_eq!(
            processor(CPUINFO),
            "Some CPU, 2 logical cores, family 25, model 17, a virtual machine"
        );
        assert_eq!(flags(CPUINFO), "avx2, fma");
        assert!(!all_of_avx512(CPUINFO));
        assert!(all_of_avx512("flags : avx512vl avx512bw avx2 avx512f avx512_vnni\n"));
        assert!(!all_of_avx512("flags : avx512vl avx512bw avx2 avx512f avx512_vnni2\n"));
        assert_eq!(memory("MemTotal:       8388608 kB\nMemFree: 1 kB\n"), "8.0 GiB");
        assert_eq!(processor(""), "unknown, 0 logical cores");
    }

    #[test]
    fn a_quick_run_says_so() {
        assert!(conditions(true, Some(0.5), Some(2.0)).contains("`--quick`"));
        let slow = conditions(false, Some(0.5), Some(2.0));
        assert!(!slow.contains("--quick") && slow.contains("0.50; after the last: 2.00"), "{slow}");
    }
}
