#include "package.h"

#include <string>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include "c10d/src/aten_ffi.rs.h"
#include "product.h"

namespace c10d_shim {

void TensorList::push(const at::Tensor& tensor) { tensors_.push_back(tensor); }

std::size_t TensorList::size() const { return tensors_.size(); }

std::unique_ptr<at::Tensor> TensorList::get(std::size_t index) const {
  return std::make_unique<at::Tensor>(tensors_.at(index));
}

std::unique_ptr<TensorList> tensor_list() { return std::make_unique<TensorList>(); }

void copy_all(const TensorList& to, const TensorList& from) {
  const at::NoGradGuard no_grad;
  if (!to.tensors_.empty()) {
    at::_foreach_copy_(to.tensors_, from.tensors_);
  }
}

void add_all(const TensorList& to, const TensorList& from) {
  const at::NoGradGuard no_grad;
  if (!to.tensors_.empty()) {
    at::_foreach_add_(to.tensors_, from.tensors_);
  }
}

Graph::Graph(std::unique_ptr<torch::inductor::AOTIModelContainerRunner> runner) : runner_(std::move(runner)) {}

std::unique_ptr<TensorList> Graph::run(std::unique_ptr<TensorList> inputs) const {
  // The backward pass is compiled in, and what falls back to ATen must not record another.
  const at::NoGradGuard no_grad;
  auto outputs = std::make_unique<TensorList>();
  // The graph lets go of each input after its last use.
  outputs->tensors_ = runner_->boxed_run(std::move(inputs->tensors_));
  return outputs;
}

std::unique_ptr<Graph> load_graph(rust::Str library, std::int8_t device) {
  // A worker that was linked in another way would compute other bits than its peers.
  TORCH_CHECK(graphs_take_our_products(), "this program was linked without the products of compiled graphs");
  const std::string path(library);
  const std::string kind = device < 0 ? "cpu" : "cuda";
  const auto& runners = torch::inductor::getAOTIModelRunnerRegistry();
  const auto create = runners.find(kind);
  TORCH_CHECK(create != runners.end(), "this build of libtorch runs no compiled graphs on ", kind);
  const std::string name = device < 0 ? kind : kind + ":" + std::to_string(device);
  // The kernels of a GPU lie beside the library.
  const std::string folder = path.substr(0, path.find_last_of('/'));
  return std::make_unique<Graph>(create->second(path, /*num_models=*/1, name, folder, /*run_single_threaded=*/true));
}

} // namespace c10d_shim
