//! How many parameters a model has, and how much a forward pass computes and reads on one rank.

use ops::cost::{Operand, Work};
use ops::routing::visited_experts;
use ops::{KvFormat, LogitRows};
use tensor::WeightFormat;

use crate::config::Config;
use crate::formats::WeightFormats;
use crate::names::tensor_specs;
use crate::options::ModelOptions;
use crate::shape::{ModelShape, PassShape};

impl Config {
    /// All parameters; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        tensor_specs(self).map(|spec| spec.elements() as u64).sum()
    }

    /// Parameters of the head.
    pub fn head_parameters(&self) -> u64 {
        self.vocab_size as u64 * self.hidden_size as u64
    }

    /// Parameters of the layers' matrices that a pass of `tokens` tokens reads: all in a dense
    /// model; in a mixture those of the experts that one token or another visits, on average.
    pub fn visited_matrix_elements(&self, tokens: usize) -> f64 {
        // One token multiplies and adds once for each.
        let one = self.work(1, 0, LogitRows::None).0.flops / 2.0;
        let Some(moe) = &self.moe else { return one };
        let sparse = (0..self.num_hidden_layers).filter(|&layer| self.is_sparse(layer)).count();
        let further = visited_experts(moe.num_experts, moe.num_experts_per_tok, tokens)
            - moe.num_experts_per_tok as f64;
        one + (sparse * 3 * self.hidden_size * moe.moe_intermediate_size) as f64 * further
    }

    /// Floating-point operations of a forward pass: `tokens` after `past` others, with the logits
    /// of `rows`.
    pub fn forward_flops(&self, tokens: usize, past: usize, rows: LogitRows) -> f64 {
        let (products, attention) = self.work(tokens, past, rows);
        products.flops + attention.flops
    }

    /// What products with weights in f32 and attention have to do in a pass on one rank.
    fn work(&self, tokens: usize, past: usize, rows: LogitRows) -> (Work, Work) {
        let formats = WeightFormats::uniform(self, WeightFormat::F32, WeightFormat::F32);
        let division = ModelOptions::new(ops::Isa::scalar()).division();
        let pass = PassShape { tokens, past, rows, kv: KvFormat::F32, nodes: 1, overlap: 0 };
        let cost = ModelShape::new(self, &formats, division, 1, 0).pass(&pass);
        let sum = |weights: bool| {
            let of = |(count, cost): (usize, &ops::Cost)| {
                let kind = |(operand, _): &&(Operand, Work)| {
                    matches!(operand, Operand::Weights(_)) == weights
                };
                cost.work.iter().filter(kind).map(|(_, work)| *work).sum::<Work>() * count as f64
            };
            cost.iter().map(of).sum()
        };
        (sum(true), sum(false))
    }
}
