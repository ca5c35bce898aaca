// The loops of table.h for AVX512. The target is set before the project's own headers, because
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
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")
#endif

#include "cpu/isa/table.h"

#define ADAROUND_ISA avx512
#define ADAROUND_WIDTH 16
#include "cpu/isa/loops.h"

namespace adaround_ext::cpu {

extern const Kernels<float> kAvx512Kernels;
extern const PackingKernels kAvx512Packing;
const Kernels<float> kAvx512Kernels = avx512::table<avx512::Vec, float>();
const PackingKernels kAvx512Packing = avx512::packing_table();

}  // namespace adaround_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
