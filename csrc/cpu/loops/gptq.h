// The loop of gptq, a tile of rows; a part of ../isa/loops.h.

namespace adaround_ext::cpu::ADAROUND_ISA {

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

}  // namespace adaround_ext::cpu::ADAROUND_ISA
