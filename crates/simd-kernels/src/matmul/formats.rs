//! How float weights are stored, as types that the vector kernels are generic over.

/// The storage of the sixteen weights of a column of a panel.
pub(super) trait Column {
    /// One weight.
    type Bits: Copy;
    /// How a kernel turns the bits into f32.
    const WIDTH: Width;
}

/// The conversion that a kernel applies to the weights of a column.
pub(super) enum Width {
    F32,
    Bf16,
    F16,
    /// None: two columns of bf16 are brought into the order of dot products of pairs.
    Pairs,
}

/// Columns of `PanelData::F32`.
pub(super) struct F32;
/// Columns of `PanelData::Bf16`.
pub(super) struct Bf16;
/// Columns of `PanelData::F16`.
pub(super) struct F16;

impl Column for F32 {
    type Bits = f32;
    const WIDTH: Width = Width::F32;
}

impl Column for Bf16 {
    type Bits = u16;
    const WIDTH: Width = Width::Bf16;
}

impl Column for F16 {
    type Bits = u16;
    const WIDTH: Width = Width::F16;
}
