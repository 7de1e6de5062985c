//! What a decoder is made of, for one rank of many.
