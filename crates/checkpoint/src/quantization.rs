//! Matrices of codes that are several tensors in a safetensors file, and what `config.json` says of
//! them.

use safetensors::Dtype;
use serde_json::Value;
use tensor::WeightFormat;

use crate::{
    Checkpoint, CheckpointError,
    checkpoint::Tensor,
    stored::coded::{Coded, Codes, Groups, Meaning, ScaleFormat, Scales, Zeros, packed_format},
};

/// `quantization_config` of `config.json`, as far as the weights' own shapes leave it open.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quantization {
    /// Bits of the codes; several if parts of the model differ.
    bits: Vec<u64>,
    group_size: Option<usize>,
    block: Option<[usize; 2]>,
    /// Whether GPTQ's zero points are stored as they are, and not less one.
    gptq_v2: bool,
    /// What the config calls the method, if it is one of the two that share names of tensors.
    awq: bool,
    gptq: bool,
    /// Whether all groups of the config have zero points.
    asymmetric: bool,
}

impl Quantization {
    /// Reads the parsed `config.json`. A value of another type counts as absent; where the tensors
    /// then do not fit, the loader names them.
    pub(crate) fn parse(config: &Value) -> Self {
        let own = &config["quantization_config"];
        let groups = own["config_groups"].as_object();
        let weights =
            || groups.into_iter().flat_map(|groups| groups.values()).map(|g| &g["weights"]);
        let size = |value: &Value| value.as_u64().and_then(|size| usize::try_from(size).ok());
        let pair = |value: &Value| Some([size(value.get(0)?)?, size(value.get(1)?)?]);
        let sizes: Vec<_> = weights()
            .map(|weights| size(&weights["group_size"]))
            .chain([size(&own["group_size"])])
            .flatten()
            .collect();
        Self {
            bits: weights()
                .map(|weights| &weights["num_bits"])
                .chain([&own["bits"]])
                .filter_map(Value::as_u64)
                .collect(),
            group_size: match sizes[..] {
                [one] if one > 0 => Some(one),
                _ => None,
            },
            block: pair(&own["weight_block_size"])
                .or_else(|| weights().find_map(|weights| pair(&weights["block_structure"])))
                .filter(|block| !block.contains(&0)),
            gptq_v2: own["checkpoint_format"].as_str() == Some("gptq_v2"),
            awq: own["quant_method"].as_str() == Some("awq"),
            gptq: own["quant_method"].as_str() == Some("gptq"),
            asymmetric: weights().next().is_some()
                && weights().all(|weights| weights["symmetric"] == false),
        }
    }
}

/// The tensors that may stand for `NAME.weight`.
const PARTS: [&str; 2] = ["qweight", "weight_packed"];

/// Whether a matrix is stored as codes in other tensors.
pub(crate) fn is_coded(checkpoint: &Checkpoint, name: &str) -> bool {
    parts(checkpoint, name).is_some()
}

fn parts<'a>(checkpoint: &'a Checkpoint, name: &str) -> Option<(&'static str, &'a Tensor)> {
    let base = name.strip_suffix("weight")?;
    PARTS.iter().find_map(|part| Some((*part, checkpoint.get(&format!("{base}{part}"))?)))
}

/// The packed format of codes; `None` if `tensor` does not hold codes.
pub(crate) fn format_of(tensor: &Tensor) -> Option<WeightFormat> {
    match tensor.dtype()? {
        Dtype::F8_E4M3 => Some(packed_format(Meaning::E4m3)),
        Dtype::I8 => Some(packed_format(Meaning::Signed)),
        _ => None,
    }
}

/// The packed format of a matrix whose codes are in other tensors.
pub(crate) fn format_of_parts(checkpoint: &Checkpoint, name: &str) -> Option<WeightFormat> {
    let (_, tensor) = parts(checkpoint, name)?;
    let meaning = if tensor.dtype() == Some(Dtype::U8) { Meaning::E2m1 } else { Meaning::Unsigned };
    Some(packed_format(meaning))
}

/// The matrix `name` `[rows, cols]`; `None` if no tensor holds codes of it.
pub(crate) fn open(
    checkpoint: &Checkpoint,
    name: &str,
    shape: [usize; 2],
) -> Option<Result<Coded, CheckpointError>> {
    let base = name.strip_suffix("weight")?;
    let open = Open { checkpoint, base, shape, quantization: checkpoint.quantization() };
    if let Some(tensor) = checkpoint.get(name) {
        return match tensor.dtype()? {
            Dtype::F8_E4M3 => Some(open.scaled(tensor, Meaning::E4m3)),
            Dtype::I8 => Some(open.scaled(tensor, Meaning::Signed)),
            _ => None,
        };
    }
    let (part, tensor) = parts(checkpoint, name)?;
    Some(match (part, tensor.dtype()) {
        ("qweight", Some(Dtype::I32)) if open.is_awq(tensor) => open.awq(tensor),
        ("qweight", Some(Dtype::I32)) => open.gptq(tensor),
        ("weight_packed", Some(Dtype::I32)) => open.packed(tensor),
        ("weight_packed", Some(Dtype::U8)) => open.fp4(tensor),
        (_, other) => Err(open.wrong(tensor, format!("{other:?}"), "I32, or U8 of 4-bit floats")),
    })
}

struct Open<'a> {
    checkpoint: &'a Checkpoint,
    /// The name without its last part.
    base: &'a str,
    shape: [usize; 2],
    quantization: &'a Quantization,
}

impl Open<'_> {
    fn wrong(
        &self,
        tensor: &Tensor,
        found: impl ToString,
        expected: impl ToString,
    ) -> CheckpointError {
        CheckpointError::Quantization {
            file: tensor.path().to_owned(),
            tensor: tensor.name.to_string(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    fn part(&self, part: &str) -> Option<&Tensor> {
        self.checkpoint.get(&format!("{}{part}", self.base))
    }

    fn need(&self, part: &str) -> Result<&Tensor, CheckpointError> {
        self.part(part).ok_or_else(|| self.checkpoint.no_tensor(&format!("{}{part}", self.base)))
    }

    fn expect(&self, tensor: &Tensor, shape: [usize; 2]) -> Result<(), CheckpointError> {
        tensor.expect_shape(&shape)
    }

    /// The scale tensor as a matrix: a scalar and a vector have one column.
    fn scales(
        &self,
        tensor: &Tensor,
        transposed: bool,
    ) -> Result<(Scales, [usize; 2]), CheckpointError> {
        let format = match tensor.dtype() {
            Some(Dtype::F32) => ScaleFormat::F32,
            Some(Dtype::F16) => ScaleFormat::F16,
            Some(Dtype::BF16) => ScaleFormat::Bf16,
            Some(Dtype::F8_E4M3) => ScaleFormat::E4m3,
            Some(Dtype::U8 | Dtype::F8_E8M0) => ScaleFormat::E8m0,
            other => return Err(self.wrong(tensor, format!("{other:?}"), "a format of scales")),
        };
        let shape = match tensor.shape[..] {
            [] => [1, 1],
            [rows] => [rows, 1],
            [rows, cols] => [rows, cols],
            _ => return Err(self.wrong(tensor, format!("{:?}", tensor.shape), "a matrix")),
        };
        let region = tensor.region(shape[0], shape[1] * format.bytes());
        Ok((Scales { region, format, transposed, rows: 1, divisor: 1.0 }, shape))
    }

    /// FP8 and INT8 codes, one a byte.
    fn scaled(&self, tensor: &Tensor, meaning: Meaning) -> Result<Coded, CheckpointError> {
        let [rows, cols] = self.shape;
        self.expect(tensor, self.shape)?;
        if let Some(zeros) = self.part("weight_zero_point") {
            return Err(self.wrong(zeros, "zero points of whole bytes", "symmetric codes"));
        }
        let scale = match self.part("weight_scale_inv") {
            Some(scale) => scale,
            None => self.need("weight_scale")?,
        };
        let (mut scales, shape) = self.scales(scale, false)?;
        let [block_rows, block_cols] = self.quantization.block.unwrap_or([128, 128]);
        let blocks = [rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
        let by_block = self.quantization.block.is_some() || scale.name.ends_with("_inv");
        let size = if by_block && shape == blocks {
            scales.rows = block_rows;
            block_cols
        } else if shape == [1, 1] {
            scales.rows = rows.max(1);
            cols.max(1)
        } else if shape[0] == rows && shape[1] > 0 && cols.is_multiple_of(shape[1]) {
            (cols / shape[1]).max(1)
        } else {
            let expected = format!("{blocks:?}, [{rows}, 1] or one number");
            return Err(self.wrong(scale, format!("the shape {:?}", scale.shape), expected));
        };
        Ok(Coded {
            shape: self.shape,
            codes: Codes::Rows { region: tensor.region(rows, cols), bits: 8 },
            meaning,
            scales,
            zeros: Zeros::Constant(0.0),
            groups: Groups::Size(size),
        })
    }

    /// Checks the bits that the shapes state against those of the config.
    fn check_bits(&self, tensor: &Tensor, bits: usize) -> Result<(), CheckpointError> {
        let stated = &self.quantization.bits;
        if ![4, 8].contains(&bits) || !stated.is_empty() && !stated.contains(&(bits as u64)) {
            let found = format!("the shape {:?}, which means {bits} bits", tensor.shape);
            let expected = if stated.is_empty() {
                "4 or 8 bits".to_owned()
            } else {
                format!("the bits of config.json, {stated:?}, of which 4 and 8 are read")
            };
            return Err(self.wrong(tensor, found, expected));
        }
        Ok(())
    }

    /// Columns of a group, for `groups` groups.
    fn group_size(&self, scale: &Tensor, groups: usize) -> Result<usize, CheckpointError> {
        let cols = self.shape[1];
        let size = match self.quantization.group_size {
            _ if groups == 1 => cols,
            Some(size) => size,
            None => cols.div_ceil(groups.max(1)),
        };
        if groups == 0 || size == 0 || cols.div_ceil(size) != groups {
            let found = format!("{groups} groups");
            let expected = format!("groups of {size} that cover {cols} columns");
            return Err(self.wrong(scale, found, expected));
        }
        Ok(size)
    }

    /// The groups, of consecutive columns or by an index.
    fn groups(
        &self,
        index: Option<&Tensor>,
        scale: &Tensor,
        groups: usize,
    ) -> Result<Groups, CheckpointError> {
        let cols = self.shape[1];
        let Some(tensor) = index else {
            return Ok(Groups::Size(self.group_size(scale, groups)?));
        };
        if tensor.dtype() != Some(Dtype::I32) || tensor.shape != [cols] {
            let found = format!("{:?} {:?}", tensor.dtype(), tensor.shape);
            return Err(self.wrong(tensor, found, format!("I32 [{cols}]")));
        }
        let mut words = vec![0_u32; cols];
        let region = tensor.region(1, cols * 4);
        let bytes = bytemuck::cast_slice_mut(&mut words);
        region.read(0..1, 0..cols * 4, bytes, &mut Vec::new())?;
        if let Some(word) = words.iter().find(|word| **word as usize >= groups) {
            return Err(self.wrong(tensor, format!("group {word}"), format!("below {groups}")));
        }
        if let Ok(size) = self.group_size(scale, groups)
            && words.iter().enumerate().all(|(col, group)| *group as usize == col / size)
        {
            return Ok(Groups::Size(size));
        }
        Ok(Groups::Index(words))
    }

    fn is_awq(&self, tensor: &Tensor) -> bool {
        let [rows, cols] = self.shape;
        let other = tensor.shape == [cols, rows / 8] && rows != cols / 8;
        self.quantization.awq || !self.quantization.gptq && other
    }

    /// `qzeros`, whose words have several zero points each.
    fn zero_points(&self, shape: [usize; 2]) -> Result<&Tensor, CheckpointError> {
        let zeros = self.need("qzeros")?;
        if zeros.dtype() != Some(Dtype::I32) {
            return Err(self.wrong(zeros, format!("{:?}", zeros.dtype()), "I32"));
        }
        self.expect(zeros, shape)?;
        Ok(zeros)
    }

    fn gptq(&self, tensor: &Tensor) -> Result<Coded, CheckpointError> {
        let [rows, cols] = self.shape;
        let bits = match tensor.shape[..] {
            [words, out] if out == rows && cols > 0 => words.saturating_mul(32) / cols,
            _ => 0,
        };
        self.check_bits(tensor, bits)?;
        let per = 32 / bits;
        self.expect(tensor, [cols.div_ceil(per), rows])?;
        let scale = self.need("scales")?;
        let (scales, [groups, _]) = self.scales(scale, true)?;
        self.expect(scale, [groups, rows])?;
        let zeros = self.zero_points([groups, rows.div_ceil(per)])?;
        let add = if self.quantization.gptq_v2 { 0.0 } else { 1.0 };
        Ok(Coded {
            shape: self.shape,
            codes: Codes::Columns { region: tensor.region(cols.div_ceil(per), rows * 4), bits },
            meaning: Meaning::Unsigned,
            scales,
            zeros: Zeros::Columns {
                region: zeros.region(groups, rows.div_ceil(per) * 4),
                bits,
                add,
            },
            groups: self.groups(self.part("g_idx"), scale, groups)?,
        })
    }

    fn awq(&self, tensor: &Tensor) -> Result<Coded, CheckpointError> {
        let [rows, cols] = self.shape;
        let bits = match tensor.shape[..] {
            [inputs, words] if inputs == cols && rows > 0 => words.saturating_mul(32) / rows,
            _ => 0,
        };
        self.check_bits(tensor, bits)?;
        if bits != 4 {
            return Err(self.wrong(tensor, format!("{bits} bits"), "4 bits of AWQ"));
        }
        self.expect(tensor, [cols, rows.div_ceil(8)])?;
        let scale = self.need("scales")?;
        let (scales, [groups, _]) = self.scales(scale, true)?;
        self.expect(scale, [groups, rows])?;
        let zeros = self.zero_points([groups, rows.div_ceil(8)])?;
        Ok(Coded {
            shape: self.shape,
            codes: Codes::Awq { region: tensor.region(cols, rows.div_ceil(8) * 4) },
            meaning: Meaning::Unsigned,
            scales,
            zeros: Zeros::Awq { region: zeros.region(groups, rows.div_ceil(8) * 4) },
            groups: Groups::Size(self.group_size(scale, groups)?),
        })
    }

    /// compressed-tensors, pack-quantized.
    fn packed(&self, tensor: &Tensor) -> Result<Coded, CheckpointError> {
        let [rows, cols] = self.shape;
        let bits = match tensor.shape[..] {
            [out, words] if out == rows && words == cols.div_ceil(8) => 4,
            [out, words] if out == rows && words == cols.div_ceil(4) => 8,
            [_, words] if cols > 0 => words.saturating_mul(32) / cols,
            _ => 0,
        };
        self.check_bits(tensor, bits)?;
        let words = cols.div_ceil(32 / bits);
        self.expect(tensor, [rows, words])?;
        if let Some(stated) = self.part("weight_shape")
            && (stated.dtype(), &stated.shape[..]) == (Some(Dtype::I64), &[2])
        {
            let mut found = [0_u64; 2];
            let bytes = bytemuck::cast_slice_mut(&mut found);
            stated.region(1, 16).read(0..1, 0..16, bytes, &mut Vec::new())?;
            if found != [rows as u64, cols as u64] {
                let expected = format!("{:?}", self.shape);
                return Err(self.wrong(stated, format!("{found:?}"), expected));
            }
        }
        let scale = self.need("weight_scale")?;
        let (scales, [_, groups]) = self.scales(scale, false)?;
        self.expect(scale, [rows, groups])?;
        let stored = match self.quantization.asymmetric {
            true => Some(self.need("weight_zero_point")?),
            false => self.part("weight_zero_point"),
        };
        let zeros = match stored {
            None => Zeros::Constant((1_u32 << (bits - 1)) as f32),
            Some(zeros) => {
                let packed = rows.div_ceil(32 / bits);
                self.expect(zeros, [packed, groups])?;
                if zeros.dtype() != Some(Dtype::I32) {
                    return Err(self.wrong(zeros, format!("{:?}", zeros.dtype()), "I32"));
                }
                Zeros::Rows { region: zeros.region(packed, groups * 4), bits }
            }
        };
        Ok(Coded {
            shape: self.shape,
            codes: Codes::Rows { region: tensor.region(rows, words * 4), bits },
            meaning: Meaning::Unsigned,
            scales,
            zeros,
            groups: self.groups(self.part("weight_g_idx"), scale, groups)?,
        })
    }

    /// NVFP4 and MXFP4.
    fn fp4(&self, tensor: &Tensor) -> Result<Coded, CheckpointError> {
        let [rows, cols] = self.shape;
        let bytes = cols.div_ceil(2);
        self.expect(tensor, [rows, bytes])?;
        let scale = self.need("weight_scale")?;
        let (mut scales, [_, groups]) = self.scales(scale, false)?;
        self.expect(scale, [rows, groups])?;
        if scales.format == ScaleFormat::E4m3 {
            let global = self.need("weight_global_scale")?;
            if global.dtype() != Some(Dtype::F32) || global.shape.iter().product::<usize>() != 1 {
                let found = format!("{:?} {:?}", global.dtype(), global.shape);
                return Err(self.wrong(global, found, "one F32"));
            }
            let mut divisor = [0.0_f32];
            let bytes = bytemuck::cast_slice_mut(&mut divisor);
            global.region(1, 4).read(0..1, 0..4, bytes, &mut Vec::new())?;
            if !(divisor[0].is_finite() && divisor[0] > 0.0) {
                return Err(self.wrong(global, divisor[0], "a finite number above 0"));
            }
            scales.divisor = divisor[0];
        }
        let expected = if scales.format == ScaleFormat::E4m3 { 16 } else { 32 };
        if groups != cols.div_ceil(expected) {
            let expected = format!("groups of {expected} that cover {cols} columns");
            return Err(self.wrong(scale, format!("{groups} groups"), expected));
        }
        Ok(Coded {
            shape: self.shape,
            codes: Codes::Rows { region: tensor.region(rows, bytes), bits: 4 },
            meaning: Meaning::E2m1,
            scales,
            zeros: Zeros::Constant(0.0),
            groups: Groups::Size(expected),
        })
    }
}
