// Lists of tensors; and graphs that PyTorch compiled ahead of time (AOTInductor), run on tensors that
// somebody else owns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner.h>

#include "rust/cxx.h"

namespace c10d_shim {

// Tensors in order, such as inputs or outputs of a graph.
class TensorList {
 public:
  void push(const at::Tensor& tensor);
  std::size_t size() const;
  std::unique_ptr<at::Tensor> get(std::size_t index) const;

 private:
  friend class Graph;
  friend void copy_all(const TensorList& to, const TensorList& from);
  friend void add_all(const TensorList& to, const TensorList& from);
  std::vector<at::Tensor> tensors_;
};

std::unique_ptr<TensorList> tensor_list();
void copy_all(const TensorList& to, const TensorList& from);
void add_all(const TensorList& to, const TensorList& from);

// A graph must not be run by two threads at once.
class Graph {
 public:
  explicit Graph(std::unique_ptr<torch::inductor::AOTIModelContainerRunner> runner);

  std::unique_ptr<TensorList> run(std::unique_ptr<TensorList> inputs) const;

 private:
  std::unique_ptr<torch::inductor::AOTIModelContainerRunner> runner_;
};

// Loads a library onto the CPU, or for a device from 0 on onto that GPU.
std::unique_ptr<Graph> load_graph(rust::Str library, std::int8_t device);

} // namespace c10d_shim
