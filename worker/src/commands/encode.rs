//! Images of the user's, for a VAE's encoder: reconstructions, and walks from one to another.

use std::path::Path;

use tch::Tensor;

use crate::commands::error::Failure;
use crate::commands::evaluate::{Source, real_data};
use crate::data::{DataSet, ImageShape, read_picture};
use crate::eval::{EvalError, images, some_of};
use crate::sampling::Generator;

/// Images with their classes.
pub(crate) struct Given {
    /// (n, c, h, w) in [-1, 1].
    pub(crate) images: Tensor,
    /// Class of each; 0 where the model knows none.
    pub(crate) classes: Vec<u32>,
}

/// Names of images, and where they are looked for.
pub(crate) struct Wanted<'a> {
    /// Option that named them.
    pub(crate) option: &'static str,
    /// Files, or indices of samples of the data.
    pub(crate) names: &'a [String],
    /// Data, if they are not the run's.
    pub(crate) data: Option<&'a Source>,
    /// Name and text of the run's job, if the run is known.
    pub(crate) job: Option<&'a (String, String)>,
    /// Class of the images in files.
    pub(crate) class: Option<u32>,
}

impl Wanted<'_> {
    /// Reads the images.
    ///
    /// # Errors
    /// There is no such file or sample, or it cannot be read as an image of the generator's.
    pub(crate) fn read(&self, generator: &Generator) -> Result<Given, Failure> {
        let mut data = None;
        let (mut all, mut classes) = (Vec::new(), Vec::new());
        for name in self.names {
            if let Ok(index) = name.parse::<usize>() {
                let opened = match data.take() {
                    Some(opened) => opened,
                    None => self.open(generator)?,
                };
                all.push(self.of_data(&opened, &[index])?);
                classes.push(self.class_of(&opened, index));
                data = Some(opened);
            } else {
                all.push(self.of_file(Path::new(name), generator.shape())?);
                classes.push(self.class_of_file(name, generator)?);
            }
        }
        Ok(Given { images: Tensor::cat(&all, 0), classes })
    }

    /// Reads `count` samples, chosen from all of the data.
    ///
    /// # Errors
    /// The data cannot be read.
    pub(crate) fn some(&self, count: u32, generator: &Generator) -> Result<Given, Failure> {
        let data = self.open(generator)?;
        let chosen = some_of(data.len(), count as usize);
        let classes = chosen.iter().map(|index| self.class_of(&data, *index)).collect();
        Ok(Given { images: self.of_data(&data, &chosen)?, classes })
    }

    /// Opens the data, with classes for a conditional model.
    fn open(&self, generator: &Generator) -> Result<DataSet, Failure> {
        let source = real_data(self.data, Some(generator.shape()), self.job)?;
        let open = if generator.classes() > 0 { DataSet::open_labelled } else { DataSet::open };
        let data = open(&source).map_err(|error| error.in_words_of("--data", "the kind of --data"));
        let data = data.map_err(EvalError::from)?;
        let (found, wanted) = (data.shape(), generator.shape());
        if found.image() != Some(wanted) {
            return Err(Failure::Input(format!(
                "the checkpoint takes images of {wanted}, and the data has {found}; give such data with --data"
            )));
        }
        if generator.classes() > 0 && data.classes() > generator.classes() {
            return Err(Failure::Input(format!(
                "the checkpoint knows {} classes, and the data has {}; give the run's data with --data",
                generator.classes(),
                data.classes()
            )));
        }
        Ok(data)
    }

    fn of_data(&self, data: &DataSet, indices: &[usize]) -> Result<Tensor, Failure> {
        if let Some(index) = indices.iter().find(|index| **index >= data.len()) {
            let what = format!(
                "{} {index}: the data has the samples 0 to {}; a file is named by a path such as ./{index}",
                self.option,
                data.len().saturating_sub(1)
            );
            return Err(Failure::Input(what));
        }
        Ok(images(data, indices).map_err(EvalError::from)?)
    }

    fn of_file(&self, path: &Path, shape: ImageShape) -> Result<Tensor, Failure> {
        let pixels = read_picture(path, shape).map_err(|error| error.in_words_of(self.option, "the picture"));
        let pixels = pixels.map_err(EvalError::from)?;
        let sizes = [1, shape.channels, shape.height, shape.width];
        Ok(Tensor::from_slice(&pixels).view(sizes.map(|n| i64::try_from(n).expect("an image is small"))))
    }

    fn class_of(&self, data: &DataSet, index: usize) -> u32 {
        self.class.or_else(|| data.labels().get(index).copied()).unwrap_or_default()
    }

    fn class_of_file(&self, name: &str, generator: &Generator) -> Result<u32, Failure> {
        if generator.classes() == 0 {
            return Ok(0);
        }
        self.class.ok_or_else(|| {
            let what = format!(
                "{} {name}: the model is told classes; give that of the image with --class",
                self.option
            );
            Failure::Input(what)
        })
    }
}

/// Refusal of images for a model without an encoder.
pub(crate) fn no_encoder(option: &str) -> Failure {
    Failure::Input(format!(
        "{option}: the run's model has no encoder, which images of yours need; only a VAE (model.kind = \"vae-28\", \
         \"vae-32\") has one"
    ))
}
