#include "script.h"

#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DefaultDtype.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/passes/tensorexpr_fuser.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/serialization/import.h>

#include "c10d/src/aten_ffi.rs.h"

namespace c10d_shim {

namespace {

// The interpreter's errors begin with where in the program they were; what went wrong is their last line.
[[noreturn]] void rethrow_reason(const std::exception& error) {
  const auto* ours = dynamic_cast<const c10::Error*>(&error);
  std::istringstream text(ours != nullptr ? ours->what_without_backtrace() : error.what());
  std::string reason;
  for (std::string line; std::getline(text, line);) {
    if (line.find_first_not_of(" \t\r") != std::string::npos) {
      reason = line;
    }
  }
  const std::string prefix = "RuntimeError: ";
  throw std::runtime_error(reason.compare(0, prefix.size(), prefix) == 0 ? reason.substr(prefix.size()) : reason);
}

template <typename F>
auto with_reason(F&& function) -> decltype(function()) {
  try {
    return function();
  } catch (const std::exception& error) {
    rethrow_reason(error);
  }
}

// A graph that is observed, rewritten and fused may round otherwise the third time it runs than the first.
void interpret_plainly() {
  static std::once_flag once;
  std::call_once(once, [] {
    torch::jit::getExecutorMode() = false;
    torch::jit::getProfilingMode() = false;
    torch::jit::setTensorExprFuserEnabled(false);
  });
}

} // namespace

Script::Script(torch::jit::Module module) : module_(std::move(module)) {
  const auto add = [this](
                       const torch::jit::Module& owner,
                       const std::string& path,
                       const std::string& attribute,
                       bool is_parameter) {
    slots_.push_back({owner, attribute, path.empty() ? attribute : path + "." + attribute, is_parameter});
  };
  // Parameters first, then buffers, by which Rust counts the tensors.
  for (const bool parameters : {true, false}) {
    for (const auto& [path, owner] : module_.named_modules()) {
      if (parameters) {
        for (const auto& own : owner.named_parameters(/*recurse=*/false)) {
          add(owner, path, own.name, true);
        }
      } else {
        for (const auto& own : owner.named_buffers(/*recurse=*/false)) {
          add(owner, path, own.name, false);
        }
      }
    }
  }
}

rust::Vec<ScriptTensor> Script::tensors() const {
  rust::Vec<ScriptTensor> all;
  for (const auto& slot : slots_) {
    const at::Tensor tensor = slot.owner.attr(slot.attribute).toTensor();
    ScriptTensor about;
    about.name = slot.name;
    for (const auto size : tensor.sizes()) {
      about.shape.push_back(size);
    }
    about.kind = std::string(c10::toString(tensor.scalar_type()));
    about.is_parameter = slot.is_parameter;
    about.is_trained = slot.is_parameter && tensor.requires_grad();
    // An address tells that two names share memory. Without elements there is none to share.
    about.place = reinterpret_cast<std::size_t>(tensor.numel() == 0 ? nullptr : tensor.const_data_ptr());
    all.push_back(std::move(about));
  }
  return all;
}

std::unique_ptr<at::Tensor> Script::tensor(std::size_t index) const {
  const auto& slot = slots_.at(index);
  return std::make_unique<at::Tensor>(slot.owner.attr(slot.attribute).toTensor());
}

void Script::bind(std::size_t index, const at::Tensor& tensor) const {
  const auto& slot = slots_.at(index);
  // Another handle on the same module: `setattr` wants one that can change.
  torch::jit::Module owner = slot.owner;
  owner.setattr(slot.attribute, tensor);
}

std::unique_ptr<at::Tensor> Script::run(bool training, std::uint64_t seed, const at::Tensor& input) const {
  return with_reason([&] {
    interpret_plainly();
    // For this thread and this call: other users of libtorch keep their optimizer.
    const torch::jit::GraphOptimizerEnabledGuard as_written(false);
    // Another handle: `train` sets an attribute, and this function is const for cxx.
    torch::jit::Module module = module_;
    module.train(training);
    if (training) {
      // In evaluation nothing is drawn, which the caller checks by the generator's state.
      at::manual_seed(seed);
    }
    const c10::IValue output = module.forward({input});
    TORCH_CHECK(output.isTensor(), "forward returns a ", output.tagKind(), ", not a tensor");
    return std::make_unique<at::Tensor>(output.toTensor());
  });
}

// What the result comes from, past what only gives it another shape.
rust::String Script::last_operation() const {
  // Inlining rewrites the graph, and this one must run as it was written.
  const auto graph = module_.get_method("forward").graph()->copy();
  torch::jit::Inline(*graph);
  const torch::jit::Node* node = graph->outputs().at(0)->node();
  const auto reshapes = [](const torch::jit::Node* node) {
    const std::string kind = node->kind().toUnqualString();
    return kind == "view" || kind == "reshape" || kind == "squeeze" || kind == "flatten";
  };
  while (reshapes(node)) {
    node = node->inputs().at(0)->node();
  }
  return std::string(node->kind().toUnqualString());
}

std::unique_ptr<Script> load_script(rust::Slice<const std::uint8_t> bytes) {
  return with_reason([&] {
    interpret_plainly();
    std::istringstream in(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
    auto module = torch::jit::load(in, at::Device(at::kCPU));
    TORCH_CHECK(module.find_method("forward").has_value(), "the module has no method forward");
    return std::make_unique<Script>(std::move(module));
  });
}

} // namespace c10d_shim
