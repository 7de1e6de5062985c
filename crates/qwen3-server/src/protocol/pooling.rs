//! Embeddings, reranking and scores.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::completions::Prompt;
use crate::body::Accepted;

/// Fields of OpenAI's clients that do not change an embedding.
pub const ACCEPTED: &[Accepted] = &[Accepted::any("user")];

/// Texts to embed.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingRequest {
    /// The model's name.
    pub model: Option<String>,
    /// The texts. Token ids are computed as they are; nothing is appended to them.
    pub input: Prompt,
    /// How the numbers are written; `float` unless set.
    pub encoding_format: Option<EncodingFormat>,
    /// Keeps so many numbers of each embedding and normalizes them.
    pub dimensions: Option<usize>,
    /// The texts are queries for this task.
    pub instruction: Option<String>,
}

/// How numbers are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EncodingFormat {
    /// A list of numbers.
    #[default]
    Float,
    /// The base64 of f32 numbers in little-endian order.
    Base64,
}

/// The embeddings.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EmbeddingResponse {
    /// Always `list`.
    pub object: &'static str,
    /// One embedding per text.
    pub data: Vec<EmbeddingEntry>,
    /// The model's name.
    pub model: String,
    /// Tokens of the texts.
    pub usage: PoolingUsage,
}

/// One embedding.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EmbeddingEntry {
    /// Always `embedding`.
    pub object: &'static str,
    /// The text's index in the request.
    pub index: usize,
    /// The numbers.
    pub embedding: Numbers,
}

/// Numbers in one of the formats.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Numbers {
    /// As numbers.
    Float(Vec<f32>),
    /// As base64.
    Base64(String),
}

/// Tokens of a request that generates none.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct PoolingUsage {
    /// Tokens of all texts.
    pub prompt_tokens: usize,
    /// The same.
    pub total_tokens: usize,
}

/// Documents to rank for a query.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RerankRequest {
    /// The model's name.
    pub model: Option<String>,
    /// The query.
    pub query: String,
    /// The documents.
    pub documents: Vec<Document>,
    /// Returns only so many of the best documents.
    pub top_n: Option<usize>,
    /// Whether the documents are returned with their scores; true unless set.
    pub return_documents: Option<bool>,
    /// What it means that a document meets the query.
    pub instruction: Option<String>,
}

/// A document: a text, or an object that holds one.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or an object with the field text")]
pub enum Document {
    /// A text.
    Text(String),
    /// An object.
    Object(TextDocument),
}

/// An object that holds a text.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TextDocument {
    /// The text.
    pub text: String,
}

impl Document {
    /// The text.
    pub fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Object(TextDocument { text }) => text,
        }
    }
}

/// The documents, the most relevant first.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RerankResponse {
    /// The answer's name.
    pub id: String,
    /// The model's name.
    pub model: String,
    /// The documents.
    pub results: Vec<RerankEntry>,
    /// Tokens of all prompts.
    pub usage: PoolingUsage,
}

/// A document with its score.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RerankEntry {
    /// The document's index in the request.
    pub index: usize,
    /// The document, unless `return_documents` is false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub document: Option<TextDocument>,
    /// The probability that the document meets the query.
    pub relevance_score: f32,
}

/// Pairs of texts to score.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScoreRequest {
    /// The model's name.
    pub model: Option<String>,
    /// One query, or as many as there are documents.
    pub text_1: Texts,
    /// The documents.
    pub text_2: Texts,
    /// What it means that a document meets the query.
    pub instruction: Option<String>,
}

/// One text or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
pub enum Texts {
    /// One text.
    One(String),
    /// Several texts.
    Many(Vec<String>),
}

impl Texts {
    /// The texts.
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

/// The scores of pairs.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ScoreResponse {
    /// The answer's name.
    pub id: String,
    /// Always `list`.
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// One score per pair.
    pub data: Vec<ScoreEntry>,
    /// Tokens of all prompts.
    pub usage: PoolingUsage,
}

/// The score of a pair.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ScoreEntry {
    /// The pair's index.
    pub index: usize,
    /// Always `score`.
    pub object: &'static str,
    /// The probability that the document meets the query.
    pub score: f32,
}
