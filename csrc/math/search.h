// The formulas of the discrete solvers refine_ and tabu_search_, once for C++ and CUDA;
// adaround_ext/reference/search.py is the same in Python. T is as in rounding.h.
#pragma once

#include "math/elementary.h"

namespace adaround_ext {

// The best code for one coordinate of e G e^T when all others stay, refine_'s change; it may be
// `code` itself. Changing it by k changes the objective by 2 d residual + d^2 gram_jj, d = k scale,
// curvature = gram_jj scale: the best k is round(-residual / curvature), kept inside the grid. It
// must lie this far past the midpoint: rounding errors of the residual may not make two equally
// good codes alternate for ever.
template <typename T>
ADAROUND_INLINE T refined_code(T code, T residual, T curvature, T qmin, T qmax) {
  const T half_step = T(0.5) + T(1e-4);
  if (!(abs_(residual) > half_step * curvature) || !(curvature > T(0.0))) {
    return code;
  }
  const T best = code + floor_(-residual / curvature + T(0.5));
  return max_(qmin, min_(qmax, best));
}

// What the tabu search's best step of one coordinate costs: one code up or down, whichever pulls
// with the residual, changes the objective by scale (curvature - 2 |residual|), curvature =
// gram_jj scale. No step out of the grid, nor of a coordinate whose inputs are dead.
template <typename T>
struct CodeStep {
  T direction;
  T cost;
};

template <typename T>
ADAROUND_INLINE T code_step_cost(T residual, T scale, T curvature) {
  return product_(scale, curvature - T(2.0) * abs_(residual));
}

template <typename T>
ADAROUND_INLINE CodeStep<T> code_step(
    T code, T residual, T scale, T curvature, T qmin, T qmax, T forbidden) {
  const T direction = select_(residual >= T(0.0), T(-1.0), T(1.0));
  const T next = code + direction;
  const T cost = code_step_cost(residual, scale, curvature);
  const T inside = select_(max_(qmin, min_(qmax, next)) == next, cost, forbidden);
  return {direction, select_(curvature > T(0.0), inside, forbidden)};
}

// The cost that must be below best - now for a resting column to change all the same. Undoing the
// step from the best codes leads back to them, not below them: rounding errors may not decide that,
// so the margin is refined_code's.
template <typename T>
ADAROUND_INLINE T code_step_with_margin(T cost, T scale, T curvature) {
  return cost + T(1e-4) * scale * curvature;
}

// For how many steps a column of the tabu search rests after a change: drawn from [t, 2t) for
// t = cols / 40, by Knuth's MMIX generator. A fixed number could make the search run in circles.
// The best t was seen to grow with the number of columns.
ADAROUND_INLINE int64_t tabu_tenure(int64_t cols, uint64_t& random) {
  random = random * 6364136223846793005u + 1442695040888963407u;
  const int64_t least = cols < 120 ? 3 : cols / 40;
  return least + static_cast<int64_t>((random >> 33) % static_cast<uint64_t>(least));
}

}  // namespace adaround_ext
