// The loops of table.h for AVX512. The target is set before the project's own headers, because
// their templates are compiled for the target they were read under.
#if defined(__x86_64__) && defined(__GNUC__)
#include "cpu/isa/standard_headers.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")
#endif

#define ADAROUND_ISA avx512
#define ADAROUND_WIDTH 16
#include "cpu/isa/loops.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
