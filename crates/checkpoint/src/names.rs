//! The prefixes that programs put before the names of tensors.

/// What a decoder's names begin with in files: as causal language models have them, wrapped in a
/// larger model, saved from a parallel training, and saved without the head.
const DECODERS: [&str; 6] =
    ["model.", "model.language_model.", "language_model.model.", "module.model.", "module.", ""];

/// What the names of tensors outside of the decoder may begin with.
const OUTER: [&str; 2] = ["module.", "language_model."];

/// Gives tensors the names that causal language models of transformers have: `model.layers.…`,
/// `lm_head.weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Renaming {
    decoder: &'static str,
}

impl Renaming {
    /// Finds the prefix from the tensors that every decoder has.
    pub(crate) fn new(contains: impl Fn(&str) -> bool) -> Self {
        let known = |prefix: &&&str| {
            ["embed_tokens.weight", "layers.0.input_layernorm.weight"]
                .iter()
                .any(|name| contains(&format!("{prefix}{name}")))
        };
        Self { decoder: DECODERS.iter().find(known).copied().unwrap_or("model.") }
    }

    /// The name of the tensor that files call `name`.
    pub(crate) fn apply(&self, name: String) -> String {
        if self.decoder == "model." {
            return name;
        }
        let outer = OUTER.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(&name);
        if ["lm_head.", "score."].iter().any(|head| outer.starts_with(head)) {
            return outer.to_owned();
        }
        match name.strip_prefix(self.decoder) {
            Some(rest) => format!("model.{rest}"),
            None => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prefix_is_removed() {
        for (decoder, head) in [
            ("model.", "lm_head.weight"),
            ("model.language_model.", "lm_head.weight"),
            ("language_model.model.", "language_model.lm_head.weight"),
            ("module.model.", "module.lm_head.weight"),
            ("module.", "module.lm_head.weight"),
            ("", "lm_head.weight"),
        ] {
            let names = ["embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight"];
            let stored: Vec<_> = names.iter().map(|name| format!("{decoder}{name}")).collect();
            let renaming = Renaming::new(|name| stored.iter().any(|other| other == name));
            for (name, stored) in names.iter().zip(stored) {
                assert_eq!(renaming.apply(stored), format!("model.{name}"));
            }
            assert_eq!(renaming.apply(head.to_owned()), "lm_head.weight", "{decoder}");
        }
    }

    #[test]
    fn names_of_other_parts_stay() {
        let renaming = Renaming::new(|name| name == "model.language_model.embed_tokens.weight");
        for name in ["model.visual.blocks.0.attn.qkv.weight", "mtp.fc.weight"] {
            assert_eq!(renaming.apply(name.to_owned()), name);
        }
        // A file of single matrices, as tests have them.
        assert_eq!(Renaming::new(|_| false).apply("w".to_owned()), "w");
    }
}
