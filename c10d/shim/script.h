// Networks written in Python and saved as TorchScript, run with tensors that somebody else owns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/api/module.h>

#include "error.h"
#include "rust/cxx.h"

namespace c10d_shim {

struct ScriptTensor;

// A module's methods must not be called by two threads at once.
class Script {
 public:
  explicit Script(torch::jit::Module module);

  rust::Vec<ScriptTensor> tensors() const;
  std::unique_ptr<at::Tensor> tensor(std::size_t index) const;
  void bind(std::size_t index, const at::Tensor& tensor) const;
  std::unique_ptr<at::Tensor> run(bool training, std::uint64_t seed, const at::Tensor& input) const;
  rust::String last_operation() const;

 private:
  // A tensor, and who has it by which name.
  struct Slot {
    torch::jit::Module owner;
    std::string attribute;
    std::string name;
    bool is_parameter;
  };

  torch::jit::Module module_;
  std::vector<Slot> slots_;
};

std::unique_ptr<Script> load_script(rust::Slice<const std::uint8_t> bytes);

} // namespace c10d_shim
