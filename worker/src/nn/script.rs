//! Networks written by users in Python, as TorchScript.
//!
//! 1. Training begins with the parameters and buffers of the file.
//! 2. A pass begins with the buffers it is given; its buffer updates are the changes that the module made
//!    to each, so that one it leaves alone keeps its bits. A second pass of the same shard gradient begins
//!    where the first one ended, as in PyTorch.
//! 3. The module's random draws are seeded by the pass's key.
//! 4. Integers among the buffers (`num_batches_tracked`) are no part of the state: a module whose result
//!    depends on how often it ran is refused.

use std::fmt;
use std::path::Path;

use c10d::script::{Mode as ScriptMode, Script, ScriptTensor};
use tch::{Device, Kind, Tensor, no_grad};

use super::broken::{BrokenModule, Watchdog};
use super::{Constant, Init, Mode, Network, Pass, TensorSpec};
use crate::data::ImageShape;
use crate::nn::module_file;
use crate::nn::tensor_bytes::to_bytes;

/// Role of a network in a GAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Noise to images of this shape.
    Generator { latent_dim: i64, shape: ImageShape },
    /// Images of this shape to logits.
    Discriminator { shape: ImageShape },
}

/// A TorchScript module that can be trained.
pub struct ScriptNetwork {
    script: Script,
    /// Path of the module's file, for error messages.
    file: String,
    role: Role,
    /// Whether the module takes noise as (n, latent_dim, 1, 1).
    as_maps: bool,
    /// Integer buffers, in the order of the module's tensors.
    constants: Vec<Constant>,
    parameters: Vec<TensorSpec>,
    buffers: Vec<TensorSpec>,
}

/// Number of samples that a module is checked with.
const PROBED: i64 = 2;

/// Reason why a module cannot be trained, and how to fix it.
type Refusal = String;

impl ScriptNetwork {
    /// Loads the generator in a file.
    pub fn generator(path: &Path, latent_dim: i64, shape: ImageShape) -> Result<ScriptNetwork, Refusal> {
        ScriptNetwork::open(path, Role::Generator { latent_dim, shape })
    }

    /// Loads the discriminator in a file.
    pub fn discriminator(path: &Path, shape: ImageShape) -> Result<ScriptNetwork, Refusal> {
        let network = ScriptNetwork::open(path, Role::Discriminator { shape })?;
        // Only a hint: a program that hides its sigmoid is not found out, and trains badly.
        if network.script.last_operation().is_ok_and(|operation| operation == "sigmoid") {
            let path = path.display();
            return Err(format!(
                "{path} ends in a sigmoid, and the losses expect its input (logits): remove the sigmoid"
            ));
        }
        Ok(network)
    }

    fn open(path: &Path, role: Role) -> Result<ScriptNetwork, Refusal> {
        let said = |what: String| format!("{}: {what}", path.display());
        // Before libtorch reads the file, which trusts the lengths in it.
        let bytes = module_file::read(path).map_err(said)?;
        let script = Script::load(&bytes).map_err(|error| {
            said(format!(
                "cannot be loaded as TorchScript; write it with torch.jit.script(module).save(...): {error}"
            ))
        })?;
        let file = path.display().to_string();
        // From here on the module's own program runs, which may not end.
        let _watchdog = Watchdog::over(&file);
        ScriptNetwork::new(script, file, role).map_err(said)
    }

    fn new(script: Script, file: String, role: Role) -> Result<ScriptNetwork, Refusal> {
        let mut network = ScriptNetwork {
            script,
            file,
            role,
            as_maps: false,
            constants: Vec::new(),
            parameters: Vec::new(),
            buffers: Vec::new(),
        };
        network.take_tensors()?;
        network.probe()?;
        Ok(network)
    }

    /// Sorts the module's tensors into parameters, buffers and constants, or names one that cannot be
    /// trained.
    fn take_tensors(&mut self) -> Result<(), Refusal> {
        let tensors = self.script.tensors();
        // A frozen module has its weights as constants of its graph, which nothing can train.
        if !tensors.iter().any(|tensor| tensor.is_parameter) {
            return Err(
                "has no parameters to train; if it was frozen, save it without torch.jit.freeze".to_string()
            );
        }
        for (index, tensor) in tensors.iter().enumerate() {
            let name = &tensor.name;
            // The state has a place for each name; one tensor under two would be updated twice.
            if let Some(other) = tensors[..index].iter().find(|other| other.is_same(tensor)) {
                return Err(format!(
                    "{} and {name} share one tensor, which is not supported; give each a tensor of its own",
                    other.name
                ));
            }
            let value = self.script.tensor(index).map_err(|error| error.to_string())?;
            match (tensor.kind.as_str(), tensor.is_parameter) {
                ("Float", true) if !tensor.is_trained => {
                    return Err(format!("{name} has requires_grad = False; register it as a buffer"));
                }
                ("Float", true) => {
                    self.parameters.push(TensorSpec::parameter(name.clone(), &tensor.shape, given(&value)));
                }
                ("Float", false) => {
                    self.buffers.push(TensorSpec::moved(name.clone(), &tensor.shape, given(&value)));
                }
                // Counters such as `num_batches_tracked`: kept for the file's sake, and no part of the
                // state (invariant 4).
                ("Long", false) => {
                    let values = value.detach().contiguous().view(-1);
                    let values = Vec::try_from(values).map_err(|error: tch::TchError| error.to_string())?;
                    let (name, shape) = (name.clone(), tensor.shape.clone());
                    self.constants.push(Constant { name, shape, values });
                }
                // The state is one buffer of f32.
                (kind, _) => {
                    return Err(format!(
                        "{name} has numbers of type {kind}; only 32-bit floats are supported: convert the module with .float()"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Runs the module on dummy inputs, in all the ways in which training will.
    fn probe(&mut self) -> Result<(), Refusal> {
        let values = self.script.tensors().len();
        let own: Result<Vec<Tensor>, _> = (0..values).map(|index| self.script.tensor(index)).collect();
        let own: Vec<Tensor> =
            // Copies, as a check must not change the values that training begins with.
            own.map_err(|error| error.to_string())?.iter().map(|t| t.detach().copy()).collect();
        let input = match self.role {
            Role::Generator { latent_dim, .. } => {
                Tensor::ones([PROBED, latent_dim], (Kind::Float, Device::Cpu))
            }
            Role::Discriminator { shape } => {
                // A value that an image has: the module may normalise its input.
                Tensor::ones(sizes(PROBED, shape), (Kind::Float, Device::Cpu)) * 0.5
            }
        };
        // Noise comes flat in most generators, and as maps of one pixel in DCGAN's.
        let first = self.evaluate(&own, &input);
        if let (Err(first), Role::Generator { latent_dim, .. }) = (&first, self.role) {
            self.as_maps = true;
            if let Err(second) = self.evaluate(&own, &input) {
                return Err(format!(
                    "fails with noise of shape (n, {latent_dim}): {first}; and of shape (n, {latent_dim}, 1, 1): {second}; set \
                     model.latent_dim to the length of its noise"
                ));
            }
        } else {
            drop(first?);
        }
        self.check_evaluation(&own, &input)?;
        self.check_training(&own, &input)
    }

    fn evaluate(&self, own: &[Tensor], input: &Tensor) -> Result<Tensor, Refusal> {
        let run = || self.script.run(own.iter(), &self.shaped(input), ScriptMode::Evaluation);
        let (output, _) = no_grad(run).map_err(|error| error.to_string())?;
        self.check_output(&output, PROBED)?;
        Ok(output)
    }

    /// Checks the kind and shape of an output for `samples` samples.
    fn check_output(&self, output: &Tensor, samples: i64) -> Result<(), Refusal> {
        let found = output.size();
        if output.kind() != Kind::Float {
            return Err(format!(
                "its output has numbers of type {:?}, expected 32-bit floats",
                output.kind()
            ));
        }
        match self.role {
            Role::Generator { shape, .. } if found != sizes(samples, shape) => Err(format!(
                "its output for {samples} samples has the shape {found:?}, and the data has images of {shape}; both must be (n, channels, height, width)"
            )),
            Role::Discriminator { .. } if found.iter().product::<i64>() != samples => Err(format!(
                "its output for {samples} images has the shape {found:?}; it must make one number of each"
            )),
            _ => Ok(()),
        }
    }

    /// Checks that the module neither draws nor changes in evaluation: sample grids and metrics are
    /// functions of the state.
    fn check_evaluation(&self, own: &[Tensor], input: &Tensor) -> Result<(), Refusal> {
        let before: Vec<Vec<u8>> = own.iter().map(whole_bytes).collect();
        let draws = Script::draws(|| {
            no_grad(|| self.script.run(own.iter(), &self.shaped(input), ScriptMode::Evaluation)).map(drop)
        });
        let traced = "save it with torch.jit.script, and not with torch.jit.trace, which fixes training or evaluation mode for ever";
        if draws.map_err(|error| error.to_string())? {
            return Err(format!("draws random numbers in evaluation mode; {traced}"));
        }
        // By bytes: a NaN in a buffer equals itself.
        if own.iter().map(whole_bytes).ne(before) {
            return Err(format!("changes its buffers in evaluation mode; {traced}"));
        }
        Ok(())
    }

    /// Checks that a training pass reaches all parameters and does not depend on how often the module ran.
    fn check_training(&self, own: &[Tensor], input: &Tensor) -> Result<(), Refusal> {
        let wrong = |error: c10d::Error| format!("in training mode: {error}");
        let leaves = |own: &[Tensor]| -> Vec<Tensor> {
            let pairs = own.iter().zip(self.script.tensors());
            // Leaves of their own, as a run of training has them.
            pairs.map(|(tensor, about)| tensor.copy().set_requires_grad(about.is_trained)).collect()
        };
        let train = |tensors: &[Tensor]| {
            self.script.run(tensors.iter(), &self.shaped(input), ScriptMode::Training { seed: 1 })
        };
        let tensors = leaves(own);
        let (output, after) = train(&tensors).map_err(wrong)?;
        self.check_output(&output, PROBED).map_err(|what| format!("in training mode: {what}"))?;
        let trained: Vec<&Tensor> = tensors
            .iter()
            .zip(self.script.tensors())
            .filter(|(_, about)| about.is_trained)
            .map(|(t, _)| t)
            .collect();
        let sum = output.sum(Kind::Float);
        // Fails if a trained parameter is not reached: it would never move, which its author cannot
        // mean.
        Tensor::f_run_backward(&[&sum], &trained, false, false)
            .map_err(|error| wrong(c10d::Error::from(error)))?;
        // The second run begins with the integers as the first run left them.
        let mut again = leaves(own);
        let buffers = self.script.tensors().iter().enumerate().filter(|(_, about)| !about.is_parameter);
        for ((index, _), after) in buffers.zip(&after) {
            if after.kind() == Kind::Int64 {
                again[index] = after.copy();
            }
        }
        // With the same seed: what differs now can only come from the counters.
        let (second, after_second) = train(&again).map_err(wrong)?;
        let floats = |all: &[Tensor]| -> Vec<Vec<u8>> {
            all.iter().filter(|tensor| tensor.kind() == Kind::Float).map(whole_bytes).collect()
        };
        if whole_bytes(&second) != whole_bytes(&output) || floats(&after_second) != floats(&after) {
            return Err(
                "its result depends on how often it ran, as with BatchNorm(momentum=None), which is not \
                        supported; set a momentum"
                    .to_string(),
            );
        }
        Ok(())
    }

    /// Returns an input in the shape that the module takes.
    fn shaped(&self, input: &Tensor) -> Tensor {
        if self.as_maps { input.unsqueeze(-1).unsqueeze(-1) } else { input.shallow_clone() }
    }

    /// Returns a tensor for each of the module's, from a pass's parameters and copies of its buffers.
    fn bound(&self, pass: &Pass<'_>) -> Vec<Tensor> {
        let (mut parameters, mut buffers) = (pass.parameters.iter(), pass.buffers.iter());
        let device = pass.parameters.first().map_or(Device::Cpu, Tensor::device);
        let value = |constant: &Constant| {
            Tensor::from_slice(&constant.values).view(constant.shape.as_slice()).to_device(device)
        };
        let mut constants = self.constants.iter().map(value);
        let tensor = |about: &ScriptTensor| {
            let next = match (about.is_parameter, about.kind.as_str()) {
                (true, _) => parameters.next().map(Tensor::shallow_clone),
                // A copy: in training the module writes into its buffers (D1).
                (false, "Float") => buffers.next().map(Tensor::copy),
                _ => constants.next(),
            };
            next.expect("a pass has the tensors that the network asked for")
        };
        self.script.tensors().iter().map(tensor).collect()
    }
}

impl Network for ScriptNetwork {
    fn parameters(&self) -> Vec<TensorSpec> {
        self.parameters.clone()
    }

    fn buffers(&self) -> Vec<TensorSpec> {
        self.buffers.clone()
    }

    /// Always true: a module's dependence on the batch cannot be seen from outside.
    fn sees_batch(&self) -> bool {
        true
    }

    fn forward(&self, input: &Tensor, pass: &mut Pass<'_>) -> Tensor {
        let tensors = no_grad(|| self.bound(pass));
        let mode = match pass.mode {
            // A key of its own for each pass: dropout of a shard depends on neither rank nor order (D2).
            Mode::Batch => ScriptMode::Training { seed: pass.key.number() },
            Mode::Running => ScriptMode::Evaluation,
        };
        let broken = |detail: String| -> ! {
            let phase = if pass.mode == Mode::Batch { "in training" } else { "in evaluation" };
            BrokenModule { module: self.file.clone(), phase, detail }.raise()
        };
        // Not bounded: the check of the module has shown that it ends, and late members are found out
        // (M8).
        let run = self.script.run(tensors.iter(), &self.shaped(input), mode);
        let (output, after) = run.unwrap_or_else(|error| broken(error.to_string()));
        self.check_output(&output, input.size()[0]).unwrap_or_else(|what| broken(what));
        if pass.mode == Mode::Batch {
            // The integers of the module are not in the state, so they have no update.
            let after = after.iter().filter(|tensor| tensor.kind() == Kind::Float);
            let changes = after.zip(pass.buffers).map(|(after, before)| no_grad(|| after.detach() - before));
            pass.statistics = changes.collect();
        }
        match self.role {
            Role::Generator { .. } => output,
            // A critic may give (n), (n, 1) or (n, 1, 1, 1).
            Role::Discriminator { .. } => output.reshape([-1, 1]),
        }
    }

    fn after(&self, buffers: &[Tensor], statistics: &[Tensor]) -> Vec<Tensor> {
        buffers.iter().zip(statistics).map(|(before, change)| no_grad(|| before + change)).collect()
    }

    fn constants(&self) -> &[Constant] {
        &self.constants
    }
}

impl fmt::Debug for ScriptNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptNetwork").field("role", &self.role).finish_non_exhaustive()
    }
}

fn given(value: &Tensor) -> Init {
    let value = value.detach().contiguous().view(-1);
    Init::Given(Vec::<f32>::try_from(value).expect("floats on the CPU").into())
}

fn whole_bytes(tensor: &Tensor) -> Vec<u8> {
    let tensor = tensor.detach().contiguous().view(-1);
    // Integers of a module are small counts, which doubles hold exactly.
    if tensor.kind() == Kind::Float { to_bytes(&tensor) } else { to_bytes(&tensor.to_kind(Kind::Double)) }
}

fn sizes(samples: i64, shape: ImageShape) -> Vec<i64> {
    let signed = |n: usize| i64::try_from(n).expect("an image is small");
    vec![samples, signed(shape.channels), signed(shape.height), signed(shape.width)]
}
