// The loop of hard_quantize; a part of ../isa/loops.h.

namespace adaround_ext::cpu::ADAROUND_ISA {

template <typename V, typename T>
void hard_quantize(const HardSpan<T>& s) {
  const Grid<V> grid = broadcast<V>(s.grid);
  for_each_vector<V>(0, s.size, [&](int64_t i, int64_t left) ADAROUND_INLINE_LAMBDA {
    const V code = hard_code(load<V>(s.weight + i, left), load<V>(s.v + i, left), grid);
    store(s.codes + i, code, left);
  });
}

}  // namespace adaround_ext::cpu::ADAROUND_ISA
