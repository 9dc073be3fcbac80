//! R3GAN: Huang, Gokaslan, Kuleshov and Tompkin (2024), "The GAN is dead; long live the GAN! A Modern
//! Baseline GAN", section 4 and figure 4, with the initial weights of the released code.
//!
//! 1. Residual blocks of a 1 x 1, a grouped 3 x 3 and a 1 x 1 convolution, twice as wide inside ("inverted
//!    bottleneck"), leaky ReLU between them, and no normalisation. The last convolution of a block begins at
//!    zero and the others are scaled down by the number of blocks (Zhang et al., 2019, Fixup), so that each
//!    block begins as the identity.
//! 2. Sides are doubled and halved by a bilinear filter. The generator begins with a learnt map, weighed by
//!    the noise; the discriminator ends with one, and has no last activation. The generator's output is not
//!    squashed.
//! 3. Features are last within the networks: a 1 x 1 convolution is then a product of matrices, also in the
//!    second derivative, and grouped convolutions have libtorch's fast kernels on CPUs.
//!
//! The paper's widths are for GPUs: 768 features at most, and two blocks a stage. Here there is one block a
//! stage and the width is the job's: `width` features at full size, where a feature costs most, four times as
//! many at half of it, eight times below. So a width of 96 has the paper's.

use tch::Tensor;

use super::pieces::{
    Sizes, Specs, double, features_first, features_last, halve, in_single, leaky_linear, linear, root, scaled,
};
use super::sequential::{leaky_relu, sizes};
use super::{Init, Network, Pass, TensorSpec};

/// Features per group of a grouped convolution: 16 in the paper's networks, and a vector on CPUs.
const GROUP: i64 = 16;
/// Ratio of a block's inner width to its outer width.
const EXPANSION: i64 = 2;
/// Slope of the activations below zero, and the gain that preserves the variance through them: sqrt(2 / (1
/// + slope^2)).
const SLOPE: f64 = 0.2;
const GAIN: f32 = 1.386_750_5;

/// Building block of one of the networks, over (n, h, w, features).
#[derive(Clone, Debug, PartialEq)]
enum Piece {
    /// A learnt map, weighed by a vector: (n, inputs) to (n, side, side, features).
    Start { inputs: i64, features: i64, side: i64 },
    /// A residual block of a network of `blocks` blocks.
    Block { features: i64, blocks: i64 },
    /// Doubles each side.
    Up { inputs: i64, outputs: i64 },
    /// Halves each side.
    Down { inputs: i64, outputs: i64 },
    /// Mixes the features of a pixel.
    Mix { inputs: i64, outputs: i64 },
    /// Weighs each feature by a learnt map and mixes them: (n, side, side, features) to (n, outputs).
    End { features: i64, side: i64, outputs: i64 },
}

type Next<'n, 'a> = &'n mut dyn FnMut() -> &'a Tensor;

impl Piece {
    fn specs(&self, name: &str, specs: &mut Specs) {
        let mut add = |part: &str, shape: &[i64], init| specs.add(format!("{name}.{part}"), shape, init);
        match *self {
            Piece::Start { inputs, features, side } => {
                add("basis", &[features, side, side], Init::Normal { mean: 0.0, deviation: 1.0 });
                add("weight", &[features, inputs], scaled(1.0, inputs));
            }
            Piece::Block { features, blocks } => {
                let (wide, zero) = (EXPANSION * features, Init::Constant(0.0));
                // The paper's gain for m = 3 convolutions a block: blocks^(-1 / (2 m - 2)).
                // With m = 3 the exponent is -1/4: the root of the root.
                let gain = GAIN / root(blocks).sqrt();
                add("conv1.weight", &[wide, features, 1, 1], scaled(gain, features));
                add("conv1.bias", &[wide], zero.clone());
                add("conv2.weight", &[wide, GROUP, 3, 3], scaled(gain, 9 * GROUP));
                add("conv2.bias", &[wide], zero.clone());
                // Zero, so that a block begins as the identity (Zhang et al., 2019).
                add("conv3.weight", &[features, wide, 1, 1], zero);
            }
            // The sides change and the features do not: nothing is learnt.
            Piece::Up { inputs, outputs } | Piece::Down { inputs, outputs } if inputs == outputs => {}
            Piece::Up { inputs, outputs }
            | Piece::Down { inputs, outputs }
            | Piece::Mix { inputs, outputs } => {
                add("weight", &[outputs, inputs, 1, 1], scaled(1.0, inputs));
            }
            Piece::End { features, side, outputs } => {
                add("basis", &[features, 1, side, side], scaled(1.0, side * side));
                add("weight", &[outputs, features], scaled(1.0, features));
            }
        }
    }

    fn forward(&self, x: &Tensor, next: Next<'_, '_>) -> Tensor {
        match *self {
            Piece::Start { features, side, .. } => {
                let basis = next().view([1, features, side * side]).transpose(1, 2);
                // The order of `specs`: first the map, then its weights.
                let weighed = linear(x, next(), None).view([-1, 1, features]) * basis;
                weighed.view([-1, side, side, features])
            }
            Piece::Block { features, .. } => block(x, EXPANSION * features / GROUP, next),
            Piece::Up { inputs, outputs } if inputs == outputs => double(x),
            // Mixed on the smaller side, which costs a quarter.
            Piece::Up { .. } => double(&mix(x, next())),
            Piece::Down { inputs, outputs } if inputs == outputs => halve(x),
            // Likewise: after halving.
            Piece::Down { .. } => mix(&halve(x), next()),
            Piece::Mix { .. } => mix(x, next()),
            Piece::End { features, side, .. } => {
                let basis = next().view([1, features, side * side]).transpose(1, 2);
                let seen = (x.reshape([-1, side * side, features]) * basis).sum_dim_intlist(
                    [1i64].as_slice(),
                    false,
                    None,
                );
                linear(&seen, next(), None)
            }
        }
    }
}

fn block(x: &Tensor, groups: i64, next: Next<'_, '_>) -> Tensor {
    let [_, height, width, features] = <[i64; 4]>::try_from(x.size()).expect("maps have four dimensions");
    // Activations and sums are in place on what products give as it is: on a view autograd would copy.
    let wide = leaky_linear(&rows(x), &next().flatten(1, -1), next(), SLOPE);
    let wide = wide.view([-1, height, width, EXPANSION * features]);
    let (weight, bias) = (next(), next());
    let seen = features_first(&wide).conv2d(weight, Some(bias), [1, 1], [1, 1], [1, 1], groups);
    let seen = features_last(&leaky_relu(seen, SLOPE));
    // The sum of the block and its input, in place on the product, which is needed nowhere else.
    let narrow = linear(&rows(&seen), &next().flatten(1, -1), None).g_add_(&rows(x));
    narrow.view([-1, height, width, features])
}

/// Returns the features of each pixel as a row.
fn rows(x: &Tensor) -> Tensor {
    x.reshape([-1, x.size()[3]])
}

/// Computes a 1 x 1 convolution over (n, h, w, features).
fn mix(x: &Tensor, weight: &Tensor) -> Tensor {
    let [_, height, width, _] = sizes(x);
    let outputs = weight.size()[0];
    linear(&rows(x), &weight.flatten(1, -1), None).view([-1, height, width, outputs])
}

/// Returns the side and the features of each stage, from the smallest side up.
fn stages(side: i64, width: i64) -> Vec<(i64, i64)> {
    let mut stages = vec![(side, width), (side / 2, 4 * width)];
    // Down to 7 for images of 28, and to 4 for those of 32.
    while let Some((side, _)) = stages.last().copied().filter(|(side, _)| side % 2 == 0 && *side > 4) {
        stages.push((side / 2, 8 * width));
    }
    stages.reverse();
    stages
}

/// Network of building blocks, one after the other.
#[derive(Clone, Debug)]
pub(super) struct R3gan {
    pieces: Vec<(String, Piece)>,
    /// Whether the network generates images, whose features come first outside.
    draws: bool,
}

impl R3gan {
    /// Builds the generator: noise (n, inputs) to images.
    pub(super) fn generator(sizes: Sizes, inputs: i64) -> R3gan {
        let stages = stages(sizes.side, sizes.width);
        let blocks = i64::try_from(stages.len()).expect("a few stages");
        let mut pieces = Vec::new();
        let mut before = 0;
        for (at, (side, features)) in stages.into_iter().enumerate() {
            let begin = match at {
                0 => Piece::Start { inputs, features, side },
                _ => Piece::Up { inputs: before, outputs: features },
            };
            pieces.push((format!("stage{at}.begin"), begin));
            pieces.push((format!("stage{at}.block"), Piece::Block { features, blocks }));
            before = features;
        }
        pieces.push(("end".to_string(), Piece::Mix { inputs: before, outputs: sizes.channels }));
        R3gan { pieces, draws: true }
    }

    /// Builds the discriminator: images to (n, outputs).
    pub(super) fn discriminator(sizes: Sizes, outputs: i64) -> R3gan {
        let Sizes { width, channels, side, .. } = sizes;
        let mut stages = stages(side, width);
        stages.reverse();
        let blocks = i64::try_from(stages.len()).expect("a few stages");
        let mut pieces = vec![("begin".to_string(), Piece::Mix { inputs: channels, outputs: width })];
        for (at, (side, features)) in stages.iter().copied().enumerate() {
            let end = match stages.get(at + 1) {
                Some((_, below)) => Piece::Down { inputs: features, outputs: *below },
                None => Piece::End { features, side, outputs },
            };
            pieces.push((format!("stage{at}.block"), Piece::Block { features, blocks }));
            pieces.push((format!("stage{at}.end"), end));
        }
        R3gan { pieces, draws: false }
    }
}

impl Network for R3gan {
    fn parameters(&self) -> Vec<TensorSpec> {
        let mut specs = Specs::default();
        self.pieces.iter().for_each(|(name, piece)| piece.specs(name, &mut specs));
        specs.list
    }

    fn buffers(&self) -> Vec<TensorSpec> {
        Vec::new()
    }

    fn sees_batch(&self) -> bool {
        false
    }

    fn forward(&self, input: &Tensor, pass: &mut Pass<'_>) -> Tensor {
        let mut parameters = pass.parameters.iter();
        let next = &mut || parameters.next().expect("a tensor for each of the network's parameters");
        let input = input.to_kind(pass.kind());
        let mut x = if self.draws { input } else { features_last(&input) };
        for (_, piece) in &self.pieces {
            x = piece.forward(&x, next);
        }
        in_single(&if self.draws { features_first(&x).contiguous() } else { x })
    }
}
