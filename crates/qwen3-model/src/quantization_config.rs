//! `quantization_config` of `config.json`: which methods can be read.

use serde_json::Value;

use crate::fields::{ConfigError, Fields};

/// The values of `quant_method` whose weights can be read.
const METHODS: &str = "\"fp8\", \"gptq\", \"awq\", \"compressed-tensors\" or \"group32\"";

/// The bits of weights that this project quantized; checks that weights of other programs can be
/// read.
pub(crate) fn quantization_bits(fields: &Fields<'_>) -> Result<Option<u32>, ConfigError> {
    let Some(quantization) = fields.object("quantization_config")?.filter(|own| !own.is_empty())
    else {
        return Ok(None);
    };
    match quantization.string("quant_method")? {
        Some("group32") => {}
        Some("fp8" | "gptq") => {
            check_sizes(&quantization)?;
            return Ok(None);
        }
        Some("awq") => {
            check_sizes(&quantization)?;
            return match quantization.string("version")? {
                None | Some("gemm" | "GEMM") => Ok(None),
                Some(other) => {
                    Err(quantization.unsupported("version", format!("{other:?}"), "\"gemm\""))
                }
            };
        }
        Some("compressed-tensors") => {
            let expected = "pack-quantized, int-quantized, float-quantized, naive-quantized, \
                            nvfp4-pack-quantized, mxfp4-pack-quantized or mixed-precision";
            return match quantization.string("format")? {
                None => Ok(None),
                Some(format) if expected.split([' ', ',']).any(|known| known == format) => Ok(None),
                Some(other) => {
                    Err(quantization.unsupported("format", format!("{other:?}"), expected))
                }
            };
        }
        Some(other) => {
            return Err(quantization.unsupported("quant_method", format!("{other:?}"), METHODS));
        }
        None => return Err(quantization.missing("quant_method", METHODS)),
    }
    match quantization.count("bits", 0)? {
        Some(8) => Ok(Some(8)),
        Some(4) => Ok(Some(4)),
        Some(other) => Err(quantization.unsupported("bits", other, "8 or 4")),
        None => Err(quantization.missing("bits", "8 or 4")),
    }
}

/// Checks the sizes of codes, groups and blocks, which the crate `checkpoint` compares with the
/// shapes of tensors as far as they are stated.
fn check_sizes(quantization: &Fields<'_>) -> Result<(), ConfigError> {
    quantization.count("bits", 1)?;
    if let Some(size) = quantization.value("group_size") {
        let expected = "a whole number, at least 1, or -1 for whole rows";
        match size.as_i64() {
            None => return Err(quantization.mistyped("group_size", size, expected)),
            Some(size) if size < 1 && size != -1 => {
                return Err(quantization.range("group_size", size, expected));
            }
            Some(_) => {}
        }
    }
    if let Some(block) = quantization.value("weight_block_size") {
        let expected = "two whole numbers, each at least 1";
        let sizes: Option<Vec<u64>> =
            block.as_array().and_then(|sizes| sizes.iter().map(Value::as_u64).collect());
        match sizes.as_deref() {
            Some([rows, columns]) if *rows > 0 && *columns > 0 => {}
            Some(_) => return Err(quantization.range("weight_block_size", block, expected)),
            None => return Err(quantization.mistyped("weight_block_size", block, expected)),
        }
    }
    Ok(())
}
