//! SNGAN: Miyato, Kataoka, Koyama and Yoshida (2018), "Spectral Normalization for Generative Adversarial
//! Networks", table 4: residual networks for 32 x 32 images, every layer of the discriminator normalised
//! spectrally.
//!
//! 1. The discriminator has `width` features (the paper: 128), the generator twice as many.
//! 2. Classes: batch normalisation's scale and shift of each class in the generator (de Vries et al., 2017),
//!    and a projection in the discriminator (Miyato and Koyama, 2018, "cGANs with Projection Discriminator",
//!    equation 3 and figure 14).
//! 3. Initial weights are Glorot's, as in the released code.

use c10d::convolution::Grid;
use tch::Tensor;

use super::pieces::{Sizes, Specs, convolved, embed, in_single, linear, root};
use super::sequential::{BATCH_NORM_MOMENTUM, channels_last, normalise};
use super::spectral::normalised;
use super::{Init, Network, Pass, TensorSpec};

/// Side in pixels of the map that the generator begins with.
const START: i64 = 4;

/// Glorot and Bengio (2010), equation 16, with a gain.
fn glorot(gain: f32, inputs: i64, outputs: i64, kernel: i64) -> Init {
    let area = kernel * kernel;
    // Of a uniform distribution whose variance is 2 / (inputs + outputs).
    Init::Uniform { bound: gain * 6.0_f32.sqrt() / root(area * (inputs + outputs)) }
}

/// Adds a convolution, or with `kernel` 1 a shortcut.
fn add_conv(specs: &mut Specs, name: &str, inputs: i64, outputs: i64, kernel: i64) {
    // The released code scales convolutions within a block by sqrt(2), and shortcuts by 1.
    let gain = if kernel == 1 { 1.0 } else { 2.0_f32.sqrt() };
    let init = glorot(gain, inputs, outputs, kernel);
    specs.add(format!("{name}.weight"), &[outputs, inputs, kernel, kernel], init);
    specs.add(format!("{name}.bias"), &[outputs], Init::Constant(0.0));
}

fn conv(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Tensor {
    // Keeps the side: 1 for a kernel of 3, 0 for one of 1.
    let grid = Grid { stride: 1, padding: weight.size()[3] / 2 };
    convolved(&channels_last(x), weight, Some(bias), grid)
}

/// Cursor over a network's tensors in order, during a pass.
struct Walk<'p, 'a> {
    pass: &'p mut Pass<'a>,
    parameters: std::slice::Iter<'a, Tensor>,
    buffers: usize,
}

impl<'p, 'a> Walk<'p, 'a> {
    fn new(pass: &'p mut Pass<'a>) -> Walk<'p, 'a> {
        let parameters = pass.parameters.iter();
        Walk { pass, parameters, buffers: 0 }
    }

    fn next(&mut self) -> &'a Tensor {
        self.parameters.next().expect("a tensor for each of the network's parameters")
    }

    fn conv(&mut self, x: &Tensor) -> Tensor {
        conv(x, self.next(), self.next())
    }

    /// Returns the next weight, spectrally normalised.
    fn spectral(&mut self) -> Tensor {
        let weight = self.next();
        // One vector of the power method for each weight.
        self.buffers += 1;
        normalised(weight, self.buffers - 1, self.pass)
    }

    fn spectral_conv(&mut self, x: &Tensor) -> Tensor {
        let weight = self.spectral();
        conv(x, &weight, self.next())
    }

    /// Applies batch normalisation, per class in a conditional model, then max(x, 0).
    fn norm_relu(&mut self, x: &Tensor, classes: i64) -> Tensor {
        let (weight, bias) = (self.next(), self.next());
        // A mean and a variance.
        self.buffers += 2;
        let buffer = self.buffers - 2;
        // Without classes the kernel scales and shifts by itself.
        if classes == 0 {
            return normalise(x, Some((weight, bias)), self.pass, buffer).relu_();
        }
        let normal = normalise(x, None, self.pass, buffer);
        let of_classes = |table: &Tensor| {
            // The tables stay in fp32 in every precision, like all of batch normalisation.
            let rows = embed(table, self.pass.classes).to_kind(normal.kind());
            rows.unsqueeze(2).unsqueeze(3)
        };
        (&normal * of_classes(weight) + of_classes(bias)).relu_()
    }
}

/// Generator: noise (n, latent) to images.
#[derive(Clone, Debug)]
pub(super) struct Generator {
    latent: i64,
    features: i64,
    channels: i64,
    classes: i64,
}

impl Generator {
    pub(super) fn new(sizes: Sizes) -> Generator {
        let Sizes { latent, width, channels, classes, .. } = sizes;
        Generator { latent, features: 2 * width, channels, classes }
    }

    /// Names of the batch normalisations, in order.
    fn norms(&self) -> impl Iterator<Item = String> {
        let of_blocks = (0..3).flat_map(|block| [1, 2].map(|at| format!("block{block}.norm{at}")));
        of_blocks.chain(["norm".to_string()])
    }

    fn add_norm(&self, specs: &mut Specs, name: &str) {
        let shape: &[i64] = if self.classes == 0 { &[self.features] } else { &[self.classes, self.features] };
        specs.add_exact(format!("{name}.weight"), shape, Init::Constant(1.0));
        specs.add_exact(format!("{name}.bias"), shape, Init::Constant(0.0));
    }
}

impl Network for Generator {
    fn parameters(&self) -> Vec<TensorSpec> {
        let (mut specs, features) = (Specs::default(), self.features);
        let flat = START * START * features;
        specs.add("begin.weight".to_string(), &[flat, self.latent], glorot(1.0, self.latent, flat, 1));
        specs.add("begin.bias".to_string(), &[flat], Init::Constant(0.0));
        for block in 0..3 {
            for at in [1, 2] {
                self.add_norm(&mut specs, &format!("block{block}.norm{at}"));
                add_conv(&mut specs, &format!("block{block}.conv{at}"), features, features, 3);
            }
            add_conv(&mut specs, &format!("block{block}.shortcut"), features, features, 1);
        }
        self.add_norm(&mut specs, "norm");
        let init = glorot(1.0, features, self.channels, 3);
        specs.add("end.weight".to_string(), &[self.channels, features, 3, 3], init);
        specs.add("end.bias".to_string(), &[self.channels], Init::Constant(0.0));
        specs.list
    }

    fn buffers(&self) -> Vec<TensorSpec> {
        let of_norm = |name: String| {
            [("running_mean", 0.0), ("running_var", 1.0)].map(|(kind, start)| {
                let (name, start) = (format!("{name}.{kind}"), Init::Constant(start));
                TensorSpec::buffer(name, &[self.features], start, BATCH_NORM_MOMENTUM)
            })
        };
        self.norms().flat_map(of_norm).collect()
    }

    fn sees_batch(&self) -> bool {
        true
    }

    fn forward(&self, input: &Tensor, pass: &mut Pass<'_>) -> Tensor {
        let kind = pass.kind();
        let mut walk = Walk::new(pass);
        let begun = linear(&input.to_kind(kind), walk.next(), Some(walk.next()));
        let mut x = channels_last(&begun.view([-1, self.features, START, START]));
        for _ in 0..3 {
            let double = |x: &Tensor| {
                let side = 2 * x.size()[2];
                x.upsample_nearest2d([side, side], None, None)
            };
            let y = walk.norm_relu(&x, self.classes);
            let y = walk.conv(&double(&y));
            let y = walk.norm_relu(&y, self.classes);
            let y = walk.conv(&y);
            // A convolution of single pixels commutes with the doubling, and is cheaper before it.
            x = y + double(&walk.conv(&x));
        }
        let x = walk.norm_relu(&x, self.classes);
        in_single(&walk.conv(&x).tanh().contiguous())
    }
}

/// Discriminator: images to logits (n, 1).
#[derive(Clone, Debug)]
pub(super) struct Discriminator {
    features: i64,
    channels: i64,
    classes: i64,
}

/// Whether each of the discriminator's blocks halves the sides.
const HALVES: [bool; 4] = [true, true, false, false];

impl Discriminator {
    pub(super) fn new(sizes: Sizes) -> Discriminator {
        let Sizes { width, channels, classes, .. } = sizes;
        Discriminator { features: width, channels, classes }
    }
}

impl Network for Discriminator {
    fn parameters(&self) -> Vec<TensorSpec> {
        let (mut specs, features) = (Specs::default(), self.features);
        for (block, halves) in HALVES.into_iter().enumerate() {
            let inputs = if block == 0 { self.channels } else { features };
            add_conv(&mut specs, &format!("block{block}.conv1"), inputs, features, 3);
            add_conv(&mut specs, &format!("block{block}.conv2"), features, features, 3);
            if halves {
                add_conv(&mut specs, &format!("block{block}.shortcut"), inputs, features, 1);
            }
        }
        specs.add("end.weight".to_string(), &[1, features], glorot(1.0, features, 1, 1));
        specs.add("end.bias".to_string(), &[1], Init::Constant(0.0));
        if self.classes > 0 {
            let init = glorot(1.0, self.classes, features, 1);
            specs.add_table("embedding.weight".to_string(), &[self.classes, features], init);
        }
        specs.list
    }

    /// Vectors of the power method, one for each weight.
    fn buffers(&self) -> Vec<TensorSpec> {
        let weights = self.parameters().into_iter().filter(|spec| spec.name.ends_with(".weight"));
        let vector = |spec: TensorSpec| {
            let (name, start) =
                (spec.name.replace(".weight", ".vector"), Init::Normal { mean: 0.0, deviation: 1.0 });
            TensorSpec::buffer(name, &spec.shape[..1], start, 1.0)
        };
        weights.map(vector).collect()
    }

    fn sees_batch(&self) -> bool {
        false
    }

    fn forward(&self, input: &Tensor, pass: &mut Pass<'_>) -> Tensor {
        let mut x = input.to_kind(pass.kind());
        let classes = pass.classes;
        let mut walk = Walk::new(pass);
        for (block, halves) in HALVES.into_iter().enumerate() {
            // The first block sees pixels, which no activation precedes.
            let y = if block == 0 { x.shallow_clone() } else { x.relu() };
            let y = walk.spectral_conv(&y).relu();
            let y = walk.spectral_conv(&y);
            let half = |x: &Tensor| x.avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None);
            x = match halves {
                true => half(&(y + walk.spectral_conv(&x))),
                false => y + x,
            };
        }
        let seen = x.relu().sum_dim_intlist([2i64, 3].as_slice(), false, None);
        let weight = walk.spectral();
        let mut logits = linear(&seen, &weight, Some(walk.next()));
        if self.classes > 0 {
            let table = walk.spectral();
            let projection = (&seen * embed(&table, classes)).sum_dim_intlist([1i64].as_slice(), true, None);
            logits = logits.g_add(&projection);
        }
        in_single(&logits)
    }
}
