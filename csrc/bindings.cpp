// The pybind11 module _C: what this build was compiled with. No torch headers, so that it loads
// whatever torch is installed and can explain why the op libraries do not.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa/table.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = ADAROUND_VERSION;
  info["compiler"] = compiler();
  info["torch_built_with"] = ADAROUND_TORCH_VERSION;
  py::list sets;
#define ADAROUND_APPEND(isa, available) sets.append(#isa);
  ADAROUND_ISAS(ADAROUND_APPEND)
#undef ADAROUND_APPEND
  info["instruction_sets"] = py::tuple(sets);
  info["cuda_toolkit"] = ADAROUND_CUDA_VERSION;  // "" where CUDA was not built
  info["cuda_architectures"] = ADAROUND_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What adaround_ext was compiled with.";
  m.def("build_info", &build_info, "Versions and targets of the build, as a dict.");
}
