//! Networks written in Python and saved as TorchScript, run with tensors that somebody else owns.
//!
//! 1. A module's own tensors are only where training begins: each run is told which to use.
//! 2. It runs as it is written: nothing observes, rewrites or fuses its graph, so it rounds the same way each
//!    time.
//! 3. What it draws while it trains (dropout) comes from libtorch's default generator, which each run seeds
//!    anew. Runs of all modules of a process take turns.
//!
//! The first line of an error is the reason, as `torch` words it.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use tch::Tensor;

use crate::Error;
use crate::aten::default_generator_state;
use crate::aten_ffi::shim;
use crate::ffi::at_tensor;

/// A tensor of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScriptTensor {
    /// Its key in the module's `state_dict`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its kind in libtorch's words, such as `Float` or `Long`.
    pub kind: String,
    /// Whether it is a parameter; else it is a buffer.
    pub is_parameter: bool,
    /// Whether it is a parameter that wants a gradient.
    pub is_trained: bool,
    place: usize,
}

impl ScriptTensor {
    /// Whether the two are one tensor by two names.
    pub fn is_same(&self, other: &ScriptTensor) -> bool {
        self.place == other.place && self.place != 0
    }
}

/// A module. Its tensors are its parameters, in the order of `named_parameters`, then its buffers.
pub struct Script {
    module: Mutex<cxx::UniquePtr<shim::Script>>,
    tensors: Vec<ScriptTensor>,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script").field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}

/// The generator that runs seed is one for all modules.
static TURN: Mutex<()> = Mutex::new(());

impl Script {
    /// Reads what `torch.jit.save` wrote, onto the CPU.
    ///
    /// # Errors
    /// [`Error::Fatal`] with the reason, if it is no TorchScript, or has no method `forward`.
    pub fn load(bytes: &[u8]) -> Result<Script, Error> {
        let module = shim::load_script(bytes)?;
        let own = |about: shim::ScriptTensor| {
            let shim::ScriptTensor { name, shape, kind, is_parameter, is_trained, place } = about;
            ScriptTensor { name, shape, kind, is_parameter, is_trained, place }
        };
        let tensors = module.tensors()?.into_iter().map(own).collect();
        Ok(Script { module: Mutex::new(module), tensors })
    }

    /// What tensors it has.
    pub fn tensors(&self) -> &[ScriptTensor] {
        &self.tensors
    }

    /// The present value of a tensor; that of the file, until it was run.
    ///
    /// # Errors
    /// [`Error::Fatal`] for an index beyond all.
    pub fn tensor(&self, index: usize) -> Result<Tensor, Error> {
        let module = self.module.lock().unwrap_or_else(PoisonError::into_inner);
        owned(module.tensor(index)?)
    }

    /// Runs `forward` with these tensors, one for each of [`Script::tensors`]: its result, and the buffers as
    /// they are then. While it trains it may write into the buffers that it was given.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another number of tensors; [`Error::Fatal`] for what the module's program
    /// refuses.
    pub fn run<'a>(
        &self,
        tensors: impl ExactSizeIterator<Item = &'a Tensor>,
        input: &Tensor,
        mode: Mode,
    ) -> Result<(Tensor, Vec<Tensor>), Error> {
        if tensors.len() != self.tensors.len() {
            return Err(Error::Invalid(format!("{} tensors for {}", tensors.len(), self.tensors.len())));
        }
        let module = self.module.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, tensor) in tensors.enumerate() {
            module.bind(index, at_tensor(tensor))?;
        }
        let (training, seed) = match mode {
            Mode::Training { seed } => (true, seed),
            Mode::Evaluation => (false, 0),
        };
        let output = {
            let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
            owned(module.run(training, seed, at_tensor(input))?)?
        };
        let buffers = (0..self.tensors.len()).filter(|index| !self.tensors[*index].is_parameter);
        let buffers = buffers.map(|index| owned(module.tensor(index)?)).collect::<Result<_, Error>>()?;
        Ok((output, buffers))
    }

    /// Runs `forward` as in evaluation, with the tensors that it has.
    ///
    /// # Errors
    /// [`Error::Fatal`] for what the module's program refuses.
    pub fn evaluate(&self, input: &Tensor) -> Result<Tensor, Error> {
        let module = self.module.lock().unwrap_or_else(PoisonError::into_inner);
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        owned(module.run(false, 0, at_tensor(input))?)
    }

    /// The operation that the result comes from, past what only gives it another shape, such as `sigmoid`.
    ///
    /// # Errors
    /// [`Error::Fatal`] if the program has no result.
    pub fn last_operation(&self) -> Result<String, Error> {
        let module = self.module.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(module.last_operation()?)
    }

    /// Whether what `look` does draws from libtorch's default generator, beside what others may draw
    /// meanwhile.
    ///
    /// # Errors
    /// Those of `look`.
    pub fn draws(look: impl FnOnce() -> Result<(), Error>) -> Result<bool, Error> {
        let before = default_generator_state()?;
        look()?;
        Ok(default_generator_state()? != before)
    }
}

/// How a module runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As in training, with draws by a seed.
    Training {
        /// Of all that it draws.
        seed: u64,
    },
    /// As in evaluation.
    Evaluation,
}

fn owned(tensor: cxx::UniquePtr<shim::Tensor>) -> Result<Tensor, Error> {
    if tensor.is_null() {
        return Err(Error::Fatal("no tensor".into()));
    }
    // SAFETY: the pointer comes from `new at::Tensor` and nobody else has it; tch deletes it when the tensor
    // is dropped.
    Ok(unsafe { Tensor::from_ptr(tensor.into_raw().cast()) })
}
