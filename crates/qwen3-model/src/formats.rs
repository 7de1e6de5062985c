//! The formats of a model's matrices in memory: as stored, as chosen, or equal ones for a model of
//! which only the config is known.

use std::ops::Range;

use checkpoint::{Checkpoint, CheckpointError};
use tensor::{GROUP, WeightFormat};

use crate::config::Config;
use crate::names::{LayerNames, head};

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
    pub qkv: WeightFormat,
    pub output: WeightFormat,
    /// In a mixture of experts.
    pub router: Option<WeightFormat>,
    /// Gate, up and down of consecutive experts; one run of one expert in a dense layer.
    pub experts: Vec<(Range<usize>, [WeightFormat; 3])>,
}

impl LayerFormats {
    /// Feed-forward columns that are never cut apart: 1, or the group of a quantized format. The
    /// first expert's down projection decides.
    pub fn granularity(&self) -> usize {
        if self.experts[0].1[2].is_quantized() { GROUP } else { 1 }
    }
}

/// Appends `value` of index `index` to runs of equal values.
fn extend<T: PartialEq>(runs: &mut Vec<(Range<usize>, T)>, index: usize, value: T) {
    match runs.last_mut() {
        Some((run, last)) if *last == value => run.end = index + 1,
        _ => runs.push((index..index + 1, value)),
    }
}

impl WeightFormats {
    /// Reads the headers; `chosen` replaces the stored formats except those of routers.
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
            for expert in 0..moe.map_or(1, |moe| moe.num_experts) {
                let names = if moe.is_some() { names.expert(expert) } else { names.mlp() };
                let pair = common(&[&names.gate_proj, &names.up_proj])?;
                extend(&mut experts, expert, [pair, pair, format(&names.down_proj)?]);
            }
            let formats = LayerFormats {
                qkv: common(&[&names.q_proj, &names.k_proj, &names.v_proj])?,
                output: format(&names.o_proj)?,
                router: moe.map(|_| checkpoint.stored_format(&names.router())).transpose()?,
                experts,
            };
            extend(&mut layers, index, formats);
        }
        Ok(Self { layers, head: format(&head(config, checkpoint).to_owned())? })
    }

    /// `format` everywhere, and `router` for routers: for a model without files.
    pub fn uniform(config: &Config, format: WeightFormat, router: WeightFormat) -> Self {
        let mut layers = Vec::new();
        for index in 0..config.num_hidden_layers {
            let moe = config.moe_of(index);
            let formats = LayerFormats {
                qkv: format,
                output: format,
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
