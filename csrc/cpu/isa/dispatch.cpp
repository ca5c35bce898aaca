// Which loops run: the best that processor and build have, unless another was asked for.
#include <atomic>
#include <cstring>
#include <iterator>

#include <torch/csrc/stable/library.h>

#include <string>

#include "arguments/checks.h"
#include "cpu/isa/table.h"

namespace adaround_ext::cpu {

namespace {

struct Choice {
  const char* name;
  const Kernels<float>* kernels;
  const PackingKernels* packing;
  bool available;
};

// The best of those that the name admits; null where there is none.
const Choice* find(const char* name) {
#define ADAROUND_CHOICE(isa, available) {#isa, &isa::kKernels, &isa::kPackingKernels, available},
  static const Choice choices[] = {ADAROUND_ISAS(ADAROUND_CHOICE)};
#undef ADAROUND_CHOICE
  for (auto choice = std::rbegin(choices); choice != std::rend(choices); ++choice) {
    if (choice->available && (!std::strcmp(name, "auto") || !std::strcmp(name, choice->name))) {
      return &*choice;
    }
  }
  return nullptr;
}

std::atomic<const Choice*>& in_use() {
  static std::atomic<const Choice*> choice = find("auto");
  return choice;
}

}  // namespace

const char* use_instruction_set(const char* name) {
  if (*name) {
    const Choice* choice = find(name);
    if (!choice) {
      return "";
    }
    in_use() = choice;
  }
  return in_use().load()->name;
}

namespace {

std::string use_instruction_set_op(std::string name) {
  const std::string used = use_instruction_set(name.c_str());
  ADAROUND_CHECK(
      !used.empty(),
      "name must be \"auto\", \"baseline\" or an instruction set of this machine and build, "
      "\"avx2\" or \"avx512\", got \"",
      name, "\"");
  return used;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *in_use().load()->kernels;
}

template <>
const Kernels<double>& kernels<double>() {
  return baseline::kDoubleKernels;
}

const PackingKernels& packing_kernels() { return *in_use().load()->packing; }

}  // namespace adaround_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CompositeExplicitAutograd, m) {
  m.impl("_use_instruction_set", TORCH_BOX(&adaround_ext::cpu::use_instruction_set_op));
}
