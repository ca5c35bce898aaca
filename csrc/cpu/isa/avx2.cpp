// The loops of table.h for AVX2. The target is set before the project's own headers, because
// their templates are compiled for the target they were read under.
#if defined(__x86_64__) && defined(__GNUC__)
#include "cpu/isa/standard_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define ADAROUND_ISA avx2
#define ADAROUND_WIDTH 8
#include "cpu/isa/loops.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
