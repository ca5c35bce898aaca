// The loop of rounding_step_; a part of ../isa/loops.h.

namespace adaround_ext::cpu::ADAROUND_ISA {

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

}  // namespace adaround_ext::cpu::ADAROUND_ISA
