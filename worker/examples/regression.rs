//! An objective of one's own: linear regression, trained by the engine that trains GANs.
//!
//! It predicts the brightness of an image's lower half from the pixels of its upper half. The program is a
//! worker like any other:
//!
//!     coordinator --workers 0                                        # prints the URL for workers
//!     cargo run --release --example regression -- --coordinator URL
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Arc;

use c10d::aten::Adam;
use ganglion_proto::dial::Credentials;
use ganglion_proto::trace::Trace;
use ganglion_worker::commands::join::run;
use ganglion_worker::device::DeviceChoice;
use ganglion_worker::nn::{Init, TensorSpec};
use ganglion_worker::objective::{
    Compute, NamedNetwork, NetworkId, Objective, Optimizer, Phase, Reads, ScalarRole, ScalarSpec, ShardAt,
    ShardBatch, ShardGrad, State,
};
use tch::{Kind, Tensor, no_grad};

/// Pixels of half a digit.
const INPUTS: i64 = 14 * 28;

/// The only network.
const LINE: NetworkId = NetworkId(0);

struct Regression;

impl Objective for Regression {
    fn networks(&self) -> Vec<NamedNetwork> {
        let weight = TensorSpec::parameter("weight".into(), &[INPUTS, 1], Init::Uniform { bound: 0.05 });
        let bias = TensorSpec::parameter("bias".into(), &[1], Init::Constant(0.0));
        let parameters = vec![weight, bias];
        vec![NamedNetwork { name: "line".into(), parameters, buffers: Vec::new(), average: None }]
    }

    fn phases(&self) -> Vec<Phase> {
        vec![Phase::of(0, LINE, Reads::Next)]
    }

    fn scalars(&self, _phase: Phase) -> Vec<ScalarSpec> {
        vec![ScalarSpec::new("loss", ScalarRole::Loss)]
    }

    fn begin(&self) -> Box<dyn Compute + '_> {
        Box::new(Regression)
    }

    fn optimizer(&self, _phase: Phase, _steps: u64) -> Optimizer {
        Adam { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }.into()
    }

    fn probe(&self, _shard_batch: u32) -> Box<dyn Objective> {
        Box::new(Regression)
    }
}

impl Compute for Regression {
    fn gradient(
        &mut self,
        _: ShardAt,
        state: &State,
        batch: Option<&ShardBatch>,
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        let images = batch.expect("the phase reads samples").images().flatten(1, -1);
        let [upper, lower] = [0, INPUTS].map(|start| images.narrow(1, start, INPUTS));
        let parameters = state.trainable(LINE);
        let found = upper.matmul(&parameters[0]) + &parameters[1];
        let wanted = lower.mean_dim([1i64].as_slice(), true, Kind::Float);
        let loss = (found - wanted).square().sum(Kind::Float);
        let gradients = Tensor::f_run_backward(&[&loss], parameters, false, false)?;
        no_grad(|| {
            out.gradients.iter_mut().zip(&gradients).for_each(|(place, gradient)| place.copy_(gradient));
            out.scalars[0].copy_(&loss);
        });
        Ok(())
    }
}

/// Joins the run at the URL that the command line gives.
pub(crate) fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, option, url] = arguments.as_slice() else { return ExitCode::from(2) };
    if option != "--coordinator" {
        return ExitCode::from(2);
    }
    let make = |_: &_, _: &_, _| Ok(Arc::new(Regression) as Arc<dyn Objective>);
    match run(url, Credentials::default(), DeviceChoice::Cpu, &make, &Trace::off()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}
