//! `worker sample` of a transformer: text on the terminal as it comes, or pictures token by token.

use std::path::{Path, PathBuf};

use clap::Args;
use ganglion_proto::job::Data;
use ganglion_proto::out;
use ganglion_proto::progress::Progress;
use ganglion_proto::words::counted;
use serde::Deserialize;
use tch::Tensor;
use tracing::Level;

use crate::commands::error::Failure;
use crate::commands::generator_file::{TransformerFile, Weights};
use crate::commands::sample::{numbered, png, say, say_beside, write};
use crate::data::{DataSet, SampleShape};
use crate::objective::transformer::{Choice, Drawing, Pen, Pixels, PixelsWanted, Prose, Source};
use crate::random::{Key, Purpose};
use crate::sampling::columns;
use crate::sampling::picture::Picture;

/// How a transformer draws tokens.
#[derive(Args, Clone, Debug)]
pub(crate) struct Tokens {
    /// Text that the samples of a transformer over text go on from. Default: the beginning of a line.
    #[arg(long, value_name = "TEXT", help_heading = "Transformers")]
    prompt: Option<String>,
    /// Number of tokens of a text.
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=10_000_000), help_heading = "Transformers")]
    tokens: u64,
    /// Divisor of the logits: below 1 the likely tokens become more likely, and 0 takes the most likely one.
    #[arg(long, value_name = "T", default_value_t = 1.0, value_parser = temperature, help_heading = "Transformers")]
    temperature: f64,
    /// Draw each token from the K most likely ones.
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Transformers")]
    top_k: Option<u32>,
    /// Draw each token from the most likely ones that have this share of the probability.
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = share, help_heading = "Transformers")]
    top_p: f64,
    /// Complete images of the run's data, held-out ones if it has them, whose upper half is given: the first
    /// column shows the images, the second the halves.
    #[arg(long, conflicts_with = "folder", help_heading = "Transformers")]
    complete: bool,
    /// Tokenizer of the run, for a run with one, if it has moved.
    #[arg(long, value_name = "FILE", help_heading = "Transformers")]
    tokenizer: Option<PathBuf>,
}

fn temperature(text: &str) -> Result<f64, String> {
    let value = number(text)?;
    if (0.0..=100.0).contains(&value) { Ok(value) } else { Err("it must be from 0 to 100".to_string()) }
}

fn share(text: &str) -> Result<f64, String> {
    let value = number(text)?;
    if value > 0.0 && value <= 1.0 { Ok(value) } else { Err("it must be above 0, and 1 at most".to_string()) }
}

fn number(text: &str) -> Result<f64, String> {
    text.parse().map_err(|_| "not a number".to_string())
}

/// Requests beside the tokens.
pub(crate) struct Asked<'a> {
    pub count: Option<u32>,
    pub seed: u64,
    pub class: Option<&'a str>,
    pub has_truncation: bool,
    pub out: Option<&'a Path>,
    pub folder: Option<&'a Path>,
}

impl Tokens {
    /// Draws from the transformer of a run; `None` if it is no transformer.
    pub(crate) fn sample(&self, weights: &Weights, asked: &Asked<'_>) -> Option<Result<(), Failure>> {
        let file = weights.transformer()?;
        Some(self.draw(&file, asked))
    }

    fn draw(&self, file: &TransformerFile, asked: &Asked<'_>) -> Result<(), Failure> {
        if asked.has_truncation {
            let what =
                "--truncation limits noise, and a transformer has none; leave it out, or give --temperature";
            return Err(Failure::Input(what.to_string()));
        }
        let drawing = Drawing::read(&file.name, &file.bytes, self.tokenizer.as_deref())?;
        let key = Key { seed: asked.seed, step: 0, phase: 0, shard: 0, purpose: Purpose::Samples };
        let pen = Pen { weights: &drawing.weights, key, choice: self.choice(&drawing)? };
        match &drawing.samples {
            Source::Text(prose) => self.text(&pen, prose, asked),
            Source::Pixels(pixels) => self.images(&pen, pixels, asked, file),
        }
    }

    /// Refuses what only a transformer knows, for a run of another model.
    pub(crate) fn refuse_others(&self) -> Result<(), Failure> {
        let options = [
            ("--prompt", self.prompt.is_some()),
            ("--top-k", self.top_k.is_some()),
            ("--top-p", self.top_p < 1.0),
            ("--temperature", self.temperature != 1.0),
            ("--complete", self.complete),
            ("--tokenizer", self.tokenizer.is_some()),
        ];
        match options.into_iter().find(|(_, given)| *given) {
            Some((option, _)) => Err(Failure::Input(format!("{option} is for transformers; leave it out"))),
            None => Ok(()),
        }
    }

    fn choice(&self, drawing: &Drawing) -> Result<Choice, Failure> {
        let vocabulary = drawing.weights.sizes.vocabulary;
        if let Some(top_k) = self.top_k.filter(|top_k| i64::from(*top_k) > vocabulary) {
            return Err(Failure::Input(format!(
                "--top-k {top_k}: the model knows {vocabulary} tokens; choose at most {vocabulary}"
            )));
        }
        let top_k = self.top_k.map(|top_k| top_k as usize);
        Ok(Choice { temperature: self.temperature, top_k, top_p: self.top_p })
    }

    fn text(&self, pen: &Pen<'_>, prose: &Prose, asked: &Asked<'_>) -> Result<(), Failure> {
        let given = [
            ("--class", asked.class.is_some()),
            ("--folder", asked.folder.is_some()),
            ("--complete", self.complete),
        ];
        if let Some((option, _)) = given.into_iter().find(|(_, given)| *given) {
            return Err(Failure::Input(format!(
                "{option} is for images, and the run writes text; leave it out"
            )));
        }
        let prompt = self.encoded(prose, pen.weights.sizes.context)?;
        let count = asked.count.unwrap_or(1);
        let mut written = String::new();
        for sample in 0..count {
            let heading =
                if count > 1 { format!("--- {} of {count} ---\n", sample + 1) } else { String::new() };
            let begun = heading + self.prompt.as_deref().unwrap_or_default();
            let mut told = show(asked.out, &mut written, &begun);
            let wrote = prose.write(pen, sample, (&prompt, self.tokens), |piece| {
                if told.is_ok() {
                    told = show(asked.out, &mut written, piece);
                }
                told.is_ok()
            });
            wrote.map_err(Failure::other)?;
            told.and_then(|()| show(asked.out, &mut written, "\n"))?;
        }
        let Some(file) = asked.out else { return Ok(()) };
        write(file, "--out", written.as_bytes())?;
        say(file)
    }

    /// Tokens of the prompt, at least one.
    fn encoded(&self, prose: &Prose, context: i64) -> Result<Vec<u32>, Failure> {
        let Some(prompt) = &self.prompt else { return Ok(prose.start()) };
        if prompt.is_empty() {
            let what =
                "--prompt: it is empty; give some text, or leave it out to begin at the beginning of a line";
            return Err(Failure::Input(what.to_string()));
        }
        let tokens =
            prose.codec.encode(prompt).map_err(|problem| Failure::Input(format!("--prompt: {problem}")))?;
        if tokens.is_empty() {
            return Err(Failure::Input(
                "--prompt: the tokenizer has no token for it; give other text".to_string(),
            ));
        }
        if i64::try_from(tokens.len()).is_ok_and(|count| count > context) {
            let has = counted(tokens.len() as u64, "token");
            // Beside the answer, and no error: the text goes on from its end.
            out::tell(
                Level::WARN,
                &format!("--prompt has {has}; the model sees the last {context} of them at most"),
            );
        }
        Ok(tokens)
    }

    fn images(
        &self,
        pen: &Pen<'_>,
        pixels: &Pixels,
        asked: &Asked<'_>,
        file: &TransformerFile,
    ) -> Result<(), Failure> {
        if self.prompt.is_some() {
            let what = "--prompt is for text, and the run draws images; leave it out, or give --complete";
            return Err(Failure::Input(what.to_string()));
        }
        let progress = Progress::start("drawing");
        let count = asked.count.unwrap_or(50);
        let drawn = |wanted: &PixelsWanted<'_>| -> Result<Tensor, Failure> {
            pixels.draw(pen, wanted).map_err(Failure::other)
        };
        if self.complete {
            let out = asked.out.ok_or_else(no_place)?;
            let originals = originals(pixels, file, i64::from(count.div_ceil(COLUMNS)))?;
            let picture = completed(pixels, &originals, &progress, drawn)?;
            drop(progress);
            write(out, "--out", &png(&picture)?)?;
            return say(out);
        }
        let classes = match asked.class {
            Some(class) => {
                let class =
                    numbered(class, pixels.class_names(), pixels.classes()).map_err(Failure::Input)?;
                vec![class; count as usize]
            }
            None => pixels.classes_in_turn(count),
        };
        progress.part("images", count.into());
        let images = drawn(&PixelsWanted { from: 0, classes: &classes, given: None, progress: &progress })?;
        if let Some(out) = asked.out {
            let picture = Picture::grid(&images, columns(pixels.classes()))?;
            drop(progress);
            write(out, "--out", &png(&picture)?)?;
            return say(out);
        }
        let folder = asked.folder.ok_or_else(no_place)?;
        std::fs::create_dir_all(folder).map_err(|error| Failure::unwritable("--folder", folder, &error))?;
        for (index, image) in images.unbind(0).iter().enumerate() {
            write(&folder.join(format!("{index:06}.png")), "--folder", &png(&Picture::of(image)?)?)?;
        }
        drop(progress);
        say_beside(folder, &format!("{}", folder.display()))
    }
}

pub(crate) fn no_place() -> Failure {
    Failure::Input("give --out FILE.png, or --folder DIR, for the images".to_string())
}

/// Shows a piece of text, or keeps it for a file.
fn show(file: Option<&Path>, written: &mut String, piece: &str) -> Result<(), Failure> {
    match file {
        Some(_) => written.push_str(piece),
        None => out::show(piece)?,
    }
    Ok(())
}

/// Images in a row of completions: the original, its half, and completions.
const COLUMNS: u32 = 10;

/// Part of a run's job that completions read.
#[derive(Deserialize)]
struct RunJob {
    data: Data,
    #[serde(default)]
    evaluation: RunEvaluation,
}

#[derive(Default, Deserialize)]
struct RunEvaluation {
    held_out: Option<PathBuf>,
}

/// Images with their classes, evenly spaced over the run's held-out data, or its training data.
fn originals(pixels: &Pixels, file: &TransformerFile, count: i64) -> Result<(Tensor, Vec<u32>), Failure> {
    let (job, text) = file.job.as_ref().ok_or_else(|| {
        Failure::Input(
            "--complete: there is no job.toml beside the checkpoint that tells of its data".to_string(),
        )
    })?;
    let wrong = |error: toml::de::Error| Failure::Input(format!("{job}: {}", error.message()));
    let RunJob { data, evaluation } = toml::from_str(text).map_err(wrong)?;
    let source = evaluation.held_out.map_or_else(|| data.clone(), |path| data.elsewhere(path));
    let opened = if pixels.classes() > 0 { DataSet::open_labelled(&source) } else { DataSet::open(&source) };
    let data = opened.map_err(crate::eval::EvalError::from)?;
    if *data.shape() != SampleShape::Image(pixels.shape()) {
        let shape = pixels.shape();
        return Err(Failure::Input(format!(
            "the checkpoint draws images of {shape}, and the data has {}",
            data.shape()
        )));
    }
    let left = data.left();
    let count = usize::try_from(count).unwrap_or(1).min(left.len());
    let indices: Vec<usize> = (0..count).map(|at| left[at * left.len() / count]).collect();
    let values = data.read_all(&indices).map_err(crate::eval::EvalError::from)?;
    let side = |size: usize| i64::try_from(size).expect("an image is small");
    let shape = pixels.shape();
    let sizes = [side(count), side(shape.channels), side(shape.height), side(shape.width)];
    let classes = indices.iter().map(|index| data.labels().get(*index).copied().unwrap_or_default());
    Ok((Tensor::from_slice(values.pixels()).view(sizes), classes.collect()))
}

/// Picture of images, each with its upper half and completions.
fn completed(
    pixels: &Pixels,
    (images, classes): &(Tensor, Vec<u32>),
    progress: &Progress,
    drawn: impl Fn(&PixelsWanted<'_>) -> Result<Tensor, Failure>,
) -> Result<Picture, Failure> {
    let tokens = pixels.tokens_of(images);
    let rows = pixels.shape().height / 2;
    let half =
        i64::try_from(rows * pixels.shape().width * pixels.shape().channels).expect("an image is small");
    let (each, count) = (COLUMNS - 2, tokens.size()[0]);
    let repeated = tokens.narrow(1, 0, half).repeat_interleave_self_int(i64::from(each), 0, None);
    let wanted: Vec<u32> = classes.iter().flat_map(|class| vec![*class; each as usize]).collect();
    progress.part("completions", wanted.len() as u64);
    let drawn = drawn(&PixelsWanted { from: 0, classes: &wanted, given: Some(&repeated), progress })?;
    let known = pixels.images_of(&tokens);
    let halves = known.copy();
    let rows = i64::try_from(rows).expect("an image is small");
    let _ = halves.narrow(2, rows, known.size()[2] - rows).fill_(-1.0);
    let by_image =
        |images: &Tensor, each: i64| images.view([&[count, each], &known.size()[1..]].concat().as_slice());
    let all = [by_image(&known, 1), by_image(&halves, 1), by_image(&drawn, i64::from(each))];
    Ok(Picture::grid(&Tensor::cat(&all, 1).flatten(0, 1), i64::from(COLUMNS))?)
}
