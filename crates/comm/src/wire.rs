//! How f32 payloads travel: as they are, rounded to bf16, or as int8 in groups with a scale.

use std::fmt;
use std::str::FromStr;

/// Elements that share a scale in [`WireFormat::Q8`].
pub const WIRE_GROUP: usize = 32;

/// The encoding of f32 sums between ranks. Sums are formed in f32 whatever travels.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(u8)]
pub enum WireFormat {
    /// 4 bytes an element, exact.
    #[default]
    F32,
    /// 2 bytes an element: the upper half of the f32, rounded to nearest even.
    Bf16,
    /// 36 bytes per group of 32 elements: an f32 scale, then int8.
    Q8,
}

impl WireFormat {
    /// `"f32"`, `"bf16"` or `"q8"`.
    pub fn name(self) -> &'static str {
        match self {
            WireFormat::F32 => "f32",
            WireFormat::Bf16 => "bf16",
            WireFormat::Q8 => "q8",
        }
    }

    /// Bytes that `elements` values take.
    pub fn encoded_bytes(self, elements: usize) -> usize {
        match self {
            WireFormat::F32 => 4 * elements,
            WireFormat::Bf16 => 2 * elements,
            WireFormat::Q8 => elements + 4 * elements.div_ceil(WIRE_GROUP),
        }
    }
}

impl fmt::Display for WireFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The text is none of `f32`, `bf16`, `q8`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("wire format is '{found}', expected f32, bf16 or q8")]
pub struct UnknownWireFormat {
    /// The text.
    pub found: String,
}

impl FromStr for WireFormat {
    type Err = UnknownWireFormat;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [WireFormat::F32, WireFormat::Bf16, WireFormat::Q8]
            .into_iter()
            .find(|format| format.name() == text)
            .ok_or_else(|| UnknownWireFormat { found: text.into() })
    }
}
