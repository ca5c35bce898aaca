// The loops of table.h, all of them, for one instruction set. Included once per instruction set by
// a file that has set the compiler's target, ADAROUND_ISA (the namespace) and ADAROUND_WIDTH
// (floats a vector); so there is no include guard, here and in what is included. Everything called
// here is force-inlined: nothing compiled for one instruction set may be linked into another.

#include "cpu/isa/table.h"

#include "cpu/isa/vec.h"

// After the vectors that they are written in.
#include "cpu/loops/spans.h"

#include "cpu/loops/gptq.h"
#include "cpu/loops/hard_quantize.h"
#include "cpu/loops/pack_bits.h"
#include "cpu/loops/refine.h"
#include "cpu/loops/rounding_step.h"
#include "cpu/loops/soft_quantize.h"
#include "cpu/loops/tabu_search.h"

#include "cpu/loops/packed_linear.h"  // uses pack_bits.h

namespace adaround_ext::cpu::ADAROUND_ISA {

template <typename V, typename T>
constexpr Kernels<T> table() {
  return {
      soft_quantize<false, V, T>,
      soft_quantize<true, V, T>,
      soft_quantize_backward<V, T>,
      rounding_step_of<V, T>,
      hard_quantize<V, T>,
      refine_row<V, T>,
      gptq_tile<V, T>,
      tabu_row<V, T>};
}

const Kernels<float> kKernels = table<Vec, float>();
const PackingKernels kPackingKernels = {pack, unpack, arrange, linear_tile};

}  // namespace adaround_ext::cpu::ADAROUND_ISA
