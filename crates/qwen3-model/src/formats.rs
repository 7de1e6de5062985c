//! The formats of a model's matrices in memory: as stored, as chosen, or equal ones for a model of
//! which only the config is known.

use std::ops::Range;

use checkpoint::{Checkpoint, CheckpointError};
use tensor::{GROUP, WeightFormat};

use crate::config::Config;
use crate::names::{LayerNames, MlpNames, head};

/// The formats that a model's matrices have in memory.
#[derive(Clone, Debug)]
pub struct WeightFormats {
    /// Consecutive layers of equal formats.
    pub(crate) layers: Vec<(Range<usize>, LayerFormats)>,
    pub(crate) head: WeightFormat,
}

/// The formats of a layer's matrices.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LayerFormats {
    /// Of [`DecoderLayer`](crate::layer::DecoderLayer)'s matrices of the same names.
    pub in_proj: WeightFormat,
    pub gates: Option<WeightFormat>,
    pub out_proj: WeightFormat,
    /// In a mixture of experts.
    pub router: Option<WeightFormat>,
    /// Gate, up and down of consecutive experts; one run of one expert in a dense layer.
    pub experts: Vec<(Range<usize>, [WeightFormat; 3])>,
    /// Gate, up and down of the shared expert, and the gate of its result.
    pub shared: Option<([WeightFormat; 3], WeightFormat)>,
}

impl LayerFormats {
    /// Feed-forward columns that are never cut apart. The first expert's down projection decides.
    pub fn granularity(&self) -> usize {
        granularity(self.experts[0].1[2])
    }
}

/// Columns of a down projection that are never cut apart: 1, or the group of a quantized format.
pub(crate) fn granularity(down: WeightFormat) -> usize {
    if down.is_quantized() { GROUP } else { 1 }
}

/// Appends `value` of index `index` to runs of equal values.
fn extend<T: PartialEq>(runs: &mut Vec<(Range<usize>, T)>, index: usize, value: T) {
    match runs.last_mut() {
        Some((run, last)) if *last == value => run.end = index + 1,
        _ => runs.push((index..index + 1, value)),
    }
}

impl WeightFormats {
    /// Reads the headers; `chosen` replaces the stored formats except those of routers and of other
    /// small matrices.
    ///
    /// # Errors
    /// When a tensor is missing or its format unknown.
    pub fn read(
        config: &Config,
        checkpoint: &Checkpoint,
        chosen: Option<WeightFormat>,
    ) -> Result<Self, CheckpointError> {
        let format = |name: &String| chosen.map_or_else(|| checkpoint.stored_format(name), Ok);
        // What is packed together, or multiplied in one go, has one format.
        let common = |names: &[&String]| -> Result<WeightFormat, CheckpointError> {
            let formats = names.iter().map(|name| format(name)).collect::<Result<Vec<_>, _>>()?;
            Ok(WeightFormat::common(formats))
        };
        let mut layers = Vec::new();
        for index in 0..config.num_hidden_layers {
            let names = LayerNames::new(index);
            let moe = config.moe_of(index);
            let mut experts = Vec::new();
            let block = |names: MlpNames| -> Result<[WeightFormat; 3], CheckpointError> {
                let pair = common(&[&names.gate_proj, &names.up_proj])?;
                Ok([pair, pair, format(&names.down_proj)?])
            };
            for expert in 0..moe.map_or(1, |moe| moe.num_experts) {
                let names = if moe.is_some() { names.expert(expert) } else { names.mlp() };
                extend(&mut experts, expert, block(names)?);
            }
            let shared = moe.and_then(|moe| moe.shared_expert_intermediate_size).map(|_| {
                let gate = checkpoint.stored_format(&names.shared_expert_gate())?;
                Ok::<_, CheckpointError>((block(names.shared_expert())?, gate))
            });
            let (in_proj, gates, out_proj) = match config.delta_of(index) {
                Some(hybrid) => {
                    let delta = names.delta(hybrid);
                    let (large, small): (Vec<_>, Vec<_>) =
                        delta.inputs.iter().partition(|input| !hybrid.is_small(input.1));
                    let large: Vec<_> = large.iter().map(|(name, _)| name).collect();
                    let small = small.iter().map(|(name, _)| checkpoint.stored_format(name));
                    let small = WeightFormat::common(small.collect::<Result<Vec<_>, _>>()?);
                    (common(&large)?, Some(small), format(&delta.out_proj)?)
                }
                None => {
                    let gates =
                        config.hybrid.as_ref().map(|_| format(&names.q_proj)).transpose()?;
                    let qkv = common(&[&names.q_proj, &names.k_proj, &names.v_proj])?;
                    (qkv, gates, format(&names.o_proj)?)
                }
            };
            let formats = LayerFormats {
                in_proj,
                gates,
                out_proj,
                shared: shared.transpose()?,
                router: moe.map(|_| checkpoint.stored_format(&names.router())).transpose()?,
                experts,
            };
            extend(&mut layers, index, formats);
        }
        Ok(Self { layers, head: format(&head(config, checkpoint).to_owned())? })
    }

    /// `format` everywhere, and `router` for routers and other small matrices: for a model without
    /// files.
    pub fn uniform(config: &Config, format: WeightFormat, router: WeightFormat) -> Self {
        let mut layers = Vec::new();
        for index in 0..config.num_hidden_layers {
            let moe = config.moe_of(index);
            let formats = LayerFormats {
                in_proj: format,
                gates: config
                    .hybrid
                    .as_ref()
                    .map(|_| if config.has_attention(index) { format } else { router }),
                out_proj: format,
                shared: moe
                    .and_then(|moe| moe.shared_expert_intermediate_size)
                    .map(|_| ([format; 3], router)),
                router: moe.map(|_| router),
                experts: vec![(0..moe.map_or(1, |moe| moe.num_experts), [format; 3])],
            };
            extend(&mut layers, index, formats);
        }
        Self { layers, head: format }
    }

    /// The format of the head, which reports name as that of the weights.
    pub fn main(&self) -> WeightFormat {
        self.head
    }
}
