//! What all requests of a server share.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use engine::EngineHandle;
use engine::qwen3_model::pooling::Scorer;
use qwen3_text::{ChatTemplate, ControlTokens, GrammarError, Grammars, Tokenizer};
use tokio::sync::{Semaphore, watch};

use crate::access::{Keys, Sites};
use crate::config::Limits;
use crate::error::ApiError;
use crate::metrics::Metrics;

/// The version of this crate, as answers and `/version` report it.
pub const FINGERPRINT: &str = concat!("qwen3-mpi ", env!("CARGO_PKG_VERSION"));

/// Whether a server answers requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The model loads.
    Loading,
    /// It answers.
    Ready,
    /// It finishes open answers and accepts no further requests.
    Draining,
    /// The ranks ended with an error.
    Failed(String),
}

impl Phase {
    /// Whether no further connection is accepted.
    pub fn is_end(&self) -> bool {
        matches!(self, Self::Draining | Self::Failed(_))
    }
}

/// How tokens are chosen unless a request says otherwise: the checkpoint's
/// `generation_config.json`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingDefaults {
    /// Divides the logits.
    pub temperature: f32,
    /// Tokens that stay; 0 for all.
    pub top_k: usize,
    /// Probability mass that stays.
    pub top_p: f32,
    /// Least relative probability.
    pub min_p: f32,
    /// Divides logits of tokens that occurred.
    pub repetition_penalty: f32,
}

impl Default for SamplingDefaults {
    /// No filter, at temperature 1.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

/// What a model does with the hidden states of texts.
#[derive(Clone, Debug)]
pub struct PoolingModel {
    /// Whether the hidden state of a text's last token is an embedding. A classifier's is not.
    pub embeds: bool,
    /// Numbers of a hidden state.
    pub hidden_size: usize,
    /// Scores documents, or the reason why the model cannot.
    pub scorer: Result<Scorer, String>,
}

/// What the formulas of the operations and the calibration say about a step of one token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Expected {
    /// Payload bytes per token, of the rank that has most.
    pub bytes_per_token: Option<u64>,
    /// Steps per second that the measured speed of this machine's ranks allows, without time for
    /// messages; `None` where nobody measured it.
    pub steps_per_second: Option<f64>,
}

/// A loaded model, as the server needs it.
pub struct ServedModel {
    /// Its name in requests.
    pub name: String,
    /// Where requests go.
    pub engine: EngineHandle,
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Writes conversations; base models have none.
    pub template: Option<ChatTemplate>,
    /// How control tokens in messages are encoded.
    pub control_tokens: ControlTokens,
    /// Ids that end a text.
    pub eos_token_ids: Vec<u32>,
    /// How tokens are chosen by default.
    pub defaults: SamplingDefaults,
    /// What the model does besides generating.
    pub pooling: PoolingModel,
    /// What a step is expected to take.
    pub expected: Expected,
}

impl ServedModel {
    /// Sizes that bound requests.
    pub fn limits(&self) -> engine::Limits {
        self.engine.limits()
    }

    /// The text of one token, also of a special one. Bytes that are a part of a character only
    /// become U+FFFD.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.tokenizer.token_bytes(id)).into_owned()
    }
}

/// What all requests share.
pub struct Service {
    /// Who may use the server.
    pub keys: Keys,
    /// Which web sites may.
    pub sites: Sites,
    /// Limits on requests.
    pub limits: Arc<Limits>,
    /// Whether the web page is served.
    pub page: bool,
    /// Whether prompts and answers are logged.
    pub log_text: bool,
    /// Counters.
    pub metrics: Metrics,
    /// Unix time in seconds of the start.
    pub started: u64,
    /// Rendering and encoding of prompts that run at the same time.
    pub encoders: Arc<Semaphore>,
    phase: watch::Sender<Phase>,
    model: OnceLock<Arc<ServedModel>>,
    grammars: OnceLock<Result<Grammars, GrammarError>>,
}

impl Service {
    /// A service whose model loads.
    pub fn new(keys: Keys, sites: Sites, limits: Arc<Limits>, page: bool, log_text: bool) -> Self {
        Self {
            keys,
            sites,
            limits,
            page,
            log_text,
            metrics: Metrics::new(),
            started: now(),
            encoders: Arc::new(Semaphore::new(2)),
            phase: watch::Sender::new(Phase::Loading),
            model: OnceLock::new(),
            grammars: OnceLock::new(),
        }
    }

    /// The current phase.
    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// Changes of the phase.
    pub fn phases(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// The model is loaded. Only the first call has an effect.
    pub fn ready(&self, model: ServedModel) {
        self.metrics.engine.expect(model.expected);
        if self.model.set(Arc::new(model)).is_ok() {
            self.phase.send_if_modified(|phase| {
                let loading = *phase == Phase::Loading;
                if loading {
                    *phase = Phase::Ready;
                }
                loading
            });
        }
    }

    /// No further requests are accepted. Nothing changes after a failure.
    pub fn drain(&self) {
        self.phase.send_if_modified(|phase| {
            let changes = matches!(phase, Phase::Loading | Phase::Ready);
            if changes {
                *phase = Phase::Draining;
            }
            changes
        });
    }

    /// The ranks ended with an error.
    pub fn fail(&self, reason: &str) {
        self.phase.send_replace(Phase::Failed(reason.to_owned()));
    }

    /// The model, if it answers requests.
    pub fn model(&self) -> Result<&Arc<ServedModel>, ApiError> {
        match (self.phase(), self.model.get()) {
            (Phase::Ready, Some(model)) => Ok(model),
            (Phase::Draining, _) => Err(ApiError::unavailable("the server is shutting down")),
            (Phase::Failed(reason), _) => Err(ApiError::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("the ranks ended: {reason}"),
            )),
            _ => Err(ApiError::unavailable("the model is loading")),
        }
    }

    /// Compiles grammars. The first call prepares the vocabulary, which takes about as long as
    /// reading the tokenizer.
    pub fn grammars(&self) -> Result<Grammars, GrammarError> {
        let Some(model) = self.model.get() else {
            return Err(GrammarError::Vocabulary { problem: "the model is loading".to_owned() });
        };
        self.grammars.get_or_init(|| Grammars::new(&model.tokenizer, &model.eos_token_ids)).clone()
    }

    /// Checks the model's name in a request; an absent name means the one model.
    pub fn model_named(&self, name: Option<&str>) -> Result<&Arc<ServedModel>, ApiError> {
        let model = self.model()?;
        match name {
            Some(name) if name != model.name => {
                let mut error = ApiError::new(
                    StatusCode::NOT_FOUND,
                    format!("model {name:?} does not exist, this server has {:?}", model.name),
                );
                error.param = Some("model".to_owned());
                error.code = Some("model_not_found");
                Err(error)
            }
            _ => Ok(model),
        }
    }

    /// The metrics as text, with what the engine knows now.
    pub fn metrics_text(&self) -> String {
        if let Some(model) = self.model.get() {
            self.metrics.engine.update(&model.engine.stats());
        }
        self.metrics.text()
    }

    /// Runs `work`, which renders and encodes, on a thread for long work, within the limit on time.
    /// At most two run at the same time, so that generation keeps its cores.
    pub async fn encode<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&ServedModel) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let limit = self.limits.tokenization_time;
        let late = || {
            ApiError::new(
                StatusCode::BAD_REQUEST,
                format!("the prompt takes more than {} s to encode", limit.as_secs()),
            )
        };
        let deadline = tokio::time::Instant::now() + limit;
        let place = tokio::time::timeout_at(deadline, Arc::clone(&self.encoders).acquire_owned());
        let place = place
            .await
            .map_err(|_| ApiError::too_many("too many prompts wait", Duration::from_secs(1)))?;
        let service = Arc::clone(self);
        let task = tokio::task::spawn_blocking(move || {
            let _place = place;
            work(service.model()?)
        });
        match tokio::time::timeout_at(deadline, task).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => {
                Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "encoding the prompt failed"))
            }
            Err(_) => Err(late()),
        }
    }
}

/// Unix time in seconds.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
