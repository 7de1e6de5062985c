//! The number formats of weights, and how many bytes a packed matrix takes in each.

use std::{fmt, str::FromStr};

/// Output rows interleaved in one panel of a packed matrix.
pub const PANEL: usize = 16;

/// Inputs (columns) that share one quantization scale.
pub const GROUP: usize = 32;

/// How the weights of a matrix are stored, in a file or in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum WeightFormat {
    /// IEEE single precision, 4 bytes a weight.
    F32,
    /// The upper half of an f32, 2 bytes a weight.
    Bf16,
    /// IEEE half precision, 2 bytes a weight.
    F16,
    /// Groups of 32 inputs: an f16 scale and 32 signed bytes, 8.5 bits a weight; weight = scale ·
    /// code.
    Q8,
    /// Groups of 32 inputs: 16 bits for a scale and a zero point, and 32 nibbles, 4.5 bits a
    /// weight; weight = scale · (nibble − zero point).
    Q4,
}

impl WeightFormat {
    /// Every format, widest first.
    pub const ALL: [Self; 5] = [Self::F32, Self::Bf16, Self::F16, Self::Q8, Self::Q4];

    /// The name used on command lines and in reports: `f32`, `bf16`, `f16`, `q8`, `q4`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }

    /// The format in which matrices of these formats can be kept together as they are: their own
    /// where it is one, else F32.
    pub fn common(formats: impl IntoIterator<Item = Self>) -> Self {
        formats
            .into_iter()
            .reduce(|one, other| if one == other { one } else { Self::F32 })
            .unwrap_or(Self::F32)
    }

    /// Whether weights share a scale per group of [`GROUP`] inputs.
    pub fn is_quantized(self) -> bool {
        matches!(self, Self::Q8 | Self::Q4)
    }

    /// Bytes of one row of `cols` weights as a checkpoint stores it (quantized: whole groups),
    /// `None` on overflow.
    pub fn stored_row_bytes(self, cols: usize) -> Option<usize> {
        match self.group_bytes() {
            Some(group) => cols.div_ceil(GROUP).checked_mul(group),
            None => cols.checked_mul(self.element_bytes()),
        }
    }

    /// Bytes of a packed `[rows, cols]` matrix: whole panels of [`PANEL`] rows and, when quantized,
    /// whole groups.
    ///
    /// # Panics
    ///
    /// If the size does not fit in `usize`.
    pub fn packed_bytes(self, rows: usize, cols: usize) -> usize {
        rows.div_ceil(PANEL).checked_mul(self.panel_bytes(cols)).unwrap_or_else(|| {
            panic!("a packed {self} matrix [{rows}, {cols}] exceeds the address space")
        })
    }

    /// Bytes of one panel: [`PANEL`] rows of `cols` weights.
    pub(crate) fn panel_bytes(self, cols: usize) -> usize {
        self.stored_row_bytes(cols).and_then(|row| row.checked_mul(PANEL)).unwrap_or_else(|| {
            panic!("a packed {self} panel of {cols} columns exceeds the address space")
        })
    }

    /// Bytes of one weight of an unquantized format, and of one code byte of a quantized one.
    pub fn element_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Q8 | Self::Q4 => 1,
        }
    }

    /// Bytes of one group of one row, the scale and the codes; `None` in unquantized formats.
    pub fn group_bytes(self) -> Option<usize> {
        match self {
            Self::Q8 => Some(2 + GROUP),
            Self::Q4 => Some(2 + GROUP / 2),
            Self::F32 | Self::Bf16 | Self::F16 => None,
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no weight format.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("unknown weight format {found:?}, expected one of f32, bf16, f16, q8, q4")]
pub struct UnknownFormat {
    /// The name as given.
    pub found: String,
}

impl FromStr for WeightFormat {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|format| format.name() == text)
            .ok_or_else(|| UnknownFormat { found: text.to_owned() })
    }
}
