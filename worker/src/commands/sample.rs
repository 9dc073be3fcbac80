//! Subcommands of the `worker` program for generation: samples, interpolations, and export of the generator
//! to other programs.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Cursor, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use clap::Args;
use ganglion_proto::progress::Progress;
use ganglion_proto::{out, printable_start};
use ganglion_storage::{RelativeName, whole};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;
use tch::{CModule, Kind, Tensor, no_grad};
use tracing::Level;
use zip::write::FileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use crate::commands::encode::{Given, Wanted, no_encoder};
use crate::commands::error::Failure;
use crate::commands::evaluate::Source;
use crate::commands::generator_file::{Found, Painter, Weights};
use crate::commands::tokens::{Asked, Tokens, no_place};
use crate::objective::package::Drawn;
use crate::random::{Key, Purpose};
use crate::sampling::picture::{Film, Picture};
use crate::sampling::{Generator, SampleError, columns, finite};

/// Whose noise, and of which class.
#[derive(Args)]
struct Choice {
    /// Seed of the noise.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Class to draw, of a conditional model, by its name or number. Default: one class after the other.
    #[arg(long, value_name = "NAME|N")]
    class: Option<String>,
    /// Keep the noise between -LIMIT and LIMIT: samples become more typical and less varied. 2 changes
    /// little, 1 much.
    #[arg(long, value_name = "LIMIT", value_parser = limit)]
    truncation: Option<f64>,
}

fn limit(text: &str) -> Result<f64, String> {
    let limit: f64 = text.parse().map_err(|_| "not a number".to_string())?;
    if limit.is_finite() && limit >= 0.01 { Ok(limit) } else { Err("it must be at least 0.01".to_string()) }
}

impl Choice {
    fn noise(&self, generator: &Generator, index: u32) -> Tensor {
        generator.noise(Purpose::Samples, self.seed, index, self.truncation)
    }

    /// Key of a package's draws.
    fn key(&self) -> Key {
        Key { seed: self.seed, step: 0, phase: 0, shard: 0, purpose: Purpose::Samples }
    }

    /// Draws samples from number `from` on, one for each class given.
    fn draw(&self, painter: &Painter, from: u32, classes: &[u32]) -> Tensor {
        match painter {
            Painter::Generator(generator) => {
                let noise = (from..).take(classes.len()).map(|index| self.noise(generator, index));
                generator.images(&Tensor::stack(&noise.collect::<Vec<_>>(), 0), classes)
            }
            Painter::Package(samples) => samples.draw(self.key(), from, classes, &Progress::off()),
        }
    }

    /// Returns the class of each of `count` samples.
    fn classes(&self, painter: &Painter, count: u32) -> Result<Vec<u32>, Failure> {
        if self.truncation.is_some() && matches!(painter, Painter::Package(_)) {
            let what = "--truncation: a package draws its own noise; leave it out, or limit the noise in its sample()";
            return Err(Failure::Input(what.to_string()));
        }
        let Some(class) = &self.class else { return Ok(painter.classes_in_turn(count)) };
        let class = numbered(class, painter.class_names(), painter.classes());
        class.map(|class| vec![class; count as usize]).map_err(Failure::Input)
    }
}

/// Number of a class by its name, or by its number as text. A name that looks like a number comes first.
pub(crate) fn numbered(class: &str, names: &[String], classes: u32) -> Result<u32, String> {
    let shown = printable_start(class, SHOWN_CHARACTERS);
    if classes == 0 {
        return Err(format!("--class {shown}: the model knows no classes; leave --class out"));
    }
    let number = (0..classes).zip(names).find(|(_, name)| *name == class).map(|(number, _)| number);
    let number = number.or_else(|| class.parse().ok().filter(|number| *number < classes));
    number.ok_or_else(|| {
        let numbers = format!("0 to {}", classes - 1);
        let mut known = names.iter().take(SHOWN_CLASSES).map(String::as_str).collect::<Vec<_>>();
        if names.len() > known.len() {
            known.push("...");
        }
        let known = match known.join(", ") {
            none if none.is_empty() => numbers,
            names => format!("{names}, or their numbers, {numbers}"),
        };
        format!("--class {shown}: the model knows the classes {known}; choose one")
    })
}

/// Names of the folders for samples of each class: those of the classes, so that a data set of them has the
/// same classes, or their numbers where names cannot be folders.
fn folders(names: &[String], classes: u32) -> Vec<String> {
    let is_folder =
        |name: &str| RelativeName::parse(name).is_ok() && !name.contains('/') && !name.starts_with('.');
    // On some file systems names that differ in their case are one.
    let distinct: BTreeSet<String> = names.iter().map(|name| name.to_lowercase()).collect();
    if names.len() == classes as usize
        && distinct.len() == names.len()
        && names.iter().all(|name| is_folder(name))
    {
        return names.to_vec();
    }
    (0..classes).map(|class| format!("{class:03}")).collect()
}

/// Arguments of `worker sample`.
#[derive(Args)]
pub(crate) struct Sample {
    #[command(flatten)]
    weights: Weights,
    /// Number of samples: by default 50 images, or 1 text.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: Option<u32>,
    #[command(flatten)]
    choice: Choice,
    /// Draw reconstructions instead, each below its original: of these images, files or indices of samples of
    /// the data, or without any of --count samples. For a VAE.
    #[arg(long, value_name = "FILE|N", num_args = 0.., conflicts_with_all = ["folder", "truncation"])]
    reconstruct: Option<Vec<String>>,
    /// Data whose samples are reconstructed: a data.kind, and for most kinds a path, such as
    /// idx:/data/t10k-images-idx3-ubyte.gz. Default: the data of the run.
    #[arg(long, value_name = "KIND[:PATH]", requires = "reconstruct")]
    data: Option<Source>,
    #[command(flatten)]
    tokens: Tokens,
    /// PNG file to write, one picture of all samples; of a transformer over text, the file to write them to
    /// instead of the terminal.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Folder for a PNG file of each sample; of a conditional model, in a folder for each class.
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    folder: Option<PathBuf>,
}

/// Maximum number of classes that an error names.
const SHOWN_CLASSES: usize = 20;
/// Maximum number of characters of an argument in an error.
const SHOWN_CHARACTERS: usize = 100;
/// Maximum number of samples in one picture.
const MOST_IN_A_PICTURE: u32 = 10_000;
/// Number of samples generated before they are written.
const AT_ONCE: u32 = 640;

/// Generates samples.
///
/// # Errors
/// The arguments do not suit the checkpoint, or nothing can be written.
pub(crate) fn sample(arguments: &Sample) -> Result<(), Failure> {
    crate::set_threads(1);
    let Sample { weights, count, choice, reconstruct, data, tokens, out, folder } = arguments;
    if let Some(out) = out {
        try_out(out)?;
    }
    let asked = Asked {
        count: *count,
        seed: choice.seed,
        class: choice.class.as_deref(),
        has_truncation: choice.truncation.is_some(),
        out: out.as_deref(),
        folder: folder.as_deref(),
    };
    if let Some(sampled) = tokens.sample(weights, &asked) {
        return sampled;
    }
    tokens.refuse_others()?;
    let count = &count.unwrap_or(50);
    if let Some(folder) = folder {
        std::fs::create_dir_all(folder)
            .and_then(|()| whole::try_out(&folder.join("000000.png")))
            .map_err(|error| Failure::unwritable("--folder", folder, &error))?;
    }
    let progress = Progress::start("reading the weights");
    let found = weights.open()?;
    if let (Some(names), Some(out)) = (reconstruct, out) {
        let wanted = Images { option: "--reconstruct", names, data: data.as_ref(), choice };
        let picture = reconstructions(&found, &wanted, *count)?;
        drop(progress);
        write(out, "--out", &png(&picture)?)?;
        return say(out);
    }
    let painter = found.painter;
    let classes = choice.classes(&painter, *count)?;
    let folders = folders(painter.class_names(), painter.classes());
    let draw = |from: u32, to: u32| choice.draw(&painter, from, &classes[from as usize..to as usize]);
    let at_once = match &painter {
        Painter::Generator(_) => AT_ONCE,
        // Whole runs of its graph.
        Painter::Package(samples) => AT_ONCE.next_multiple_of(samples.at_once()),
    };
    let Some(folder) = folder else {
        let out = out.as_deref().ok_or_else(no_place)?;
        if *count > MOST_IN_A_PICTURE {
            let what = format!(
                "--count {count}: a picture holds up to {MOST_IN_A_PICTURE}; give --folder instead of --out"
            );
            return Err(Failure::Input(what));
        }
        progress.part("drawing a picture", 0);
        write(out, "--out", &png(&Picture::grid(&draw(0, *count), columns(painter.classes()))?)?)?;
        return say(out);
    };
    progress.part("samples", (*count).into());
    for from in (0..*count).step_by(at_once as usize) {
        let to = (from + at_once).min(*count);
        for (index, image) in (from..to).zip(draw(from, to).unbind(0)) {
            // Without classes there is no folder of one.
            let own =
                folders.get(classes[index as usize] as usize).map_or(folder.clone(), |own| folder.join(own));
            std::fs::create_dir_all(&own).map_err(|error| Failure::unwritable("--folder", &own, &error))?;
            write(&own.join(format!("{index:06}.png")), "--folder", &png(&Picture::of(&image)?)?)?;
            progress.add(1);
        }
    }
    say(folder)
}

/// Images that were named on the command line.
struct Images<'a> {
    option: &'static str,
    names: &'a [String],
    data: Option<&'a Source>,
    choice: &'a Choice,
}

impl Images<'_> {
    /// Reads the images, or `count` samples of the data where none are named, for a model with an encoder.
    fn read<'f>(&self, found: &'f Found, count: u32) -> Result<(&'f Generator, Given), Failure> {
        let generator = match &found.painter {
            Painter::Generator(generator) if generator.has_encoder() => generator,
            _ => return Err(no_encoder(self.option)),
        };
        let class = self.choice.class.as_ref();
        let class = class.map(|class| numbered(class, generator.class_names(), generator.classes()));
        let class = class.transpose().map_err(Failure::Input)?;
        let Images { option, names, data, .. } = *self;
        let wanted = Wanted { option, names, data, job: found.job.as_ref(), class };
        let given = if names.is_empty() { wanted.some(count, generator) } else { wanted.read(generator) };
        Ok((generator, given?))
    }
}

/// Renders images with their reconstructions: a row of originals, and below it one of reconstructions.
fn reconstructions(found: &Found, wanted: &Images<'_>, count: u32) -> Result<Picture, Failure> {
    let (generator, Given { images, classes }) = wanted.read(found, count.min(MOST_IN_A_PICTURE))?;
    let latent = generator.encoded(&images, &classes).expect("a model with an encoder was found");
    let decoded = generator.images(&latent, &classes);
    let (count, columns) = (images.size()[0], ROW.min(images.size()[0]));
    let rows = |images: &Tensor| {
        // Black images fill the last row, so that each original is above its reconstruction.
        let shape = [&[columns - 1 - (count - 1) % columns], &images.size()[1..]].concat();
        let rest = Tensor::full(shape.as_slice(), -1.0, (images.kind(), images.device()));
        let shape = [&[-1, columns], &images.size()[1..]].concat();
        Tensor::cat(&[images, &rest], 0).view(shape.as_slice())
    };
    let pairs = Tensor::stack(&[rows(&images), rows(&decoded)], 1).flatten(0, 2);
    Ok(Picture::grid(&pairs, columns)?)
}

/// Maximum number of images in a row of reconstructions.
const ROW: i64 = 10;

/// Arguments of `worker interpolate`.
#[derive(Args)]
pub(crate) struct Interpolate {
    #[command(flatten)]
    weights: Weights,
    /// Number of films side by side in one picture, each with samples of its own.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    count: u32,
    /// Number of samples that a film passes before it is back at the first.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=100))]
    points: u32,
    /// Number of pictures from one sample to the next.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    frames: u32,
    /// Walk from image to image instead, files or indices of samples of the data, and back to the first; the
    /// two that a picture lies between are shown beside it. For a VAE.
    #[arg(long, value_name = "FILE|N", num_args = 2..=100, conflicts_with_all = ["count", "points", "truncation"])]
    images: Vec<String>,
    /// Data whose samples --images names, a data.kind and a path as for `worker eval`. Default: the data of
    /// the run.
    #[arg(long, value_name = "KIND[:PATH]", requires = "images")]
    data: Option<Source>,
    /// Time that a picture is shown, in hundredths of a second.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    delay: u16,
    #[command(flatten)]
    choice: Choice,
    /// GIF file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Renders a film of walks through the noise.
///
/// # Errors
/// The arguments do not suit the checkpoint, or nothing can be written.
pub(crate) fn interpolate(arguments: &Interpolate) -> Result<(), Failure> {
    crate::set_threads(1);
    let Interpolate { weights, count, points, frames, images, data, delay, choice, out } = arguments;
    try_out(out)?;
    let progress = Progress::start("reading the weights");
    let found = weights.open()?;
    if !images.is_empty() {
        let wanted = Images { option: "--images", names: images, data: data.as_ref(), choice };
        let (generator, given) = wanted.read(&found, 0)?;
        let stops = u32::try_from(images.len()).expect("few images");
        let between = Between::new(generator, &given);
        let picture =
            |index: u32| between.picture(index / frames, f64::from(index % frames) / f64::from(*frames));
        return film(out, *delay, stops * frames, &progress, picture);
    }
    let painter = found.painter;
    let classes = choice.classes(&painter, *count)?;
    let walk = Walk::new(&painter, choice, *points, &classes)?;
    let picture = |index: u32| {
        let part = f64::from(index % frames) / f64::from(*frames);
        Picture::grid(&walk.images(index / frames, part, &classes), columns(painter.classes()))
    };
    film(out, *delay, points * frames, &progress, picture)
}

/// Writes a film of `all` pictures.
fn film(
    out: &Path,
    delay: u16,
    all: u32,
    progress: &Progress,
    picture: impl Fn(u32) -> Result<Picture, SampleError>,
) -> Result<(), Failure> {
    let first = picture(0)?;
    progress.part("pictures", all.into());
    let drawn = whole::write_by(out, |file| {
        let mut film = Film::begin(BufWriter::new(file), &first, delay).map_err(of_film)?;
        film.add(&first).map_err(of_film)?;
        for index in 1..all {
            film.add(&picture(index).map_err(io::Error::other)?).map_err(of_film)?;
            progress.set((index + 1).into(), all.into());
        }
        film.end().map_err(of_film)
    });
    drawn.map_err(|error: io::Error| match error.downcast::<SampleError>() {
        Ok(error) => error.into(),
        Err(error) => Failure::unwritable("--out", out, &error),
    })?;
    say(out)
}

/// A walk from image to image, through their latent vectors.
struct Between<'a> {
    generator: &'a Generator,
    images: &'a Tensor,
    classes: &'a [u32],
    /// (n, latent_dim).
    latent: Tensor,
}

impl Between<'_> {
    fn new<'a>(generator: &'a Generator, given: &'a Given) -> Between<'a> {
        let Given { images, classes } = given;
        let latent = generator.encoded(images, classes).expect("a model with an encoder was found");
        Between { generator, images, classes, latent }
    }

    /// The image on the way from a stop to the next, between both.
    fn picture(&self, stop: u32, part: f64) -> Result<Picture, SampleError> {
        let next = (stop as usize + 1) % self.classes.len();
        let at =
            |tensor: &Tensor, index: usize| tensor.narrow(0, i64::try_from(index).expect("few images"), 1);
        let [from, to] = [stop as usize, next];
        // Half of the way each: there is nothing between two classes.
        let class = self.classes[if part < 0.5 { from } else { to }];
        let latent = spherical(&at(&self.latent, from), &at(&self.latent, to), part);
        let image = self.generator.images(&latent, &[class]);
        Picture::grid(&Tensor::cat(&[at(self.images, from), image, at(self.images, to)], 0), 3)
    }
}

/// Walks through the noise of several films, from stop to stop.
struct Walk<'a> {
    painter: &'a Painter,
    /// Noise of all films at each stop: of a generator one tensor (n, latent_dim); of a package the draws of
    /// as many runs of its graph as all films need.
    stops: Vec<Vec<Drawn>>,
}

impl Walk<'_> {
    fn new<'a>(
        painter: &'a Painter,
        choice: &Choice,
        points: u32,
        classes: &[u32],
    ) -> Result<Walk<'a>, Failure> {
        let films = u32::try_from(classes.len()).expect("a picture shows few films");
        let stop = |point: u32| match painter {
            Painter::Generator(generator) => {
                let own = (0..films).map(|film| choice.noise(generator, film * points + point));
                vec![vec![Tensor::stack(&own.collect::<Vec<_>>(), 0)]]
            }
            Painter::Package(samples) => {
                let runs = films.div_ceil(samples.at_once());
                let draws = |run: u32| samples.draws(choice.key(), point * runs + run);
                (0..runs).map(draws).collect()
            }
        };
        if let Painter::Package(samples) = painter
            && !samples.is_normal()
        {
            return Err(Failure::Input(
                "the package's samples are not drawn from normal noise alone, so there is no way from one to another: use \
                 draw.normal alone in its sample()"
                    .to_string(),
            ));
        }
        Ok(Walk { painter, stops: (0..points).map(stop).collect() })
    }

    /// Images of all films on the way from a stop to the next, or from the last to the first.
    fn images(&self, stop: u32, part: f64, classes: &[u32]) -> Tensor {
        let stop = stop as usize;
        let (from, to) = (&self.stops[stop], &self.stops[(stop + 1) % self.stops.len()]);
        let way = |(from, to): (&Drawn, &Drawn)| -> Drawn {
            from.iter().zip(to).map(|(from, to)| spherical(from, to, part)).collect()
        };
        let between: Vec<Drawn> = from.iter().zip(to).map(way).collect();
        match self.painter {
            Painter::Generator(generator) => generator.images(&between[0][0], classes),
            Painter::Package(samples) => {
                let parts = between.iter().zip(classes.chunks(samples.at_once() as usize));
                let images: Vec<Tensor> =
                    parts.map(|(draws, classes)| samples.images(draws, classes)).collect();
                Tensor::cat(&images, 0)
            }
        }
    }
}

/// Interpolates the points (n, ...) along great circles; `part` goes from 0 to 1. Noise of many dimensions
/// lies near a sphere, which a straight line would leave: White (2016), "Sampling generative networks",
/// section 2.1; Shoemake (1985).
fn spherical(from: &Tensor, to: &Tensor, part: f64) -> Tensor {
    let shape = from.size();
    // A point is all that belongs to one sample.
    let along = |x: &Tensor| x.to_kind(Kind::Double).reshape([shape.first().copied().unwrap_or(1), -1]);
    let (from, to) = (along(from), along(to));
    let length = |x: &Tensor| (x * x).sum_dim_intlist([1i64].as_slice(), true, Kind::Double).sqrt();
    let product = (&from * &to).sum_dim_intlist([1i64].as_slice(), true, Kind::Double);
    // Clamped away from 0, where the formula is undefined and the straight line is as good.
    let angle = (product / (length(&from) * length(&to))).clamp(-1.0, 1.0).acos().clamp_min(1e-6);
    let weight = |part: f64| (&angle * part).sin() / angle.sin();
    (from * weight(1.0 - part) + to * weight(part)).to_kind(Kind::Float).view(shape.as_slice())
}

/// Arguments of `worker export`.
#[derive(Args)]
pub(crate) struct Export {
    #[command(flatten)]
    weights: Weights,
    /// File to write: TorchScript, or of a transformer safetensors.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Maximum difference between the images of an exported module and the generator's.
const EXACT_ENOUGH: f64 = 1e-5;

/// Exports the generator as a TorchScript module, once its images agree with the generator's.
///
/// # Errors
/// The generator cannot be exported, or nothing can be written.
pub(crate) fn export(arguments: &Export) -> Result<(), Failure> {
    crate::set_threads(1);
    let Export { weights, out } = arguments;
    try_out(out)?;
    if let Some(file) = weights.transformer() {
        write(out, "--out", &file.bytes)?;
        let line = format!("{}: the state_dict of the transformer, with nanoGPT's names", out.display());
        return say_beside(out, &line);
    }
    let progress = Progress::start("reading the weights");
    let Painter::Generator(generator) = weights.open()?.painter else {
        return Err(Failure::Input(
            "the run trains a package, which has its networks in Python: load the weights into them with \
             ganglion.load(run), and export them from there"
                .to_string(),
        ));
    };
    progress.part("writing and checking the module", 0);
    let unable = |error: tch::TchError| Failure::Other(format!("the network cannot be exported: {error}"));
    let module = record(&generator).map_err(unable)?;
    // As another program reads it.
    let read = CModule::load_data(&mut module.as_slice()).map_err(unable)?;
    let apart = apart(&generator, &read)?;
    // Only now: a module that fails the check never gets a name.
    write(out, "--out", &module)?;
    let classes = if generator.classes() > 0 { " and classes (n) of int64" } else { "" };
    let (latent, shape) = (generator.latent_dim(), generator.shape());
    let line = format!(
        "{}: noise (n, {latent}){classes} to images (n, {}, {}, {}) in [-1, 1]; {}",
        out.display(),
        shape.channels,
        shape.height,
        shape.width,
        match apart > 0.0 {
            true => format!("its images differ from the checkpoint's by {apart:.1e} at most"),
            false => "its images are the checkpoint's, to the last bit".to_string(),
        }
    );
    drop(progress);
    say_beside(out, &line)
}

/// Records the generator as a module; returns the bytes of its file.
fn record(generator: &Generator) -> Result<Vec<u8>, tch::TchError> {
    let draw = &mut |inputs: &[Tensor]| vec![generator.forward(&inputs[0], inputs.get(1))];
    let module = no_grad(|| CModule::create_by_tracing("Generator", "forward", &inputs(generator, 2), draw))?;
    // libtorch ends the process when a disk is full, so it writes to memory. It takes paths alone.
    let memory = File::from(memfd_create("module", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
    module.save(format!("/proc/self/fd/{}", memory.as_raw_fd()))?;
    let mut bytes = Vec::new();
    (&memory).rewind()?;
    (&memory).read_to_end(&mut bytes)?;
    Ok(add_names(bytes, generator.class_names()).map_err(io::Error::from)?)
}

/// Adds the names of the classes to a module, as the extra file `classes.json` of `torch.jit.load`.
fn add_names(module: Vec<u8>, names: &[String]) -> zip::result::ZipResult<Vec<u8>> {
    if names.is_empty() {
        return Ok(module);
    }
    let archive = ZipArchive::new(Cursor::new(&module))?;
    // All files of a module lie in one folder.
    let folder = archive.file_names().find_map(|name| name.split_once('/')).map_or("", |(folder, _)| folder);
    let name = format!("{folder}/extra/classes.json");
    let mut archive = ZipWriter::new_append(Cursor::new(module))?;
    archive.start_file(name, FileOptions::default().compression_method(CompressionMethod::Stored))?;
    archive.write_all(json!(names).to_string().as_bytes())?;
    Ok(archive.finish()?.into_inner())
}

/// Inputs for `count` samples: noise, and classes for a conditional generator.
fn inputs(generator: &Generator, count: u32) -> Vec<Tensor> {
    let noise: Vec<Tensor> =
        (0..count).map(|index| generator.noise(Purpose::Probe, 0, index, None)).collect();
    let classes: Vec<i64> = generator.classes_in_turn(count).into_iter().map(i64::from).collect();
    let classes = (generator.classes() > 0).then(|| Tensor::from_slice(&classes));
    std::iter::once(Tensor::stack(&noise, 0)).chain(classes).collect()
}

/// Maximum difference between the two, for another number of samples than was recorded and for one alone.
///
/// # Errors
/// The difference is more than [`EXACT_ENOUGH`], or images are not finite.
fn apart(generator: &Generator, module: &CModule) -> Result<f64, Failure> {
    no_grad(|| {
        let mut most = 0.0f64;
        for count in [1, 7] {
            let inputs = inputs(generator, count);
            let ours = finite(generator.forward(&inputs[0], inputs.get(1)))?;
            let theirs = module.forward_ts(&inputs);
            let theirs = theirs.map_err(|error| otherwise(&format!("not at all: {error}")))?;
            if theirs.size() != ours.size() {
                return Err(otherwise(&format!("{:?} and not {:?}", theirs.size(), ours.size())));
            }
            let apart = (ours - theirs).abs().max().double_value(&[]);
            // `max` below would drop NaN.
            if apart.is_nan() || apart > EXACT_ENOUGH {
                return Err(otherwise(&format!("numbers that differ by up to {apart:.1e}")));
            }
            most = most.max(apart);
        }
        Ok(most)
    })
}

/// Failure of an export whose module does not draw what the generator draws.
fn otherwise(what: &str) -> Failure {
    Failure::Other(format!("the exported module would draw otherwise than the checkpoint: {what}"))
}

pub(crate) fn png(picture: &Picture) -> Result<Vec<u8>, Failure> {
    Ok(picture.png().map_err(SampleError::from)?)
}

pub(crate) fn write(path: &Path, option: &str, bytes: &[u8]) -> Result<(), Failure> {
    whole::write(path, bytes).map_err(|error| Failure::unwritable(option, path, &error))
}

/// Checks before the work that its output can be written.
pub(crate) fn try_out(out: &Path) -> Result<(), Failure> {
    whole::try_out(out).map_err(|error| Failure::unwritable("--out", out, &error))
}

fn of_film(error: gif::EncodingError) -> io::Error {
    match error {
        gif::EncodingError::Io(error) => error,
        other => io::Error::other(other),
    }
}

/// Prints the path that was written.
pub(crate) fn say(path: &Path) -> Result<(), Failure> {
    say_beside(path, &path.display().to_string())
}

/// Prints a message about a file that was written; not between the file's own bytes.
pub(crate) fn say_beside(file: &Path, message: &str) -> Result<(), Failure> {
    if whole::is_standard_output(file) {
        out::tell(Level::INFO, message);
        return Ok(());
    }
    Ok(out::say(message)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_named_or_numbered() {
        let names = ["cat", "1", "dog"].map(str::to_string);
        assert_eq!(numbered("dog", &names, 3), Ok(2));
        assert_eq!(numbered("0", &names, 3), Ok(0));
        assert_eq!(numbered("1", &names, 3), Ok(1));
        assert_eq!(numbered("7", &[], 10), Ok(7));
        let wrong = numbered("flags", &names, 3).unwrap_err();
        assert!(wrong.contains("the classes cat, 1, dog, or their numbers, 0 to 2"), "{wrong}");
        assert!(numbered("10", &[], 10).unwrap_err().contains("the classes 0 to 9"));
        assert!(numbered("cat", &[], 0).unwrap_err().contains("knows no classes"));
    }

    #[test]
    fn folders_have_the_names_of_classes_where_they_can() {
        let of = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
            folders(&names, 2)
        };
        assert_eq!(of(&["cat", "a dog"]), ["cat", "a dog"]);
        for names in
            [&["cat", "../dog"][..], &["cat", "a/b"], &["cat", ".dog"], &["cat", "Cat"], &["cat"], &[]]
        {
            assert_eq!(of(names), ["000", "001"], "{names:?}");
        }
        assert!(folders(&[], 0).is_empty());
    }

    #[test]
    fn a_walk_stays_on_the_sphere_and_meets_its_ends() {
        let point = |numbers: &[f32]| Tensor::from_slice(numbers).view([1, -1]);
        let (from, to) = (point(&[3.0, 0.0, 0.0]), point(&[0.0, 3.0, 0.0]));
        let apart = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
        assert!(apart(&spherical(&from, &to, 0.0), &from) < 1e-6);
        assert!(apart(&spherical(&from, &to, 1.0), &to) < 1e-6);
        let half = 3.0 / 2.0_f32.sqrt();
        assert!(apart(&spherical(&from, &to, 0.5), &point(&[half, half, 0.0])) < 1e-6);
        // Where there is no circle, because both are one.
        assert!(apart(&spherical(&from, &from, 0.3), &from) < 1e-6);
    }
}
