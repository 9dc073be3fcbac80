//! ATen functions compared with plain computations; none panics.
#![allow(clippy::unwrap_used)] // a test may panic

use c10d::Error;
use std::ops::Range;

use c10d::aten::{self, Adam, Sgd, Step};
use tch::{Device, Kind, Tensor};

const ADAM: Adam = Adam { lr: 2e-4, beta1: 0.5, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
const SGD: Sgd = Sgd { lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 0.05 };

/// Parameters and both moments.
struct Flat([Tensor; 3]);

impl Flat {
    fn new(length: usize) -> Flat {
        let values: Vec<f32> = (0..length).map(|i| (i as f32 * 0.37).sin()).collect();
        let zeros = || Tensor::zeros([values.len() as i64], (Kind::Float, Device::Cpu));
        Flat([Tensor::from_slice(&values), zeros(), zeros()])
    }

    fn step(&mut self, grads: &Tensor, step: u64) {
        let [params, exp_avg, exp_avg_sq] = &mut self.0;
        aten::fused_adam(Step::whole(params, grads), [exp_avg, exp_avg_sq], step, ADAM).unwrap();
    }

    /// A step of SGD of some elements, with the first moment as its momentum.
    fn descend(&mut self, grads: &Tensor, ranges: Option<&[Range<usize>]>) {
        let [params, momentum, _] = &mut self.0;
        let step = Step { ranges, ..Step::whole(params, grads) };
        aten::fused_sgd(step, Some(momentum), SGD).unwrap();
    }

    fn bits(&self) -> Vec<u32> {
        self.0.iter().flat_map(|tensor| Vec::<f32>::try_from(tensor).unwrap()).map(f32::to_bits).collect()
    }
}

fn grads(length: usize, step: u64) -> Vec<f32> {
    (0..length).map(|i| ((i as f32 + 1.0) * step as f32 * 0.11).cos()).collect()
}

/// Kingma and Ba, algorithm 1, in double precision.
fn reference(param: f64, grads: impl Iterator<Item = f64>) -> f64 {
    let (mut param, mut m, mut v) = (param, 0.0, 0.0);
    for (step, grad) in (1..).zip(grads) {
        m = ADAM.beta1 * m + (1.0 - ADAM.beta1) * grad;
        v = ADAM.beta2 * v + (1.0 - ADAM.beta2) * grad * grad;
        let (m_hat, v_hat) = (m / (1.0 - ADAM.beta1.powi(step)), v / (1.0 - ADAM.beta2.powi(step)));
        param -= ADAM.lr * m_hat / (v_hat.sqrt() + ADAM.eps);
    }
    param
}

#[test]
fn fused_adam_is_adam() {
    let length = 1003;
    let mut flat = Flat::new(length);
    let start = Vec::<f32>::try_from(&flat.0[0]).unwrap();
    (1..=10).for_each(|step| flat.step(&Tensor::from_slice(&grads(length, step)), step));
    let end = Vec::<f32>::try_from(&flat.0[0]).unwrap();
    for i in 0..length {
        let wanted = reference(f64::from(start[i]), (1..=10).map(|step| f64::from(grads(length, step)[i])));
        assert!((f64::from(end[i]) - wanted).abs() < 1e-6, "{i}: {} and {wanted}", end[i]);
    }
}

/// Parameters, and the gradient of each step.
fn course() -> (Vec<f32>, impl Fn(u64) -> Vec<f32>) {
    #[allow(clippy::cast_possible_truncation)] // rounded
    let values = |of: f64| (0..8).map(|i| (f64::from(i) * 0.7 + of).sin() as f32).collect::<Vec<_>>();
    (values(0.5), move |step| values(step as f64 * 1.3))
}

/// The parameters after 20 steps of `update`, of elements 0 to 3 with weight decay and 4 to 7 without.
fn after_20(mut update: impl FnMut(Step<'_>, [&mut Tensor; 2], u64, f64)) -> Vec<f32> {
    let (start, grads) = course();
    let (mut params, zeros) = (Tensor::from_slice(&start), || Tensor::zeros([8], (Kind::Float, Device::Cpu)));
    let [mut first, mut second] = [zeros(), zeros()];
    for count in 1..=20 {
        let grads = Tensor::from_slice(&grads(count));
        for (ranges, decay) in [([0..2, 2..4], 0.1), ([4..7, 7..8], 0.0)] {
            let step = Step { ranges: Some(&ranges), ..Step::whole(&mut params, &grads) };
            update(step, [&mut first, &mut second], count, decay);
        }
    }
    Vec::<f32>::try_from(params).unwrap()
}

#[track_caller]
fn close(found: &[f32], wanted: &[f64]) {
    assert_eq!(found.len(), wanted.len());
    for (found, wanted) in found.iter().zip(wanted) {
        assert!((f64::from(*found) - wanted).abs() < 2e-6, "{found} and {wanted}");
    }
}

const ADAMW: [f64; 8] = [
    0.442868342,
    0.900212017,
    0.932370054,
    0.540011191,
    -0.125641981,
    -0.735599596,
    -0.995762838,
    -0.784773553,
];
const PLAIN: [f64; 8] = [
    0.463917613,
    0.906821546,
    0.923233155,
    0.505433786,
    -0.15305383,
    -0.749917202,
    -0.994082756,
    -0.770715721,
];
const MOMENTUM: [f64; 8] = [
    0.374315944,
    0.808950527,
    0.863123053,
    0.511355319,
    -0.094644365,
    -0.720971383,
    -1.00821425,
    -0.821278262,
];
const NESTEROV: [f64; 8] = [
    0.370902949,
    0.797490982,
    0.849006562,
    0.501221088,
    -0.096262638,
    -0.717669197,
    -1.001544675,
    -0.814378103,
];

/// Figures of PyTorch 2.11's `torch.optim.AdamW` and `SGD`, computed there in double precision.
#[test]
fn adam_with_decay_and_sgd_are_those_of_pytorch() {
    let adam = Adam { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0 };
    close(
        &after_20(|step, moments, count, weight_decay| {
            aten::fused_adam(step, moments, count, Adam { weight_decay, ..adam }).unwrap();
        }),
        &ADAMW,
    );
    for (momentum, nesterov, wanted) in [(0.0, false, PLAIN), (0.9, false, MOMENTUM), (0.9, true, NESTEROV)] {
        close(
            &after_20(|step, [first, _], _, weight_decay| {
                let sgd = Sgd { lr: 0.01, momentum, nesterov, weight_decay };
                aten::fused_sgd(step, (momentum != 0.0).then_some(first), sgd).unwrap();
            }),
            &wanted,
        );
    }
}

/// A step by a divided gradient is that by the quotient, and leaves the quotient behind.
#[test]
fn a_gradient_is_divided_before_the_step() {
    let (start, grads) = course();
    let zeros = || Tensor::zeros([8], (Kind::Float, Device::Cpu));
    let run = |divisor: Option<f32>, grads: &Tensor, by_adam: bool| {
        let (mut params, mut first, mut second) = (Tensor::from_slice(&start), zeros(), zeros());
        let step = Step { divisor, ..Step::whole(&mut params, grads) };
        match by_adam {
            true => aten::fused_adam(step, [&mut first, &mut second], 1, ADAM).unwrap(),
            false => aten::fused_sgd(step, Some(&mut first), SGD).unwrap(),
        }
        Vec::<f32>::try_from(params).unwrap()
    };
    for by_adam in [true, false] {
        let (whole, quotient) = (Tensor::from_slice(&grads(1)), Tensor::from_slice(&grads(1)) / 3.0);
        assert_eq!(run(Some(3.0), &whole, by_adam), run(None, &quotient, by_adam));
        assert_eq!(Vec::<f32>::try_from(whole).unwrap(), Vec::<f32>::try_from(quotient).unwrap());
    }
}

/// The module's invariant 2.
#[test]
fn a_fused_step_does_not_depend_on_cuts_at_multiples_of_16() {
    let length = 16 * 5000;
    let cuts = [0, 16, 48, 16 * 77, 16 * 78, 16 * 3001, length];
    let ranges: Vec<_> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
    let (mut whole, cut) = (Flat::new(length), Flat::new(length));
    let (mut whole_sgd, mut cut_sgd) = (Flat::new(length), Flat::new(length));
    for step in 1..=3 {
        let grads = Tensor::from_slice(&grads(length, step));
        whole.step(&grads, step);
        for range in &ranges {
            let part = |tensor: &Tensor| tensor.narrow(0, range.start as i64, range.len() as i64);
            Flat([0, 1, 2].map(|i| part(&cut.0[i]))).step(&part(&grads), step);
        }
        whole_sgd.descend(&grads, None);
        cut_sgd.descend(&grads, Some(&ranges));
    }
    assert!(whole.bits() == cut.bits());
    assert!(whole_sgd.bits() == cut_sgd.bits());
}

/// The module's invariant 3.
#[test]
fn a_norm_is_that_of_a_plain_sum_in_double_precision() {
    for length in [0, 1, 15, 16, 17, 1003, 16 * 5000] {
        let values = grads(length, 3);
        let plain = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        let tensor = Tensor::from_slice(&values);
        let norm = aten::norm(&tensor).unwrap();
        assert!((norm - plain).abs() <= 1e-12 * plain, "{length}: {norm} and {plain}");
        let threads = tch::get_num_threads();
        tch::set_num_threads(3);
        assert_eq!(norm.to_bits(), aten::norm(&tensor).unwrap().to_bits());
        tch::set_num_threads(threads);
    }
    // Of another kind and other strides, as on another device.
    let columns = Tensor::from_slice(&grads(1000, 3)).view([100, 10]).select(1, 3);
    let (there, here) = (aten::norm(&columns).unwrap(), aten::norm(&columns.contiguous()).unwrap());
    assert!((there - here).abs() < 1e-12 * here);
    // Neither overflow nor underflow of floats.
    for value in [f32::MAX, f32::from_bits(1)] {
        assert_eq!(aten::norm(&Tensor::from_slice(&[value; 4])).unwrap(), 2.0 * f64::from(value));
    }
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(!aten::norm(&Tensor::from_slice(&[1.0, value, 2.0])).unwrap().is_finite());
    }
    assert!(matches!(aten::norm(&Tensor::from_slice(&[1_i64])), Err(Error::Fatal(_))));
}

/// The module's invariant 1.
#[test]
fn mistakes_become_errors() {
    let of = |length: i64| Tensor::zeros([length], (Kind::Float, Device::Cpu));
    let fatal = |result| matches!(result, Err(Error::Fatal(detail)) if !detail.contains('\n'));
    let adam = |params: &mut Tensor, grads: &Tensor, count: u64| {
        let (mut first, mut second) = (params.zeros_like(), params.zeros_like());
        aten::fused_adam(Step::whole(params, grads), [&mut first, &mut second], count, ADAM)
    };
    assert!(matches!(adam(&mut of(3), &of(3), 0), Err(Error::Invalid(_))));
    assert!(matches!(adam(&mut of(3), &of(4), 1), Err(Error::Invalid(_))));
    let whole = || Tensor::zeros([3], (Kind::Int, Device::Cpu));
    assert!(fatal(adam(&mut whole(), &whole(), 1)));
    let sgd = |ranges: [Range<usize>; 2], momentum: Option<&mut Tensor>| {
        let (mut params, grads) = (of(3), of(3));
        let step = Step { ranges: Some(&ranges), ..Step::whole(&mut params, &grads) };
        aten::fused_sgd(step, momentum, SGD)
    };
    assert!(sgd([0..1, 2..3], Some(&mut of(3))).is_ok());
    assert!(matches!(sgd([0..1, 1..4], Some(&mut of(3))), Err(Error::Invalid(_))));
    assert!(matches!(sgd([0..1, 2..3], None), Err(Error::Invalid(_))));
    assert!(matches!(sgd([0..1, 2..3], Some(&mut of(4))), Err(Error::Invalid(_))));
}

#[test]
fn the_default_generator_moves_only_when_drawn_from() {
    let before = aten::default_generator_state().unwrap();
    assert_eq!(before, aten::default_generator_state().unwrap());
    drop(Tensor::randn([1], (Kind::Float, Device::Cpu)));
    assert_ne!(before, aten::default_generator_state().unwrap());
}

#[test]
fn libtorch_says_what_it_is() {
    assert_eq!(aten::libtorch_version().unwrap(), "2.11.0");
    assert!(!aten::cpu_capability().unwrap().is_empty());
    aten::set_deterministic(true).unwrap();
    aten::set_deterministic(false).unwrap();
}

/// Every element counts, at any place; numbers at the limits are finite.
#[test]
fn one_infinity_or_nan_anywhere_is_found() {
    let quiet_nan_of_another_payload = f32::from_bits(0xffc0_1234);
    let signalling_nan = f32::from_bits(0x7f80_0001);
    let odd = [f32::NAN, quiet_nan_of_another_payload, signalling_nan, f32::INFINITY, f32::NEG_INFINITY];
    let numbers = [0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, f32::from_bits(1), -f32::from_bits(1)];
    for length in [1, 2, 3, 15, 16, 17, 63, 64, 65, 1003] {
        let clean: Vec<f32> = numbers.iter().copied().cycle().take(length).collect();
        assert!(aten::all_finite(&Tensor::from_slice(&clean)).unwrap(), "{length} numbers");
        for at in [0, length / 2, length - 1] {
            for value in odd {
                let mut dirty = clean.clone();
                dirty[at] = value;
                let found = !aten::all_finite(&Tensor::from_slice(&dirty)).unwrap();
                assert!(found, "{value} ({:#x}) at {at} of {length}", value.to_bits());
            }
        }
    }
    assert!(aten::all_finite(&Tensor::zeros([0], (Kind::Float, Device::Cpu))).unwrap());
}

/// A view is judged by its own elements, from any offset, and other kinds and strides take the other path.
#[test]
fn only_the_elements_of_a_view_are_judged() {
    let values = Tensor::from_slice(&[f32::NAN, 1.0, 2.0, 3.0, f32::INFINITY, 4.0]);
    assert!(aten::all_finite(&values.narrow(0, 1, 3)).unwrap());
    assert!(!aten::all_finite(&values.narrow(0, 1, 4)).unwrap());
    let columns = values.view([2, 3]);
    assert!(aten::all_finite(&columns.select(1, 2)).unwrap());
    assert!(!aten::all_finite(&columns.select(1, 1)).unwrap());
    assert!(aten::all_finite(&Tensor::from_slice(&[f64::MAX])).unwrap());
    assert!(!aten::all_finite(&Tensor::from_slice(&[1.0, f64::NAN])).unwrap());
    let parameter = values.narrow(0, 1, 3).set_requires_grad(true);
    assert!(aten::all_finite(&parameter).unwrap());
    assert!(matches!(aten::all_finite(&Tensor::from_slice(&[1_i64])), Err(Error::Fatal(_))));
}

/// Cost of the check. Run with `--ignored --nocapture`.
#[test]
#[ignore = "prints a time"]
fn the_time_of_a_check() {
    let tensor = Tensor::ones([500_000], (Kind::Float, Device::Cpu));
    let mut times: Vec<_> = (0..1000)
        .map(|_| {
            let start = std::time::Instant::now();
            assert!(aten::all_finite(&tensor).unwrap());
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("500,000 floats: median {:?}, fastest {:?}", times[500], times[0]);
}
