//! Kinds and sizes of samples.

use std::fmt;

use ganglion_proto::array::ArraySpec;

/// Kind and size of every sample of a data set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SampleShape {
    /// An image.
    Image(ImageShape),
    /// A piece of text.
    Tokens(TokenShape),
    /// One array or several.
    Arrays(Vec<ArraySpec>),
}

/// Shape of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImageShape {
    /// Number of colour channels.
    pub channels: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
}

/// Size of a piece of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TokenShape {
    /// Number of tokens that are predicted: a sample has one more.
    pub context: usize,
    /// Number of different tokens. Each token is below it.
    pub vocabulary: u32,
}

impl SampleShape {
    /// The shape of images; `None` for samples of another kind.
    pub fn image(&self) -> Option<ImageShape> {
        if let SampleShape::Image(shape) = self { Some(*shape) } else { None }
    }

    /// The size of pieces of text; `None` for samples of another kind.
    pub fn tokens(&self) -> Option<TokenShape> {
        if let SampleShape::Tokens(shape) = self { Some(*shape) } else { None }
    }

    /// The arrays of a sample; `None` for samples of another kind.
    pub fn arrays(&self) -> Option<&[ArraySpec]> {
        if let SampleShape::Arrays(arrays) = self { Some(arrays) } else { None }
    }
}

impl ImageShape {
    /// Number of values in a sample.
    pub fn numel(&self) -> usize {
        self.channels * self.height * self.width
    }
}

impl TokenShape {
    /// Number of tokens in a sample.
    pub fn numel(&self) -> usize {
        self.context + 1
    }
}

impl fmt::Display for ImageShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {} x {}", self.channels, self.height, self.width)
    }
}

impl fmt::Display for SampleShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SampleShape::Image(shape) => write!(f, "images of {shape}"),
            SampleShape::Tokens(TokenShape { context, vocabulary }) => {
                write!(f, "texts of {context} tokens, of {vocabulary} different ones")
            }
            SampleShape::Arrays(arrays) => {
                let arrays: Vec<String> = arrays.iter().map(ArraySpec::to_string).collect();
                write!(f, "arrays {}", arrays.join(", "))
            }
        }
    }
}
