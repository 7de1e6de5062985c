//! Activations, weight formats, packed weight matrices, balanced splits and a checkpoint reader that reads only what a rank owns.
