//! How many parameters a model has and how much arithmetic a token costs.

use crate::config::{Config, MoeConfig};

impl MoeConfig {
    /// Experts that a pass of `tokens` tokens visits in a layer on average, where all experts are
    /// equally likely.
    pub(crate) fn visited_experts(&self, tokens: f64) -> f64 {
        let (experts, visits) = (self.num_experts as f64, self.num_experts_per_tok as f64);
        experts * (1.0 - (1.0 - visits / experts).powf(tokens))
    }
}

impl Config {
    /// All parameters; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        let layers: u64 =
            (0..self.num_hidden_layers).map(|layer| self.layer_parameters(layer)).sum();
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        layers + tables * self.head_parameters() + self.hidden_size as u64
    }

    /// Elements of the matrices that one token visits in the layers: all of a dense model's, the
    /// chosen experts' of a sparse one's.
    pub fn active_matrix_elements(&self) -> u64 {
        (0..self.num_hidden_layers)
            .map(|layer| self.layer_elements(layer, |moe| moe.num_experts_per_tok))
            .sum()
    }

    /// Elements of the matrices that a pass of `tokens` tokens visits in the layers: in a sparse
    /// one those of the experts that one token or another has chosen, on average.
    pub fn visited_matrix_elements(&self, tokens: usize) -> f64 {
        let one = self.active_matrix_elements() as f64;
        let Some(moe) = &self.moe else { return one };
        let sparse = (0..self.num_hidden_layers).filter(|&layer| self.is_sparse(layer)).count();
        let further = moe.visited_experts(tokens as f64) - moe.num_experts_per_tok as f64;
        one + (sparse * 3 * self.hidden_size * moe.moe_intermediate_size) as f64 * further
    }

    /// Elements of the head.
    pub fn head_parameters(&self) -> u64 {
        self.vocab_size as u64 * self.hidden_size as u64
    }

    /// Floating-point operations of the layers' matrices for one token: a multiplication and an
    /// addition an element.
    pub fn layer_flops_per_token(&self) -> u64 {
        2 * self.active_matrix_elements()
    }

    /// Floating-point operations of the head for one row of logits.
    pub fn head_flops_per_row(&self) -> u64 {
        2 * self.head_parameters()
    }

    /// Floating-point operations of attention, all layers, for `tokens` that follow `past` others:
    /// token i sees past + i + 1 keys, and each key costs head_dim multiply-adds for its score and
    /// head_dim for its value in every query head.
    pub fn attention_flops(&self, tokens: usize, past: usize) -> u64 {
        let (tokens, past) = (tokens as u64, past as u64);
        let keys = tokens * past + tokens * (tokens + 1) / 2;
        4 * keys * self.query_size() as u64 * self.num_hidden_layers as u64
    }

    /// Floating-point operations of a forward pass: `tokens` after `past` others, with `rows` rows
    /// of logits.
    pub fn forward_flops(&self, tokens: usize, past: usize, rows: usize) -> u64 {
        tokens as u64 * self.layer_flops_per_token()
            + self.attention_flops(tokens, past)
            + rows as u64 * self.head_flops_per_row()
    }

    fn layer_parameters(&self, layer: usize) -> u64 {
        self.layer_elements(layer, |moe| moe.num_experts)
            + 2 * (self.hidden_size + self.head_dim) as u64
    }

    /// Elements of the matrices of a layer, in a sparse one of so many of its experts and the
    /// router.
    fn layer_elements(&self, layer: usize, experts: impl Fn(&MoeConfig) -> usize) -> u64 {
        let columns = match self.moe_of(layer) {
            Some(moe) => {
                3 * (experts(moe) * moe.moe_intermediate_size) as u64 + moe.num_experts as u64
            }
            None => 3 * self.intermediate_size as u64,
        };
        self.hidden_size as u64 * (self.attention_rows() + columns)
    }

    /// Rows of q, k and v and columns of o.
    fn attention_rows(&self) -> u64 {
        2 * (self.query_size() + self.key_value_size()) as u64
    }
}
