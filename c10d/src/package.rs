//! Graphs that PyTorch compiled ahead of time (AOTInductor), run on tensors that the caller owns.
//!
//! 1. A graph is native code, with all rights of this process. It trusts the number of its inputs, their
//!    shapes and their types: the caller checks them, against what was written when it was compiled.
//! 2. A graph reads its inputs and writes none; its outputs are new tensors, or inputs that it passes on.
//! 3. Runs of one graph are serialised; different graphs run beside each other.

use std::fmt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use tch::{Device, Tensor};

use crate::Error;
use crate::aten_ffi::shim;
use crate::ffi::at_tensor;

/// Compiled graph, loaded into this process.
pub struct Graph(Mutex<cxx::UniquePtr<shim::Graph>>);

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

impl Graph {
    /// Loads the library of a graph onto a device. On a CPU the file may be removed afterwards; on a GPU
    /// only after the first run, which loads the kernels that lie beside it.
    ///
    /// # Errors
    /// [`Error::Fatal`] with the reason, if the library cannot be loaded or has no graph;
    /// [`Error::Invalid`] for a path that is not UTF-8 or a device of another kind.
    pub fn load(library: &Path, device: Device) -> Result<Graph, Error> {
        let invalid = |what: String| Error::Invalid(what);
        let path = library.to_str().ok_or_else(|| invalid(format!("{} is not UTF-8", library.display())))?;
        let device = match device {
            Device::Cpu => -1,
            // libtorch numbers devices by 8 bits.
            Device::Cuda(index) => i8::try_from(index).map_err(|_| invalid(format!("GPU {index}")))?,
            other => return Err(invalid(format!("{other:?} runs no compiled graphs"))),
        };
        Ok(Graph(Mutex::new(shim::load_graph(path, device)?)))
    }

    /// Runs the graph on its inputs, each contiguous and of the shape and kind that it was compiled for;
    /// returns its outputs. Nothing is recorded for a backward pass.
    ///
    /// # Errors
    /// [`Error::Fatal`] if the graph fails. The reason goes to standard error.
    pub fn run<'a>(&self, inputs: impl IntoIterator<Item = &'a Tensor>) -> Result<Vec<Tensor>, Error> {
        let mut list = shim::tensor_list()?;
        for input in inputs {
            list.pin_mut().push(at_tensor(input))?;
        }
        let outputs = {
            let graph = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            graph.run(list).map_err(failure)?
        };
        (0..outputs.size()).map(|index| crate::aten::owned(outputs.get(index)?)).collect()
    }
}

/// Error of a run. The interface of compiled graphs has a number for each error, and prints the reason.
fn failure(exception: cxx::Exception) -> Error {
    match Error::from(exception) {
        Error::Fatal(text) if text.contains("API call failed") => {
            Error::Fatal("the compiled graph failed; standard error has its reason".into())
        }
        other => other,
    }
}
