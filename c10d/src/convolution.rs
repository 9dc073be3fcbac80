//! Convolutions with square kernels, of equal stride and padding on all sides.
//!
//! Kernels of libraries for CPUs compute 16 channels at once, also where there is one: ten times as long as
//! it takes. So there an image of at most 4 channels is laid from patches, or cut into them where its
//! gradient is wanted, and the rest is a product of matrices. So is the gradient of a large weight in bf16
//! over small maps. Elsewhere, and in a program that is recorded, convolutions are libtorch's. All have all
//! derivatives.

use tch::Tensor;

use crate::Error;
use crate::aten::owned;
use crate::aten_ffi::shim;
use crate::ffi::at_tensor;

/// Where a kernel lies on an image, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Distance between two places of the kernel.
    pub stride: i64,
    /// Number of zeros on each side of the image.
    pub padding: i64,
}

/// Computes a convolution: images, (n, inputs, h, w), with a weight, (outputs, inputs, k, k), and a bias,
/// (outputs), if there is one, to (n, outputs, h', w').
///
/// # Errors
/// [`Error::Fatal`] for shapes that do not fit each other, and if libtorch fails.
pub fn convolution(
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    Grid { stride, padding }: Grid,
) -> Result<Tensor, Error> {
    let none = Tensor::new();
    let bias = at_tensor(bias.unwrap_or(&none));
    owned(shim::convolution(at_tensor(input), at_tensor(weight), bias, stride, padding)?)
}

/// Computes a transposed convolution, whose grid lies on its output: images, (n, inputs, h, w), with a
/// weight, (inputs, outputs, k, k).
///
/// # Errors
/// As for [`convolution`].
pub fn transposed_convolution(
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    Grid { stride, padding }: Grid,
) -> Result<Tensor, Error> {
    let none = Tensor::new();
    let bias = at_tensor(bias.unwrap_or(&none));
    owned(shim::transposed_convolution(at_tensor(input), at_tensor(weight), bias, stride, padding)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use tch::{Device, Kind};

    use super::*;

    /// Values, gradients and gradients of gradients of a layer.
    fn all(tensors: &[Tensor], kind: Kind, layer: &dyn Fn(&[Tensor]) -> Tensor) -> Vec<Tensor> {
        let leaves: Vec<_> =
            tensors.iter().map(|x| x.to_kind(kind).detach().set_requires_grad(true)).collect();
        let out = layer(&leaves);
        let squares = out.square().sum(kind);
        let first = Tensor::run_backward(&[&squares], &leaves, true, true);
        let norm = first[0].square().sum(kind) + first[1].square().sum(kind);
        let second = Tensor::run_backward(&[&(norm + squares)], &leaves, false, false);
        let all = [out].into_iter().chain(first).chain(second);
        all.map(|x| x.detach().to_kind(Kind::Double)).collect()
    }

    fn are_near(ours: &[Tensor], exact: &[Tensor], bound: f64, what: &str) {
        for (ours, exact) in ours.iter().zip(exact) {
            assert_eq!(ours.size(), exact.size(), "{what}");
            let apart = (ours - exact).abs().max() / exact.abs().max();
            assert!(apart.double_value(&[]) < bound, "{what}: {apart:?}");
        }
    }

    /// Not drawn: other tests draw from the same generator meanwhile.
    fn numbers(shape: &[i64]) -> Tensor {
        let count = shape.iter().product::<i64>();
        (Tensor::arange(count, (Kind::Double, Device::Cpu)).square() * 0.37 + 1.0).sin().view(shape)
    }

    /// Against libtorch's own, with few channels on either side and with many, on grids whose kernel reaches
    /// beyond the image, and on others.
    #[test]
    fn convolutions_have_all_derivatives() {
        for (inputs, outputs) in [(1, 6), (6, 1), (3, 4), (5, 7)] {
            for (kernel, stride, padding) in [(4, 2, 1), (3, 1, 1), (5, 3, 0), (3, 1, 2), (2, 1, 1)] {
                let grid = Grid { stride, padding };
                let what = format!("{inputs} to {outputs}, kernel {kernel}, {grid:?}");
                let (strides, paddings) = ([stride, stride], [padding, padding]);
                let image = numbers(&[3, inputs, 8, 11]);
                let bias = numbers(&[outputs]);
                let plain =
                    [&image, &numbers(&[outputs, inputs, kernel, kernel]), &bias].map(Tensor::shallow_clone);
                let exact = all(&plain, Kind::Double, &|x| {
                    x[0].conv2d(&x[1], Some(&x[2]), strides, paddings, [1, 1], 1)
                });
                let ours = |x: &[Tensor]| convolution(&x[0], &x[1], Some(&x[2]), grid).unwrap();
                are_near(&all(&plain, Kind::Double, &ours), &exact, 1e-12, &what);
                are_near(&all(&plain, Kind::Float, &ours), &exact, 1e-5, &what);
                let turned =
                    [&image, &numbers(&[inputs, outputs, kernel, kernel]), &bias].map(Tensor::shallow_clone);
                let exact = all(&turned, Kind::Double, &|x| {
                    x[0].conv_transpose2d(&x[1], Some(&x[2]), strides, paddings, [0, 0], 1, [1, 1])
                });
                let ours = |x: &[Tensor]| transposed_convolution(&x[0], &x[1], Some(&x[2]), grid).unwrap();
                are_near(&all(&turned, Kind::Double, &ours), &exact, 1e-12, &format!("{what}, transposed"));
                are_near(&all(&turned, Kind::Float, &ours), &exact, 1e-5, &format!("{what}, transposed"));
            }
        }
    }

    /// In bf16, where its gradient is a product with patches.
    #[test]
    fn a_large_weight_over_small_maps_has_all_derivatives() {
        let grid = Grid { stride: 2, padding: 1 };
        let (image, weight) = (numbers(&[3, 64, 8, 8]), numbers(&[512, 64, 4, 4]) / 32.0);
        let tensors = [image, weight].map(|x| x.to_kind(Kind::BFloat16));
        let exact =
            all(&tensors, Kind::Double, &|x| x[0].conv2d(&x[1], None::<&Tensor>, [2, 2], [1, 1], [1, 1], 1));
        let ours = |x: &[Tensor]| convolution(&x[0], &x[1], None, grid).unwrap();
        are_near(&all(&tensors, Kind::BFloat16, &ours), &exact, 0.02, "bf16");
        let tensors = [numbers(&[3, 512, 4, 4]).to_kind(Kind::BFloat16), tensors[1].shallow_clone()];
        let exact = all(&tensors, Kind::Double, &|x| {
            x[0].conv_transpose2d(&x[1], None::<&Tensor>, [2, 2], [1, 1], [0, 0], 1, [1, 1])
        });
        let ours = |x: &[Tensor]| transposed_convolution(&x[0], &x[1], None, grid).unwrap();
        are_near(&all(&tensors, Kind::BFloat16, &ours), &exact, 0.02, "bf16, transposed");
        let grid = Grid { stride: 0, padding: 1 };
        assert!(matches!(convolution(&tensors[0], &tensors[1], None, grid), Err(Error::Fatal(_))));
    }

    /// Half precision, the order of the channels, and the bits with more threads.
    #[test]
    fn thin_convolutions_take_what_networks_have() {
        tch::manual_seed(6);
        let draw = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let (image, weight) = (draw(&[5, 8, 7, 7]), draw(&[8, 1, 4, 4]));
        let grid = Grid { stride: 2, padding: 1 };
        let of = |image: &Tensor| transposed_convolution(image, &weight, None, grid).unwrap();
        let exact = of(&image);
        let last = image.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
        assert!(of(&last).equal(&exact));
        tch::set_num_threads(3);
        assert!(of(&image).equal(&exact));
        tch::set_num_threads(1);
        let half = |x: &Tensor| x.to_kind(Kind::BFloat16);
        let in_half = transposed_convolution(&half(&image), &half(&weight), None, grid).unwrap();
        assert_eq!(in_half.kind(), Kind::BFloat16);
        are_near(&[in_half.to_kind(Kind::Float)], &[exact], 0.02, "bf16");
        let refused = transposed_convolution(&image, &draw(&[7, 1, 4, 4]), None, grid);
        assert!(matches!(refused, Err(Error::Fatal(_))));
        assert!(matches!(convolution(&image, &draw(&[8, 1, 4, 4]), None, grid), Err(Error::Fatal(_))));
    }
}
