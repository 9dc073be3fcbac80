//! Tests of the job reader as a whole.

use super::*;
use ganglion_proto::job::{
    Background, ClassOrder, DataKind, Decay, Fit, Length, Likelihood, LossKind, ModelKind, OptimizerOptions,
    Orientation, Positions,
};
use proptest::prelude::*;

/// The smallest job on bundled data.
const SMALL: &str = "[job]\nname = \"small\"\nsteps = 10\n[data]\nkind = \"mnist-10k\"\n";

fn resolve(text: &str, overrides: &[&str]) -> Result<Job, JobErrors> {
    let text = Text { file: "configs/x.toml", folder: Path::new("/jobs"), default_name: Some("x"), text };
    let overrides: Vec<String> = overrides.iter().map(|pair| (*pair).to_owned()).collect();
    text.resolve(&overrides, false)
}

/// Error text of a job that must not resolve.
fn errors(text: &str, overrides: &[&str]) -> String {
    resolve(text, overrides).unwrap_err().to_string()
}

fn assert_error(text: &str, overrides: &[&str], expected: &str) {
    let errors = errors(text, overrides);
    assert!(errors.contains(expected), "{expected:?} is not in:\n{errors}");
}

#[test]
fn every_job_in_configs_is_right_apart_from_data_to_download() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut count = 0;
    for entry in std::fs::read_dir(configs).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let job = read_file(&path, &[], false).unwrap_or_else(|errors| panic!("{errors}"));
            assert_eq!(Some(job.job.name.as_str()), path.file_stem().unwrap().to_str());
            assert_eq!(parse_resolved(&render(&job)).unwrap(), job);
            count += 1;
        }
    }
    assert!(count >= 4);
}

#[test]
fn the_embedded_job_runs_from_anywhere() {
    let job = read(&Source::Embedded, &["job.steps=3".to_owned()]).unwrap();
    assert_eq!(job.job.name, "mnist-mlp");
    assert_eq!(job.job.length, Length::Steps(3));
    assert_eq!(job.data.kind, DataKind::Mnist10k);
    assert_eq!((job.job.data_shards, job.job.shard_batch), (8, 8));
}

/// The default job spells out every default in comments only, so that overriding a kind brings that
/// kind's own defaults.
#[test]
fn kinds_bring_their_defaults_to_the_embedded_job() {
    let set = ["loss.kind=wasserstein-gp", "model.kind=dcgan-28"].map(str::to_owned);
    let job = read(&Source::Embedded, &set).unwrap();
    assert_eq!(job.loss.kind, LossKind::WassersteinGp);
    assert_eq!(job.loss.discriminator_steps, 5);
    assert_eq!((job.optimizer.beta1, job.optimizer.beta2), (0.0, 0.9));
    assert_eq!((job.model.kind, job.model.width), (ModelKind::Dcgan28, 64));
    // Of another family: what the file says of its own does not count, and an override does.
    for kind in ["model.kind=vae-28", "model.kind=transformer"] {
        let job = read(&Source::Embedded, &[kind.to_owned()]).unwrap();
        assert_eq!((job.optimizer.learning_rate, job.optimizer.beta1), (1e-3, 0.9));
    }
    let set = ["model.kind=vae-28", "loss.kind=hinge"].map(str::to_owned);
    assert!(read(&Source::Embedded, &set).unwrap_err().to_string().contains("--set loss.kind=hinge: is a"));
}

#[test]
fn defaults_fill_what_is_not_given() {
    let text = "[job]\nepochs = 2\n[data]\nkind = \"mnist-10k\"\n";
    let job = resolve(text, &[]).unwrap();
    let expected = r#"
        [job]
        name = "x"
        seed = 0
        epochs = 2
        data_shards = 8
        shard_batch = 8
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
        kind = "mlp-28"
        latent_dim = 100
        width = 256
        ema_half_life_images = 10000
        ema_schedule = "ramp-up"
        conditional = false
        freeze_discriminator = 0
        [loss]
        kind = "non-saturating"
        discriminator_steps = 1
        gradient_penalty = 10.0
        r1 = 0.0
        final_r1 = 0.0
        r2 = 0.0
        final_r2 = 0.0
        penalty_every = 1
        [optimizer]
        kind = "adam"
        learning_rate = 2e-4
        discriminator_learning_rate = 2e-4
        beta1 = 0.5
        beta2 = 0.999
        epsilon = 1e-8
        decay_images = 0
        final_learning_rate = 2e-4
        final_discriminator_learning_rate = 2e-4
        final_beta2 = 0.999
        [augmentation]
        flip = false
        kinds = []
        probability = 1.0
        final_probability = 1.0
        adaptive = false
        target = 0.6
        adjust_images = 500000
        [checkpoint]
        every_steps = 1000
        every_epochs = 0
        keep_last = 3
        [sample]
        every_steps = 1000
        count = 50
        [metrics]
        every_steps = 10
    "#;
    assert_eq!(flat(&job), flat(&toml::from_str(expected).unwrap()));
}

#[test]
fn settings_of_other_families_are_refused_and_not_in_the_resolved_job() {
    let vae = resolve(SMALL, &["model.kind=vae-28", "loss.likelihood=gaussian", "loss.beta=4"]).unwrap();
    let settings = vae.model.vae.as_ref().unwrap();
    assert_eq!((settings.likelihood, settings.beta, settings.binarise), (Likelihood::Gaussian, 4.0, false));
    assert_eq!((vae.optimizer.learning_rate, vae.optimizer.beta1), (1e-3, 0.9));
    let given =
        ["model.kind=transformer", "model.heads=2", "model.positions=rotary", "model.activation=swiglu"];
    let transformer = resolve(SMALL, &given).unwrap();
    let settings = transformer.model.transformer.as_ref().unwrap();
    assert_eq!((settings.heads, settings.positions), (2, Positions::Rotary));
    for (job, absent) in [(vae, "discriminator"), (transformer, "latent_dim")] {
        let text = render(&job);
        assert!(!text.contains(absent) && !text.contains("[augmentation]"), "{text}");
        assert_eq!(parse_resolved(&text).unwrap(), job);
    }
    for (overrides, expected) in [
        (
            &["model.kind=vae-28", "loss.r1=1"][..],
            "--set loss.r1=1: is a setting of GANs, and model.kind = \"vae-28\" is one of the VAEs; remove it",
        ),
        (
            &["model.kind=vae-28", "augmentation.adaptive=true"],
            "augmentation.adaptive=true: is a setting of GANs",
        ),
        (&["model.kind=transformer", "model.latent_dim=3"], "is a setting of GANs and VAEs"),
        (&["model.layers=3"], "is a setting of transformers, and model.kind = \"mlp-28\" is one of the GANs"),
        (&["loss.beta=true"], "is a setting of VAEs"),
        (&["model.kind=vae-28", "loss.beta=-1"], "must be at least 0.0"),
        (&["model.kind=vae-32"], "takes images of 32 x 32, but \"mnist-10k\" has 28 x 28"),
        (&["model.kind=vae-28", "optimizer.final_beta2=0.9"], "but optimizer.decay_images is 0"),
    ] {
        assert_error(SMALL, overrides, expected);
        assert!(!errors(SMALL, overrides).contains('\n'), "{}", errors(SMALL, overrides));
    }
}

#[test]
fn models_bring_their_objectives() {
    let of = |kind: &str| {
        resolve(SMALL, &[&format!("model.kind={kind}"), "data.resize=32", "data.crop=32"]).unwrap()
    };
    let r3gan = of("r3gan-32");
    assert_eq!(r3gan.loss.kind, LossKind::RelativisticPairing);
    assert_eq!((r3gan.loss.r1, r3gan.loss.r2, r3gan.optimizer.beta1), (1.0, 1.0, 0.0));
    let sngan = of("sngan-32");
    assert_eq!((sngan.loss.kind, sngan.loss.discriminator_steps), (LossKind::Hinge, 5));
}

#[test]
fn what_does_not_go_together_is_told() {
    let r3gan = "model.kind=r3gan-28";
    let cases: [(&[&str], &str); 14] = [
        (
            &[r3gan, "model.width=12"],
            "model.width=12: is 12, but R3GAN's groups of 16 features need a multiple of 8",
        ),
        (&["model.kind=script", "model.conditional=true"], "networks of your own are not told classes"),
        (&["model.freeze_discriminator=2"], "without model.init_from they are random"),
        (&["model.init_from=ftp://x"], "model.init_from"),
        (&["model.ema_schedule=cosine"], "set optimizer.decay_images"),
        (&["optimizer.final_learning_rate=1e-5"], "but optimizer.decay_images is 0"),
        (&["loss.r1=1", "loss.final_r1=0.5"], "--set loss.final_r1=0.5: is another value to end with"),
        (&["loss.penalty_every=0"], "must be from 1 to 1000"),
        (&["augmentation.kinds=blur"], "there is no \"blur\"; choose from \"flip\", \"rotate90\""),
        (&["augmentation.kinds=flip,flip"], "has \"flip\" twice"),
        (&["augmentation.kinds=[1]"], "expected a list of names, such as [\"flip\"]"),
        (&["augmentation.adaptive=true"], "has nothing to adapt"),
        (&[r3gan, "augmentation.adaptive=true", "augmentation.kinds=flip"], "goes by the sign"),
        (&["augmentation.probability=2"], "must be at least 0.0 and at most 1.0"),
    ];
    for (overrides, expected) in cases {
        assert_error(SMALL, overrides, expected);
    }
    let both = ["augmentation.kinds=color, cutout", "augmentation.kinds=[\"color\", \"cutout\"]"];
    let kinds = |pair: &str| resolve(SMALL, &[pair]).unwrap().augmentation.kinds;
    assert_eq!(kinds(both[0]), kinds(both[1]));
    let rate = [
        "optimizer.discriminator_learning_rate=4e-4",
        "optimizer.final_learning_rate=1e-4",
        "optimizer.decay_images=9",
    ];
    assert_eq!(resolve(SMALL, &rate).unwrap().optimizer.final_discriminator_learning_rate, 2e-4);
}

#[test]
fn defaults_follow_other_keys() {
    let job = resolve(SMALL, &["optimizer.learning_rate=1e-3", "checkpoint.every_epochs=2"]).unwrap();
    assert_eq!(job.optimizer.discriminator_learning_rate, 1e-3);
    assert_eq!((job.checkpoint.every_steps, job.checkpoint.every_epochs), (0, 2));
    let both = ["checkpoint.every_epochs=2", "checkpoint.every_steps=5"];
    assert_eq!(resolve(SMALL, &both).unwrap().checkpoint.every_steps, 5);
    let never = ["checkpoint.every_epochs=0"];
    assert_eq!(resolve(SMALL, &never).unwrap().checkpoint.every_steps, 1000);
    let folder = ["data.kind=folder", "data.path=/pictures", "data.resize=64", "model.kind=dcgan-64"];
    let job = resolve(SMALL, &folder).unwrap();
    assert_eq!((job.data.channels, job.data.crop), (3, Some(64)));
    assert!(!render(&job).contains("orientation"), "a default leaves a resolved job as it was");
    let keys = ["data.orientation=ignore", "data.image_extension=.Seg.PNG"];
    let job = resolve(SMALL, &[&folder[..], &keys[..]].concat()).unwrap();
    let data = &job.data;
    assert_eq!((data.orientation, data.image_extension.as_deref()), (Orientation::Ignore, Some("seg.png")));
    assert_eq!(parse_resolved(&render(&job)).unwrap(), job);
}

const FOLDER: [&str; 4] =
    ["data.kind=folder", "data.path=/pictures", "data.resize=64", "model.kind=dcgan-64"];

#[test]
fn settings_of_pictures_are_read_and_checked() {
    let keys = ["data.background=#20a0ff", "data.class_order=bytes", "data.fit=pad"];
    let job = resolve(SMALL, &[&FOLDER[..], &keys].concat()).unwrap();
    let of = (job.data.background, job.data.class_order, job.data.fit);
    assert_eq!(of, (Some(Background::Colour([32, 160, 255])), Some(ClassOrder::Bytes), Fit::Pad));
    assert_eq!(parse_resolved(&render(&job)).unwrap(), job);
    let plain = resolve(SMALL, &[]).unwrap();
    assert_eq!((plain.data.background, plain.data.class_order), (None, None), "digits have neither");
    for (wrong, expected) in [
        (&["data.background=red"][..], "\"#20a0ff\""),
        (&["data.class_order=random"], "choose one of \"natural\", \"bytes\""),
        (&["data.fit=pad", "data.crop=32"], "data.crop=32: cuts, and data.fit = \"pad\" does not"),
    ] {
        assert_error(SMALL, &[&FOLDER[..], wrong].concat(), expected);
    }
    assert_error(SMALL, &["data.fit=pad"], "set data.resize");
    assert_error(SMALL, &["data.background=white"], "remove it");
    assert_error(SMALL, &["data.class_order=natural"], "remove it");
}

/// A run that began before there were these settings goes on as it began, and any other value is a
/// difference.
#[test]
fn a_run_without_a_background_goes_on_without_one() {
    let new = resolve(SMALL, &FOLDER).unwrap();
    let text = render(&new);
    let old: String = text
        .lines()
        .filter(|line| !["background", "class_order"].iter().any(|key| line.starts_with(key)))
        .map(|line| format!("{line}\n"))
        .collect();
    assert_ne!(old, text, "a new job has both");
    let recorded = parse_resolved(&old).unwrap();
    let mut given = new.clone();
    given.data.resume(&recorded.data);
    assert_eq!(given, recorded);
    let mut other = resolve(SMALL, &[&FOLDER[..], &["data.background=black"]].concat()).unwrap();
    other.data.resume(&recorded.data);
    let shown: Vec<String> = differences(&recorded, &other).iter().map(Difference::to_string).collect();
    assert_eq!(shown, ["data.background: the run was started with not set, but given is \"black\""]);
    let mut same = new.clone();
    same.data.resume(&new.data);
    assert_eq!(same, new);
}

/// Invariant 1.
#[test]
fn all_errors_show_at_once_in_order_of_their_lines() {
    let text = "[job]\nname = \"a/b\"\nstep = 3\nepochs = \"many\"\n\n[optimzer]\nkind = 1\nbeta1 = 2\n\
                [data]\nkind = \"mnist\"\n[sample]\ncount = 2000\n";
    assert_eq!(
        errors(text, &["metrics.every_steps=0"]),
        "configs/x.toml:2: job.name: \"a/b\" is no name; write 1 to 64 of A-Z a-z 0-9 . _ - and no dot in front, for it \
         names the run's folder, such as \"my-first-gan\"\n\
         configs/x.toml:3: job.step: unknown key; did you mean job.steps?\n\
         configs/x.toml:4: job.epochs: expected a whole number, such as 10, but found the text \"many\"\n\
         configs/x.toml:6: optimzer: unknown section; did you mean [optimizer]?\n\
         configs/x.toml:10: data.kind: there is no \"mnist\"; choose one of \"mnist-10k\", \"idx\", \"cifar-10\", \
         \"folder\", \"text\", \"arrays\"\n\
         configs/x.toml:12: sample.count: must be from 1 to 1024, but is 2000; choose a value in between\n\
         --set metrics.every_steps=0: must be from 1 to 1000000000000, but is 0; choose a value in between\n\
         7 errors in the job"
    );
}

#[test]
fn unknown_keys_come_with_the_nearest_known_one() {
    let cases = [
        ("data.steps=1", "did you mean job.steps?"),
        ("steps=1", "did you mean job.steps?"),
        ("job.sede=1", "did you mean job.seed?"),
        ("optimizer.lr=1", "[optimizer] has kind, learning_rate"),
        ("jobs.steps=1", "did you mean [job]?"),
        ("network.depth=1", "there are [job], [data]"),
        ("job=1", "write [job] and its keys below"),
        ("job.steps.x=1", "unknown key"),
    ];
    for (pair, expected) in cases {
        assert_error(SMALL, &[pair], &format!("--set {pair}: "));
        assert_error(SMALL, &[pair], expected);
    }
    let empty = format!("{SMALL}[networks]\n");
    assert_error(&empty, &[], "configs/x.toml:6: networks: unknown section");
    assert_error("steps = 3\n", &[], "configs/x.toml:1: steps: unknown key; did you mean job.steps?");
}

#[test]
fn types_and_ranges_are_checked() {
    let cases = [
        ("job.steps=1.5", "expected a whole number, such as 20000, but found the number 1.5"),
        ("job.steps=true", "but found true"),
        ("job.steps=[1]", "but found a list"),
        ("job.steps=99999999999999999999999999999999999999999", "must be from 1 to"),
        ("job.seed=-1", "must be from 0 to"),
        ("job.name=7", "expected text in quotes, such as \"my-first-gan\", but found the whole number 7"),
        ("job.name=.hidden", "is no name"),
        ("job.failure_deadline=0.1", "must be at least 0.5 and at most 3600.0, but is 0.1"),
        ("optimizer.beta1=1", "must be at least 0.0 and below 1.0, but is 1"),
        ("optimizer.learning_rate=nan", "but is nan"),
        ("optimizer.learning_rate=fast", "expected a number, such as 0.0002"),
        ("loss.gradient_penalty=-1", "must be at least 0.0"),
        ("job.deterministic=1", "expected true or false, such as true, but found"),
        ("job.precision=fp16", "there is no \"fp16\"; choose one of \"fp32\", \"bf16\""),
        ("job.tf32=some", "there is no \"some\"; choose one of \"off\", \"convolutions\", \"all\""),
        ("job.non_finite=ignore", "there is no \"ignore\"; choose one of \"skip\", \"roll-back\", \"stop\""),
        ("loss.kind=", "is empty"),
        ("loss.kind=wgan", "\"hinge\", \"wasserstein-gp\""),
        ("data.channels=2", "must be 1 for grey or 3 for colour"),
        ("data.channels=3", "but \"mnist-10k\" has 1; remove it"),
        ("data.orientation=turn", "choose one of \"follow\", \"ignore\""),
        ("data.orientation=ignore", "with data.kind = \"folder\" alone; remove it"),
        ("data.image_extension=*.png", "must be an ending of files, such as \"jpg\""),
        ("checkpoint.url=ftp://bucket", "s3://BUCKET/PREFIX"),
        ("checkpoint.url=file://here", "\"file://here\" names no absolute folder"),
        ("job.steps", "write --set key=value"),
    ];
    for (pair, expected) in cases {
        assert_error(SMALL, &[pair], expected);
    }
    let big = ["job.steps=1000000000000 ", "job.data_shards=65536", "job.shard_batch=65536"];
    assert_error(SMALL, &big, "are more than");
}

#[test]
fn an_override_of_one_length_replaces_the_other() {
    let length = |overrides: &[&str]| resolve(SMALL, overrides).map(|job| job.job.length);
    assert_eq!(length(&["job.epochs=3"]), Ok(Length::Epochs(3)));
    assert_eq!(length(&["job.steps=4"]), Ok(Length::Steps(4)));
    assert_eq!(length(&["job.steps=4", "job.steps=5"]), Ok(Length::Steps(5)));
    assert_error(SMALL, &["job.steps=4", "job.epochs=3"], "given together with job.steps");
    let both = SMALL.replace("steps = 10", "steps = 10\nepochs = 2");
    assert_error(&both, &[], "configs/x.toml:4: job.epochs: given together");
    assert_error("[data]\nkind = \"mnist-10k\"\n", &[], "configs/x.toml: job.steps: missing");
}

#[test]
fn syntax_errors_show_the_place() {
    let two = errors("[job]\nsteps = 1\nsteps = 2\n[data\n", &[]);
    let first = two.find("configs/x.toml:3: ").unwrap();
    assert!(two.find("configs/x.toml:4: ").unwrap() > first, "{two}");
    let errors = errors("[job]\nsteps = = 3\n", &[]);
    assert!(errors.starts_with("configs/x.toml:2: not valid TOML\n"), "{errors}");
    assert!(errors.contains("steps = = 3") && errors.contains('^'), "{errors}");
}

#[test]
fn images_must_fit_the_model() {
    let cases: [(&[&str], &str); 6] = [
        (
            &["data.resize=64"],
            "--set data.resize=64: gives images of 64 x 64, but model.kind = \"mlp-28\" takes 28 x 28",
        ),
        (&["model.kind=dcgan-64"], "has 28 x 28; set data.resize = 64"),
        (&["data.crop=32"], "cuts 32 pixels out of an image with a shorter side of 28"),
        (&["data.resize=32", "data.crop=20"], "--set data.crop=20: gives images of 20 x 20"),
        (&["data.kind=cifar-10", "data.path=/c", "data.crop=28"], "takes images of 1 channel"),
        (&["data.kind=folder", "data.path=/c", "model.kind=mlp-28"], "takes images of 1 channel"),
    ];
    for (overrides, expected) in cases {
        assert_error(SMALL, overrides, expected);
    }
    resolve(SMALL, &["data.resize=32", "data.crop=28"]).unwrap();
    resolve(SMALL, &["data.kind=idx", "data.path=/any", "model.kind=dcgan-64"]).unwrap();
    let folder = ["data.kind=folder", "data.path=/c", "data.channels=1", "data.resize=30", "data.crop=28"];
    resolve(SMALL, &folder).unwrap();
    // An error in one key is not reported again as a mismatch with another.
    assert!(!errors(SMALL, &["model.kind=dcgan64", "data.resize=64"]).contains("takes"));
}

/// Invariant 2.
#[test]
fn paths_start_at_the_file_or_where_the_user_is() {
    let text = "[job]\nsteps = 1\n[data]\nkind = \"idx\"\npath = \"digits\"\n[checkpoint]\nurl = \"kept\"\n";
    let job = resolve(text, &[]).unwrap();
    assert_eq!(job.data.path.as_deref(), Some(Path::new("/jobs/digits")));
    assert_eq!(job.checkpoint.url.as_deref(), Some("/jobs/kept"));
    let here = std::env::current_dir().unwrap();
    let job = resolve(text, &["data.path=digits", "checkpoint.url=file:///kept"]).unwrap();
    assert_eq!(job.data.path, Some(here.join("digits")));
    assert_eq!(job.checkpoint.url.as_deref(), Some("file:///kept"));
}

/// User input may appear in logs, credentials must not.
#[test]
fn an_address_with_credentials_is_refused_and_not_shown() {
    let text = "[job]\nsteps = 1\n[checkpoint]\nurl = \"s3://key:hush@bucket/a\"\n";
    for errors in [errors(text, &[]), errors(SMALL, &["checkpoint.url=s3://key:hush@bucket/a"])] {
        assert!(errors.contains("checkpoint.url") && errors.contains("credentials"), "{errors}");
        assert!(!errors.contains("hush"), "{errors}");
    }
    let job = resolve(SMALL, &["checkpoint.url=s3://bucket/a"]).unwrap();
    assert_eq!(job.checkpoint.url.as_deref(), Some("s3://bucket/a"));
}

#[test]
fn data_must_be_where_it_is_said_to_be() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("my job.toml");
    let text = "[job]\nsteps = 1\n[data]\nkind = \"cifar-10\"\npath = \"cifar\"\nresize = 64\n[model]\nkind = \"dcgan-64\"\n";
    std::fs::write(&file, text).unwrap();
    let source = Source::File(file.clone());
    let named = ["job.name=mine".to_owned()];
    let shown = file.display();
    let errors = read(&source, &named).unwrap_err().to_string();
    assert!(errors.starts_with(&format!("{shown}:5: data.path: ")), "{errors}");
    assert!(errors.contains("cifar does not exist; \"cifar-10\" needs the folder"), "{errors}");
    std::fs::write(dir.path().join("cifar"), "").unwrap();
    assert!(read(&source, &named).unwrap_err().to_string().contains("is no folder"));
    std::fs::remove_file(dir.path().join("cifar")).unwrap();
    std::fs::create_dir(dir.path().join("cifar")).unwrap();
    assert_eq!(read(&source, &named).unwrap().data.path, Some(dir.path().join("cifar")));

    let errors = read(&source, &[]).unwrap_err().to_string();
    assert!(errors.contains("the file's own name \"my job\" cannot serve"), "{errors}");
    let missing = Source::File(dir.path().join("no.toml"));
    assert!(read(&missing, &[]).unwrap_err().to_string().contains("no.toml: cannot be read: "));
    assert_error(SMALL, &["data.kind=folder"], "data.path: missing; \"folder\" needs path");
    assert_error(SMALL, &["data.path=/x"], "comes with the program; remove it");
}

#[test]
fn a_run_goes_on_only_with_the_job_it_was_started_with() {
    let recorded = resolve(SMALL, &[]).unwrap();
    let changeable = [
        "job.epochs=7",
        "job.failure_deadline=9",
        "checkpoint.every_steps=1",
        "checkpoint.every_epochs=1",
        "checkpoint.keep_last=1",
        "checkpoint.url=/elsewhere",
        "sample.every_steps=1",
        "sample.count=1",
        "metrics.every_steps=1",
    ];
    let changeable = [&changeable[..], &["job.name=other"]].concat();
    assert_eq!(differences(&recorded, &resolve(SMALL, &changeable).unwrap()), []);
    let given = ["job.seed=1", "data.kind=idx", "data.path=/d", "job.non_finite=roll-back"];
    let given = resolve(SMALL, &given).unwrap();
    let shown: Vec<String> = differences(&recorded, &given).iter().map(Difference::to_string).collect();
    assert_eq!(
        shown,
        [
            "data.kind: the run was started with \"mnist-10k\", but given is \"idx\"",
            "data.path: the run was started with not set, but given is \"/d\"",
            "job.non_finite: the run was started with \"skip\", but given is \"roll-back\"",
            "job.seed: the run was started with 0, but given is 1",
        ]
    );
}

/// An edited `job.toml` is noticed and named.
#[test]
fn a_damaged_resolved_job_is_refused() {
    let text = render(&resolve(SMALL, &[]).unwrap()).replace("seed = 0", "seed = -4");
    let errors = parse_resolved(&text).unwrap_err().to_string();
    assert!(errors.starts_with("job.toml:") && errors.contains("job.seed: must be"), "{errors}");
}

/// A `job.toml` as the first version wrote it.
const OF_THE_FIRST_VERSION: &str = r#"# The job of this run as it was resolved: defaults filled in, paths absolute.

[job]
name = "small"
seed = 7
steps = 10
data_shards = 8
shard_batch = 8
threads = 1
failure_deadline = 5.0

[data]
kind = "mnist-10k"
channels = 1

[model]
kind = "mlp-28"
latent_dim = 100
width = 256
ema_half_life_images = 10000

[loss]
kind = "wasserstein-gp"
discriminator_steps = 5
gradient_penalty = 10.0

[optimizer]
kind = "adam"
learning_rate = 0.0002
discriminator_learning_rate = 0.0003
beta1 = 0.0
beta2 = 0.9
epsilon = 0.00000001

[checkpoint]
every_steps = 1000
every_epochs = 0
keep_last = 3

[sample]
every_steps = 1000
count = 50

[metrics]
every_steps = 10
"#;

/// Sections that later versions wrote beside those: settings that the first one had not, with the
/// values that it computed with.
const OF_LATER_VERSIONS: &str = r#"
[augmentation]
flip = false
kinds = []
probability = 1.0
final_probability = 1.0
adaptive = false
target = 0.6
adjust_images = 500000

[evaluation]
every_steps = 0
with_checkpoints = false
samples = 2000
reference = 10000
features = "auto"
best_by = "auto"

[alarms]
policy = "warn"
after_images = 25000
collapse = 0.3
overfitting = 0.8
saturated_rows = 100
"#;

/// A newer build resumes the runs of every older one: a key that their `job.toml` lacks has the
/// value that they computed with.
#[test]
fn a_run_of_an_older_version_goes_on_with_the_same_job() {
    let overrides = ["job.seed=7", "loss.kind=wasserstein-gp", "optimizer.discriminator_learning_rate=3e-4"];
    let given = resolve(SMALL, &overrides).unwrap();
    let later = format!("{OF_THE_FIRST_VERSION}{OF_LATER_VERSIONS}");
    let with = |text: &str, section: &str, keys: &str| text.replace(section, &format!("{section}\n{keys}"));
    let general = "non_finite = \"skip\"\nprecision = \"fp32\"\nreduction = \"tree\"\ndeterministic = true";
    let later = with(&later, "[job]", general);
    let model = "ema_schedule = \"ramp-up\"\nconditional = false\nfreeze_discriminator = 0";
    let later = with(&later, "[model]", model);
    let loss = "r1 = 0.0\nfinal_r1 = 0.0\nr2 = 0.0\nfinal_r2 = 0.0\npenalty_every = 1";
    let later = with(&later, "[loss]", loss);
    let optimizer = "decay_images = 0\nfinal_learning_rate = 0.0002\nfinal_discriminator_learning_rate = 0.0003\n\
                     final_beta2 = 0.9";
    let later = with(&later, "[optimizer]", optimizer);
    for text in [OF_THE_FIRST_VERSION, &later] {
        let recorded = parse_resolved(text).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(differences(&recorded, &given), []);
        assert_eq!(recorded, given);
    }
    // The second has every key of today's form, with its values spelled as they are written today.
    assert_eq!(toml::from_str::<toml::Table>(&later).unwrap(), given.to_table());
}

/// Workers refuse a longer text, so it is refused before they are asked.
#[test]
fn a_job_that_is_too_long_to_send_is_refused() {
    let list = tempfile::NamedTempFile::new().unwrap();
    let names: String = (0..90_000).map(|number| format!("{number:0>100}\n")).collect();
    std::fs::write(list.path(), names).unwrap();
    let listed = format!("data.exclude=@{}", list.path().display());
    assert_error(SMALL, &[&listed], "can be sent to workers; leave fewer samples out by name");
}

proptest! {
    /// Invariant 3.
    #[test]
    fn the_resolved_job_reads_back_the_same(
        seed in 0..=i64::MAX, rate in 1e-12..10.0_f64, beta in 0.0..1.0_f64, deadline in 0.5..3600.0_f64,
        path in "/[^\u{0}/]{1,20}", loss in 0..5_usize, epochs in proptest::bool::ANY,
    ) {
        let kind = ["non-saturating", "minimax", "least-squares", "hinge", "wasserstein-gp"][loss];
        let mut job = resolve(SMALL, &[
            &format!("job.seed={seed}"),
            &format!("optimizer.learning_rate={rate:?}"),
            &format!("optimizer.beta1={beta:?}"),
            &format!("job.failure_deadline={deadline:?}"),
            &format!("loss.kind={kind}"),
            if epochs { "job.epochs=3" } else { "job.steps=3" },
            "data.kind=idx",
            "data.path=/placeholder",
        ]).unwrap();
        prop_assert_eq!((job.optimizer.learning_rate, job.optimizer.beta1), (rate, beta));
        job.data.path = Some(Path::new(&path).components().collect());
        let back = parse_resolved(&render(&job)).unwrap();
        prop_assert_eq!(differences(&job, &back), []);
        prop_assert_eq!(back, job);
    }
}

/// `data.exclude` in all its forms, and the tables that it is resolved to.
#[test]
fn samples_are_left_out_by_name() {
    let text = "[job]\nsteps = 1\n[data]\nkind = \"folder\"\npath = \"/pics\"\n[model]\nkind = \"script\"\n\
                generator = \"/g\"\ndiscriminator = \"/d\"\n";
    let excluded = |text: &str, overrides: &[&str]| {
        let job = resolve(text, overrides).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(parse_resolved(&render(&job)).unwrap(), job);
        job.data.exclusions.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(excluded(text, &["data.exclude=a/b c.jpg"]), ["from the start: a/b c.jpg"]);
    assert_eq!(excluded(text, &["data.exclude=17"]), ["from the start: 17"]);
    let several = "data.exclude=[\"./z.png\", \"/pics/a/1.png\", \"z.png\"]";
    assert_eq!(excluded(text, &[several]), ["from the start: a/1.png, z.png"]);
    let list = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(list.path(), "one.png\n\n#two.png\n").unwrap();
    let listed = format!("data.exclude=@{}", list.path().display());
    assert_eq!(excluded(text, &[&listed]), ["from the start: #two.png, one.png"]);
    let tables =
        format!("{text}[[data.exclusion]]\nafter_step = 7\nafter_phase = 1\nfiles = [\"b\", \"a\"]\n");
    let both = excluded(&tables, &["data.exclude=[\"a\", \"c\"]"]);
    assert_eq!(both, ["from the start: c", "after step 7 and phase 1 of the next: b, a"]);
    // A run's own record may be of another objective, whose steps have more phases.
    let recorded = render(&resolve(&tables, &[]).unwrap()).replace("after_phase = 1", "after_phase = 3");
    assert_eq!(parse_resolved(&recorded).unwrap().data.exclusions[0].after_phase, 3);
    for (wrong, says) in [
        ("data.exclude=true", "a list of texts"),
        ("data.exclude=@/no/such/list", "/no/such/list: No such file"),
        ("data.exclusion=7", "[[data.exclusion]]"),
        ("data.exclusion=[{after_step = 1}]", "names no file"),
        ("data.exclusion=[{after = 1}]", "\"after\" is unknown"),
        ("data.exclusion=[{after_step = 1, after_phase = 2, files = [\"a\"]}]", "must be below 2"),
        ("data.exclusion=[{after_step = 2, files = [\"a\"]}, {after_step = 1, files = [\"b\"]}]", "order"),
    ] {
        assert_error(text, &[wrong], says);
    }
}

#[test]
fn a_resumed_job_asks_only_for_what_is_not_left_out_yet() {
    let job = |overrides: &[&str]| resolve(SMALL, overrides).unwrap();
    let recorded = job(&[
        "data.exclusion=[{after_step = 0, files = [\"1\"]}, {after_step = 5, files = [\"2\", \"3\"]}]",
    ]);
    for (given, asks) in [
        (&[][..], &[][..]),
        (&["data.exclude=1"], &[]),
        (&["data.exclude=[\"3\", \"4\"]"], &["4"]),
        (&["data.exclusion=[{after_step = 5, files = [\"2\"]}]"], &[]),
    ] {
        assert_eq!(asked(&recorded, &job(given)).unwrap(), asks, "{given:?}");
        assert!(differences(&recorded, &job(given)).is_empty());
    }
    let other = asked(&recorded, &job(&["data.exclusion=[{after_step = 6, files = [\"2\"]}]"])).unwrap_err();
    assert!(other.to_string().contains("after step 6"), "{other}");
}

/// Workers compare what is there. A place that only one job has is another job.
#[test]
fn content_may_move_and_not_appear() {
    let job = |settings: &[&str]| resolve(SMALL, &[&["data.kind=idx"], settings].concat()).unwrap();
    let [old, new] = ["/old", "/new"].map(|at| job(&[&format!("data.path={at}"), "job.steps=9"]));
    assert_eq!(differences(&old, &new), []);
    let keys: Vec<String> = moves(&old, &new).into_iter().map(|moved| moved.key).collect();
    assert_eq!(keys, ["data.path"]);
    let weights = job(&["data.path=/old", "model.init_from=/weights"]);
    assert_eq!(differences(&old, &weights)[0].key, "model.init_from");
    assert_eq!(moves(&old, &weights), []);
}

const TEXT: &str =
    "[job]\nsteps = 10\n[model]\nkind = \"transformer\"\n[data]\nkind = \"text\"\npath = \"/d/a.txt\"\n";

#[test]
fn text_has_its_own_settings_and_none_of_images() {
    let job = resolve(TEXT, &[]).unwrap();
    assert_eq!((job.data.context, job.data.channels, &job.data.tokenizer), (Some(128), 0, &None));
    let section = toml::to_string(&job.to_table()["data"]).unwrap();
    assert_eq!(section, "context = 128\nkind = \"text\"\npath = \"/d/a.txt\"\n");
    assert_eq!(parse_resolved(&render(&job)).unwrap(), job);
    let arrays = resolve(
        TEXT,
        &["data.kind=arrays", "model.kind=package", "model.path=x.pt2", "data.names=[\"y\",\"x\"]"],
    );
    assert_eq!(arrays.unwrap().data.names, Some(vec!["x".to_owned(), "y".to_owned()]));
    for (overrides, expected) in [
        (&["data.resize=64"][..], "data.resize=64: is of use with images alone; remove it"),
        (&["data.channels=1"], "data.channels=1: is of use with images alone; remove it"),
        (&["data.names=x"], "data.names=x: is of use with data.kind = \"arrays\" alone; remove it"),
        (&["data.context=0"], "data.context=0"),
        (&["data.context=2000000"], "data.context=2000000"),
        (
            &["model.kind=dcgan-28"],
            "\"dcgan-28\" is trained on images, but data.kind = \"text\"; change one of the two",
        ),
        (&["model.kind=vae-28"], "\"vae-28\" is trained on images"),
        (&["data.kind=arrays"], "\"transformer\" is trained on text or images, but data.kind = \"arrays\""),
        (&["data.kind=arrays", "data.names=[]"], "names no array"),
    ] {
        assert_error(TEXT, overrides, expected);
    }
    assert_error(SMALL, &["data.context=5"], "data.context=5: is of use with data.kind = \"text\" alone");
    assert_error(
        SMALL,
        &["data.tokenizer=t.json"],
        "data.tokenizer=t.json: is of use with data.kind = \"text\" alone",
    );
}

#[test]
fn a_tokenizer_belongs_to_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("a.txt"), "text").unwrap();
    std::fs::write(at("t.json"), "{}").unwrap();
    std::fs::write(at("j.toml"), TEXT.replace("/d/a.txt", "a.txt") + "tokenizer = \"t.json\"\n").unwrap();
    let read = || read_file(&at("j.toml"), &[], true);
    let job = read().unwrap();
    assert_eq!(job.data.tokenizer, Some(at("t.json")));
    let hash = blake3::hash(b"{}").to_hex().to_string();
    assert_eq!(job.data.tokenizer_hash.as_deref(), Some(hash.as_str()));
    // The record is read without the file, which may have moved.
    std::fs::rename(at("t.json"), at("u.json")).unwrap();
    assert_eq!(parse_resolved(&render(&job)).unwrap(), job);
    let missing = read().unwrap_err().to_string();
    assert!(missing.contains("data.tokenizer") && missing.contains("name a tokenizer.json"), "{missing}");
    std::fs::write(at("t.json"), "{\"other\": 1}").unwrap();
    let found: Vec<String> = differences(&job, &read().unwrap()).iter().map(ToString::to_string).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].starts_with("data.tokenizer: the tokenizer was changed since the run began"),
        "{found:?}"
    );
}

#[test]
fn optimizers_have_their_settings_and_lengths_in_steps_become_images() {
    let plain = resolve(SMALL, &[]).unwrap();
    assert_eq!(plain.optimizer.options, OptimizerOptions::default(), "older jobs keep their text");
    // 8 shards of 8 samples, in each of 5 updates of the discriminator.
    let settings = [
        "loss.discriminator_steps=5",
        "optimizer.kind=adamw",
        "optimizer.clip_norm=1",
        "optimizer.warmup_steps=2",
        "optimizer.decay=linear",
        "optimizer.decay_steps=9",
        "optimizer.discriminator_learning_rate=1e-3",
    ];
    let job = resolve(SMALL, &settings).unwrap();
    let OptimizerOptions { weight_decay, clip_norm, warmup_images, decay, momentum, .. } =
        job.optimizer.options;
    assert_eq!(
        (weight_decay, clip_norm, momentum, decay),
        (Some(0.01), Some(1.0), None, Some(Decay::Linear))
    );
    assert_eq!((warmup_images, job.optimizer.decay_images), (Some(2 * 5 * 64), 9 * 5 * 64));
    let finals = (job.optimizer.final_learning_rate, job.optimizer.final_discriminator_learning_rate);
    assert_eq!(finals, (0.0, 0.0), "where a decay is asked for, the rate falls to 0");
    assert_eq!(parse_resolved(&render(&job)).unwrap(), job);
    assert_eq!(warmup_is_cut(&job), None);
    let ends = "warmup_images in [optimizer]), and the run ends after 320";
    let cut = resolve(SMALL, &[&settings[..], &["job.steps=1"]].concat()).unwrap();
    assert!(warmup_is_cut(&cut).unwrap().ends_with(ends), "{:?}", warmup_is_cut(&cut));
    let sgd =
        resolve(SMALL, &["optimizer.kind=sgd", "optimizer.momentum=0.9", "optimizer.nesterov=true"]).unwrap();
    let text = render(&sgd);
    assert!(text.contains("weight_decay = 0.0") && !text.contains("beta"), "{text}");
    assert_eq!(parse_resolved(&text).unwrap(), sgd);
    let keys: Vec<String> = differences(&plain, &sgd).into_iter().map(|found| found.key).collect();
    assert!(
        keys.contains(&"optimizer.kind".to_owned()) && keys.contains(&"optimizer.beta1".to_owned()),
        "{keys:?}"
    );
    // An override of one unit replaces the other of the file.
    let text = format!("{SMALL}[optimizer]\nwarmup_steps = 5\ndecay_images = 640\n");
    let job = resolve(&text, &["optimizer.warmup_images=3", "optimizer.decay_steps=2"]).unwrap();
    assert_eq!((job.optimizer.options.warmup_images, job.optimizer.decay_images), (Some(3), 128));
}

#[test]
fn settings_of_optimizers_that_do_not_fit_are_refused() {
    let sgd = "optimizer.kind=sgd";
    let long = "optimizer.decay_steps=1000000000000";
    for (overrides, expected) in [
        (&["optimizer.clip_norm=0"][..], "must be above 0.0 and at most 1000000000.0, but is 0; try 1"),
        (&["optimizer.clip_norm=-1"], "must be above 0.0"),
        (&["optimizer.weight_decay=0.1"], "is not for \"adam\""),
        (&["optimizer.weight_decay=0.1"], "set kind = \"adamw\""),
        (&["optimizer.momentum=0.9"], "is a setting of \"sgd\"; remove it: the momentum of"),
        (&["optimizer.nesterov=false", "optimizer.kind=adamw"], "is a setting of \"sgd\""),
        (&[sgd, "optimizer.beta1=0.5"], "optimizer.beta1=0.5: is a setting of \"adam\" and \"adamw\""),
        (&[sgd, "optimizer.momentum=1"], "must be at least 0.0 and below 1.0"),
        (&[sgd, "optimizer.nesterov=true"], "nesterov=true: looks ahead along a momentum, and there is none"),
        (&["optimizer.warmup_steps=1", "optimizer.warmup_images=1"], "together with optimizer.warmup_images"),
        (&["optimizer.decay_steps=1", "optimizer.decay_images=1"], "together with optimizer.decay_images"),
        (&["optimizer.decay=cosine"], "needs a length; set decay_steps or decay_images"),
        (&["optimizer.decay=step", "optimizer.decay_steps=5"], "choose one of \"cosine\", \"linear\""),
        (
            &["optimizer.warmup_steps=5", "optimizer.decay_images=320"],
            "rises over 320 images, and is to have",
        ),
        (&[long], "is 64000000000000 images, more than"),
        (&["optimizer.kind=lamb"], "choose one of \"adam\", \"adamw\", \"sgd\""),
        (&["optimizer.final_learning_rate=0"], "but optimizer.decay_images is 0"),
    ] {
        assert_error(SMALL, overrides, expected);
        assert!(!errors(SMALL, overrides).contains('\n'), "{}", errors(SMALL, overrides));
    }
}
