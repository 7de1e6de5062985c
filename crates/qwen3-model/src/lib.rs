//! The Qwen3 language models, dense and mixture-of-experts, split over any number of ranks.
