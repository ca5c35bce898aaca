// The standard headers of the loops. They are read before a file sets the compiler's target, so
// that nothing of theirs is compiled for it.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
