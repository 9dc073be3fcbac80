//! Job and checks for tests of objectives.

use std::sync::Arc;

use ganglion_proto::job::{Job, Model, Precision};
use tch::{Device, Tensor};

use super::{Model as LaidOut, Objective, ShardAt, ShardBatch, ShardGrad};
use crate::nn::tensor_bytes::to_bytes;
use crate::random::{Draws, Key};
use crate::state::State;

/// Returns a job with a model, 2 data shards and 3 samples each.
pub(crate) fn small_job(model: Model) -> Job {
    let text = r#"
        [job]
        name = "small"
        seed = 3
        steps = 4
        data_shards = 2
        shard_batch = 3
        threads = 1
        failure_deadline = 5.0
        non_finite = "skip"
        precision = "fp32"
        reduction = "tree"
        deterministic = true
        [data]
        kind = "mnist-10k"
        channels = 1
        [model]
        kind = "vae-28"
        latent_dim = 4
        width = 1
        ema_half_life_images = 1
        ema_schedule = "ramp-up"
        conditional = false
        [loss]
        likelihood = "bernoulli"
        beta = 1.0
        binarise = false
        [optimizer]
        kind = "adam"
        learning_rate = 0.001
        beta1 = 0.9
        beta2 = 0.999
        epsilon = 1e-8
        decay_images = 0
        final_learning_rate = 0.001
        final_beta2 = 0.999
        [checkpoint]
        every_steps = 0
        every_epochs = 0
        keep_last = 0
        [sample]
        every_steps = 0
        count = 1
        [metrics]
        every_steps = 1
        [evaluation]
        every_steps = 0
        with_checkpoints = false
        samples = 10
        reference = 10
        features = "auto"
        best_by = "auto"
        importance_samples = 1
        [alarms]
        policy = "warn"
        after_images = 1
        collapse = 0.3
        overfitting = 0.8
        saturated_rows = 1
    "#;
    Job { model, ..Job::from_toml(text).unwrap() }
}

/// Checks that draws made ahead change no bit of a shard's gradient, and that each tensor of them is used.
/// Returns how many there are of each key.
pub(crate) fn check_draws_ahead(objective: &Arc<dyn Objective>, batch: &ShardBatch) -> Vec<usize> {
    let laid_out = LaidOut::new(objective.clone(), Precision::Fp32).unwrap();
    let state = State::initial(laid_out.layout.clone(), 3, Device::Cpu);
    let phase = laid_out.phases()[0];
    let at = ShardAt { phase, step: 2, shard: 1 };
    let gradient = |draws: Vec<(Key, Vec<Tensor>)>| {
        let layout = laid_out.gradient(phase);
        let mut out = ShardGrad::new(layout, layout.len(), Device::Cpu);
        let mut compute = objective.begin();
        compute.keep(Draws::of(draws));
        compute.gradient(at, &state, Some(batch), &mut out).unwrap();
        to_bytes(&out.flat)
    };
    let wanted = gradient(Vec::new());
    assert!(gradient(objective.draws(at)) == wanted);
    let counts: Vec<usize> = objective.draws(at).iter().map(|(_, tensors)| tensors.len()).collect();
    for (key, place) in (0..).zip(&counts).flat_map(|(key, count)| (0..*count).map(move |place| (key, place)))
    {
        let mut draws = objective.draws(at);
        let tensor: &mut Tensor = &mut draws[key].1[place];
        *tensor = tensor.flip([0]);
        assert!(gradient(draws) != wanted, "nobody uses tensor {place} of the draws of {key}");
    }
    counts
}
