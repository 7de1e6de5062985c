//! What runs on an emulated network gave, beside what the plan had predicted.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Tokens a second, and as many as the plan had predicted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    pub measured: f64,
    pub predicted: f64,
}

impl Speed {
    fn json(self) -> Value {
        json!({ "tokens_per_s": self.measured, "predicted": self.predicted })
    }

    fn cells(self) -> String {
        let Speed { measured, predicted } = self;
        format!("{measured:>13.1} {predicted:>10.1} {:>6.2}", measured / predicted)
    }
}

/// One bench.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub strategy: String,
    pub wire: String,
    pub prefill: Speed,
    pub decode: Speed,
    /// Payload of one decoded token as rank 0's ledger counts it.
    pub token_bytes: f64,
    /// Bytes that all machines sent during the whole run, repetitions and loading included.
    pub network_bytes: u64,
}

impl Run {
    /// From the answer of a bench, with what the network carried meanwhile, and that of `plan`.
    pub fn of(measured: &Value, plan: &Value, strategy: &str, wire: &str) -> Result<Run> {
        let bench = &measured["answer"];
        let result = |phase: &str| {
            let found = bench["results"]
                .as_array()
                .into_iter()
                .flatten()
                .find(|result| result["phase"] == phase);
            found.with_context(|| format!("the bench has no result for {phase}"))
        };
        let ways = plan["ways"].as_array().into_iter().flatten();
        let way =
            ways.clone().find(|way| way["strategy"] == strategy && way["mlp"] == bench["mlp"]);
        let way =
            way.with_context(|| format!("the plan has no way {strategy} with {}", bench["mlp"]))?;
        let speed = |phase: &str, planned: &str| -> Result<Speed> {
            Ok(Speed {
                measured: number(result(phase)?, "tokens_per_s")?,
                predicted: number(&way[planned], "tokens_per_s")?,
            })
        };
        let sum = |phase: &str| -> f64 {
            let entries = bench["traffic"].as_array().into_iter().flatten();
            entries
                .filter(|entry| entry["phase"] == phase)
                .filter_map(|entry| entry["payload_bytes"].as_f64())
                .sum()
        };
        let tokens = number(result("decode")?, "tokens")?;
        let network_bytes =
            measured["network_bytes"].as_u64().context("no count of the network's bytes")?;
        // Ranks that found another way to each other, such as shared memory, would be measured as
        // if they had the network. The ledger counts what one rank puts into its calls; each byte
        // of it crosses the network at least once.
        if (network_bytes as f64) < sum("prefill") + sum("decode") {
            bail!(
                "the network carried {network_bytes} bytes, less than the ranks exchanged: they do not use it"
            );
        }
        Ok(Run {
            strategy: strategy.to_owned(),
            wire: wire.to_owned(),
            prefill: speed("prefill", "prompt")?,
            decode: speed("decode", "token")?,
            token_bytes: sum("decode") / tokens,
            network_bytes,
        })
    }

    fn json(&self) -> Value {
        json!({
            "strategy": self.strategy, "wire": self.wire, "prefill": self.prefill.json(), "decode": self.decode.json(),
            "token_bytes": self.token_bytes, "network_bytes": self.network_bytes,
        })
    }
}

/// A network with its runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    pub gbit: f64,
    pub ranks: usize,
    /// As `calibrate` measured the ranks and their links.
    pub machine: Value,
    pub runs: Vec<Run>,
}

impl Network {
    /// From the machine that `calibrate` found.
    pub fn of(machine: &Value, gbit: f64, ranks: usize) -> Result<Network> {
        if number(machine, "nodes")? as usize != ranks {
            bail!(
                "calibrate found {} machines, expected {ranks}: the ranks take each other for neighbours",
                machine["nodes"]
            );
        }
        Ok(Network { gbit, ranks, machine: machine.clone(), runs: Vec::new() })
    }

    /// For people.
    pub fn table(&self) -> String {
        let link = |name: &str| self.machine["between"][name].as_f64().unwrap_or(f64::NAN);
        let (gbit, ranks, alpha, beta) =
            (self.gbit, self.ranks, link("alpha_us"), link("beta_gb_s"));
        let mut text = format!(
            "\n{gbit} Gbit/s, {ranks} ranks: {alpha:.1} µs and {beta:.3} GB/s as calibrate measured them\n"
        );
        text += "strategy  wire  prefill tok/s  predicted  ratio  decode tok/s  predicted  ratio  bytes/token\n";
        for run in &self.runs {
            let Run { strategy, wire, prefill, decode, token_bytes, .. } = run;
            let (prefill, decode) = (prefill.cells(), decode.cells());
            let _ =
                writeln!(text, "{strategy:<9} {wire:<5} {prefill} {decode} {token_bytes:>12.0}");
        }
        text
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let runs: Vec<Value> = self.runs.iter().map(Run::json).collect();
        json!({ "gbit": self.gbit, "ranks": self.ranks, "machine": self.machine, "runs": runs })
    }
}

fn number(object: &Value, name: &str) -> Result<f64> {
    object[name].as_f64().with_context(|| format!("no number {name} in {object}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bench(network_bytes: u64) -> Value {
        json!({ "network_bytes": network_bytes, "answer": {
            "mlp": "fused",
            "results": [
                { "phase": "prefill", "tokens": 64, "tokens_per_s": 90.0 },
                { "phase": "decode", "tokens": 8, "tokens_per_s": 20.0 },
            ],
            "traffic": [
                { "phase": "prefill", "collective": "Allreduce", "payload_bytes": 6000 },
                { "phase": "decode", "collective": "Allreduce", "payload_bytes": 800 },
                { "phase": "decode", "collective": "Allgather", "payload_bytes": 80 },
            ],
        } })
    }

    fn plan() -> Value {
        let way = |mlp: &str, prompt: f64, token: f64| json!({ "strategy": "heads", "mlp": mlp, "prompt": { "tokens_per_s": prompt }, "token": { "tokens_per_s": token } });
        json!({ "ways": [way("naive", 1.0, 1.0), way("fused", 100.0, 25.0)] })
    }

    #[test]
    fn a_run_stands_beside_its_own_prediction() {
        let run = Run::of(&bench(20_000), &plan(), "heads", "f32").unwrap();
        assert_eq!(run.prefill, Speed { measured: 90.0, predicted: 100.0 });
        assert_eq!(run.decode, Speed { measured: 20.0, predicted: 25.0 });
        assert_eq!(run.token_bytes, 110.0);
        let error = Run::of(&bench(20_000), &plan(), "sequence", "f32").unwrap_err().to_string();
        assert!(error.contains("sequence"), "{error}");
    }

    #[test]
    fn ranks_that_do_not_use_the_network_are_an_error() {
        let error = Run::of(&bench(5_000), &plan(), "heads", "f32").unwrap_err().to_string();
        assert!(error.contains("5000 bytes"), "{error}");
        assert!(Run::of(&bench(6_880), &plan(), "heads", "f32").is_ok());
        let machine = |nodes: usize| json!({ "nodes": nodes, "between": { "alpha_us": 5.0, "beta_gb_s": 0.11 } });
        assert!(Network::of(&machine(1), 1.0, 2).is_err());
        let mut network = Network::of(&machine(2), 1.0, 2).unwrap();
        network.runs.push(Run::of(&bench(20_000), &plan(), "heads", "f32").unwrap());
        let table = network.table();
        assert!(table.contains("1 Gbit/s, 2 ranks: 5.0 µs and 0.110 GB/s"), "{table}");
        assert!(
            table.lines().any(|line| line.starts_with("heads     f32") && line.contains("0.90")),
            "{table}"
        );
        assert_eq!(network.json()["runs"][0]["decode"]["predicted"], 25.0);
    }
}
