//! The program `qwen3`: Qwen3 models on the cores and ranks of ordinary machines.

#![forbid(unsafe_code)]

// Modules in reading order, lowest first; a module uses only those of its group and of the groups
// above.

// Errors, signals, options, files, and what is known of the machine.
mod failure;
mod ctrl_c;
mod model_path;
mod options;
mod output_file;
mod calibration;
mod memory;
mod plan;
mod progress;

// What several commands do.
mod ahead;
mod empty_thought;
mod answer;
mod client;
mod prompt;
mod session;

// The commands, each after the parts that it alone has.
mod allocations;
mod bench_limits;
mod bench_profile;
mod bench_trace;
mod bench_report;
mod bench_batch;
mod bench;
mod calibrate;
mod chat;
mod summary;
mod demo;
mod jsonl;
mod generate;
mod logits;
mod perplexity;
mod pooling;
mod embed;
mod rerank;
mod quantize;
mod serve;
#[cfg(feature = "pull")]
mod pull;
mod synth;
mod tokenize;

mod command_line;

fn main() -> std::process::ExitCode {
    // With a limit on address space, heaps of each thread could take all of it.
    if rustix::process::getrlimit(rustix::process::Resource::As).current.is_some() {
        qwen3_model::tensor::share_heap();
    }
    qwen3_text::serve_templates();
    command_line::run()
}
