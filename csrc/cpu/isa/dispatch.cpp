// Which loops run: the best that processor and build have, unless another was asked for.
#include <atomic>
#include <cstring>

#include <torch/csrc/stable/library.h>

#include <string>

#include "arguments/checks.h"
#include "cpu/isa/table.h"

namespace adaround_ext::cpu {

extern const Kernels<float> kBaselineKernels;
extern const PackingKernels kBaselinePacking;
extern const Kernels<double> kDoubleKernels;
#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels<float> kAvx2Kernels;
extern const Kernels<float> kAvx512Kernels;
extern const PackingKernels kAvx2Packing;
extern const PackingKernels kAvx512Packing;
#endif

namespace {

struct Choice {
  const char* name;
  const Kernels<float>* table;
  const PackingKernels* packing;
  bool available;
};

// Best first.
const Choice* choices(int* count) {
  static const Choice list[] = {
#if defined(__x86_64__) && defined(__GNUC__)
      {"avx512", &kAvx512Kernels, &kAvx512Packing,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")},
      {"avx2", &kAvx2Kernels, &kAvx2Packing,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"baseline", &kBaselineKernels, &kBaselinePacking, true},
  };
  *count = sizeof(list) / sizeof(list[0]);
  return list;
}

const Choice* find(const char* name) {
  int count = 0;
  const Choice* list = choices(&count);
  for (int i = 0; i < count; ++i) {
    if (list[i].available && (!std::strcmp(name, "auto") || !std::strcmp(name, list[i].name))) {
      return &list[i];
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
    const Choice* found = find(name);
    if (!found) {
      return "";
    }
    in_use() = found;
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
  return *in_use().load()->table;
}

template <>
const Kernels<double>& kernels<double>() {
  return kDoubleKernels;
}

const PackingKernels& packing_kernels() { return *in_use().load()->packing; }

}  // namespace adaround_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CompositeExplicitAutograd, m) {
  m.impl("_use_instruction_set", TORCH_BOX(&adaround_ext::cpu::use_instruction_set_op));
}
