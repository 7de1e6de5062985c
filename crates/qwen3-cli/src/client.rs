//! A client of the engine: one thread of rank 0 asks, while all ranks serve.

use engine::{Engine, EngineConfig, EngineHandle};
use qwen3_model::Model;
use ranks::{Failure, Rank};

use crate::failure::CliError;

/// Serves the requests of `client`, which runs on a thread of rank 0 and has its value there. All
/// ranks call it together; it ends on all of them when `client` has ended, with its error if it has
/// one.
pub fn serve<T: Send>(
    rank: &Rank,
    model: Model,
    config: &EngineConfig,
    client: impl FnOnce(&EngineHandle) -> Result<T, CliError> + Send,
) -> Result<(Model, Option<T>), Failure> {
    let (model, value) = Engine::new(model, config)?.serve(client)?;
    Ok((model, rank.agree_after(|| Ok(value.transpose()?))?))
}
