// pack_bits and unpack_bits on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "arguments/packing.h"
#include "cpu/isa/table.h"

namespace adaround_ext::cpu {
namespace {

constexpr int64_t kBlocksPerTask = 2048;  // 16,384 codes; whole blocks, so that no byte is shared

// Calls f(row, col, size) for every run of codes of one row, on the threads of torch's pool. Long
// rows are cut, at bounds that only the sizes decide.
template <typename F>
void parallel_runs(int64_t rows, int64_t cols, const F& f) {
  const int64_t row_blocks = (cols + kBlock - 1) / kBlock;
  torch::stable::parallel_for(
      0, rows * row_blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end;) {
          const int64_t row = block / row_blocks;
          const int64_t stop = std::min(end, (row + 1) * row_blocks);
          const int64_t col = (block - row * row_blocks) * kBlock;
          f(row, col, std::min(cols, (stop - row * row_blocks) * kBlock) - col);
          block = stop;
        }
      });
}

int64_t count_outside(const uint8_t* codes, int64_t numel, int64_t bits, int64_t qmin) {
  const auto too_large = [=](uint8_t code) {
    return static_cast<uint8_t>(code - qmin) >> bits != 0;
  };
  return std::count_if(codes, codes + numel, too_large);
}

Tensor pack_bits_cpu(const Tensor& codes_in, int64_t bits, int64_t qmin) {
  const PackArguments args(codes_in, bits, qmin);
  const int64_t rows = args.codes.size(0);
  const int64_t cols = args.codes.size(1);
  const int64_t row_bytes = packed_bytes(cols, bits);
  const Tensor packed = allocate(args.codes, {rows, row_bytes}, ScalarType::Byte);
  const auto* codes_ptr = static_cast<const uint8_t*>(args.codes.const_data_ptr());
  auto* packed_ptr = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const auto pack = packing_kernels().pack;
  std::atomic<bool> all_fit = true;
  parallel_runs(rows, cols, [&](int64_t row, int64_t col, int64_t size) {
    const PackSpan span{
        codes_ptr + row * cols + col, packed_ptr + row * row_bytes + col / kBlock * bits, size,
        static_cast<int>(bits), static_cast<int>(qmin)};
    if (!pack(span)) {
      all_fit = false;
    }
  });
  ADAROUND_CHECK(
      all_fit, "codes must lie within [", qmin, ", ", qmin + (1 << bits) - 1, "], got ",
      count_outside(codes_ptr, rows * cols, bits, qmin), " of ", rows * cols, " outside");
  return packed;
}

Tensor unpack_bits_cpu(const Tensor& packed_in, int64_t bits, int64_t cols, int64_t qmin) {
  const UnpackArguments args(packed_in, bits, cols, qmin);
  const int64_t rows = args.packed.size(0);
  const int64_t row_bytes = args.packed.size(1);
  const Tensor codes = allocate(args.packed, {rows, cols}, code_dtype(qmin));
  const auto* packed_ptr = static_cast<const uint8_t*>(args.packed.const_data_ptr());
  auto* codes_ptr = static_cast<uint8_t*>(codes.mutable_data_ptr());
  const auto unpack = packing_kernels().unpack;
  parallel_runs(rows, cols, [&](int64_t row, int64_t col, int64_t size) {
    unpack(
        {packed_ptr + row * row_bytes + col / kBlock * bits, codes_ptr + row * cols + col, size,
         static_cast<int>(bits), static_cast<int>(qmin)});
  });
  return codes;
}

}  // namespace
}  // namespace adaround_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&adaround_ext::cpu::pack_bits_cpu));
  m.impl("unpack_bits", TORCH_BOX(&adaround_ext::cpu::unpack_bits_cpu));
}
