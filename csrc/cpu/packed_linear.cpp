// packed_linear on the CPU. Every sum goes over the columns in one order, which neither the number
// of threads nor that of positions changes.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "arguments/packing.h"
#include "cpu/isa/table.h"

namespace adaround_ext::cpu {
namespace {

constexpr int64_t kProductsPerTask = 1 << 16;  // fewer are not worth waking a thread

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

int64_t grain(int64_t products) {
  return blocks_of(kProductsPerTask, std::max<int64_t>(1, products));
}

// Pointers and sizes, once: asking a tensor for them costs as much as a short row.
class PackedLinear {
 public:
  PackedLinear(
      const LinearArguments& args, int64_t bits, int64_t qmin, const Tensor& arranged,
      const Tensor& y)
      : bits_(static_cast<int>(bits)),
        qmin_(static_cast<int>(qmin)),
        positions_(args.positions),
        rows_(args.rows),
        cols_(args.cols),
        stride_(arranged.size(1)),
        row_bytes_(args.packed.size(1)),
        n_groups_(args.scale.size(1)),
        shared_grid_(args.scale.size(0) == 1),
        x_(args.x.const_data_ptr<float>()),
        packed_(args.packed.const_data_ptr<uint8_t>()),
        scale_(args.scale.const_data_ptr<float>()),
        zero_point_(args.zero_point.const_data_ptr<int32_t>()),
        bias_(args.bias ? args.bias->const_data_ptr<float>() : nullptr),
        arranged_(arranged.mutable_data_ptr<float>()),
        y_(y.mutable_data_ptr<float>()) {}

  void run() const {
    arrange();
    const int64_t chunks = blocks_of(positions_, kLinearPositions);
    const int64_t tiles = blocks_of(rows_, kLinearRows);
    const int64_t together = std::min<int64_t>(positions_, kLinearPositions);
    torch::stable::parallel_for(
        0, chunks * tiles, grain(cols_ * kLinearRows * together), [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) {
            multiply(task / tiles * kLinearPositions, task % tiles * kLinearRows);
          }
        });
  }

 private:
  void arrange() const {
    torch::stable::parallel_for(0, positions_, grain(stride_), [&](int64_t begin, int64_t end) {
      for (int64_t position = begin; position < end; ++position) {
        kernels_.arrange(x_ + position * cols_, arranged_ + position * stride_, cols_);
      }
    });
  }

  // Rows beyond the last are the last again; their results are not stored.
  LinearTile tile(int64_t first_position, int64_t first_row, float* sums) const {
    LinearTile tile;
    tile.x = arranged_ + first_position * stride_;
    tile.positions = std::min<int64_t>(kLinearPositions, positions_ - first_position);
    tile.stride = stride_;
    for (int64_t i = 0; i < kLinearRows; ++i) {
      const int64_t row = std::min(first_row + i, rows_ - 1);
      const int64_t grid = shared_grid_ ? 0 : row * n_groups_;
      tile.packed[i] = packed_ + row * row_bytes_;
      tile.scale[i] = scale_ + grid;
      tile.zero_point[i] = zero_point_ + grid;
    }
    tile.cols = cols_;
    tile.group_size = std::max<int64_t>(1, cols_ / n_groups_);
    tile.bits = bits_;
    tile.qmin = qmin_;
    tile.y = sums;
    return tile;
  }

  void multiply(int64_t first_position, int64_t first_row) const {
    float sums[kLinearPositions * kLinearRows];
    const LinearTile s = tile(first_position, first_row, sums);
    kernels_.linear_tile(s);
    const int64_t rows = std::min<int64_t>(kLinearRows, rows_ - first_row);
    for (int64_t position = 0; position < s.positions; ++position) {
      float* y = y_ + (first_position + position) * rows_ + first_row;
      for (int64_t i = 0; i < rows; ++i) {
        const float sum = sums[position * kLinearRows + i];
        y[i] = bias_ ? sum + bias_[first_row + i] : sum;
      }
    }
  }

  const PackingKernels& kernels_ = packing_kernels();  // one for all: they share x's order
  int bits_;
  int qmin_;
  int64_t positions_;
  int64_t rows_;
  int64_t cols_;
  int64_t stride_;
  int64_t row_bytes_;
  int64_t n_groups_;
  bool shared_grid_;
  const float* x_;
  const uint8_t* packed_;
  const float* scale_;
  const int32_t* zero_point_;
  const float* bias_;
  float* arranged_;  // x as linear_tile reads it: [positions, stride]
  float* y_;
};

Tensor packed_linear_cpu(
    const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& zero_point,
    const std::optional<Tensor>& bias, int64_t bits, int64_t qmin) {
  const LinearArguments args(x, packed, scale, zero_point, bias, bits, qmin);
  const Tensor y = allocate(args.x, args.y_shape);
  if (y.numel() == 0) {  // however many positions without columns there are
    return torch::stable::to(y, x.scalar_type());
  }
  const int64_t stride = blocks_of(args.cols, kLinearBlock) * kLinearBlock;
  const Tensor arranged = allocate(args.x, {args.positions, stride});
  PackedLinear(args, bits, qmin, arranged, y).run();
  return x.scalar_type() == ScalarType::Float ? y : torch::stable::to(y, x.scalar_type());
}

}  // namespace
}  // namespace adaround_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&adaround_ext::cpu::packed_linear_cpu));
}
