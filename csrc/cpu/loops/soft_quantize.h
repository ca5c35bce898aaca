// The loops of soft_quantize, with and without gradients, and of its backward; a part of
// ../isa/loops.h.

namespace adaround_ext::cpu::ADAROUND_ISA {

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
  // The gradient alone, no step.
  const StepParams<V> params{V(s.beta), V(s.grad_reg), V(T(0)), V(T(0))};
  for_each_vector<V>(0, s.size, [&](int64_t i, int64_t left) ADAROUND_INLINE_LAMBDA {
    const V below = floor_code(load<V>(s.weight + i, left), grid);
    const V grad_v = rounding_grad<true>(
        load<V>(s.v + i, left), load<V>(s.grad_weight_q + i, left), below, grid, grid.scale,
        params);
    store(s.grad_v + i, grad_v, left);
  });
}

}  // namespace adaround_ext::cpu::ADAROUND_ISA
