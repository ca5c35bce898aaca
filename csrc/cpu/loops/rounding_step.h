// The loops of kernels.h. Included once per instruction set by a file that has set the compiler's
// target, ADAROUND_ISA (the namespace) and Vec; so there is no include guard. Everything called
// here is force-inlined: nothing compiled for one instruction set may be linked into another.

namespace adaround_ext::cpu::ADAROUND_ISA {

template <typename V, typename T>
ADAROUND_INLINE Grid<V> broadcast(const Grid<T>& grid) {
  return {V(grid.scale), V(grid.zero_point), V(grid.qmin), V(grid.qmax)};
}

template <typename V, typename T>
ADAROUND_INLINE StepParams<V> broadcast(const StepParams<T>& params) {
  return {V(params.beta), V(params.reg_weight), V(params.step_size), V(params.inv_bias_sqrt)};
}

// Calls f(i, count) for every vector of a span: the full ones with a constant count, so that their
// loads and stores need no test, then the rest.
template <typename V, typename F>
ADAROUND_INLINE void for_each_vector(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kSize<V> <= end; i += kSize<V>) {
    f(i, kSize<V>);
  }
  if (i < end) {
    f(i, end - i);
  }
}

template <bool kWithGrad, typename V, typename T>
double soft_quantize(const SoftSpan<T>& s) {
  const Grid<V> grid = broadcast<V>(s.grid);
  const V beta(s.beta);
  Sum<V> sum;
  for_each_vector<V>(0, s.size, [&](int64_t i, int64_t left) ADAROUND_INLINE_LAMBDA {
    const Rectified<V> r = rectified_sigmoid(load<V>(s.v + i, left));
    const V code = floor_code(load<V>(s.weight + i, left), grid) + r.h;
    store(s.weight_q + i, dequantize(clamp_code(code, grid), grid), left);
    const Regularizer<V> reg = round_reg(r.h, beta);
    if (kWithGrad) {
      store(s.dweight_q_dv + i, through_clamp(grid.scale * r.grad, code, grid), left);
      store(s.dreg_dv + i, reg.grad * r.grad, left);
    }
    sum.add(reg.value, left);
  });
  return sum.total();
}

template <typename V, typename T>
void soft_quantize_backward(const BackwardSpan<T>& s) {
  const Grid<V> grid = broadcast<V>(s.grid);
  const V beta(s.beta);
  const V grad_reg(s.grad_reg);
  for_each_vector<V>(0, s.size, [&](int64_t i, int64_t left) ADAROUND_INLINE_LAMBDA {
    const Rectified<V> r = rectified_sigmoid(load<V>(s.v + i, left));
    const V code = floor_code(load<V>(s.weight + i, left), grid) + r.h;
    const V grad_code = load<V>(s.grad_weight_q + i, left) * grid.scale;
    const V grad_h = through_clamp(grad_code, code, grid) + grad_reg * round_reg(r.h, beta).grad;
    store(s.grad_v + i, grad_h * r.grad, left);
  });
}

template <bool kWithReg, typename V, typename T>
void rounding_step_span(const StepSpan<T>& s) {
  const Grid<V> grid = broadcast<V>(s.grid);
  const StepParams<V> params = broadcast<V>(s.params);
  const V grad_factor(s.normalize ? T(1) / s.grid.scale : s.grid.scale);
  const V weight_factor(s.as_error ? T(1) : T(0));
  // Two loops over a piece that stays in the first-level cache: one long chain of dependent
  // operations would leave the processor waiting, two short ones overlap better.
  // Dividing for floor_code again is cheaper than keeping its result from the first loop.
  constexpr int64_t kPiece = 512;
  alignas(64) T grad_v[kPiece];
  for (int64_t begin = 0; begin < s.size; begin += kPiece) {
    const int64_t end = s.size < begin + kPiece ? s.size : begin + kPiece;
    for_each_vector<V>(begin, end, [&](int64_t i, int64_t left) ADAROUND_INLINE_LAMBDA {
      const V code = floor_code(load<V>(s.weight + i, left), grid);
      const V g = rounding_grad<kWithReg>(
          load<V>(s.v + i, left), load<V>(s.grad + i, left), code, grid, grad_factor, params);
      store(grad_v + (i - begin), g, left);
    });
    for_each_vector<V>(begin, end, [&](int64_t i, int64_t left) ADAROUND_INLINE_LAMBDA {
      V exp_avg = load<V>(s.exp_avg + i, left);
      V exp_avg_sq = load<V>(s.exp_avg_sq + i, left);
      const V v = adam_step(
          load<V>(s.v + i, left), exp_avg, exp_avg_sq, load<V>(grad_v + (i - begin), left), params);
      const V weight = load<V>(s.weight + i, left);
      const V soft = soft_weight(v, floor_code(weight, grid), grid);
      store(s.v + i, v, left);
      store(s.exp_avg + i, exp_avg, left);
      store(s.exp_avg_sq + i, exp_avg_sq, left);
      store(s.weight_q + i, soft - weight_factor * weight, left);
    });
  }
}

template <typename V, typename T>
void rounding_step_of(const StepSpan<T>& s) {
  if (s.with_reg) {
    rounding_step_span<true, V>(s);
  } else {
    rounding_step_span<false, V>(s);
  }
}

template <typename V, typename T>
void hard_quantize(const HardSpan<T>& s) {
  const Grid<V> grid = broadcast<V>(s.grid);
  for_each_vector<V>(0, s.size, [&](int64_t i, int64_t left) ADAROUND_INLINE_LAMBDA {
    const V code = hard_code(load<V>(s.weight + i, left), load<V>(s.v + i, left), grid);
    store(s.codes + i, code, left);
  });
}

// Cyclic coordinate descent of one row under e G e^T, whose gradient is 2 residual, with
// refined_code for each column in turn. Ends when a sweep changes nothing.
template <typename V, typename T>
void refine_row(const RefineRow<T>& s) {
  for (int64_t sweep = 0; sweep < s.max_sweeps; ++sweep) {
    bool changed = false;
    for (int64_t j = 0; j < s.cols; ++j) {
      const T scale = s.scale[j / s.group_size];
      const T curvature = s.gram[j * s.cols + j] * scale;
      const T code = refined_code(s.codes[j], s.residual[j], curvature, s.qmin, s.qmax);
      if (code == s.codes[j]) {
        continue;
      }
      const V delta((code - s.codes[j]) * scale);
      s.codes[j] = code;
      changed = true;
      const T* gram_row = s.gram + j * s.cols;
      for_each_vector<V>(0, s.cols, [&](int64_t i, int64_t left) ADAROUND_INLINE_LAMBDA {
        const V sum = load<V>(s.residual + i, left) + delta * load<V>(gram_row + i, left);
        store(s.residual + i, sum, left);
      });
    }
    if (!changed) {
      return;
    }
  }
}

// GPTQ as QuIP's LDLQ has it (Chee et al. 2023, theorem 6): each column is rounded to nearest, and
// what that misses of the weight shifts the columns after it.
template <typename V, typename T>
void gptq_tile(const GptqTile<T>& s) {
  for (int64_t k = 0; k < s.cols; ++k) {
    V missed[kGptqRows];
    for (int64_t row = 0; row < kGptqRows; ++row) {
      const int64_t at = row * s.cols + k;
      s.codes[at] = nearest_code(s.weight[at] + s.shift[at], s.grid[at]);
      missed[row] = V(s.weight[at] - dequantize(s.codes[at], s.grid[at]));
    }
    const T* feedback = s.feedback + k * s.cols;
    for_each_vector<V>(k + 1, s.cols, [&](int64_t i, int64_t left) ADAROUND_INLINE_LAMBDA {
      const V factor = load<V>(feedback + i, left);
      for (int64_t row = 0; row < kGptqRows; ++row) {
        T* shift = s.shift + row * s.cols + i;
        store(shift, load<V>(shift, left) + missed[row] * factor, left);
      }
    });
  }
}

// Of the columns seen by add() the one with the least cost, the first where several have it.
template <typename V>
struct Cheapest {
  V cost;
  V column;
  V columns = lane_numbers<V>();

  template <typename T>
  ADAROUND_INLINE explicit Cheapest(T limit) : cost(limit), column(T(-1)) {}

  template <typename T>
  ADAROUND_INLINE void add(V costs, T first, T limit, int64_t left) {
    if (left < kSize<V>) {  // load() fills up with values that are no columns
      costs = select_(columns >= V(static_cast<T>(left)), V(limit), costs);
    }
    column = select_(costs < cost, columns + V(first), column);
    cost = select_(costs < cost, costs, cost);
  }

  // The column and its cost; -1 where no cost is below the limit.
  template <typename T>
  ADAROUND_INLINE int64_t find(T& least) const {
    int64_t best = -1;
    for (int64_t i = 0; i < kSize<V>; ++i) {
      const auto at = static_cast<int64_t>(lane(column, i));
      const T found = lane(cost, i);
      if (at >= 0 && (best < 0 || found < least || (found == least && at < best))) {
        best = at;
        least = found;
      }
    }
    return best;
  }
};

// One-flip tabu search: the cheapest single step is taken even where it is uphill, and that column
// then rests for a while. The codes with the least objective are kept.
template <typename V, typename T>
void tabu_row(const TabuRow<T>& s) {
  constexpr T kForbidden = T(3e38);
  const V qmin(s.qmin), qmax(s.qmax), forbidden(kForbidden);
  const size_t bytes = sizeof(T) * static_cast<size_t>(s.cols);
  memcpy(s.best_codes, s.codes, bytes);
  memcpy(s.best_residual, s.residual, bytes);
  uint64_t random = s.seed;
  double change = 0.0, best_change = 0.0;  // of the objective since the beginning
  T delta(0);
  const T* gram_row = s.gram;
  for (int64_t step = 0; step <= s.steps; ++step) {  // the last pass only settles the last step
    const V now(static_cast<T>(step));
    // The codes now may be the best, which are recorded after the pass.
    const V aspiration(static_cast<T>(best_change < change ? best_change - change : 0.0));
    const V moved(delta);
    Cheapest<V> cheapest(kForbidden);
    // The step before is put into the residual and the next one looked for in the same pass.
    for_each_vector<V>(0, s.cols, [&](int64_t i, int64_t left) ADAROUND_INLINE_LAMBDA {
      const V residual = load<V>(s.residual + i, left) + moved * load<V>(gram_row + i, left);
      store(s.residual + i, residual, left);
      const V cost = code_step(
                         load<V>(s.codes + i, left), residual, load<V>(s.scale + i, left),
                         load<V>(s.curvature + i, left), qmin, qmax, forbidden)
                         .cost;
      const V rested = select_(now >= load<V>(s.free_from + i, left), cost, forbidden);
      const V leads_below =
          code_step_with_margin(cost, load<V>(s.scale + i, left), load<V>(s.curvature + i, left));
      cheapest.add(
          select_(leads_below < aspiration, cost, rested), static_cast<T>(i), kForbidden, left);
    });
    if (change < best_change) {  // now that the residual belongs to the codes
      best_change = change;
      memcpy(s.best_codes, s.codes, bytes);
      memcpy(s.best_residual, s.residual, bytes);
    }
    T cost(0);
    const int64_t j = cheapest.find(cost);
    if (j < 0 || step == s.steps) {
      break;
    }
    const T direction =
        code_step(s.codes[j], s.residual[j], s.scale[j], s.curvature[j], s.qmin, s.qmax, kForbidden)
            .direction;
    s.codes[j] = s.codes[j] + direction;
    delta = direction * s.scale[j];
    gram_row = s.gram + j * s.cols;
    change += static_cast<double>(cost);
    s.free_from[j] = static_cast<T>(step + tabu_tenure(s.cols, random));
  }
}

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

}  // namespace adaround_ext::cpu::ADAROUND_ISA
