//! Networks written in Python and saved as TorchScript, run with tensors that the caller owns.
//!
//! 1. A module's own tensors are only the initial values: each run is given the tensors to use.
//! 2. The graph runs as it is written: nothing observes, rewrites or fuses it, so it rounds the
//!    same way each time.
//! 3. Draws during training (dropout) come from libtorch's default generator, which each run seeds
//!    anew. Runs of all modules of a process are serialised.
//!
//! The first line of an error is the reason, in the words of `torch`.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use tch::Tensor;

use crate::Error;
use crate::aten::{default_generator_state, owned};
use crate::aten_ffi::shim;
use crate::ffi::at_tensor;

/// Description of a tensor of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScriptTensor {
    /// Key in the module's `state_dict`.
    pub name: String,
    /// Size of each dimension.
    pub shape: Vec<i64>,
    /// Element type in libtorch's words, such as `Float` or `Long`.
    pub kind: String,
    /// Whether the tensor is a parameter; otherwise it is a buffer.
    pub is_parameter: bool,
    /// Whether the tensor is a parameter that requires a gradient.
    pub is_trained: bool,
    place: usize,
}

impl ScriptTensor {
    /// Whether both are the same tensor under two names.
    pub fn is_same(&self, other: &ScriptTensor) -> bool {
        // Tensors without elements have no place, and are never the same.
        self.place == other.place && self.place != 0
    }
}

/// TorchScript module. Its tensors are its parameters, in the order of `named_parameters`, then its
/// buffers.
pub struct Script {
    module: Mutex<cxx::UniquePtr<shim::Script>>,
    tensors: Vec<ScriptTensor>,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script").field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}

/// Serialises the runs: the generator that they seed is shared by all modules.
static TURN: Mutex<()> = Mutex::new(());

impl Script {
    /// Loads a file of `torch.jit.save` onto the CPU.
    ///
    /// # Errors
    /// [`Error::Fatal`] with the reason, if the bytes are not TorchScript, or the module has no
    /// method `forward`.
    pub fn load(bytes: &[u8]) -> Result<Script, Error> {
        let module = shim::load_script(bytes)?;
        let own = |about: shim::ScriptTensor| {
            let shim::ScriptTensor { name, shape, kind, is_parameter, is_trained, place } = about;
            ScriptTensor { name, shape, kind, is_parameter, is_trained, place }
        };
        let tensors = module.tensors()?.into_iter().map(own).collect();
        Ok(Script { module: Mutex::new(module), tensors })
    }

    /// Describes the tensors of the module.
    pub fn tensors(&self) -> &[ScriptTensor] {
        &self.tensors
    }

    /// Returns the current value of a tensor; before the first run, that of the file.
    ///
    /// # Errors
    /// [`Error::Fatal`] for an index out of range.
    pub fn tensor(&self, index: usize) -> Result<Tensor, Error> {
        let module = self.module.lock().unwrap_or_else(PoisonError::into_inner);
        owned(module.tensor(index)?)
    }

    /// Runs `forward` with these tensors, one for each of [`Script::tensors`]; returns its result
    /// and the buffers after it. In training it may write into the buffers that it was given.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another number of tensors; [`Error::Fatal`] if the module's program
    /// fails.
    pub fn run<'a>(
        &self,
        tensors: impl ExactSizeIterator<Item = &'a Tensor>,
        input: &Tensor,
        mode: Mode,
    ) -> Result<(Tensor, Vec<Tensor>), Error> {
        if tensors.len() != self.tensors.len() {
            return Err(Error::Invalid(format!("{} tensors for {}", tensors.len(), self.tensors.len())));
        }
        // Held until the buffers are read: binding, running and reading belong to one caller.
        let module = self.module.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, tensor) in tensors.enumerate() {
            module.bind(index, at_tensor(tensor))?;
        }
        let (training, seed) = match mode {
            Mode::Training { seed } => (true, seed),
            // No draw is made in evaluation, so the seed has no meaning.
            Mode::Evaluation => (false, 0),
        };
        let output = {
            // Held for the run alone, which seeds the shared generator and then draws from it.
            let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
            owned(module.run(training, seed, at_tensor(input))?)?
        };
        // Parameters are the caller's own, and a run does not change them.
        let buffers = (0..self.tensors.len()).filter(|index| !self.tensors[*index].is_parameter);
        let buffers = buffers.map(|index| owned(module.tensor(index)?)).collect::<Result<_, Error>>()?;
        Ok((output, buffers))
    }

    /// Runs `forward` in evaluation mode, with the tensors that the module has.
    ///
    /// # Errors
    /// [`Error::Fatal`] if the module's program fails.
    pub fn evaluate(&self, input: &Tensor) -> Result<Tensor, Error> {
        let module = self.module.lock().unwrap_or_else(PoisonError::into_inner);
        // The module's lock is taken before the turn, here and in `run`, so the two cannot
        // deadlock.
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        owned(module.run(false, 0, at_tensor(input))?)
    }

    /// Returns the operation that computes the result, such as `sigmoid`, skipping operations that
    /// only change its shape.
    ///
    /// # Errors
    /// [`Error::Fatal`] if the program has no result.
    pub fn last_operation(&self) -> Result<String, Error> {
        let module = self.module.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(module.last_operation()?)
    }

    /// Whether `look` draws from libtorch's default generator, including draws of other threads
    /// meanwhile.
    ///
    /// # Errors
    /// Those of `look`.
    pub fn draws(look: impl FnOnce() -> Result<(), Error>) -> Result<bool, Error> {
        // A draw moves the generator, so its state is evidence.
        let before = default_generator_state()?;
        look()?;
        Ok(default_generator_state()? != before)
    }
}

/// Mode of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Training mode, with draws from a seed.
    Training {
        /// Seed of all draws.
        seed: u64,
    },
    /// Evaluation mode.
    Evaluation,
}
