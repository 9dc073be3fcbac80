//! ATen functions compared with plain computations; none panics.
#![allow(clippy::unwrap_used)] // a test may panic

use c10d::Error;
use c10d::aten::{self, Adam};
use tch::{Device, Kind, Tensor};

const ADAM: Adam = Adam { lr: 2e-4, beta1: 0.5, beta2: 0.999, eps: 1e-8 };

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
        aten::fused_adam(params, grads, [exp_avg, exp_avg_sq], step, ADAM).unwrap();
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

/// The module's invariant 2.
#[test]
fn fused_adam_does_not_depend_on_cuts_at_multiples_of_16() {
    let length = 16 * 5000;
    let cuts = [0, 16, 48, 16 * 77, 16 * 78, 16 * 3001, length];
    let (mut whole, cut) = (Flat::new(length), Flat::new(length));
    for step in 1..=3 {
        let grads = Tensor::from_slice(&grads(length, step));
        whole.step(&grads, step);
        for range in cuts.windows(2) {
            let part = |tensor: &Tensor| tensor.narrow(0, range[0] as i64, (range[1] - range[0]) as i64);
            Flat([0, 1, 2].map(|i| part(&cut.0[i]))).step(&part(&grads), step);
        }
    }
    assert!(whole.bits() == cut.bits());
}

/// The module's invariant 1.
#[test]
fn mistakes_become_errors() {
    let of = |length: i64| Tensor::zeros([length], (Kind::Float, Device::Cpu));
    let fatal = |result| matches!(result, Err(Error::Fatal(detail)) if !detail.contains('\n'));
    let zero = aten::fused_adam(&mut of(3), &of(3), [&mut of(3), &mut of(3)], 0, ADAM);
    assert!(matches!(zero, Err(Error::Invalid(_))));
    let ragged = aten::fused_adam(&mut of(3), &of(4), [&mut of(3), &mut of(3)], 1, ADAM);
    assert!(matches!(ragged, Err(Error::Invalid(_))));
    let whole = || Tensor::zeros([3], (Kind::Int, Device::Cpu));
    assert!(fatal(aten::fused_adam(&mut whole(), &whole(), [&mut whole(), &mut whole()], 1, ADAM)));
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
