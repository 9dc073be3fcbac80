//! Memory of a batch's samples.

use super::shape::SampleShape;

/// Values of a batch, one sample after the other.
#[derive(Debug)]
pub enum Values {
    /// Pixels in [-1, 1]: samples x channels x height x width.
    Pixels(Vec<f32>),
    /// Tokens: samples x (context + 1).
    Tokens(Vec<i64>),
    /// Bytes of the elements of each array: samples x the array's shape, in the machine's order of bytes.
    Arrays(Vec<Vec<u8>>),
}

/// Memory of one sample.
#[derive(Debug)]
pub(crate) enum SampleMut<'a> {
    Pixels(&'a mut [f32]),
    Tokens(&'a mut [i64]),
    Arrays(Vec<&'a mut [u8]>),
}

impl Values {
    /// Memory for a number of samples.
    pub(crate) fn new(shape: &SampleShape, samples: usize) -> Values {
        let mut values = match shape {
            SampleShape::Image(_) => Values::Pixels(Vec::new()),
            SampleShape::Tokens(_) => Values::Tokens(Vec::new()),
            SampleShape::Arrays(arrays) => Values::Arrays(vec![Vec::new(); arrays.len()]),
        };
        values.resize(shape, samples);
        values
    }

    /// Makes room for a number of samples in memory that was used before.
    ///
    /// # Panics
    /// If the memory is for samples of another kind.
    pub(crate) fn resize(&mut self, shape: &SampleShape, samples: usize) {
        match (self, shape) {
            (Values::Pixels(pixels), SampleShape::Image(shape)) => {
                pixels.resize(samples * shape.numel(), 0.0)
            }
            (Values::Tokens(tokens), SampleShape::Tokens(shape)) => tokens.resize(samples * shape.numel(), 0),
            (Values::Arrays(all), SampleShape::Arrays(specs)) => {
                for (bytes, spec) in all.iter_mut().zip(specs) {
                    bytes.resize(samples * spec.bytes(), 0);
                }
            }
            (_, shape) => panic!("memory of other samples than {shape}"),
        }
    }

    /// The memory of each sample, in order.
    ///
    /// # Panics
    /// If the memory is for samples of another kind.
    pub(crate) fn samples_mut(&mut self, shape: &SampleShape) -> Vec<SampleMut<'_>> {
        match (self, shape) {
            (Values::Pixels(pixels), SampleShape::Image(shape)) => {
                pixels.chunks_exact_mut(shape.numel()).map(SampleMut::Pixels).collect()
            }
            (Values::Tokens(tokens), SampleShape::Tokens(shape)) => {
                tokens.chunks_exact_mut(shape.numel()).map(SampleMut::Tokens).collect()
            }
            (Values::Arrays(all), SampleShape::Arrays(specs)) => {
                let mut parts: Vec<_> = all
                    .iter_mut()
                    .zip(specs)
                    .map(|(bytes, spec)| bytes.chunks_exact_mut(spec.bytes()))
                    .collect();
                // As long as each array has one more.
                let sample = || parts.iter_mut().map(Iterator::next).collect::<Option<Vec<_>>>();
                std::iter::from_fn(sample).map(SampleMut::Arrays).collect()
            }
            (_, shape) => panic!("memory of other samples than {shape}"),
        }
    }

    /// The pixels of images.
    ///
    /// # Panics
    /// If the samples are no images.
    pub fn pixels(&self) -> &[f32] {
        match self {
            Values::Pixels(pixels) => pixels,
            _ => panic!("samples that are no images"),
        }
    }
}
