//! `POST /v1/embeddings`, `/v1/rerank` and `/v1/score`.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use engine::qwen3_model::pooling::{check_dimensions, embedding};
use engine::{Event, Pooling, Stream, SubmitError};
use qwen3_text::{PoolingTextError, RerankPrompt, embedding_tokens, instructed};

use super::{From, json, ok, respond_to_prompt};
use crate::error::{ApiError, Dialect, ErrorBody};
use crate::gate::Caller;
use crate::protocol::completions::Prompt;
use crate::protocol::pooling::{
    ACCEPTED, Document, EmbeddingEntry, EmbeddingRequest, EmbeddingResponse, EncodingFormat,
    Numbers, PoolingUsage, RerankEntry, RerankRequest, RerankResponse, ScoreEntry, ScoreRequest,
    ScoreResponse, TextDocument,
};
use crate::request_id;
use crate::service::{ServedModel, Service, now};

/// Texts of one request, as in OpenAI's API.
const MOST_TEXTS: usize = 2048;
/// Texts of one request that are with the engine at the same time.
const TOGETHER: usize = 32;

/// Embeds texts.
#[utoipa::path(post, path = "/v1/embeddings", request_body = EmbeddingRequest,
    responses((status = 200, body = EmbeddingResponse), (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody)))]
pub async fn embeddings(
    State(service): State<Arc<Service>>,
    caller: From,
    request: Request,
) -> Response<Body> {
    let answer = async {
        let body: EmbeddingRequest = json(&service, request, ACCEPTED).await?;
        let model = Arc::clone(service.model_named(body.model.as_deref())?);
        if !model.pooling.embeds {
            let message = "the model is a reranker; /v1/rerank and /v1/score use it";
            return Err(ApiError::new(StatusCode::BAD_REQUEST, message));
        }
        if let Some(dimensions) = body.dimensions {
            check_dimensions(dimensions, model.pooling.hidden_size)
                .map_err(|error| ApiError::param("dimensions", error.to_string()))?;
        }
        let (input, task) = (body.input, body.instruction);
        let prompts = service.encode(move |model| inputs(model, input, task.as_deref())).await?;
        let usage = usage(&prompts);
        let states = run(&service, &model, &caller, prompts).await?;
        let numbers = |state: Vec<f32>| {
            let numbers = embedding(state, body.dimensions);
            match body.encoding_format.unwrap_or_default() {
                EncodingFormat::Float => Numbers::Float(numbers),
                EncodingFormat::Base64 => {
                    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
                    Numbers::Base64(BASE64_STANDARD.encode(bytes))
                }
            }
        };
        let entry = |(index, state)| EmbeddingEntry {
            object: "embedding",
            index,
            embedding: numbers(state),
        };
        Ok(ok(&EmbeddingResponse {
            object: "list",
            data: states.into_iter().enumerate().map(entry).collect(),
            model: model.name.clone(),
            usage,
        }))
    };
    respond_to_prompt(Dialect::OpenAi, "input", answer.await)
}

/// Ranks documents by their relevance for a query.
#[utoipa::path(post, path = "/v1/rerank", request_body = RerankRequest,
    responses((status = 200, body = RerankResponse), (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody)))]
pub async fn rerank(
    State(service): State<Arc<Service>>,
    caller: From,
    request: Request,
) -> Response<Body> {
    let answer = async {
        let body: RerankRequest = json(&service, request, &[]).await?;
        let model = Arc::clone(service.model_named(body.model.as_deref())?);
        if body.top_n == Some(0) {
            return Err(ApiError::param("top_n", "top_n is 0, expected at least 1"));
        }
        check_count("documents", body.documents.len())?;
        let texts: Vec<String> = body.documents.into_iter().map(Document::into_text).collect();
        let pairs = texts.iter().map(|text| (body.query.clone(), text.clone())).collect();
        let (scores, usage) = scores(&service, &model, &caller, pairs, body.instruction).await?;
        let documents = body.return_documents.unwrap_or(true);
        let entry = |(index, (text, relevance_score))| RerankEntry {
            index,
            document: documents.then_some(TextDocument { text }),
            relevance_score,
        };
        let mut results: Vec<_> = texts.into_iter().zip(scores).enumerate().map(entry).collect();
        results.sort_by(|one, other| other.relevance_score.total_cmp(&one.relevance_score));
        results.truncate(body.top_n.unwrap_or(usize::MAX));
        let id = request_id::new("rerank-");
        Ok(ok(&RerankResponse { id, model: model.name.clone(), results, usage }))
    };
    respond_to_prompt(Dialect::OpenAi, "documents", answer.await)
}

/// Scores pairs of texts.
#[utoipa::path(post, path = "/v1/score", request_body = ScoreRequest,
    responses((status = 200, body = ScoreResponse), (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody)))]
pub async fn score(
    State(service): State<Arc<Service>>,
    caller: From,
    request: Request,
) -> Response<Body> {
    let answer = async {
        let body: ScoreRequest = json(&service, request, &[]).await?;
        let model = Arc::clone(service.model_named(body.model.as_deref())?);
        let (queries, documents) = (body.text_1.into_vec(), body.text_2.into_vec());
        check_count("text_1", queries.len())?;
        check_count("text_2", documents.len())?;
        if queries.len() != 1 && queries.len() != documents.len() {
            let message = format!(
                "{} queries for {} documents, expected 1 or as many as documents",
                queries.len(),
                documents.len()
            );
            return Err(ApiError::param("text_1", message));
        }
        let pairs = queries.into_iter().cycle().zip(documents).collect();
        let (scores, usage) = scores(&service, &model, &caller, pairs, body.instruction).await?;
        let entry = |(index, score)| ScoreEntry { index, object: "score", score };
        Ok(ok(&ScoreResponse {
            id: request_id::new("score-"),
            object: "list",
            created: now(),
            model: model.name.clone(),
            data: scores.into_iter().enumerate().map(entry).collect(),
            usage,
        }))
    };
    respond_to_prompt(Dialect::OpenAi, "text_2", answer.await)
}

fn check_count(param: &str, count: usize) -> Result<(), ApiError> {
    if (1..=MOST_TEXTS).contains(&count) {
        return Ok(());
    }
    Err(ApiError::param(param, format!("{count} texts, expected 1 to {MOST_TEXTS}")))
}

fn usage(prompts: &[Vec<u32>]) -> PoolingUsage {
    let tokens = prompts.iter().map(Vec::len).sum();
    PoolingUsage { prompt_tokens: tokens, total_tokens: tokens }
}

fn prompt_error(error: PoolingTextError) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, error.to_string())
}

/// The tokens of the texts to embed.
fn inputs(
    model: &ServedModel,
    input: Prompt,
    task: Option<&str>,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let texts = match input {
        Prompt::Text(text) => vec![text],
        Prompt::Texts(texts) => texts,
        Prompt::Ids(ids) => return checked_ids(vec![ids]),
        Prompt::IdLists(lists) => return checked_ids(lists),
    };
    check_count("input", texts.len())?;
    let tokens = |text: &String| {
        let query = task.map(|task| instructed(task, text));
        let text = query.as_ref().unwrap_or(text);
        embedding_tokens(&model.tokenizer, text, model.control_tokens).map_err(prompt_error)
    };
    texts.iter().map(tokens).collect()
}

fn checked_ids(lists: Vec<Vec<u32>>) -> Result<Vec<Vec<u32>>, ApiError> {
    check_count("input", lists.len())?;
    match lists.iter().position(Vec::is_empty) {
        Some(index) => Err(ApiError::param(
            "input",
            format!("list {index} has no token, expected at least one"),
        )),
        None => Ok(lists),
    }
}

/// The probability that each document meets its query, and the tokens that this took.
async fn scores(
    service: &Arc<Service>,
    model: &Arc<ServedModel>,
    caller: &Caller,
    pairs: Vec<(String, String)>,
    instruction: Option<String>,
) -> Result<(Vec<f32>, PoolingUsage), ApiError> {
    let scorer = model.pooling.scorer.clone().map_err(|reason| {
        ApiError::new(StatusCode::BAD_REQUEST, format!("the model ranks no documents: {reason}"))
    })?;
    let prompts = service.encode(move |model| {
        let tokenizer = &model.tokenizer;
        let prompts = RerankPrompt::new(tokenizer, instruction.as_deref()).map_err(prompt_error)?;
        let prompt = |(query, document): &(String, String)| {
            let tokens = prompts.tokens(tokenizer, query, document, model.control_tokens);
            tokens.map_err(prompt_error)
        };
        pairs.iter().map(prompt).collect::<Result<Vec<_>, _>>()
    });
    let prompts = prompts.await?;
    let usage = usage(&prompts);
    let states = run(service, model, caller, prompts).await?;
    Ok((states.iter().map(|state| scorer.probability(state)).collect(), usage))
}

/// The hidden states of the prompts' last tokens, `[hidden_size]` each.
async fn run(
    service: &Arc<Service>,
    model: &ServedModel,
    caller: &Caller,
    prompts: Vec<Vec<u32>>,
) -> Result<Vec<Vec<f32>>, ApiError> {
    let salt = caller.permit.as_ref().map_or_else(Vec::new, |own| own.key().salt().to_vec());
    let (mut states, mut open) = (Vec::with_capacity(prompts.len()), VecDeque::new());
    for prompt in prompts {
        let tokens = prompt.len();
        let request = || engine::Request {
            pooling: Some(Pooling::LastToken),
            cache_salt: salt.clone(),
            ..engine::Request::new(prompt.clone(), 0)
        };
        if open.len() >= TOGETHER
            && let Some(first) = open.pop_front()
        {
            states.push(state(&first).await?);
        }
        let stream = loop {
            match model.engine.submit(request()) {
                // A full queue has room again when one of the own texts is done.
                Err(SubmitError::QueueFull { .. } | SubmitError::QueueTokens { .. })
                    if !open.is_empty() =>
                {
                    let first = open.pop_front().expect("it is not empty");
                    states.push(state(&first).await?);
                }
                result => break result?,
            }
        };
        service.metrics.prompt_tokens.inc_by(tokens as u64);
        caller.record.prompt(tokens);
        open.push_back(stream);
    }
    for stream in open {
        states.push(state(&stream).await?);
    }
    caller.record.finish("stop");
    Ok(states)
}

async fn state(stream: &Stream) -> Result<Vec<f32>, ApiError> {
    loop {
        match stream.recv().await {
            Some(Event::Hidden(state)) => return Ok(state),
            Some(Event::Failed(error)) => return Err(error.into()),
            Some(_) => {}
            None => {
                let message = "the engine ended before the answer";
                return Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message));
            }
        }
    }
}
