//! The weights that a rank's shape states, against what loading takes.

mod cases;

use std::sync::Arc;

use comm::ThreadComm;
use qwen3_model::ModelSource;
use qwen3_model::checkpoint::Checkpoint;
use qwen3_model::formats::WeightFormats;
use qwen3_model::options::{ExpertSplit, MlpSchedule, WeightFormat};
use qwen3_model::shape::ModelShape;
use qwen3_model::{Config, Isa, Model, ModelOptions, ParallelStrategy};

#[test]
fn memory_is_what_loading_takes() {
    for case in cases::CASES {
        let dir = cases::folder(case);
        let config = Config::read(&ModelSource::open(&dir).unwrap()).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        for (weights, ranks) in
            [None, Some(WeightFormat::Q8)].into_iter().flat_map(|w| (1..=5).map(move |r| (w, r)))
        {
            let formats = WeightFormats::read(&config, &checkpoint, weights).unwrap();
            let grids = (2..ranks)
                .filter(|tp| ranks % tp == 0)
                .map(|tp| ParallelStrategy::Grid { tp, sp: ranks / tp });
            for strategy in
                [ParallelStrategy::Heads, ParallelStrategy::Sequence].into_iter().chain(grids)
            {
                let whole =
                    config.moe.is_some().then_some((MlpSchedule::Fused, ExpertSplit::Ranks));
                let inside = [
                    MlpSchedule::Fused,
                    MlpSchedule::Naive,
                    MlpSchedule::Gathered,
                    MlpSchedule::Local,
                ]
                .map(|mlp| (mlp, ExpertSplit::Inside));
                for (mlp, experts) in inside.into_iter().chain(whole) {
                    let options = ModelOptions {
                        strategy,
                        mlp: Some(mlp),
                        experts,
                        weights,
                        ..ModelOptions::new(Isa::scalar())
                    };
                    std::thread::scope(|scope| {
                        for (rank, comm) in ThreadComm::group(ranks).into_iter().enumerate() {
                            let (dir, formats, config) = (&dir, &formats, &config);
                            scope.spawn(move || {
                                let model = Model::load(&ModelSource::open(dir).unwrap(), Arc::new(comm), &options, &|_| ()).unwrap();
                                let shape =
                                    ModelShape::new(config, formats, options.division(), ranks, rank);
                                let label =
                                    format!("{case}, {weights:?}, rank {rank} of {ranks}, {strategy} {mlp} {experts}");
                                assert_eq!(shape.weight_bytes(), model.weight_bytes(), "{label}");
                            });
                        }
                    });
                }
            }
        }
    }
}
