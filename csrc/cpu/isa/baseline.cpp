// What every processor of the target architecture runs (SSE2 on x86-64, NEON on 64-bit Arm), and
// the loops in double.
#include <type_traits>
#include <utility>

#include "cpu/isa/table.h"

#define ADAROUND_ISA baseline
#define ADAROUND_WIDTH 4
#include "cpu/isa/loops.h"

namespace adaround_ext::cpu {

extern const Kernels<float> kBaselineKernels;
extern const PackingKernels kBaselinePacking;
extern const Kernels<double> kDoubleKernels;
const Kernels<float> kBaselineKernels = baseline::table<baseline::Vec, float>();
const PackingKernels kBaselinePacking = baseline::packing_table();
const Kernels<double> kDoubleKernels = baseline::table<double, double>();

}  // namespace adaround_ext::cpu
