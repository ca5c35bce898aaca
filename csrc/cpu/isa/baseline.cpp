// What every processor of the target architecture runs (SSE2 on x86-64, NEON on 64-bit Arm), and
// the loops in double.
#include "cpu/isa/standard_headers.h"

#define ADAROUND_ISA baseline
#define ADAROUND_WIDTH 4
#include "cpu/isa/loops.h"

namespace adaround_ext::cpu::baseline {

const Kernels<double> kDoubleKernels = table<double, double>();

}  // namespace adaround_ext::cpu::baseline
