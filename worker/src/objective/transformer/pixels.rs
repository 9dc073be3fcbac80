//! Images as tokens: pixels in raster order, the channels of one after the other, each of a number of levels.

use ganglion_proto::progress::Progress;
use serde_json::json;
use tch::{Device, Kind, Tensor, no_grad};

use super::drawing::{Header, Pen};
use super::writer::Writer;
use crate::data::ImageShape;
use crate::sampling::{CLASS_NAMES, SampleError};

/// Number of samples that are drawn side by side.
// Fixed, as a kernel's rounding may depend on the size of a batch.
const LANES: usize = 32;

/// Images as tokens.
#[derive(Clone, Debug)]
pub(crate) struct Pixels {
    shape: ImageShape,
    levels: i64,
    classes: u32,
    class_names: Vec<String>,
}

/// Samples to draw.
pub(crate) struct Wanted<'a> {
    /// Number of the first one, by which its draws are keyed.
    pub from: u32,
    /// A class for each; of no meaning without classes.
    pub classes: &'a [u32],
    /// First tokens of each, (samples, n).
    pub given: Option<&'a Tensor>,
    pub progress: &'a Progress,
}

impl<'a> Wanted<'a> {
    /// A sample of each of these classes.
    pub(crate) fn of(classes: &'a [u32]) -> Wanted<'a> {
        static OFF: std::sync::LazyLock<Progress> = std::sync::LazyLock::new(Progress::off);
        Wanted { from: 0, classes, given: None, progress: &OFF }
    }
}

impl Pixels {
    pub(crate) fn new(shape: ImageShape, levels: u32, classes: u32, class_names: Vec<String>) -> Pixels {
        Pixels { shape, levels: levels.into(), classes, class_names }
    }

    /// Shape of the images.
    pub(crate) fn shape(&self) -> ImageShape {
        self.shape
    }

    /// Number of levels of a pixel's channel.
    pub(crate) fn levels(&self) -> i64 {
        self.levels
    }

    /// Number of classes that the network is conditioned on; 0 for none.
    pub(crate) fn classes(&self) -> u32 {
        self.classes
    }

    /// Names of the classes by their numbers; empty where they are numbers.
    pub(crate) fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// A class for each of `count` samples, in turn.
    pub(crate) fn classes_in_turn(&self, count: u32) -> Vec<u32> {
        (0..count).map(|index| index % self.classes.max(1)).collect()
    }

    /// Tokens of an image.
    pub(crate) fn tokens(&self) -> i64 {
        i64::try_from(self.shape.numel()).expect("an image is small")
    }

    /// Tokens of images (n, c, h, w) in [-1, 1]: (n, h w c), each floor(byte levels / 256).
    pub(crate) fn tokens_of(&self, images: &Tensor) -> Tensor {
        let bytes = ((images + 1.0) * 127.5).round().clamp(0.0, 255.0).to_kind(Kind::Int64);
        let tokens = (bytes * self.levels).divide_scalar_mode(256, "floor");
        tokens.permute([0, 2, 3, 1]).reshape([images.size()[0], -1])
    }

    /// Images in [-1, 1] of tokens (n, h w c). The lowest level is black, the highest white.
    pub(crate) fn images_of(&self, tokens: &Tensor) -> Tensor {
        let side = |size: usize| i64::try_from(size).expect("an image is small");
        let sizes = [-1, side(self.shape.height), side(self.shape.width), side(self.shape.channels)];
        #[allow(clippy::cast_precision_loss)] // at most 256 levels
        let step = 2.0 / (self.levels - 1) as f64;
        (tokens.to_kind(Kind::Float) * step - 1.0).view(sizes).permute([0, 3, 1, 2]).contiguous()
    }

    /// Tokens that the network reads, and those that it predicts. In front of an image stands a token of its
    /// class.
    pub(crate) fn pair(&self, images: &Tensor, classes: Option<&Tensor>) -> [Tensor; 2] {
        let targets = self.tokens_of(images);
        let first = match classes.filter(|_| self.classes > 0) {
            Some(classes) => (classes + self.levels).unsqueeze(1),
            None => Tensor::full([targets.size()[0], 1], self.levels, (Kind::Int64, targets.device())),
        };
        let before = targets.narrow(1, 0, targets.size()[1] - 1);
        [Tensor::cat(&[first, before], 1), targets]
    }

    /// Draws images (n, c, h, w) in [-1, 1].
    ///
    /// # Errors
    /// libtorch refused.
    pub(crate) fn draw(&self, pen: &Pen<'_>, wanted: &Wanted<'_>) -> Result<Tensor, c10d::Error> {
        let mut images = Vec::new();
        for (first, classes) in (0..).step_by(LANES).zip(wanted.classes.chunks(LANES)) {
            let tokens = no_grad(|| self.draw_some(pen, wanted, first, classes))?;
            images.push(self.images_of(&tokens));
            wanted.progress.add(classes.len() as u64);
        }
        Ok(Tensor::cat(&images, 0))
    }

    /// Draws the tokens of as many images as there are classes, from `first` of the wanted ones on.
    fn draw_some(
        &self,
        pen: &Pen<'_>,
        wanted: &Wanted<'_>,
        first: u32,
        classes: &[u32],
    ) -> Result<Tensor, c10d::Error> {
        // Always as many side by side: lanes beyond are drawn, and left out.
        let begun = |lane: usize| {
            let own = if lane < classes.len() { lane } else { 0 };
            let class = if self.classes > 0 { i64::from(classes[own]) } else { 0 };
            let mut tokens = vec![self.levels + class];
            if let Some(given) = wanted.given {
                let row = given.get(i64::from(first) + i64::try_from(own).expect("a few lanes"));
                tokens.extend(Vec::<i64>::try_from(row.to_device(Device::Cpu)).expect("integers"));
            }
            tokens
        };
        let begun: Vec<Vec<i64>> = (0..LANES).map(begun).collect();
        let draws = (wanted.from + first..).take(LANES).map(|sample| pen.draws(sample)).collect();
        let mut rows: Vec<Vec<i64>> =
            begun[..classes.len()].iter().map(|tokens| tokens[1..].to_vec()).collect();
        let left = self.shape.numel() - rows[0].len();
        let mut writer = Writer::new(pen.weights.network(), begun, draws, pen.choice);
        for _ in 0..left {
            let new = writer.write()?;
            rows.iter_mut().zip(new).for_each(|(row, token)| row.push(token));
        }
        let rows: Vec<i64> = rows.into_iter().flatten().collect();
        Ok(Tensor::from_slice(&rows).view([-1, self.tokens()]))
    }

    /// Adds to the header of a weights file.
    pub(super) fn describe(&self, about: &mut Vec<(&'static str, String)>) {
        about.extend([
            ("samples", "pixels".to_string()),
            ("levels", self.levels.to_string()),
            ("channels", self.shape.channels.to_string()),
            ("height", self.shape.height.to_string()),
            ("image_width", self.shape.width.to_string()),
            ("classes", self.classes.to_string()),
        ]);
        if !self.class_names.is_empty() {
            about.push((CLASS_NAMES, json!(self.class_names).to_string()));
        }
    }

    /// Reads the header of a weights file.
    pub(super) fn read(header: &Header<'_>) -> Result<Pixels, SampleError> {
        let side = |key: &str| -> Result<usize, SampleError> {
            Ok(usize::try_from(header.number(key)?).unwrap_or(usize::MAX))
        };
        let shape =
            ImageShape { channels: side("channels")?, height: side("height")?, width: side("image_width")? };
        let levels = header.number("levels")?;
        let classes =
            header.text("classes")?.parse().map_err(|_| header.wrong("its classes are no number"))?;
        let names = serde_json::from_str(header.optional(CLASS_NAMES).unwrap_or("[]"));
        let class_names =
            names.map_err(|error| header.wrong(&format!("its {CLASS_NAMES} cannot be read: {error}")))?;
        let is_sound = (2..=256).contains(&levels) && [1, 3].contains(&shape.channels);
        match is_sound && shape.height <= 8192 && shape.width <= 8192 {
            true => Ok(Pixels { shape, levels, classes, class_names }),
            false => Err(header.wrong("its images are of no size that there is")),
        }
    }
}
