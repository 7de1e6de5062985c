//! Tests of whole servers with the bundled model.

mod suite;
