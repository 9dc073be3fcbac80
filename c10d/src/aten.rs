//! Safe wrappers of ATen functions that tch lacks.
//!
//! 1. No function panics or lets an exception through: an exception of libtorch becomes an
//!    [`Error`].
//! 2. [`fused_adam`] and [`fused_sgd`] on CPU give the same bits however a flat tensor is cut, as long as the
//!    cuts are multiples of 16 elements: the last few elements of a slice are computed by other instructions.
//! 3. [`norm`] depends on the tensor alone, not on the number of threads.

use std::marker::PhantomData;
use std::ops::Range;

use tch::Tensor;

use crate::Error;
use crate::aten_ffi::shim;
use crate::ffi::at_tensor;

/// Hyperparameters of Adam (Kingma and Ba, 2015, algorithm 1), and of AdamW (Loshchilov and Hutter, 2019,
/// algorithm 2) where parameters decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// Learning rate.
    pub lr: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Term added to the root of the second moment.
    pub eps: f64,
    /// Decay of the parameters: a step shrinks them by `lr` times this share, apart from the gradient.
    pub weight_decay: f64,
}

/// Hyperparameters of stochastic gradient descent with momentum (Sutskever et al., 2013), as in PyTorch: the
/// momentum sums up gradients, and the learning rate scales the sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// Share of the momentum that stays in a step.
    pub momentum: f64,
    /// Whether a step looks ahead along the new momentum (Nesterov's gradient).
    pub nesterov: bool,
    /// Weight of the L2 penalty: this times the parameters is added to the gradient.
    pub weight_decay: f64,
}

/// Flat tensors that a step of an optimizer reads and writes. All have one length, kind and device.
#[derive(Debug)]
pub struct Step<'a> {
    /// Parameters, changed in place without recording gradients.
    pub params: &'a mut Tensor,
    /// Gradient of the parameters.
    pub grads: &'a Tensor,
    /// Elements that the step covers: ranges that do not overlap. `None` for all.
    pub ranges: Option<&'a [Range<usize>]>,
    /// Number that the gradient is divided by, in place and in the same kernel.
    pub divisor: Option<f32>,
}

impl<'a> Step<'a> {
    /// A step of all parameters, by a gradient as it is.
    pub fn whole(params: &'a mut Tensor, grads: &'a Tensor) -> Step<'a> {
        Step { params, grads, ranges: None, divisor: None }
    }

    /// Checks the tensors against each other, and returns the ranges.
    fn spans(&self, moments: &[&Tensor]) -> Result<Vec<shim::Span>, Error> {
        let properties = |tensor: &Tensor| (tensor.size(), tensor.kind(), tensor.device());
        // The kernel walks all of them by the first one's size.
        let is_alike = |other: &&Tensor| properties(other) == properties(self.params);
        if self.params.dim() != 1 || ![self.grads].iter().chain(moments).all(is_alike) {
            return Err(Error::Invalid(
                "an optimizer's tensors must be flat, of one length, kind and device".into(),
            ));
        }
        let len = self.params.numel();
        let whole = std::slice::from_ref(&(0..len)).to_vec();
        let ranges = self.ranges.map_or(whole, <[_]>::to_vec);
        if ranges.iter().any(|range| range.start > range.end || range.end > len) {
            return Err(Error::Invalid(format!("an optimizer's ranges must lie within 0..{len}")));
        }
        Ok(ranges.into_iter().map(|range| shim::Span { start: range.start, len: range.len() }).collect())
    }
}

/// Applies a step of Adam, in one kernel. The moments are the first, then the second; `count` is the number of
/// the step, from 1.
///
/// # Errors
/// [`Error::Invalid`] for step 0, and tensors or ranges that do not match; [`Error::Fatal`] if libtorch fails.
pub fn fused_adam(
    step: Step<'_>,
    [exp_avg, exp_avg_sq]: [&mut Tensor; 2],
    count: u64,
    adam: Adam,
) -> Result<(), Error> {
    // The correction of the bias divides by 1 - beta^count, which would be 0.
    if count == 0 {
        return Err(Error::Invalid("Adam's steps count from 1".into()));
    }
    let spans = step.spans(&[&*exp_avg, &*exp_avg_sq])?;
    let Adam { lr, beta1, beta2, eps, weight_decay } = adam;
    let divisor = step.divisor.unwrap_or(1.0);
    // The kernel takes the count as a float: beyond 2^24 it is inexact, where that no longer
    // matters.
    let settings =
        shim::AdamSettings { count: count as f64, lr, beta1, beta2, eps, weight_decay, divisor, spans };
    let [params, grads, exp_avg, exp_avg_sq] =
        [&*step.params, step.grads, &*exp_avg, &*exp_avg_sq].map(at_tensor);
    Ok(shim::fused_adam(params, grads, exp_avg, exp_avg_sq, &settings)?)
}

/// Applies a step of stochastic gradient descent, in one kernel. The momentum begins as zeros; without one,
/// `momentum` of the hyperparameters must be 0.
///
/// # Errors
/// [`Error::Invalid`] for tensors or ranges that do not match; [`Error::Fatal`] if libtorch fails.
pub fn fused_sgd(step: Step<'_>, momentum: Option<&mut Tensor>, sgd: Sgd) -> Result<(), Error> {
    let momentum = momentum.as_deref();
    if momentum.is_none() && sgd.momentum != 0.0 {
        return Err(Error::Invalid("a momentum needs a tensor".into()));
    }
    let spans = step.spans(momentum.as_slice())?;
    let Sgd { lr, momentum: share, nesterov, weight_decay } = sgd;
    let divisor = step.divisor.unwrap_or(1.0);
    let settings = shim::SgdSettings { lr, momentum: share, nesterov, weight_decay, divisor, spans };
    let (params, grads) = (at_tensor(step.params), at_tensor(step.grads));
    // Not read where there is no momentum.
    let momentum = momentum.map_or(params, at_tensor);
    Ok(shim::fused_sgd(params, grads, momentum, &settings)?)
}

/// Returns the Euclidean norm of a tensor of floats, computed in double precision. It is not finite exactly
/// if an element is not.
///
/// # Errors
/// [`Error::Fatal`] for a tensor of another kind, and if libtorch fails.
pub fn norm(tensor: &Tensor) -> Result<f64, Error> {
    Ok(shim::norm(at_tensor(tensor))?)
}

/// Returns the state of libtorch's default generator for CPUs, to detect draws from it.
///
/// # Errors
/// [`Error::Fatal`] if libtorch fails.
pub fn default_generator_state() -> Result<Vec<u8>, Error> {
    Ok(shim::default_generator_state()?)
}

/// Returns the instruction set that libtorch's CPU kernels use on this machine, such as `AVX512`.
///
/// # Errors
/// [`Error::Fatal`] if libtorch fails.
pub fn cpu_capability() -> Result<String, Error> {
    Ok(shim::cpu_capability()?)
}

/// Returns the version of libtorch that this crate was compiled against.
///
/// # Errors
/// None in practice.
pub fn libtorch_version() -> Result<String, Error> {
    Ok(shim::libtorch_version()?)
}

/// Sets whether operations of this process must give the same bits each time, and fail where they
/// have no such implementation. With cuDNN it also stops the choice of algorithms by timing.
///
/// # Errors
/// [`Error::Fatal`] if libtorch fails.
pub fn set_deterministic(deterministic: bool) -> Result<(), Error> {
    Ok(shim::set_deterministic(deterministic)?)
}

/// Sets what CUDA's libraries may compute in TF32 in this process: convolutions, and products of matrices.
/// Sums of products of bf16 they then keep in fp32.
///
/// # Errors
/// [`Error::Fatal`] if libtorch fails.
pub fn set_tf32(convolutions: bool, products: bool) -> Result<(), Error> {
    Ok(shim::set_tf32(convolutions, products)?)
}

/// Returns the name and version of the C library at run time, such as `glibc 2.36`.
///
/// # Errors
/// None in practice.
pub fn c_library_version() -> Result<String, Error> {
    Ok(shim::c_library_version()?)
}

/// Keeps memory of freed tensors on the CPU for the tensors that come next, as libtorch does on a GPU.
/// [`release_memory`] returns it to the system.
///
/// # Errors
/// None at present.
pub fn keep_freed_memory() -> Result<(), Error> {
    Ok(shim::keep_freed_memory()?)
}

/// Lets tensors of 2 MB and more on the CPU lie in huge pages, where the system has them. Must be called
/// before anything else of libtorch, and before another thread may read the environment.
///
/// # Errors
/// None in practice.
pub fn use_huge_pages() -> Result<(), Error> {
    Ok(shim::use_huge_pages()?)
}

/// Returns cached free memory to the system: the C library's, and that of all GPUs. Memory that
/// CUDA itself takes stays until the process ends.
///
/// # Errors
/// [`Error::Fatal`] if CUDA reports an earlier error.
pub fn release_memory() -> Result<(), Error> {
    #[cfg(feature = "cuda")]
    shim::empty_cuda_cache()?;
    Ok(shim::trim_heap()?)
}

/// Copies tensors into others of their shapes: on a GPU in one launch, or a few. One that [is there
/// already](PlacedGradients) stays.
///
/// # Errors
/// [`Error::Fatal`] if numbers or shapes of tensors differ.
pub fn copy_all<'a>(pairs: impl Iterator<Item = (&'a mut Tensor, &'a Tensor)>) -> Result<(), Error> {
    let (to, from) = lists(pairs.filter(|(place, value)| !is_in_place(place, value)))?;
    Ok(shim::copy_all(&to, &from)?)
}

/// Whether a gradient lies in its place already.
pub fn is_in_place(place: &Tensor, gradient: &Tensor) -> bool {
    gradient.defined() && place.data_ptr() == gradient.data_ptr()
}

/// Backward passes of this thread, as long as it lives, write the gradients of weights straight into their
/// places where they can: those of [`linear`] on a CPU in fp32, each once. A large gradient's own memory
/// would be cleared by the kernel each time, which takes as long as computing it.
#[must_use = "the gradients are placed as long as it lives"]
#[derive(Debug)]
pub struct PlacedGradients(PhantomData<*const ()>);

impl PlacedGradients {
    /// Gives each weight's gradient a place, a contiguous tensor of its shape, to be overwritten.
    ///
    /// # Errors
    /// [`Error::Fatal`] if libtorch fails.
    pub fn new<'a>(
        pairs: impl Iterator<Item = (&'a mut Tensor, &'a Tensor)>,
    ) -> Result<PlacedGradients, Error> {
        let (places, weights) = lists(pairs)?;
        let placed = PlacedGradients(PhantomData);
        shim::place_gradients(&weights, &places)?;
        Ok(placed)
    }
}

impl Drop for PlacedGradients {
    fn drop(&mut self) {
        shim::forget_places();
    }
}

/// Adds tensors to others of their shapes, in place: on a GPU in one launch, or a few.
///
/// # Errors
/// [`Error::Fatal`] if numbers or shapes of tensors differ.
pub fn add_all<'a>(pairs: impl Iterator<Item = (&'a mut Tensor, &'a Tensor)>) -> Result<(), Error> {
    let (to, from) = lists(pairs)?;
    Ok(shim::add_all(&to, &from)?)
}

type List = cxx::UniquePtr<shim::TensorList>;

fn lists<'a>(pairs: impl Iterator<Item = (&'a mut Tensor, &'a Tensor)>) -> Result<(List, List), Error> {
    let (mut to, mut from) = (shim::tensor_list()?, shim::tensor_list()?);
    for (place, value) in pairs {
        to.pin_mut().push(at_tensor(place))?;
        from.pin_mut().push(at_tensor(value))?;
    }
    Ok((to, from))
}

/// Computes max(x, slope x), elementwise, in place and differentiable. The slope of tch's own is
/// fixed at 0.01.
///
/// # Errors
/// [`Error::Fatal`] if libtorch fails.
pub fn leaky_relu(tensor: &mut Tensor, slope: f64) -> Result<(), Error> {
    Ok(shim::leaky_relu(at_tensor(tensor), slope)?)
}

/// Computes a product of matrices, (m, k) and (k, n), which autograd differentiates any number of times. On a
/// CPU oneDNN multiplies single precision: libtorch asks MKL, which takes twice the time on processors of
/// another maker.
///
/// # Errors
/// [`Error::Fatal`] for shapes that do not fit each other, and if libtorch fails.
pub fn product(a: &Tensor, b: &Tensor) -> Result<Tensor, Error> {
    owned(shim::product(at_tensor(a), at_tensor(b))?)
}

/// Computes a linear layer: rows of an input, (m, k), with a weight, (n, k), and a bias, (n), if there is
/// one, to (m, n). Otherwise as [`product`]; inputs of more dimensions are libtorch's.
///
/// Of a layer with few weights each row has the same bits whatever the number of rows.
///
/// # Errors
/// As for [`product`].
pub fn linear(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, Error> {
    linear_by_groups(input, weight, bias, 1.0, 1)
}

/// Computes a linear layer with a bias, as [`linear`], and max(x, slope x) of each element.
///
/// # Errors
/// As for [`product`].
pub fn leaky_linear(input: &Tensor, weight: &Tensor, bias: &Tensor, slope: f64) -> Result<Tensor, Error> {
    linear_by_groups(input, weight, Some(bias), slope, 1)
}

/// Computes a linear layer, as [`linear`], and max(x, slope x) of each element unless the slope is 1. The
/// rows are `groups` neighbouring groups of as many rows each: the gradients of weight and bias have the bits
/// of the groups' own, summed as leaves of a binary tree from left to right.
///
/// # Errors
/// As for [`product`]; for several groups also [`Error::Fatal`] where [`sums_by_groups`] is false, for another
/// kind than fp32, and for a gradient that is to be differentiated.
pub fn linear_by_groups(
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    slope: f64,
    groups: u32,
) -> Result<Tensor, Error> {
    let none = Tensor::new();
    let bias = at_tensor(bias.unwrap_or(&none));
    owned(shim::linear(at_tensor(input), at_tensor(weight), bias, slope, i64::from(groups))?)
}

/// Whether a linear layer of fp32 on a CPU takes several groups of so many rows, with a weight of this shape:
/// a small one does, on a processor that has the instructions.
pub fn sums_by_groups(rows: usize, [outputs, inputs]: [i64; 2]) -> bool {
    i64::try_from(rows).is_ok_and(|rows| shim::sums_by_groups(rows, outputs.saturating_mul(inputs)))
}

/// Writes or adds a product to a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// The product replaces what is there.
    Write,
    /// The product is added to what is there.
    Add,
}

/// Computes `scale` times a product of matrices, (m, k) and (k, n), or of as many pairs as a batch has, (b, m,
/// k) and (b, k, n), straight into its place, without recording gradients. On a CPU oneDNN multiplies single
/// precision. Factors of another kind than the place's give a product of their kind, which is cast.
///
/// # Errors
/// [`Error::Invalid`] for shapes that do not fit each other; [`Error::Fatal`] if libtorch fails.
pub fn matmul_into(out: &Tensor, how: Into, scale: f64, [a, b]: [&Tensor; 2]) -> Result<(), Error> {
    let (of_a, of_b) = (a.size(), b.size());
    let fits = match (of_a.as_slice(), of_b.as_slice()) {
        ([m, k], [l, n]) => k == l && out.size() == [*m, *n],
        ([batch, m, k], [other, l, n]) => batch == other && k == l && out.size() == [*batch, *m, *n],
        _ => false,
    };
    if !fits {
        // oneDNN would read and write beyond them.
        let out = out.size();
        return Err(Error::Invalid(format!("no product of {of_a:?} and {of_b:?} is {out:?}")));
    }
    Ok(shim::matmul_into(at_tensor(out), at_tensor(a), at_tensor(b), scale, how == Into::Add)?)
}

/// Forward pass of a layer normalisation (Ba et al., 2016) without a bias, whose gradient is to come.
#[derive(Debug)]
pub struct LayerNorm<'a> {
    /// Input, (n, features).
    pub input: &'a Tensor,
    /// Weight, (features).
    pub weight: &'a Tensor,
    /// Means and reciprocal deviations, as `native_layer_norm` returns them.
    pub moments: [&'a Tensor; 2],
}

impl LayerNorm<'_> {
    /// Adds the gradient of the input to `of_input`, and writes that of the weight, for the output's gradient
    /// `grad`.
    ///
    /// # Errors
    /// [`Error::Fatal`] for tensors that do not fit each other, and if libtorch fails.
    pub fn backward(&self, grad: &Tensor, of_input: &Tensor, of_weight: &Tensor) -> Result<(), Error> {
        let [mean, rstd] = self.moments.map(at_tensor);
        let (input, weight) = (at_tensor(self.input), at_tensor(self.weight));
        let places = [of_input, of_weight].map(at_tensor);
        Ok(shim::layer_norm_backward(at_tensor(grad), input, mean, rstd, weight, places[0], places[1])?)
    }
}

/// Whether a tensor of floats holds neither an infinity nor a NaN. A contiguous tensor of `f32` on
/// a CPU is read once, by its bits, without an allocation; for any other the largest absolute value
/// is computed.
///
/// # Errors
/// [`Error::Fatal`] for a tensor of another kind, and if libtorch fails.
pub fn all_finite(tensor: &Tensor) -> Result<bool, Error> {
    Ok(shim::all_finite(at_tensor(tensor))?)
}

/// Returns a hash of a contiguous tensor's bytes: XXH3 (64 bits) on a CPU. On another device a sum
/// of its 32-bit words, each times an odd number that depends on its place, mod 2^64, is computed
/// there and hashed. It certainly distinguishes two tensors that differ in one element, and others
/// almost certainly. So hashes from the same kind of device can be compared.
///
/// # Errors
/// [`Error::Invalid`] for a tensor that is not contiguous.
pub fn fingerprint(tensor: &Tensor, seed: u64) -> Result<u64, Error> {
    if !tensor.is_contiguous() {
        return Err(Error::Invalid("only a contiguous tensor has a fingerprint".into()));
    }
    // A GPU hashes slowly what it sums fast, and the copy would be as long as the tensor.
    if tensor.device() != tch::Device::Cpu && tensor.kind().elt_size_in_bytes() == 4 {
        return fingerprint_of_sum(tensor, seed);
    }
    let on_cpu = tensor.f_to_device(tch::Device::Cpu)?;
    let bytes = on_cpu.numel() * on_cpu.kind().elt_size_in_bytes();
    // An empty tensor may have no memory, and a slice must not begin at a null pointer.
    if bytes == 0 {
        return Ok(xxhash_rust::xxh3::xxh3_64_with_seed(&[], seed));
    }
    // SAFETY: a contiguous, non-empty tensor on the CPU has `bytes` initialised bytes from
    // `data_ptr` on, which live as long as `on_cpu`. Nothing on this thread writes to them while
    // the slice lives; a tensor that another thread writes to must not be passed in, as for any
    // other operation of libtorch.
    let bytes = unsafe { std::slice::from_raw_parts(on_cpu.data_ptr().cast::<u8>(), bytes) };
    Ok(xxhash_rust::xxh3::xxh3_64_with_seed(bytes, seed))
}

/// Returns the fingerprint that a contiguous tensor of words has on `device`, of a copy of it on a CPU.
///
/// # Errors
/// As for [`fingerprint`].
pub fn fingerprint_of_copy(copy: &Tensor, device: tch::Device, seed: u64) -> Result<u64, Error> {
    if device == tch::Device::Cpu { fingerprint(copy, seed) } else { fingerprint_of_sum(copy, seed) }
}

/// Returns the fingerprint of words that are not on a CPU: only their sum is copied to the CPU.
fn fingerprint_of_sum(tensor: &Tensor, seed: u64) -> Result<u64, Error> {
    let sum = shim::weighted_sum(at_tensor(tensor))?;
    Ok(xxhash_rust::xxh3::xxh3_64_with_seed(&sum.to_le_bytes(), seed))
}

/// Takes a tensor over from the shim.
pub(crate) fn owned(tensor: cxx::UniquePtr<shim::Tensor>) -> Result<Tensor, Error> {
    if tensor.is_null() {
        return Err(Error::Fatal("no tensor".into()));
    }
    // SAFETY: the pointer comes from `new at::Tensor` and has no other owner; tch deletes it when
    // the tensor is dropped.
    Ok(unsafe { Tensor::from_ptr(tensor.into_raw().cast()) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use tch::Kind;

    use super::*;

    /// Against double precision, in every layout that an operand may have.
    #[test]
    fn products_are_written_and_added_in_place() {
        let of = |shape: &[i64], kind: Kind| {
            let all = (Kind::Double, tch::Device::Cpu);
            (Tensor::arange(shape.iter().product::<i64>(), all) * 0.7).sin().view(shape).to_kind(kind)
        };
        for (kind, within) in [(Kind::Float, 1e-5), (Kind::Double, 1e-12), (Kind::BFloat16, 0.1)] {
            let (a, b) = (of(&[5, 33], kind), of(&[7, 33], kind));
            let (batch, rows) = (of(&[3, 5, 33], kind), of(&[3, 40, 33], kind));
            let pairs = [
                (a.shallow_clone(), b.transpose(0, 1)),
                (of(&[33, 5], kind).transpose(0, 1), of(&[33, 7], kind)),
                (batch, rows.narrow(1, 2, 7).transpose(1, 2)),
            ];
            for (a, b) in pairs {
                let wanted = a.to_kind(Kind::Double).matmul(&b.to_kind(Kind::Double)) * 0.5;
                let place_kind = if kind == Kind::Double { kind } else { Kind::Float };
                let mut shape = wanted.size();
                *shape.last_mut().unwrap() += 2;
                let wide = Tensor::ones(shape.as_slice(), (place_kind, tch::Device::Cpu));
                // Within a longer row, so that the place's stride is not its length.
                let place = wide.narrow(-1, 1, 7);
                matmul_into(&place, Into::Add, 0.5, [&a, &b]).unwrap();
                let apart = |wanted: &Tensor| (&place - wanted).abs().max().double_value(&[]);
                assert!(apart(&(&wanted + 1.0)) < within, "{kind:?} added");
                matmul_into(&place, Into::Write, 0.5, [&a, &b]).unwrap();
                assert!(apart(&wanted) < within, "{kind:?} written");
                for edge in [0, 8] {
                    let ones = wide.narrow(-1, edge, 1).eq(1.0).all();
                    assert!(bool::try_from(ones).unwrap(), "written beyond its place");
                }
            }
        }
        let [a, b] = [of(&[2, 3], Kind::Float), of(&[4, 5], Kind::Float)];
        let place = of(&[2, 5], Kind::Float);
        assert!(matches!(matmul_into(&place, Into::Add, 1.0, [&a, &b]), Err(Error::Invalid(_))));
    }

    /// Values, gradients and gradients of gradients against libtorch's own layers in double precision, with
    /// few weights and with many.
    #[test]
    fn products_and_linear_layers_have_all_derivatives() {
        let draw = |shape: &[i64]| Tensor::randn(shape, (Kind::Double, tch::Device::Cpu));
        for (rows, inputs, outputs) in [(3, 5, 7), (9, 200, 300), (9, 1100, 1000)] {
            let factors = [draw(&[rows, inputs]), draw(&[outputs, inputs]), draw(&[outputs])];
            // What a gradient penalty does: the gradient of a sum that has a gradient in it.
            let all = |kind: Kind, layer: &dyn Fn(&[Tensor]) -> Tensor| {
                let factors: Vec<Tensor> =
                    factors.iter().map(|x| x.to_kind(kind).detach().set_requires_grad(true)).collect();
                let out = layer(&factors);
                let squares = out.square().sum(kind);
                let first = Tensor::run_backward(&[&squares], &factors[..2], true, true);
                let norm = first[0].square().sum(kind) + first[1].square().sum(kind);
                let second = Tensor::run_backward(&[&(norm + squares)], &factors, false, false);
                let all = [out].into_iter().chain(first).chain(second);
                all.map(|x| x.detach().to_kind(Kind::Double)).collect::<Vec<_>>()
            };
            let is_near = |ours: Vec<Tensor>, theirs: Vec<Tensor>| {
                for (ours, theirs) in ours.into_iter().zip(theirs) {
                    let apart = (&ours - &theirs).abs().max() / theirs.abs().max();
                    assert!(apart.double_value(&[]) < 1e-5, "{rows} x {inputs} x {outputs}");
                }
            };
            let ours = all(Kind::Float, &|x| linear(&x[0], &x[1], Some(&x[2])).unwrap());
            is_near(ours, all(Kind::Double, &|x| x[0].linear(&x[1], Some(&x[2]))));
            let ours = all(Kind::Float, &|x| linear(&x[0], &x[1], None).unwrap() + &x[2]);
            is_near(ours, all(Kind::Double, &|x| x[0].linear(&x[1], Some(&x[2]))));
            let ours = all(Kind::Float, &|x| leaky_linear(&x[0], &x[1], &x[2], 0.2).unwrap());
            is_near(
                ours,
                all(Kind::Double, &|x| {
                    let mut out = x[0].linear(&x[1], Some(&x[2]));
                    leaky_relu(&mut out, 0.2).unwrap();
                    out
                }),
            );
            let ours = all(Kind::Float, &|x| product(&x[0], &x[1].tr()).unwrap() + &x[2]);
            is_near(ours, all(Kind::Double, &|x| x[0].matmul(&x[1].tr()) + &x[2]));
        }
        let [a, b] = [draw(&[300, 200]), draw(&[300, 200])].map(|x| x.to_kind(Kind::Float));
        assert!(matches!(product(&a, &b), Err(Error::Fatal(_))));
        assert!(matches!(linear(&a, &b.tr(), None), Err(Error::Fatal(_))));
        assert!(matches!(leaky_linear(&a, &b, &a, 0.2), Err(Error::Fatal(_))));
    }

    /// Outputs and gradients of a linear layer, whose input has `groups` groups of rows.
    fn layer(tensors: &[Tensor; 4], slope: f64, groups: u32) -> Vec<Tensor> {
        let [input, weight, bias, grad] = tensors;
        let leaves = [input, weight, bias].map(|x| x.detach().set_requires_grad(true));
        let out = linear_by_groups(&leaves[0], &leaves[1], Some(&leaves[2]), slope, groups).unwrap();
        let of = Tensor::run_backward(&[&(&out * grad).sum(Kind::Float)], &leaves, false, false);
        [out.detach()].into_iter().chain(of).collect()
    }

    fn bits(tensor: &Tensor) -> Vec<u32> {
        Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap().into_iter().map(f32::to_bits).collect()
    }

    /// With sizes that fill no tile, and numbers of groups that fill no tree.
    #[test]
    fn a_small_layer_over_groups_has_the_bits_of_one_for_each_group() {
        assert!(sums_by_groups(1, [1, 1]), "this test needs a processor with AVX2");
        let seed = 7;
        tch::manual_seed(seed);
        let draw = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, tch::Device::Cpu));
        for (rows, inputs, outputs) in [(1, 1, 1), (3, 37, 1), (7, 100, 67), (33, 65, 130)] {
            for (groups, slope) in [(1, 1.0), (2, 0.2), (5, 0.2), (8, 1.0), (13, 0.2)] {
                let (weight, bias) = (draw(&[outputs, inputs]), draw(&[outputs]));
                let [input, grad] = [inputs, outputs].map(|size| draw(&[i64::from(groups) * rows, size]));
                let of_group = |group: u32| {
                    let own = |x: &Tensor| x.narrow(0, i64::from(group) * rows, rows).copy();
                    layer(&[own(&input), weight.copy(), bias.copy(), own(&grad)], slope, 1)
                };
                // Neighbours are added level by level; one without a neighbour goes up as it is.
                let mut nodes: Vec<Vec<Tensor>> = (0..groups).map(of_group).collect();
                let joined =
                    |index: usize| Tensor::cat(&nodes.iter().map(|node| &node[index]).collect::<Vec<_>>(), 0);
                let rows_of = [joined(0), joined(1)];
                while nodes.len() > 1 {
                    let pairs = nodes.chunks(2).map(|pair| match pair {
                        [left, right] => left.iter().zip(right).map(|(a, b)| a + b).collect(),
                        _ => pair[0].iter().map(Tensor::shallow_clone).collect(),
                    });
                    nodes = pairs.collect();
                }
                let wanted: Vec<_> = rows_of.iter().chain(&nodes[0][2..]).map(bits).collect();
                let tensors = [input, weight, bias, grad];
                for narrow in [false, true] {
                    shim::narrow_vectors(narrow);
                    let ours: Vec<_> = layer(&tensors, slope, groups).iter().map(bits).collect();
                    shim::narrow_vectors(false);
                    assert!(
                        ours == wanted,
                        "{groups} groups of {rows} x {inputs} x {outputs}, narrow {narrow}, seed {seed}"
                    );
                }
            }
        }
    }

    /// Of a small layer and of a large one; of a weight that is used once, and twice.
    #[test]
    fn a_gradient_is_written_to_its_place_once() {
        tch::manual_seed(8);
        let draw = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, tch::Device::Cpu));
        for size in [50, 1100] {
            let weight = draw(&[size, size]).set_requires_grad(true);
            let [first, second] = [draw(&[6, size]), draw(&[6, size])];
            let gradient = |inputs: &[&Tensor]| {
                let outs = inputs.iter().map(|x| linear(x, &weight, None).unwrap().sum(Kind::Float));
                let loss: Tensor = outs.sum();
                Tensor::run_backward(&[&loss], &[&weight], false, false).swap_remove(0)
            };
            for inputs in [&[&first][..], &[&first, &second]] {
                let wanted = bits(&gradient(inputs));
                let flat = Tensor::zeros([3, size, size], (Kind::Float, tch::Device::Cpu));
                let mut place = flat.get(1);
                let placed = PlacedGradients::new([(&mut place, &weight)].into_iter()).unwrap();
                let ours = gradient(inputs);
                // A sum of two lies elsewhere, and no further gradient overwrites the first.
                let again = gradient(inputs);
                drop(placed);
                assert_eq!(is_in_place(&place, &ours), inputs.len() == 1);
                assert!(!is_in_place(&place, &again) && !is_in_place(&place, &gradient(inputs)));
                assert_eq!([&ours, &again].map(bits), [&wanted, &wanted].map(Clone::clone));
                copy_all([(&mut place, &ours)].into_iter()).unwrap();
                assert_eq!(bits(&flat.get(1)), wanted);
            }
        }
    }

    /// Every order in which factors may lie, with sizes on both sides of every bound.
    #[test]
    fn a_compiled_graph_multiplies_matrices_of_any_order() {
        let seed = 7;
        tch::manual_seed(seed);
        let draw = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, tch::Device::Cpu));
        let graph_product = |a: &Tensor, b: &Tensor, addend: &Tensor| {
            owned(shim::graph_product(at_tensor(a), at_tensor(b), at_tensor(addend)).unwrap()).unwrap()
        };
        for (rows, inner, columns) in [(1, 1, 1), (3, 37, 5), (100, 70, 130), (300, 20, 300), (9, 1100, 1000)]
        {
            let factors = |shape: [i64; 2]| {
                let turned = draw(&[shape[1], shape[0]]).tr();
                [draw(&shape), turned, draw(&[shape[0], 2 * shape[1]]).slice(1, 0, None, 2)]
            };
            let row = draw(&[columns]);
            let addends =
                [row.view([1, columns]).expand([rows, columns], false), draw(&[rows, columns]), row];
            for (a, b) in factors([rows, inner])
                .iter()
                .flat_map(|a| factors([inner, columns]).map(|b| (a.shallow_clone(), b)))
            {
                let exact = a.to_kind(Kind::Double).matmul(&b.to_kind(Kind::Double));
                let is_near = |ours: &Tensor, addend: Option<&Tensor>| {
                    let exact = addend.map_or(exact.shallow_clone(), |addend| &exact + addend);
                    let apart = (ours.to_kind(Kind::Double) - &exact).abs().max() / exact.abs().max();
                    assert!(apart.double_value(&[]) < 1e-5, "{rows} x {inner} x {columns}, seed {seed}");
                };
                is_near(&graph_product(&a, &b, &Tensor::new()), None);
                for addend in &addends {
                    is_near(&graph_product(&a, &b, addend), Some(addend));
                }
            }
        }
        // A small layer's bits are those that a job without a package has.
        let [input, weight, bias] = [draw(&[16, 100]), draw(&[67, 100]), draw(&[67])];
        let ours = linear(&input, &weight, Some(&bias)).unwrap();
        assert_eq!(bits(&graph_product(&input, &weight.tr(), &bias)), bits(&ours));
    }

    #[test]
    fn only_small_layers_of_single_precision_take_groups() {
        assert!(sums_by_groups(256, [1024, 1024]));
        assert!(
            !sums_by_groups(257, [1, 1]) && !sums_by_groups(1, [1025, 1024]) && !sums_by_groups(0, [1, 1])
        );
        let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, tch::Device::Cpu));
        let refused = |input: Tensor, weight: Tensor, groups| {
            matches!(linear_by_groups(&input, &weight, None, 1.0, groups), Err(Error::Fatal(_)))
        };
        assert!(refused(ones(&[4, 2048]), ones(&[1024, 2048]), 2), "many weights");
        assert!(refused(ones(&[600, 3]), ones(&[2, 3]), 2), "many rows");
        assert!(refused(ones(&[4, 3]), ones(&[2, 3]), 3), "groups that differ");
        assert!(refused(ones(&[4, 3]), ones(&[2, 3]), 0), "no group");
        let double = |x: Tensor| x.to_kind(Kind::Double);
        assert!(refused(double(ones(&[4, 3])), double(ones(&[2, 3])), 2), "double precision");
        // A gradient penalty's.
        let [input, weight] = [ones(&[4, 3]), ones(&[2, 3])].map(|x| x.set_requires_grad(true));
        let out = linear_by_groups(&input, &weight, None, 1.0, 2).unwrap().sum(Kind::Float);
        assert!(Tensor::f_run_backward(&[&out], &[&input], true, true).is_err());
    }

    #[test]
    fn a_sum_of_weighted_words_tells_tensors_apart() {
        let values: Vec<f32> = (0..3000_u16).map(|i| f32::from(i).sin()).collect();
        let of = |values: &[f32]| fingerprint_of_sum(&Tensor::from_slice(values), 1).unwrap();
        let known = of(&values);
        assert_eq!(known, of(&values));
        assert_ne!(known, fingerprint_of_sum(&Tensor::from_slice(&values), 2).unwrap());
        assert_ne!(known, of(&values[1..]));
        for (at, bit) in [(0, 0), (1, 31), (1499, 22), (2999, 7)] {
            let mut other = values.clone();
            other[at] = f32::from_bits(other[at].to_bits() ^ (1 << bit));
            assert_ne!(known, of(&other), "bit {bit} of number {at}");
        }
        let mut swapped = values.clone();
        swapped.swap(3, 4);
        assert_ne!(known, of(&swapped));
        assert_ne!(of(&[0.0]), of(&[-0.0]));
        assert_ne!(of(&[f32::NAN, 1.0]), of(&[1.0, f32::NAN]));
    }

    /// The sum wraps and is the same in any order, so it is the same on any device.
    #[test]
    fn a_weighted_sum_is_the_one_that_integers_give() {
        let mix = |i: i64| {
            let mut z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15_u64.cast_signed());
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9_u64.cast_signed());
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb_u64.cast_signed());
            (z ^ (z >> 31)) | 1
        };
        // Of one piece, and of two.
        for count in [5000, (1 << 23) + 5] {
            let words: Vec<i32> = (1..=count).map(|i: i32| i.wrapping_mul(0x2545_f491)).collect();
            let terms = (1..).zip(&words).map(|(i, word)| mix(i).wrapping_mul(i64::from(*word)));
            let sum = terms.fold(0_i64, i64::wrapping_add).cast_unsigned();
            assert_eq!(shim::weighted_sum(at_tensor(&Tensor::from_slice(&words))).unwrap(), sum);
        }
    }
}
