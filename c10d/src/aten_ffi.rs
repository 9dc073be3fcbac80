//! Bridge to the C++ shim for the ATen functions.

use std::any::Any;
use std::sync::Arc;

/// Owner of a tensor's memory, which lives as long as the tensor.
pub(crate) struct Keep(#[allow(dead_code)] pub(crate) Arc<dyn Any + Send + Sync>);

#[cxx::bridge(namespace = "c10d_shim")]
#[allow(clippy::too_many_arguments)] // tensors come one by one
pub(crate) mod shim {
    /// Scalars of one Adam step.
    struct AdamSettings {
        count: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
        divisor: f32,
        /// Elements that the step covers.
        spans: Vec<Span>,
    }

    /// Scalars of one step of stochastic gradient descent.
    struct SgdSettings {
        lr: f64,
        momentum: f64,
        nesterov: bool,
        weight_decay: f64,
        divisor: f32,
        /// Elements that the step covers.
        spans: Vec<Span>,
    }

    /// Elements of a flat tensor.
    struct Span {
        start: usize,
        len: usize,
    }

    /// Numbers of the vectors that a transformer's heads read.
    struct Heads {
        samples: i64,
        parts: i64,
        heads: i64,
    }

    /// Tensor of a TorchScript module.
    struct ScriptTensor {
        name: String,
        shape: Vec<i64>,
        kind: String,
        is_parameter: bool,
        is_trained: bool,
        place: usize,
    }

    extern "Rust" {
        type Keep;
    }

    unsafe extern "C++" {
        include!("c10d/shim/aten.h");
        include!("c10d/shim/product.h");
        include!("c10d/shim/convolution.h");
        include!("c10d/shim/processor.h");
        include!("c10d/shim/transformer.h");

        #[namespace = "at"]
        type Tensor = crate::ffi::shim::Tensor;

        fn fused_adam(
            params: &Tensor,
            grads: &Tensor,
            exp_avg: &Tensor,
            exp_avg_sq: &Tensor,
            settings: &AdamSettings,
        ) -> Result<()>;
        fn fused_sgd(
            params: &Tensor,
            grads: &Tensor,
            momentum: &Tensor,
            settings: &SgdSettings,
        ) -> Result<()>;
        fn norm(tensor: &Tensor) -> Result<f64>;
        fn default_generator_state() -> Result<Vec<u8>>;
        fn cpu_capability() -> Result<String>;
        fn libtorch_version() -> Result<String>;
        fn set_deterministic(deterministic: bool) -> Result<()>;
        fn set_tf32(convolutions: bool, products: bool) -> Result<()>;
        fn c_library_version() -> Result<String>;
        fn keep_freed_memory() -> Result<()>;
        fn use_huge_pages() -> Result<()>;
        fn trim_heap() -> Result<()>;
        fn leaky_relu(tensor: &Tensor, slope: f64) -> Result<()>;
        fn product(a: &Tensor, b: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn linear(
            input: &Tensor,
            weight: &Tensor,
            bias: &Tensor,
            slope: f64,
            groups: i64,
        ) -> Result<UniquePtr<Tensor>>;
        fn sums_by_groups(rows: i64, weights: i64) -> bool;
        fn place_gradients(weights: &TensorList, places: &TensorList) -> Result<()>;
        fn forget_places();
        #[allow(dead_code)] // a test's
        fn narrow_vectors(narrow: bool);
        #[allow(dead_code)] // a test's
        fn graph_product(a: &Tensor, b: &Tensor, addend: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn convolution(
            input: &Tensor,
            weight: &Tensor,
            bias: &Tensor,
            stride: i64,
            padding: i64,
        ) -> Result<UniquePtr<Tensor>>;
        fn transposed_convolution(
            input: &Tensor,
            weight: &Tensor,
            bias: &Tensor,
            stride: i64,
            padding: i64,
        ) -> Result<UniquePtr<Tensor>>;
        fn swiglu(rows: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn swiglu_backward(rows: &Tensor, grad: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn split_heads(rows: &Tensor, cos: &Tensor, sin: &Tensor, heads: &Heads)
        -> Result<UniquePtr<Tensor>>;
        fn join_heads(
            vectors: &Tensor,
            cos: &Tensor,
            sin: &Tensor,
            heads: &Heads,
        ) -> Result<UniquePtr<Tensor>>;
        fn all_finite(tensor: &Tensor) -> Result<bool>;
        fn matmul_into(out: &Tensor, a: &Tensor, b: &Tensor, scale: f64, add: bool) -> Result<()>;
        fn layer_norm_backward(
            grad: &Tensor,
            input: &Tensor,
            mean: &Tensor,
            rstd: &Tensor,
            weight: &Tensor,
            grad_input: &Tensor,
            grad_weight: &Tensor,
        ) -> Result<()>;
        fn weighted_sum(tensor: &Tensor) -> Result<u64>;
        fn floats_at(address: usize, numel: usize, keep: Box<Keep>) -> Result<UniquePtr<Tensor>>;

        include!("c10d/shim/script.h");

        type Script;
        fn tensors(self: &Script) -> Result<Vec<ScriptTensor>>;
        fn tensor(self: &Script, index: usize) -> Result<UniquePtr<Tensor>>;
        fn bind(self: &Script, index: usize, tensor: &Tensor) -> Result<()>;
        fn run(self: &Script, training: bool, seed: u64, input: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn last_operation(self: &Script) -> Result<String>;
        fn load_script(bytes: &[u8]) -> Result<UniquePtr<Script>>;

        include!("c10d/shim/package.h");

        type TensorList;
        fn push(self: Pin<&mut TensorList>, tensor: &Tensor) -> Result<()>;
        fn size(self: &TensorList) -> usize;
        fn get(self: &TensorList, index: usize) -> Result<UniquePtr<Tensor>>;
        fn tensor_list() -> Result<UniquePtr<TensorList>>;
        fn copy_all(to: &TensorList, from: &TensorList) -> Result<()>;
        fn add_all(to: &TensorList, from: &TensorList) -> Result<()>;

        type Graph;
        fn run(self: &Graph, inputs: UniquePtr<TensorList>) -> Result<UniquePtr<TensorList>>;
        fn load_graph(library: &str, device: i8) -> Result<UniquePtr<Graph>>;

        include!("c10d/shim/cuda.h");

        #[cfg(feature = "cuda")]
        type Mark;
        #[cfg(feature = "cuda")]
        fn wait(self: &Mark) -> Result<()>;
        #[cfg(feature = "cuda")]
        fn mark(device: i8) -> Result<UniquePtr<Mark>>;
        #[cfg(feature = "cuda")]
        fn prepare_cuda() -> Result<()>;
        #[cfg(feature = "cuda")]
        fn pci_bus_id(device: i8) -> Result<String>;
        #[cfg(feature = "cuda")]
        fn upload(values: &[f32], device: i8) -> Result<UniquePtr<Tensor>>;
        #[cfg(feature = "cuda")]
        fn wait_for_gpu(device: i8) -> Result<()>;
        #[cfg(feature = "cuda")]
        fn empty_cuda_cache() -> Result<()>;
        #[cfg(feature = "cuda")]
        fn refused_allocations(device: i8) -> Result<u64>;
        #[cfg(feature = "cuda")]
        fn compute_capability(device: i8) -> Result<String>;
        #[cfg(feature = "cuda")]
        fn gpu_name(device: i8) -> Result<String>;
        #[cfg(feature = "cuda")]
        fn gpu_libraries() -> Result<String>;
        #[cfg(feature = "cuda")]
        fn cuda_version() -> Result<String>;
    }
    impl UniquePtr<Tensor> {}
}

// SAFETY: a module consists only of reference-counted memory and a graph; any thread may run or
// destroy it, one at a time.
unsafe impl Send for shim::Script {}
// SAFETY: a graph consists of memory and of a library that stays loaded; any thread may run or destroy
// it, one at a time.
unsafe impl Send for shim::Graph {}
