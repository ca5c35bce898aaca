// What the loops over spans share: a grid in every lane, and the walk in vectors; a part of
// ../isa/loops.h.

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

}  // namespace adaround_ext::cpu::ADAROUND_ISA
