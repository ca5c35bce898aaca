// The loop of refine_, one row; a part of ../isa/loops.h.

namespace adaround_ext::cpu::ADAROUND_ISA {

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

}  // namespace adaround_ext::cpu::ADAROUND_ISA
