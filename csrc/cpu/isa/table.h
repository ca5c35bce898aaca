// The inner loops of the CPU ops, compiled once per instruction set and chosen at run time.
// Every loop works on a span: consecutive weights that share one scale and zero point, already
// converted to the arithmetic type T (float or double). No torch headers here.
#pragma once

#include <cstdint>

#include "math/packing.h"
#include "math/rounding.h"
#include "math/search.h"

namespace adaround_ext::cpu {

template <typename T>
struct SoftSpan {
  const T* weight;
  const T* v;
  T* weight_q;
  T* dweight_q_dv;  // used by soft_quantize_with_grad only, as is dreg_dv
  T* dreg_dv;
  int64_t size;
  Grid<T> grid;
  T beta;
};

template <typename T>
struct BackwardSpan {
  const T* grad_weight_q;
  T grad_reg;
  const T* weight;
  const T* v;
  T* grad_v;
  int64_t size;
  Grid<T> grid;
  T beta;
};

template <typename T>
struct StepSpan {
  T* v;
  T* exp_avg;
  T* exp_avg_sq;
  T* weight_q;
  const T* grad;
  const T* weight;
  int64_t size;
  Grid<T> grid;
  StepParams<T> params;
  bool with_reg;  // false while the schedule's reg_weight is 0
  bool as_error;
  bool normalize;
};

template <typename T>
struct HardSpan {
  const T* weight;
  const T* v;
  T* codes;
  int64_t size;
  Grid<T> grid;
};

// One row of refine_. code(j) moves weight j by scale[j / group_size].
template <typename T>
struct RefineRow {
  T* codes;
  T* residual;     // [cols]: error times gram (minus the constant of the asymmetric form)
  const T* gram;   // [cols, cols], symmetric
  const T* scale;  // [n_groups]
  int64_t cols;
  int64_t group_size;
  T qmin;
  T qmax;
  int64_t max_sweeps;
};

// kGptqRows rows of the GPTQ recursion, their columns in the order of processing.
constexpr int64_t kGptqRows = 4;

template <typename T>
struct GptqTile {
  const T* weight;  // [kGptqRows, cols], as are all but the factor
  T* shift;         // 0 at first: what the columns before ask of a column
  T* codes;
  const Grid<T>* grid;
  const T* feedback;  // [cols, cols], upper triangular
  int64_t cols;
};

// One row of tabu_search_, and memory for it.
template <typename T>
struct TabuRow {
  T* codes;
  T* residual;    // [cols], as in RefineRow
  T* best_codes;  // [cols], as are all below
  T* best_residual;
  T* free_from;  // the step from which a column may be changed again
  const T* scale;
  const T* curvature;  // gram[j][j] scale[j]
  const T* gram;       // [cols, cols], symmetric
  int64_t cols;
  T qmin;
  T qmax;
  int64_t steps;
  uint64_t seed;
};

template <typename T>
struct Kernels {
  double (*soft_quantize)(const SoftSpan<T>&);            // returns the sum of the regularizer
  double (*soft_quantize_with_grad)(const SoftSpan<T>&);  // the same
  void (*soft_quantize_backward)(const BackwardSpan<T>&);
  void (*rounding_step)(const StepSpan<T>&);
  void (*hard_quantize)(const HardSpan<T>&);
  void (*refine_row)(const RefineRow<T>&);
  void (*gptq_tile)(const GptqTile<T>&);
  void (*tabu_row)(const TabuRow<T>&);
};

// Codes of one row, from the first of a block on, and the bytes that they are packed into.
struct PackSpan {
  const uint8_t* codes;  // int8 where qmin < 0
  uint8_t* packed;
  int64_t size;  // codes
  int bits;
  int qmin;
};

struct UnpackSpan {
  const uint8_t* packed;
  uint8_t* codes;
  int64_t size;
  int bits;
  int qmin;
};

// packed_linear takes kLinearRows rows of the weight and up to kLinearPositions rows of x at a
// time.
constexpr int kLinearRows = 4;
constexpr int kLinearPositions = 64;
constexpr int64_t kLinearBlock = 64;  // columns: x is filled up to whole blocks

struct LinearTile {
  const float* x;  // [positions, stride], as arrange() wrote it
  int64_t positions;
  int64_t stride;
  const uint8_t* packed[kLinearRows];
  const float* scale[kLinearRows];  // [n_groups], as zero_point
  const int32_t* zero_point[kLinearRows];
  int64_t cols;
  int64_t group_size;
  int bits;
  int qmin;
  float* y;  // [positions, kLinearRows]
};

struct PackingKernels {
  bool (*pack)(const PackSpan&);  // returns whether all codes fit into the bits
  void (*unpack)(const UnpackSpan&);
  // Writes a row of x in the order in which linear_tile meets the columns, filled up with 0.
  void (*arrange)(const float* x, float* arranged, int64_t cols);
  void (*linear_tile)(const LinearTile&);
};

// The instruction sets that this build has loops for, the best last: X(name, whether this processor
// has it). double has the baseline's loops only: it serves gradient checks.
#if defined(__x86_64__) && defined(__GNUC__)
#define ADAROUND_ISAS(X)                                                               \
  X(baseline, true)                                                                    \
  X(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))             \
  X(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && \
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
#else
#define ADAROUND_ISAS(X) X(baseline, true)
#endif

// What isa/NAME.cpp defines.
#define ADAROUND_DECLARE(isa, available)       \
  namespace isa {                              \
  extern const Kernels<float> kKernels;        \
  extern const PackingKernels kPackingKernels; \
  }
ADAROUND_ISAS(ADAROUND_DECLARE)
#undef ADAROUND_DECLARE

namespace baseline {
extern const Kernels<double> kDoubleKernels;
}

// The loops in use. An op asks once, before its threads start: use_instruction_set may be called
// while it runs.
const PackingKernels& packing_kernels();

// The same for T.
template <typename T>
const Kernels<T>& kernels();

// Chooses the loops for float: "auto", "baseline", "avx2" or "avx512". Returns the name now in use,
// or an empty string, changing nothing, where this machine or build lacks the one asked for.
const char* use_instruction_set(const char* name);

}  // namespace adaround_ext::cpu
