//! Operations between the products of a transformer's block.
//!
//! 1. Each function is one pass over memory on CPUs in fp32, and libtorch's operations elsewhere.
//! 2. A number's bits depend on its own arguments, not on the number of threads.
//! 3. Nothing is recorded for gradients: each function has its gradient beside it.

use tch::Tensor;

use crate::Error;
use crate::aten::owned;
use crate::aten_ffi::shim;
use crate::ffi::at_tensor;

/// Computes SwiGLU (Shazeer, 2020, equation 6): rows of gates and values, (n, 2 hidden), to
/// silu(gate) value, (n, hidden).
///
/// # Errors
/// [`Error::Fatal`] for rows of an odd length, and if libtorch fails.
pub fn swiglu(rows: &Tensor) -> Result<Tensor, Error> {
    owned(shim::swiglu(at_tensor(rows))?)
}

/// Computes the gradient of [`swiglu`]'s rows from that of its output, `grad`.
///
/// # Errors
/// As for [`swiglu`], and for a gradient of another shape.
pub fn swiglu_backward(rows: &Tensor, grad: &Tensor) -> Result<Tensor, Error> {
    owned(shim::swiglu_backward(at_tensor(rows), at_tensor(grad))?)
}

/// Heads of attention, in rows of `samples` x tokens. A row has `parts` x `heads` vectors.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a> {
    /// Number of samples.
    pub samples: i64,
    /// Number of vectors that a head has of a token, such as query, key and value.
    pub parts: i64,
    /// Number of heads.
    pub heads: i64,
    /// Cosines and sines, (tokens, width / 2) each, by which the vectors of the first two parts are turned
    /// (Su et al., 2021, equation 34): pairs of their halves' numbers.
    pub angles: Option<&'a [Tensor; 2]>,
}

impl Heads<'_> {
    /// Brings rows, (samples tokens, parts heads width), into the order in which heads read them, (parts,
    /// samples heads, tokens, width), and turns them.
    ///
    /// # Errors
    /// [`Error::Fatal`] for shapes that do not fit each other, and if libtorch fails.
    pub fn split(&self, rows: &Tensor) -> Result<Tensor, Error> {
        self.with(|cos, sin, heads| owned(shim::split_heads(at_tensor(rows), cos, sin, heads)?))
    }

    /// Brings vectors of heads, (parts, samples heads, tokens, width), into the order of rows, (samples
    /// tokens, parts heads width), and turns them back: the gradient of [`Heads::split`].
    ///
    /// # Errors
    /// As for [`Heads::split`].
    pub fn join(&self, vectors: &Tensor) -> Result<Tensor, Error> {
        self.with(|cos, sin, heads| owned(shim::join_heads(at_tensor(vectors), cos, sin, heads)?))
    }

    fn with<T>(&self, call: impl FnOnce(&shim::Tensor, &shim::Tensor, &shim::Heads) -> T) -> T {
        let none = Tensor::new();
        let [cos, sin] = self.angles.map_or([&none, &none], |[cos, sin]| [cos, sin]);
        let heads = shim::Heads { samples: self.samples, parts: self.parts, heads: self.heads };
        call(at_tensor(cos), at_tensor(sin), &heads)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use tch::{Device, Kind};

    use super::*;

    /// Numbers that only this test draws: others run beside it, and libtorch's generator is one for all.
    fn numbers(shape: &[i64], scale: f64, phase: f64) -> Tensor {
        let count = shape.iter().product::<i64>();
        let places = Tensor::arange(count, (Kind::Double, Device::Cpu));
        ((places * 12.9898 + phase).sin() * scale).view(shape).to_kind(Kind::Float)
    }

    fn bits(tensor: &Tensor) -> Vec<u32> {
        Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap().into_iter().map(f32::to_bits).collect()
    }

    /// A result, whose bits are the same for vectors of each width, and for several threads.
    fn by_any_means(compute: impl Fn() -> Tensor) -> Tensor {
        let [plain, others @ ..] = [(1, false), (1, true), (3, false)].map(|(threads, narrow)| {
            // This thread's own settings.
            tch::set_num_threads(threads);
            shim::narrow_vectors(narrow);
            let out = compute();
            shim::narrow_vectors(false);
            out
        });
        assert!(others.iter().all(|other| bits(other) == bits(&plain)), "vectors or threads change bits");
        plain
    }

    /// Largest distance of two tensors, in units of the last place of the exact one.
    fn units(ours: &Tensor, exact: &Tensor) -> f64 {
        let unit = exact.abs().clamp_min(f64::from(f32::MIN_POSITIVE)) * f64::from(f32::EPSILON);
        ((ours.to_kind(Kind::Double) - exact) / unit).abs().max().double_value(&[])
    }

    #[test]
    fn swiglu_is_exact_to_a_few_units_in_the_last_place() {
        for (n, hidden) in [(1, 1), (5, 352), (3, 37), (200, 400)] {
            for scale in [0.01, 3.0, 80.0] {
                let rows = numbers(&[n, 2 * hidden], scale, 0.3);
                let grad = numbers(&[n, hidden], 1.0, 0.7);
                let exact = rows.to_kind(Kind::Double).set_requires_grad(true);
                let halves = exact.chunk(2, 1);
                let output = &halves[0] * halves[0].sigmoid() * &halves[1];
                let loss = (&output * &grad).sum(Kind::Double);
                let of_rows = Tensor::run_backward(&[&loss], &[&exact], false, false).swap_remove(0);
                let apart = units(&by_any_means(|| swiglu(&rows).unwrap()), &output.detach());
                assert!(apart < 8.0, "{n} x {hidden}, up to {scale}: {apart}");
                let ours = by_any_means(|| swiglu_backward(&rows, &grad).unwrap());
                // Where its two terms cancel it has fewer digits.
                let apart = (ours.to_kind(Kind::Double) - &of_rows).abs().max() / of_rows.abs().max();
                assert!(apart.double_value(&[]) < 1e-6, "{n} x {hidden}, up to {scale}: {apart:?}");
            }
        }
    }

    #[test]
    fn swiglu_tells_what_is_not_finite() {
        let rows =
            Tensor::from_slice(&[f32::NAN, 200.0, -200.0, 1.0, f32::INFINITY, 1.0, 2.0, 3.0, f32::NAN, 1.0]);
        let out = Vec::<f32>::try_from(swiglu(&rows.view([1, 10])).unwrap().flatten(0, -1)).unwrap();
        assert!(out[0].is_nan() && out[3].is_nan() && out[4].is_infinite(), "{out:?}");
        assert!((out[1] - 400.0).abs() < 1e-3 && out[2].abs() < 1e-30, "{out:?}");
    }

    /// As libtorch's operations do, bit for bit.
    #[test]
    fn heads_are_split_turned_and_joined() {
        for (samples, tokens, heads, width) in [(1, 1, 1, 2), (3, 5, 2, 6), (2, 70, 4, 32), (4, 33, 3, 74)] {
            let angles = numbers(&[tokens, width / 2], 3.0, 0.1);
            let angles = [angles.cos(), angles.sin()];
            for (parts, angles) in [(3, Some(&angles)), (3, None), (1, None)] {
                let of = Heads { samples, parts, heads, angles };
                let rows = numbers(&[samples * tokens, parts * heads * width], 1.0, 0.9);
                let by_head = rows.view([samples, tokens, parts, heads, width]).permute([2, 0, 3, 1, 4]);
                let by_head = by_head.reshape([parts, samples * heads, tokens, width]);
                let turned = |vectors: &Tensor, back: bool| {
                    let Some([cos, sin]) = angles else { return vectors.copy() };
                    let sin = if back { -sin } else { sin.shallow_clone() };
                    let (both, rest) = (vectors.narrow(0, 0, 2), vectors.narrow(0, 2, parts - 2));
                    let halves = both.chunk(2, -1);
                    let [a, b] = [&halves[0], &halves[1]];
                    let both = Tensor::cat(&[a * cos - b * &sin, b * cos + a * &sin], -1);
                    Tensor::cat(&[both, rest], 0)
                };
                let split = by_any_means(|| of.split(&rows).unwrap());
                assert_eq!(split.size(), [parts, samples * heads, tokens, width]);
                assert!(bits(&split) == bits(&turned(&by_head, false)), "{of:?}");
                let joined = by_any_means(|| of.join(&split).unwrap());
                assert_eq!(joined.size(), rows.size());
                let back = turned(&split, true).view([parts, samples, heads, tokens, width]);
                let back = back.permute([1, 3, 0, 2, 4]).reshape(rows.size().as_slice());
                assert!(bits(&joined) == bits(&back), "{of:?}");
                // Where there are no kernels.
                let exact = of.split(&rows.to_kind(Kind::Double));
                if angles.is_none() {
                    let exact = exact.unwrap();
                    assert!(bits(&exact.to_kind(Kind::Float)) == bits(&split));
                    let exact = of.join(&exact).unwrap();
                    assert!(bits(&exact.to_kind(Kind::Float)) == bits(&joined));
                } else {
                    assert!(matches!(exact, Err(Error::Fatal(_))), "angles of another kind");
                }
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let rows = numbers(&[6, 12], 1.0, 0.0);
        let angles = [numbers(&[3, 1], 1.0, 0.0), numbers(&[3, 1], 1.0, 0.0)];
        let heads = Heads { samples: 2, parts: 3, heads: 2, angles: Some(&angles) };
        assert!(heads.split(&rows).is_ok());
        let wrong = [
            Heads { samples: 4, ..heads },
            Heads { samples: 0, ..heads },
            Heads { parts: 5, ..heads },
            Heads { heads: 0, ..heads },
            Heads { samples: 3, ..heads },
        ];
        for heads in wrong {
            assert!(matches!(heads.split(&rows), Err(Error::Fatal(_))), "{heads:?}");
        }
        assert!(matches!(heads.join(&rows), Err(Error::Fatal(_))));
        assert!(matches!(swiglu(&numbers(&[2, 3], 1.0, 0.0)), Err(Error::Fatal(_))));
        assert!(matches!(swiglu_backward(&rows, &rows), Err(Error::Fatal(_))));
    }
}
