//! `POST /v1/completions`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Response;
use engine::TokenLogprobs;
use tokio::sync::mpsc;

use super::chat::finite;
use super::{From, json, ok, respond_to_prompt};
use crate::answer::{Answer, Delta, Job, Piece};
use crate::error::{ApiError, Dialect, ErrorBody};
use crate::gate::Caller;
use crate::plan;
use crate::prompt::encoded;
use crate::protocol::answer::{ServerSentEvent, Timings, Usage};
use crate::protocol::completions::{
    ACCEPTED, Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Prompt,
};
use crate::request_id;
use crate::service::{FINGERPRINT, ServedModel, Service, now};
use crate::sse::{self, StreamError};
use crate::structure::{self, Guided, Structure};

/// Tokens of an answer, if the request does not say; as in OpenAI's API.
const DEFAULT_MAX_TOKENS: usize = 16;

/// Continues text.
#[utoipa::path(post, path = "/v1/completions", request_body = CompletionRequest,
    responses((status = 200, content(
        (Completion = "application/json"), (ServerSentEvent = "text/event-stream"))),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
pub async fn create(
    State(service): State<Arc<Service>>,
    caller: From,
    request: Request,
) -> Response<Body> {
    let answer = async {
        let body: CompletionRequest = json(&service, request, ACCEPTED).await?;
        service.model_named(body.model.as_deref())?;
        if body.stream_options.is_some() && body.stream != Some(true) {
            return Err(ApiError::param("stream_options", "stream_options needs stream: true"));
        }
        let stream = body.stream.unwrap_or(false);
        let format = Format::of(&body);
        let answers = submit(&service, &caller, body).await?;
        if stream {
            return Ok(self::stream(&service, format, answers));
        }
        whole(format, answers).await
    };
    respond_to_prompt(Dialect::OpenAi, "prompt", answer.await)
}

/// How the answers are written.
#[derive(Clone)]
struct Format {
    id: String,
    created: u64,
    n: usize,
    echo: bool,
    logprobs: bool,
    token_ids: bool,
    include_usage: bool,
}

/// The answer to one of the prompts.
struct Prompted {
    answer: Answer,
    prompt: Vec<u32>,
    text: String,
}

impl Format {
    fn of(body: &CompletionRequest) -> Self {
        let options = body.stream_options.unwrap_or_default();
        Self {
            id: request_id::new("cmpl-"),
            created: now(),
            n: body.n.unwrap_or(1),
            echo: body.echo.unwrap_or(false),
            logprobs: body.logprobs.is_some(),
            token_ids: body.return_token_ids.unwrap_or(false),
            include_usage: options.include_usage.unwrap_or(false),
        }
    }

    fn completion(&self, model: &ServedModel, choices: Vec<CompletionChoice>) -> Completion {
        Completion {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: model.name.clone(),
            system_fingerprint: FINGERPRINT,
            choices,
            usage: None,
            timings: None,
        }
    }
}

/// Encodes all prompts and submits them.
async fn submit(
    service: &Arc<Service>,
    caller: &Caller,
    body: CompletionRequest,
) -> Result<Vec<Prompted>, ApiError> {
    let mut sampling = body.sampling();
    sampling.max_tokens = Some(sampling.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS));
    sampling.logprobs = body.logprobs;
    sampling.echo = body.echo.unwrap_or(false);
    let guide = match body.structured_outputs {
        Some(fields) => {
            let grammar = Structure::of(fields)?.grammar();
            Some(structure::compile(service, "structured_outputs", grammar).await?)
        }
        None => None,
    };
    let permit = caller.permit.clone();
    let limits = Arc::clone(&service.limits);
    let jobs = service.encode(move |model| {
        let prompts = prompts(model, body.prompt, limits.prompts)?;
        let job = |prompt: Vec<u32>| {
            let text = if sampling.echo { model.tokenizer.decode(&prompt) } else { String::new() };
            let (mut request, stops) =
                plan::request(model, &limits, permit.as_deref(), &sampling, prompt)?;
            request.prompt_logprobs = sampling.logprobs.filter(|_| sampling.echo);
            if let Some(guide) = &guide {
                let guided = || Box::new(Guided::new(guide.clone())) as _;
                request.constraints = (0..request.n).map(|_| guided()).collect();
            }
            Ok((Job { request, stops, parse: None, one_call: false }, text))
        };
        prompts.into_iter().map(job).collect::<Result<Vec<_>, ApiError>>()
    });
    let jobs = jobs.await?;
    let model = service.model()?;
    let submit = |(job, text): (Job, String)| {
        let prompt = job.request.prompt.clone();
        let answer = Answer::submit(service, model, &caller.record, job)?;
        Ok(Prompted { answer, prompt, text })
    };
    jobs.into_iter().map(submit).collect()
}

fn prompts(model: &ServedModel, prompt: Prompt, limit: usize) -> Result<Vec<Vec<u32>>, ApiError> {
    let wrong = |message: String| ApiError::param("prompt", message);
    let encode = |text: String| encoded(model.tokenizer.encode(&text));
    let prompts = match prompt {
        Prompt::Text(text) => vec![encode(text)?],
        Prompt::Ids(ids) => vec![ids],
        Prompt::Texts(texts) if texts.len() <= limit => {
            texts.into_iter().map(encode).collect::<Result<_, _>>()?
        }
        Prompt::IdLists(lists) if lists.len() <= limit => lists,
        Prompt::Texts(list) => {
            return Err(wrong(format!("{} prompts, expected at most {limit}", list.len())));
        }
        Prompt::IdLists(list) => {
            return Err(wrong(format!("{} prompts, expected at most {limit}", list.len())));
        }
    };
    match prompts.iter().position(Vec::is_empty) {
        _ if prompts.is_empty() => Err(wrong("there is no prompt, expected one".to_owned())),
        Some(index) => Err(wrong(format!("prompt {index} has no token, expected at least one"))),
        None => Ok(prompts),
    }
}

async fn whole(format: Format, mut answers: Vec<Prompted>) -> Result<Response<Body>, ApiError> {
    let model = Arc::clone(answers[0].answer.model());
    let mut choices = Vec::new();
    let mut timings = None;
    for prompted in &mut answers {
        for whole in prompted.answer.whole().await? {
            let end = whole.end();
            timings.get_or_insert(Timings::of(&end.usage));
            let mut writer = Writer::new(&format);
            let mut choice = writer.echoed(&model, prompted);
            writer.add_logprobs(&model, &mut choice, &whole.logprobs);
            choice.index = choices.len();
            choice.text += &whole.text();
            choice.finish_reason = Some(end.reason.openai());
            choice.stop_reason = end.reason.stop();
            if format.token_ids {
                choice.prompt_token_ids = Some(prompted.prompt.clone());
                choice.token_ids = Some(whole.ids);
            }
            choices.push(choice);
        }
    }
    let mut completion = format.completion(&model, choices);
    completion.usage =
        Some(usage(&answers.iter().map(|one| one.answer.usage()).collect::<Vec<_>>()));
    completion.timings = timings;
    Ok(ok(&completion))
}

fn usage(all: &[Usage]) -> Usage {
    let sum = |part: fn(&Usage) -> usize| all.iter().map(part).sum();
    Usage::new(
        sum(|usage| usage.prompt_tokens),
        sum(|usage| usage.prompt_tokens_details.cached_tokens),
        sum(|usage| usage.completion_tokens),
        0,
    )
}

fn stream(service: &Arc<Service>, format: Format, answers: Vec<Prompted>) -> Response<Body> {
    sse::stream(&service.limits, Dialect::OpenAi, |events| async move {
        let model = Arc::clone(answers[0].answer.model());
        // Answers of several prompts come side by side; the tasks end when the channel closes.
        let (sender, mut pieces) = mpsc::channel(1);
        let mut tasks = tokio::task::JoinSet::new();
        for (at, prompted) in answers.into_iter().enumerate() {
            let (format, sender) = (format.clone(), sender.clone());
            tasks.spawn(async move {
                let mut prompted = prompted;
                let result = pump(&format, at, &mut prompted, &sender).await;
                if let Err(StreamError::Failed(error)) = &result {
                    // A reader that has gone needs no error.
                    let _ = sender.send(Err(error.clone())).await;
                }
                prompted.answer.usage()
            });
        }
        drop(sender);
        while let Some(piece) = pieces.recv().await {
            events.send(&piece?).await?;
        }
        if format.include_usage {
            let all = tasks.join_all().await;
            let mut last = format.completion(&model, Vec::new());
            last.usage = Some(usage(&all));
            events.send(&last).await?;
        }
        Ok::<_, StreamError>(events.done().await?)
    })
}

/// Sends the pieces of one prompt's answer.
async fn pump(
    format: &Format,
    at: usize,
    prompted: &mut Prompted,
    sender: &mpsc::Sender<Result<Completion, ApiError>>,
) -> Result<(), StreamError> {
    let model = Arc::clone(prompted.answer.model());
    let send = async |completion| sender.send(Ok(completion)).await.map_err(|_| StreamError::Gone);
    let mut writers: Vec<Writer> = (0..format.n).map(|_| Writer::new(format)).collect();
    let mut begun = vec![false; format.n];
    while let Some(piece) = prompted.answer.next().await? {
        let writer = &mut writers[piece.index];
        let first = !std::mem::replace(&mut begun[piece.index], true);
        let mut choice = if first {
            let mut choice = writer.echoed(&model, prompted);
            choice.prompt_token_ids = format.token_ids.then(|| prompted.prompt.clone());
            choice
        } else {
            CompletionChoice { logprobs: writer.logprobs(), ..CompletionChoice::default() }
        };
        choice.index = at * format.n + piece.index;
        writer.add_logprobs(&model, &mut choice, &piece.logprobs);
        let Piece { deltas, ids, end, .. } = piece;
        for delta in deltas {
            if let Delta::Text(text) = delta {
                choice.text += &text;
            }
        }
        choice.token_ids = format.token_ids.then_some(ids);
        let timings = end.as_ref().map(|end| Timings::of(&end.usage));
        if let Some(end) = end {
            choice.finish_reason = Some(end.reason.openai());
            choice.stop_reason = end.reason.stop();
        }
        let mut completion = format.completion(&model, vec![choice]);
        completion.timings = timings;
        send(completion).await?;
    }
    Ok(())
}

/// Writes one choice; knows how many characters its tokens have had.
struct Writer {
    wanted: bool,
    echo: bool,
    offset: usize,
}

impl Writer {
    fn new(format: &Format) -> Self {
        Self { wanted: format.logprobs, echo: format.echo, offset: 0 }
    }

    fn logprobs(&self) -> Option<CompletionLogprobs> {
        self.wanted.then(CompletionLogprobs::default)
    }

    /// A choice with the prompt, if it is echoed.
    fn echoed(&mut self, model: &ServedModel, prompted: &Prompted) -> CompletionChoice {
        let mut choice =
            CompletionChoice { logprobs: self.logprobs(), ..CompletionChoice::default() };
        if self.echo {
            choice.text = prompted.text.clone();
            if let (Some(logprobs), Some(&first)) = (&mut choice.logprobs, prompted.prompt.first())
            {
                // Nothing predicts the first token.
                self.push(model, logprobs, first, None, None);
            }
            self.add_logprobs(model, &mut choice, &prompted.answer.prompt_logprobs);
        }
        choice
    }

    fn add_logprobs(
        &mut self,
        model: &ServedModel,
        choice: &mut CompletionChoice,
        tokens: &[TokenLogprobs],
    ) {
        if let Some(logprobs) = &mut choice.logprobs {
            for token in tokens {
                let top = token.top.iter();
                let top = top.map(|(id, logprob)| (model.token_text(*id), finite(*logprob)));
                let logprob = Some(finite(token.logprob));
                self.push(model, logprobs, token.id, logprob, Some(top.collect()));
            }
        }
    }

    fn push(
        &mut self,
        model: &ServedModel,
        logprobs: &mut CompletionLogprobs,
        id: u32,
        logprob: Option<f32>,
        top: Option<std::collections::BTreeMap<String, f32>>,
    ) {
        let text = model.token_text(id);
        logprobs.text_offset.push(self.offset);
        self.offset += text.chars().count();
        logprobs.tokens.push(text);
        logprobs.token_logprobs.push(logprob);
        logprobs.top_logprobs.push(top);
    }
}
