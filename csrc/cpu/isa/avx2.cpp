// The loops of table.h for AVX2. The target is set before the project's own headers, because
// their templates are compiled for the target they were read under; the standard headers come
// first, so that nothing of theirs is.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "cpu/isa/table.h"

#define ADAROUND_ISA avx2
#define ADAROUND_WIDTH 8
#include "cpu/isa/loops.h"

namespace adaround_ext::cpu {

extern const Kernels<float> kAvx2Kernels;
extern const PackingKernels kAvx2Packing;
const Kernels<float> kAvx2Kernels = avx2::table<avx2::Vec, float>();
const PackingKernels kAvx2Packing = avx2::packing_table();

}  // namespace adaround_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
