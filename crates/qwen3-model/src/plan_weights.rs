//! The weights that each rank would hold, from the checkpoint's headers alone.

use std::ops::Range;

use tensor::{Checkpoint, CheckpointError, GROUP, WeightFormat, split_range};

use crate::config::Config;
use crate::heads::{BlockShape, BlockShare, HeadPlan};
use crate::names::{LayerNames, head};
use crate::options::Division;

/// An amount for each weight format, in the order of [`WeightFormat::ALL`].
pub(crate) type ByFormat = [f64; WeightFormat::ALL.len()];

/// The formats that a model's matrices have in memory.
#[derive(Clone, Debug)]
pub struct WeightFormats {
    layers: Vec<LayerFormats>,
    head: WeightFormat,
}

#[derive(Clone, Debug)]
pub(crate) struct LayerFormats {
    pub qkv: WeightFormat,
    pub output: WeightFormat,
    pub router: Option<WeightFormat>,
    /// Gate, up and down, and the consecutive experts that have them; one in a dense layer.
    pub experts: Vec<([WeightFormat; 3], Range<usize>)>,
    /// Of the first expert's down projection, which decides where columns may be cut.
    pub granule: usize,
}

/// Matrices of a rank, by their formats.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Matrices {
    pub bytes: ByFormat,
    pub elements: ByFormat,
}

/// The share of one rank.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RankWeights {
    /// Bytes held.
    pub bytes: usize,
    /// What every token visits: of attention, and of the feed-forward blocks (dense ones and
    /// routers).
    pub attention: Matrices,
    pub mlp: Matrices,
    /// All experts; their elements are counted with what narrow matrices take longer.
    pub experts: Matrices,
    pub head: Matrices,
    /// Elements of the rows that a token's visits make, an expert's result each.
    pub expert_rows: f64,
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
        let format = |name: &str| chosen.map_or_else(|| checkpoint.stored_format(name), Ok);
        // What is packed together, or multiplied in one go, has one format.
        let common = |names: &[&String]| -> Result<WeightFormat, CheckpointError> {
            let formats = names.iter().map(|name| format(name)).collect::<Result<Vec<_>, _>>()?;
            Ok(WeightFormat::common(formats))
        };
        let layer = |index| -> Result<LayerFormats, CheckpointError> {
            let names = LayerNames::new(index);
            let moe = config.moe_of(index);
            let blocks = match moe {
                Some(moe) => (0..moe.num_experts).map(|expert| names.expert(expert)).collect(),
                None => vec![names.mlp()],
            };
            let mut experts: Vec<([WeightFormat; 3], Range<usize>)> = Vec::new();
            for (index, names) in blocks.iter().enumerate() {
                let pair = common(&[&names.gate_proj, &names.up_proj])?;
                let formats = [pair, pair, format(&names.down_proj)?];
                match experts.last_mut() {
                    Some((last, run)) if *last == formats => run.end = index + 1,
                    _ => experts.push((formats, index..index + 1)),
                }
            }
            let quantized = experts[0].0[2].is_quantized();
            Ok(LayerFormats {
                qkv: common(&[&names.q_proj, &names.k_proj, &names.v_proj])?,
                output: format(&names.o_proj)?,
                router: moe.map(|_| checkpoint.stored_format(&names.router())).transpose()?,
                experts,
                granule: if quantized { GROUP } else { 1 },
            })
        };
        let head = format(head(config, checkpoint))?;
        Ok(Self {
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_, _>>()?,
            head,
        })
    }

    /// The format of the head, which reports name as that of the weights.
    pub fn main(&self) -> WeightFormat {
        self.head
    }

    pub(crate) fn layers(&self) -> &[LayerFormats] {
        &self.layers
    }

    /// Feed-forward columns that are never cut apart: 1, or the group of a quantized format.
    pub fn granularity(&self) -> usize {
        self.layers.first().map_or(1, |layer| layer.granule)
    }

    /// Bytes of packed weights of `rank` among `ranks`, replicated KV heads and routers included:
    /// what [`Model::weight_bytes`](crate::Model::weight_bytes) is after loading.
    pub fn bytes(&self, config: &Config, division: Division, ranks: usize, rank: usize) -> usize {
        self.of_rank(config, division, ranks, rank).bytes
    }

    pub(crate) fn of_rank(
        &self,
        config: &Config,
        division: Division,
        ranks: usize,
        rank: usize,
    ) -> RankWeights {
        let (tp, _) = division.strategy.grid(ranks);
        let heads = HeadPlan::new(config, tp, rank % tp);
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let qkv_rows = (heads.query_heads.len() + 2 * heads.kv_heads.len()) * head_dim;
        let queries = heads.query_heads.len() * head_dim;
        let parts = division.block_ranks(ranks);

        let mut share = RankWeights::default();
        for (index, layer) in self.layers.iter().enumerate() {
            for (format, rows, cols) in
                [(layer.qkv, qkv_rows, hidden), (layer.output, hidden, queries)]
            {
                share.bytes += share.attention.add(format, 1, rows, cols, 1.0);
            }
            let moe = config.moe_of(index);
            let (experts, visited) =
                moe.map_or((1, 1), |moe| (moe.num_experts, moe.num_experts_per_tok));
            if let Some(format) = layer.router {
                share.bytes += share.mlp.add(format, 1, experts, hidden, 1.0);
            }
            let shape = BlockShape::new(config, index, layer.granule);
            let own =
                BlockShare::new(shape, division.schedule, division.experts, parts, rank % parts);
            let (inner, (down_rows, down_cols)) =
                (own.inner.len(), (own.down.0.len(), own.down.1.len()));
            // A product with few columns, or few of a sum, spends more on its edges: as much as
            // with so many columns more.
            let edge = if layer.granule > 1 { 32.0 } else { 16.0 };
            let narrow = 1.0 + edge / inner.max(1) as f64;
            if moe.is_some() {
                share.expert_rows += (own.experts.len() * visited * hidden) as f64 / experts as f64;
            }
            for ([gate, up, down], run) in &layer.experts {
                let count =
                    run.end.min(own.experts.end).saturating_sub(run.start.max(own.experts.start));
                for (format, rows, cols) in
                    [(*gate, inner, hidden), (*up, inner, hidden), (*down, down_rows, down_cols)]
                {
                    let (kind, longer) = if moe.is_some() {
                        (&mut share.experts, narrow)
                    } else {
                        (&mut share.mlp, 1.0)
                    };
                    share.bytes += kind.add(format, count, rows, cols, longer);
                }
            }
        }
        share.bytes += share.head.add(
            self.head,
            1,
            split_range(config.vocab_size, ranks, rank).len(),
            hidden,
            1.0,
        );
        share
    }
}

impl Matrices {
    /// Adds `count` matrices, whose products take `longer` than others, and returns their bytes.
    fn add(
        &mut self,
        format: WeightFormat,
        count: usize,
        rows: usize,
        cols: usize,
        longer: f64,
    ) -> usize {
        let index = WeightFormat::ALL
            .iter()
            .position(|other| *other == format)
            .expect("ALL lists every format");
        let bytes = count * format.packed_bytes(rows, cols);
        self.bytes[index] += bytes as f64;
        self.elements[index] += (count * rows * cols) as f64 * longer;
        bytes
    }
}
