// The primitives that rounding.h and search.h are written in, for float and double on host and
// device. cpu/isa/vec.h adds the same names for vectors, so that a formula is written once for all
// of them.
//
// exp2_ and log2_ of float on the host are polynomials: a loop over libm cannot be vectorised. The
// vectors evaluate the same polynomials. Largest errors: exp2_ 1.5e-7 relative, log2_ 1.2e-7
// relative. On the device they are the hardware's ex2 and lg2 (2 ulp; lg2 2^-22 absolute near 1).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ADAROUND_INLINE __host__ __device__ __forceinline__
#else
// Forced, so that no out-of-line copy is compiled for one instruction set and linked into another.
#define ADAROUND_INLINE inline __attribute__((always_inline))
#endif
#define ADAROUND_INLINE_LAMBDA __attribute__((always_inline))

namespace adaround_ext {

// min_ and max_ return x where x is NaN: a limit must not hide it.
template <typename T>
ADAROUND_INLINE T min_(T limit, T x) {
  return limit < x ? limit : x;
}

template <typename T>
ADAROUND_INLINE T max_(T limit, T x) {
  return limit > x ? limit : x;
}

template <typename T>
ADAROUND_INLINE T select_(bool condition, T yes, T no) {
  return condition ? yes : no;
}

ADAROUND_INLINE float floor_(float x) { return floorf(x); }
ADAROUND_INLINE double floor_(double x) { return floor(x); }

// To the nearest integer, ties to even, as torch.round has it.
ADAROUND_INLINE float round_(float x) { return rintf(x); }
ADAROUND_INLINE double round_(double x) { return rint(x); }

ADAROUND_INLINE float sqrt_(float x) { return sqrtf(x); }
ADAROUND_INLINE double sqrt_(double x) { return sqrt(x); }

// A quotient that need not be exact. On the device 2 ulp, 0 for denominators above 2^126, and no
// branch: the exact one has a slow path for numerators of 0 and denormal ones, which is what
// exp_avg becomes once h is clipped.
template <typename T>
ADAROUND_INLINE T divide_(T numerator, T denominator) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return __fdividef(numerator, denominator);
  }
#endif
  return numerator / denominator;
}

// A product that is rounded before it is added to anything: whether a compiler fuses a sum of two
// products, and which of the two, differs from one use to the next.
template <typename T>
ADAROUND_INLINE T product_(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return __fmul_rn(a, b);
  }
#endif
  return a * b;
}

ADAROUND_INLINE float abs_(float x) { return fabsf(x); }
ADAROUND_INLINE double abs_(double x) { return fabs(x); }

// The bits of a float and back, for the polynomials.
ADAROUND_INLINE int32_t to_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
ADAROUND_INLINE float from_bits(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
// Without the undefined behaviour of a signed overflow.
ADAROUND_INLINE int32_t shift_left_(int32_t x, int count) {
  return static_cast<int32_t>(static_cast<uint32_t>(x) << count);
}
ADAROUND_INLINE float to_float(int32_t x) { return static_cast<float>(x); }

// 2^r for |r| <= 1/2. F is float or a vector of floats.
template <typename F>
ADAROUND_INLINE F exp2_fraction(F r) {
  const F r2 = r * r;
  // Paired (Estrin) rather than nested: half the latency.
  const F low = F(6.931471880e-1f) + r * F(2.402265076e-1f);
  const F mid = F(5.550357114e-2f) + r * F(9.618082557e-3f);
  const F high = F(1.339086336e-3f) + r * F(1.545316295e-4f);
  return F(1.0f) + r * (low + r2 * (mid + r2 * high));
}

// 2^x, x clamped to [-126, 126].
template <typename F>
ADAROUND_INLINE F exp2_polynomial(F x) {
  x = max_(F(-126.0f), min_(F(126.0f), x));
  // 1.5 * 2^23 + 127: the sum's low bits hold the integer and the exponent's bias.
  const F round_to_integer = F(12583039.0f);
  const F shifted = x + round_to_integer;
  const F p = exp2_fraction(x - (shifted - round_to_integer));
  // A product, not a sum of exponents: that would turn a NaN with a payload into a number.
  return p * from_bits(shift_left_(to_bits(shifted), 23));
}

// log2(x) for normal x > 0: x = 2^n (1 + f), 1 + f in [2/3, 4/3).
template <typename F>
ADAROUND_INLINE F log2_polynomial(F x) {
  const auto bits = to_bits(x);
  const auto n = (bits - 0x3f2aaaab) >> 23;
  const F f = from_bits(bits - shift_left_(n, 23)) - F(1.0f);
  const F f2 = f * f;
  const F f4 = f2 * f2;
  const F a = F(1.442695041e+0f) + f * F(-7.213465601e-1f);
  const F b = F(4.808974711e-1f) + f * F(-3.607881906e-1f);
  const F c = F(2.886433725e-1f) + f * F(-2.368114719e-1f);
  const F d = F(2.027825121e-1f) + f * F(-2.220923952e-1f);
  const F high = (c + f2 * d) + f4 * F(1.983461742e-1f);
  return to_float(n) + f * ((a + f2 * b) + f4 * high);
}

ADAROUND_INLINE float exp2_(float x) {
#if defined(__CUDA_ARCH__)
  return exp2f(x);
#else
  return exp2_polynomial(x);
#endif
}
ADAROUND_INLINE double exp2_(double x) { return exp2(x); }

ADAROUND_INLINE float log2_(float x) {
#if defined(__CUDA_ARCH__)
  return __log2f(x);
#else
  return log2_polynomial(x);
#endif
}
ADAROUND_INLINE double log2_(double x) { return log2(x); }

}  // namespace adaround_ext
