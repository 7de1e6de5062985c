//! The texts that embedding models and rerankers of the Qwen3 family take.

use crate::{ControlTokens, Tokenizer, TokenizerError};

/// The token that ends every text of an embedding model.
const END_OF_TEXT: &str = "<|endoftext|>";
/// What a reranker judges by unless the caller says otherwise.
const DEFAULT_TASK: &str =
    "Given a web search query, retrieve relevant passages that answer the query";
/// The start of a reranker's prompt.
const PREFIX: &str = "<|im_start|>system\nJudge whether the Document meets the requirements based \
                      on the Query and the Instruct provided. Note that the answer can only be \
                      \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n";
/// The end of a reranker's prompt.
const SUFFIX: &str = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";

/// Why a text cannot be encoded for an embedding model or a reranker.
#[derive(Debug, thiserror::Error)]
pub enum PoolingTextError {
    /// The tokenizer fails.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The tokenizer lacks the token that ends a text.
    #[error("the tokenizer has no token {END_OF_TEXT}, expected that of an embedding model")]
    NoEnd,
    /// An answer of the reranker is not one token.
    #[error("\"{answer}\" has {tokens} tokens, expected 1, as in the tokenizer of a reranker")]
    Answer {
        /// `yes` or `no`.
        answer: &'static str,
        /// Its tokens.
        tokens: usize,
    },
}

fn encode(
    tokenizer: &Tokenizer,
    text: &str,
    control: ControlTokens,
) -> Result<Vec<u32>, TokenizerError> {
    match control {
        ControlTokens::Trusted => tokenizer.encode_rendered(text),
        ControlTokens::Literal => tokenizer.encode_literal(text),
    }
}

/// A query with its task, as embedding models take it. Documents have no task.
pub fn instructed(task: &str, query: &str) -> String {
    format!("Instruct: {task}\nQuery:{query}")
}

/// The ids of a text for an embedding model: those of the text, then `<|endoftext|>`, whose hidden
/// state is the embedding.
///
/// # Errors
/// When the tokenizer fails or has no such token.
pub fn embedding_tokens(
    tokenizer: &Tokenizer,
    text: &str,
    control: ControlTokens,
) -> Result<Vec<u32>, PoolingTextError> {
    let end = tokenizer.added_token(END_OF_TEXT).ok_or(PoolingTextError::NoEnd)?;
    let mut tokens = encode(tokenizer, text, control)?;
    tokens.push(end);
    Ok(tokens)
}

/// The ids of "yes" and "no".
///
/// # Errors
/// When the tokenizer fails, or one of them is not one token.
pub fn yes_and_no(tokenizer: &Tokenizer) -> Result<[u32; 2], PoolingTextError> {
    let id = |answer| match tokenizer.encode_rendered(answer)?[..] {
        [id] => Ok(id),
        ref other => Err(PoolingTextError::Answer { answer, tokens: other.len() }),
    };
    Ok([id("yes")?, id("no")?])
}

/// Writes the prompts of a reranker.
#[derive(Clone, Debug)]
pub struct RerankPrompt {
    task: String,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

impl RerankPrompt {
    /// Prompts that ask whether a document fits `task`; `None` stands for a search in the web.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn new(tokenizer: &Tokenizer, task: Option<&str>) -> Result<Self, PoolingTextError> {
        let (prefix, suffix) =
            (tokenizer.encode_rendered(PREFIX)?, tokenizer.encode_rendered(SUFFIX)?);
        Ok(Self { task: task.unwrap_or(DEFAULT_TASK).to_owned(), prefix, suffix })
    }

    /// The ids of the prompt for one document. The two texts are encoded as `control` says.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn tokens(
        &self,
        tokenizer: &Tokenizer,
        query: &str,
        document: &str,
        control: ControlTokens,
    ) -> Result<Vec<u32>, PoolingTextError> {
        let task = &self.task;
        let body = format!("<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}");
        let mut tokens = self.prefix.clone();
        tokens.extend(encode(tokenizer, &body, control)?);
        tokens.extend(&self.suffix);
        Ok(tokens)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;

    /// The ids that the published tokenizer gives, where `../shared` exists beside the workspace.
    #[test]
    fn ids_are_those_of_the_published_tokenizer() {
        let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
        let Ok(text) = std::fs::read_to_string(shared.join("oracle/embedding-texts.json")) else {
            eprintln!("skipped: no embedding-texts.json in {}", shared.display());
            return;
        };
        let tokenizer = Tokenizer::open(&shared.join("qwen3-tokenizer")).unwrap();
        let cases: Value = serde_json::from_str(&text).unwrap();
        let field = |case: &Value, name: &str| case[name].as_str().unwrap().to_owned();
        for case in cases["embedding"].as_array().unwrap() {
            for control in [ControlTokens::Trusted, ControlTokens::Literal] {
                let ids = embedding_tokens(&tokenizer, &field(case, "text"), control).unwrap();
                assert_eq!(serde_json::json!(ids), case["ids"], "{case}");
            }
        }
        let query = instructed(DEFAULT_TASK, "Explain gravity");
        assert_eq!(query, field(&cases["embedding"][1], "text"));
        let rerank = &cases["rerank"];
        let ids = yes_and_no(&tokenizer).unwrap();
        assert_eq!(serde_json::json!(ids), serde_json::json!([rerank["yes"], rerank["no"]]));
        for case in rerank["prompts"].as_array().unwrap() {
            let prompt = RerankPrompt::new(&tokenizer, Some(&field(case, "instruct"))).unwrap();
            let (query, document) = (field(case, "query"), field(case, "document"));
            for control in [ControlTokens::Trusted, ControlTokens::Literal] {
                let ids = prompt.tokens(&tokenizer, &query, &document, control).unwrap();
                assert_eq!(serde_json::json!(ids), case["ids"], "{case}");
            }
        }
    }
}
