//! Job for tests of objectives.

use ganglion_proto::job::{Job, Model};

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
