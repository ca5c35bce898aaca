// The loops of packed_linear; a part of ../isa/loops.h.
//
// A vector of 32-bit lanes takes kLaneCodes codes a lane, so kVectorCodes neighbours; shifting it
// by j codes leaves code kLaneCodes i + j at the foot of lane i. Weights stay in that order, and x
// is brought into it once: arranging costs less than putting every row's weights back in theirs.

namespace adaround_ext::cpu::ADAROUND_ISA {

constexpr int kLaneCodes = 4;
constexpr int64_t kVectorCodes = kLaneCodes * ADAROUND_WIDTH;
static_assert(kLinearBlock % kVectorCodes == 0);

inline void arrange(const float* x, float* arranged, int64_t cols) {
  const int64_t whole = (cols + kLinearBlock - 1) / kLinearBlock * kLinearBlock;
  for (int64_t begin = 0; begin < whole; begin += kVectorCodes) {
    for (int64_t j = 0; j < kLaneCodes; ++j) {
      for (int64_t i = 0; i < ADAROUND_WIDTH; ++i) {
        const int64_t col = begin + kLaneCodes * i + j;
        arranged[begin + ADAROUND_WIDTH * j + i] = col < cols ? x[col] : 0.0f;
      }
    }
  }
}

// kVectorCodes codes, kLaneCodes a lane.
template <int kBits>
ADAROUND_INLINE IntVec load_quads(const uint8_t* from) {
  constexpr int kLaneBytes = kBits * kLaneCodes / 8;
  if constexpr (kBits % 2 == 0 && kWholeLane<kLaneBytes>) {
    return load_lanes<Lane<kLaneBytes>>(from);
  } else {
    return lanes_of_32_bits(split_quads<kBits>(load_blocks<kBits>(from)));
  }
}

// kVectorCodes codes of a row from column col on; what lies beyond its end is 0.
template <int kBits>
ADAROUND_INLINE IntVec load_codes(const uint8_t* row, int64_t col, int64_t row_bytes) {
  constexpr int64_t kBytes = kVectorCodes / kBlock * kBits;
  constexpr int64_t kRead = kBytes + (kWholeLane<kBits> ? 0 : 8 - kBits);
  const int64_t begin = col / kBlock * kBits;
  if (begin + kRead <= row_bytes) {
    return load_quads<kBits>(row + begin);
  }
  uint8_t filled[kRead] = {};
  memcpy(filled, row + begin, static_cast<size_t>(min_(row_bytes - begin, kBytes)));
  return load_quads<kBits>(filled);
}

// The grids of the columns of a vector of codes: one of all, or lane i of grid[j] is that of column
// kLaneCodes i + j. Codes are counted from qmin.
template <bool kOneGroup>
struct RowGrids {
  Grid<Vec> grid[kOneGroup ? 1 : kLaneCodes];

  ADAROUND_INLINE const Grid<Vec>& of(int j) const { return grid[kOneGroup ? 0 : j]; }
};

ADAROUND_INLINE Grid<Vec> grid_of_group(const LinearTile& s, int row, int64_t group) {
  const float zero = static_cast<float>(s.zero_point[row][group]) - static_cast<float>(s.qmin);
  return {Vec(s.scale[row][group]), Vec(zero), Vec(0.0f), Vec(0.0f)};
}

// The grids from a column of the group on, of which there are `left`.
template <bool kOneGroup>
ADAROUND_INLINE RowGrids<kOneGroup> load_grids(
    const LinearTile& s, int row, int64_t group, int64_t left) {
  RowGrids<kOneGroup> grids;
  const Grid<Vec> first = grid_of_group(s, row, group);
  for (Grid<Vec>& grid : grids.grid) {
    grid = first;
  }
  if constexpr (!kOneGroup) {
    const int64_t groups = s.cols / s.group_size;
    for (int64_t begin = left; begin < kVectorCodes && ++group < groups; begin += s.group_size) {
      const Grid<Vec> next = grid_of_group(s, row, group);
      for (int j = 0; j < kLaneCodes; ++j) {
        const Vec column = lane_numbers<Vec>() * Vec(1.0f * kLaneCodes) + Vec(1.0f * j);
        const IntVec inside = column >= Vec(static_cast<float>(begin));
        grids.grid[j].scale = select_(inside, next.scale, grids.grid[j].scale);
        grids.grid[j].zero_point = select_(inside, next.zero_point, grids.grid[j].zero_point);
      }
    }
  }
  return grids;
}

// Calls f(begin, end, group, left, one_group) for runs of vectors of codes in columns
// [first, last): of one group as many as there are in a row, else one. `left` columns of the run
// are of the group that it begins in.
template <typename F>
ADAROUND_INLINE void for_each_run(const LinearTile& s, int64_t first, int64_t last, const F& f) {
  int64_t group = first / s.group_size;
  int64_t group_end = (group + 1) * s.group_size;
  for (int64_t col = first; col < last;) {
    while (group_end <= col) {
      ++group;
      group_end += s.group_size;
    }
    const int64_t left = group_end - col;
    if (left >= kVectorCodes || group_end == s.cols) {
      const int64_t whole =
          min_(last, col + max_(kVectorCodes, left / kVectorCodes * kVectorCodes));
      f(col, whole, group, left, std::true_type());
      col = whole;
    } else {
      f(col, col + kVectorCodes, group, left, std::false_type());
      col += kVectorCodes;
    }
  }
}

// kVectorCodes weights of a row.
template <int kBits, bool kOneGroup>
ADAROUND_INLINE void load_weights(
    const LinearTile& s, int row, int64_t col, const RowGrids<kOneGroup>& grids,
    Vec (&weight)[kLaneCodes]) {
  const IntVec codes = load_codes<kBits>(s.packed[row], col, packed_bytes(s.cols, kBits));
  for (int j = 0; j < kLaneCodes; ++j) {
    const IntVec code = (codes >> (kBits * j)) & ((1 << kBits) - 1);
    weight[j] = dequantize(to_float(code), grids.of(j));
  }
}

// Calls f for every row of a tile, a constant in f, so that an array over rows can be registers.
template <typename F, int... kRow>
ADAROUND_INLINE void for_each_row(const F& f, std::integer_sequence<int, kRow...>) {
  (f(std::integral_constant<int, kRow>()), ...);
}
template <typename F>
ADAROUND_INLINE void for_each_row(const F& f) {
  for_each_row(f, std::make_integer_sequence<int, kLinearRows>());
}

// Calls f(row, col, weight) for all vectors of weights in columns [first, last) of the rows.
template <int kBits, typename F>
ADAROUND_INLINE void for_each_weights(
    const LinearTile& s, int64_t first, int64_t last, const F& f) {
  for_each_run(
      s, first, last,
      [&](int64_t begin, int64_t end, int64_t group, int64_t left, auto one_group)
          ADAROUND_INLINE_LAMBDA {
            constexpr bool kOneGroup = decltype(one_group)::value;
            RowGrids<kOneGroup> grids[kLinearRows];
            for (int row = 0; row < kLinearRows; ++row) {
              grids[row] = load_grids<kOneGroup>(s, row, group, left);
            }
            for (int64_t col = begin; col < end; col += kVectorCodes) {
              for_each_row([&](auto row) ADAROUND_INLINE_LAMBDA {
                Vec weight[kLaneCodes];
                load_weights<kBits>(s, row, col, grids[row], weight);
                f(row, col, weight);
              });
            }
          });
}

ADAROUND_INLINE Vec load_vector(const float* from) { return load<Vec>(from, kSize<Vec>); }

// A few positions: weights go from the codes into the products.
template <int kBits, int kPositions>
ADAROUND_INLINE void linear_few(const LinearTile& s) {
  Vec sum[kPositions][kLinearRows];
  for (int p = 0; p < kPositions; ++p) {
    for (int row = 0; row < kLinearRows; ++row) {
      sum[p][row] = Vec(0.0f);
    }
  }
  const auto multiply = [&](int row, int64_t col,
                            const Vec(&weight)[kLaneCodes]) ADAROUND_INLINE_LAMBDA {
    for (int p = 0; p < kPositions; ++p) {
      const float* x = s.x + p * s.stride + col;
      for (int j = 0; j < kLaneCodes; ++j) {
        sum[p][row] = sum[p][row] + weight[j] * load_vector(x + ADAROUND_WIDTH * j);
      }
    }
  };
  for_each_weights<kBits>(s, 0, s.cols, multiply);
  for (int p = 0; p < kPositions; ++p) {
    for (int row = 0; row < kLinearRows; ++row) {
      s.y[p * kLinearRows + row] = sum_of_lanes(sum[p][row]);
    }
  }
}

constexpr int64_t kPieceCols = 512;  // kLinearRows times as many weights fit the first-level cache

// Adds the products of kPositions rows of x, from column begin on, with a piece of the weights.
template <int kPositions>
ADAROUND_INLINE void add_products(
    const float* x, int64_t stride, const float* weight, int64_t cols, Vec* sum) {
  Vec total[kPositions][kLinearRows];
  for (int p = 0; p < kPositions; ++p) {
    for (int row = 0; row < kLinearRows; ++row) {
      total[p][row] = sum[p * kLinearRows + row];
    }
  }
  for (int64_t i = 0; i < cols; i += kSize<Vec>) {
    Vec w[kLinearRows];
    for (int row = 0; row < kLinearRows; ++row) {
      w[row] = load_vector(weight + row * kPieceCols + i);
    }
    for (int p = 0; p < kPositions; ++p) {
      const Vec a = load_vector(x + p * stride + i);
      for (int row = 0; row < kLinearRows; ++row) {
        total[p][row] = total[p][row] + w[row] * a;
      }
    }
  }
  for (int p = 0; p < kPositions; ++p) {
    for (int row = 0; row < kLinearRows; ++row) {
      sum[p * kLinearRows + row] = total[p][row];
    }
  }
}

// The same for position p and all after it, as long as there are kPositions; returns the next.
template <int kPositions>
ADAROUND_INLINE int64_t add_all_products(
    const LinearTile& s, int64_t begin, const float* weight, int64_t cols, Vec* sum, int64_t p) {
  for (; p + kPositions <= s.positions; p += kPositions) {
    add_products<kPositions>(
        s.x + p * s.stride + begin, s.stride, weight, cols, sum + p * kLinearRows);
  }
  return p;
}

// Many positions: weights are written down, a piece at a time, and met by all of x.
template <int kBits>
ADAROUND_INLINE void linear_many(const LinearTile& s) {
  constexpr int kTogether = ADAROUND_WIDTH == 16 ? 6 : 2;  // sums that fit the registers
  alignas(64) float weight[kLinearRows * kPieceCols];
  Vec sum[kLinearPositions * kLinearRows];
  for (int64_t i = 0; i < s.positions * kLinearRows; ++i) {
    sum[i] = Vec(0.0f);
  }
  for (int64_t begin = 0; begin < s.cols; begin += kPieceCols) {
    const int64_t end = min_(s.cols, begin + kPieceCols);
    const auto write = [&](int row, int64_t col,
                           const Vec(&piece)[kLaneCodes]) ADAROUND_INLINE_LAMBDA {
      for (int j = 0; j < kLaneCodes; ++j) {
        store(weight + row * kPieceCols + (col - begin) + ADAROUND_WIDTH * j, piece[j], kSize<Vec>);
      }
    };
    for_each_weights<kBits>(s, begin, end, write);
    const int64_t written = (end - begin + kVectorCodes - 1) / kVectorCodes * kVectorCodes;
    int64_t p = 0;
    p = add_all_products<kTogether>(s, begin, weight, written, sum, p);
    p = add_all_products<2>(s, begin, weight, written, sum, p);
    add_all_products<1>(s, begin, weight, written, sum, p);
  }
  for (int64_t i = 0; i < s.positions * kLinearRows; ++i) {
    s.y[i] = sum_of_lanes(sum[i]);
  }
}

template <int kBits>
void linear_tile_of(const LinearTile& s) {
  if (s.positions == 1) {
    linear_few<kBits, 1>(s);
  } else if (s.positions == 2) {
    linear_few<kBits, 2>(s);
  } else {
    linear_many<kBits>(s);
  }
}

inline void linear_tile(const LinearTile& s) {
  with_bits(
      s.bits, [&](auto bits) ADAROUND_INLINE_LAMBDA { linear_tile_of<decltype(bits)::value>(s); });
}

}  // namespace adaround_ext::cpu::ADAROUND_ISA
