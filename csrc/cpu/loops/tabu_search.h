// The loop of tabu_search_, one row; a part of ../isa/loops.h.

namespace adaround_ext::cpu::ADAROUND_ISA {

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

}  // namespace adaround_ext::cpu::ADAROUND_ISA
