// A vector of floats with the primitives of math/elementary.h, in the compiler's vector extension.
// Included once per instruction set (see loops.h): no include guard, ADAROUND_ISA is the
// namespace and ADAROUND_WIDTH the number of floats.

namespace adaround_ext::cpu::ADAROUND_ISA {

// The overloads below would hide those for scalars.
using ::adaround_ext::abs_;
using ::adaround_ext::add_bytes;
using ::adaround_ext::floor_;
using ::adaround_ext::max_;
using ::adaround_ext::min_;
using ::adaround_ext::select_;
using ::adaround_ext::sqrt_;

struct Vec {
  typedef float Native __attribute__((vector_size(4 * ADAROUND_WIDTH)));
  typedef double Doubles __attribute__((vector_size(8 * ADAROUND_WIDTH)));
  Native x;

  Vec() = default;
  ADAROUND_INLINE Vec(Native native) : x(native) {}
  ADAROUND_INLINE explicit Vec(float value) : x(value - Native{}) {}  // -0.0f keeps its sign
  ADAROUND_INLINE explicit Vec(double value) : Vec(static_cast<float>(value)) {}
};

// How many numbers a V holds.
template <typename V>
constexpr int64_t kSize = sizeof(V) / sizeof(float);
template <>
constexpr int64_t kSize<double> = 1;

struct IntVec {
  typedef int32_t Native __attribute__((vector_size(4 * ADAROUND_WIDTH)));
  Native x;
};

ADAROUND_INLINE Vec operator+(Vec a, Vec b) { return a.x + b.x; }
ADAROUND_INLINE Vec operator-(Vec a, Vec b) { return a.x - b.x; }
ADAROUND_INLINE Vec operator*(Vec a, Vec b) { return a.x * b.x; }
ADAROUND_INLINE Vec operator/(Vec a, Vec b) { return a.x / b.x; }
ADAROUND_INLINE Vec operator-(Vec a) { return -a.x; }
ADAROUND_INLINE IntVec operator==(Vec a, Vec b) { return {a.x == b.x}; }
ADAROUND_INLINE IntVec operator>=(Vec a, Vec b) { return {a.x >= b.x}; }
ADAROUND_INLINE IntVec operator>(Vec a, Vec b) { return {a.x > b.x}; }
ADAROUND_INLINE IntVec operator<(Vec a, Vec b) { return {a.x < b.x}; }
ADAROUND_INLINE IntVec operator-(IntVec a, IntVec b) { return {a.x - b.x}; }
ADAROUND_INLINE IntVec operator-(IntVec a, int32_t b) { return {a.x - b}; }
ADAROUND_INLINE IntVec shift_left_(IntVec a, int32_t count) {
  typedef uint32_t Unsigned __attribute__((vector_size(4 * ADAROUND_WIDTH)));
  return {(IntVec::Native)((Unsigned)a.x << count)};
}
ADAROUND_INLINE IntVec operator>>(IntVec a, int32_t b) { return {a.x >> b}; }
ADAROUND_INLINE IntVec operator&(IntVec a, int32_t b) { return {a.x & b}; }

ADAROUND_INLINE Vec select_(IntVec mask, Vec yes, Vec no) { return mask.x ? yes.x : no.x; }

ADAROUND_INLINE IntVec to_bits(Vec a) {
  IntVec bits;
  memcpy(&bits, &a, sizeof bits);
  return bits;
}
ADAROUND_INLINE Vec from_bits(IntVec a) {
  Vec x;
  memcpy(&x, &a, sizeof x);
  return x;
}
ADAROUND_INLINE Vec to_float(IntVec a) { return __builtin_convertvector(a.x, Vec::Native); }
ADAROUND_INLINE Vec abs_(Vec a) { return from_bits({to_bits(a).x & 0x7fffffff}); }

// Unsigned integers of type T, side by side in memory, one a lane.
template <typename T>
ADAROUND_INLINE IntVec load_lanes(const uint8_t* from) {
  typedef T Lanes __attribute__((vector_size(sizeof(T) * ADAROUND_WIDTH)));
  Lanes lanes;
  memcpy(&lanes, from, sizeof lanes);
  // The compiler widens only by halves, which it then has to join.
#if ADAROUND_WIDTH == 16
  if constexpr (sizeof(T) == 2) {
    return {(IntVec::Native)_mm512_cvtepu16_epi32((__m256i)lanes)};
  } else if constexpr (sizeof(T) == 1) {
    return {(IntVec::Native)_mm512_cvtepu8_epi32((__m128i)lanes)};
  }
#elif ADAROUND_WIDTH == 8
  if constexpr (sizeof(T) == 2) {
    return {(IntVec::Native)_mm256_cvtepu16_epi32((__m128i)lanes)};
  }
#endif
  return {__builtin_convertvector(lanes, IntVec::Native)};
}

#if ADAROUND_WIDTH == 16
ADAROUND_INLINE Vec min_(Vec limit, Vec a) { return Vec::Native(_mm512_min_ps(limit.x, a.x)); }
ADAROUND_INLINE Vec max_(Vec limit, Vec a) { return Vec::Native(_mm512_max_ps(limit.x, a.x)); }
ADAROUND_INLINE Vec sqrt_(Vec a) { return Vec::Native(_mm512_sqrt_ps(a.x)); }
ADAROUND_INLINE Vec floor_(Vec a) {
  return Vec::Native(_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
// Fewer instructions than exp2_polynomial, and no clamp: vscalefps saturates by itself.
ADAROUND_INLINE Vec exp2_(Vec a) {
  const Vec n =
      Vec::Native(_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return Vec::Native(_mm512_scalef_ps(exp2_fraction(a - n).x, n.x));
}
#elif ADAROUND_WIDTH == 8
ADAROUND_INLINE Vec min_(Vec limit, Vec a) { return Vec::Native(_mm256_min_ps(limit.x, a.x)); }
ADAROUND_INLINE Vec max_(Vec limit, Vec a) { return Vec::Native(_mm256_max_ps(limit.x, a.x)); }
ADAROUND_INLINE Vec sqrt_(Vec a) { return Vec::Native(_mm256_sqrt_ps(a.x)); }
ADAROUND_INLINE Vec floor_(Vec a) { return Vec::Native(_mm256_floor_ps(a.x)); }
#else
ADAROUND_INLINE Vec min_(Vec limit, Vec a) { return limit.x < a.x ? limit.x : a.x; }
ADAROUND_INLINE Vec max_(Vec limit, Vec a) { return limit.x > a.x ? limit.x : a.x; }
ADAROUND_INLINE Vec sqrt_(Vec a) {
  for (int i = 0; i < ADAROUND_WIDTH; ++i) {
    a.x[i] = sqrt_(static_cast<float>(a.x[i]));
  }
  return a;
}
ADAROUND_INLINE Vec floor_(Vec a) {
  for (int i = 0; i < ADAROUND_WIDTH; ++i) {
    a.x[i] = floor_(static_cast<float>(a.x[i]));
  }
  return a;
}
#endif

#if ADAROUND_WIDTH != 16
ADAROUND_INLINE Vec exp2_(Vec a) { return exp2_polynomial(a); }
#endif
ADAROUND_INLINE Vec log2_(Vec a) { return log2_polynomial(a); }

// The first `size` floats (at most kSize), the rest 1: a value every formula takes.
template <typename V>
ADAROUND_INLINE V load(const float* from, int64_t size) {
  V a(1.0f);
  if (size >= kSize<V>) {
    memcpy(&a, from, sizeof a);
  } else {
    memcpy(&a, from, sizeof(float) * static_cast<size_t>(size));
  }
  return a;
}
ADAROUND_INLINE void store(float* to, Vec a, int64_t size) {
  if (size >= kSize<Vec>) {
    memcpy(to, &a, sizeof a);
  } else {
    memcpy(to, &a, sizeof(float) * static_cast<size_t>(size));
  }
}

// Words of 64 bits, each a block of packed codes (math/packing.h).
struct Words {
  typedef uint64_t Native __attribute__((vector_size(4 * ADAROUND_WIDTH)));
  typedef uint8_t Bytes __attribute__((vector_size(4 * ADAROUND_WIDTH)));
  Native x;

  Words() = default;
  ADAROUND_INLINE Words(Native native) : x(native) {}
  ADAROUND_INLINE explicit Words(uint64_t value) : x(value | Native{}) {}
};

ADAROUND_INLINE Words operator&(Words a, Words b) { return a.x & b.x; }
ADAROUND_INLINE Words operator|(Words a, Words b) { return a.x | b.x; }
ADAROUND_INLINE Words operator<<(Words a, int count) { return a.x << count; }
ADAROUND_INLINE Words operator>>(Words a, int count) { return a.x >> count; }
ADAROUND_INLINE IntVec lanes_of_32_bits(Words a) { return {(IntVec::Native)a.x}; }
ADAROUND_INLINE Words add_bytes(Words a, Words b) {
  return (Words::Native)((Words::Bytes)a.x + (Words::Bytes)b.x);
}

// 0, 1, 2, ... a lane.
template <typename V>
ADAROUND_INLINE V lane_numbers() {
  V a(0.0f);
  for (int i = 0; i < kSize<V>; ++i) {
    a.x[i] = static_cast<float>(i);
  }
  return a;
}
ADAROUND_INLINE float lane(Vec a, int64_t i) { return a.x[i]; }

// The sum of N floats, halves onto each other.
template <int N, typename Floats>
ADAROUND_INLINE float sum_of_floats(const Floats& a) {
  if constexpr (N == 1) {
    return a[0];
  } else {
    typedef float Half __attribute__((vector_size(4 * (N / 2))));
    Half halves[2];
    memcpy(halves, &a, sizeof halves);
    return sum_of_floats<N / 2>(halves[0] + halves[1]);
  }
}
ADAROUND_INLINE float sum_of_lanes(Vec a) { return sum_of_floats<ADAROUND_WIDTH>(a.x); }

// A sum in double, a partial sum a lane, in an order that only the sizes decide.
template <typename V>
struct Sum {
  typename V::Doubles lanes = {};

  ADAROUND_INLINE void add(V a, int64_t size) {
    if (size >= kSize<V>) {
      lanes += __builtin_convertvector(a.x, typename V::Doubles);
    } else {
      for (int64_t i = 0; i < size; ++i) {
        lanes[i] += static_cast<double>(a.x[i]);
      }
    }
  }
  ADAROUND_INLINE double total() const {
    double sum = 0.0;
    for (int64_t i = 0; i < kSize<V>; ++i) {
      sum += lanes[i];
    }
    return sum;
  }
};

// double, for gradient checks, is a vector of one.
template <typename V>
ADAROUND_INLINE V load(const double* from, int64_t /*size*/) {
  return *from;
}
ADAROUND_INLINE void store(double* to, double a, int64_t /*size*/) { *to = a; }
template <>
ADAROUND_INLINE double lane_numbers<double>() {
  return 0.0;
}
ADAROUND_INLINE double lane(double a, int64_t /*i*/) { return a; }
template <>
struct Sum<double> {
  double sum = 0.0;
  ADAROUND_INLINE void add(double a, int64_t /*size*/) { sum += a; }
  ADAROUND_INLINE double total() const { return sum; }
};

}  // namespace adaround_ext::cpu::ADAROUND_ISA
