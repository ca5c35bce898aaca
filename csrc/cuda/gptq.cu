// gptq on CUDA: a block takes kRows rows, which share the reading of the factor. A panel of columns
// at a time is rounded, a warp a row, a column after the other; then all threads together, twice as
// many, tell the columns behind the panel what it missed. The sums are those of cpu/loops/gptq.h,
// in its order.
#include <torch/csrc/stable/library.h>

#include "arguments/search.h"
#include "cuda/working_memory.cuh"

namespace adaround_ext::cuda {
namespace {

constexpr int kPanel = 64;
constexpr int kPerLane = kPanel / 32;  // columns of the panel that a lane has
constexpr int kBatch = 8;              // rows of the factor on their way at once

template <int kRows>
constexpr int kThreadsOf = 64 * kRows;

struct GptqPointers {
  const float* weight;    // [rows, cols]
  const float* feedback;  // [groups, cols, cols], upper triangular in the order of processing
  const int64_t* order;   // [groups, cols]
  const float* scale;     // [rows or 1, n_groups]
  const int32_t* zero_point;
  uint8_t* codes;    // [rows, cols], or int8
  uint8_t* scratch;  // [blocks, kRows cols floats], where shared memory does not do
  int64_t rows_per_factor;
  int64_t tiles_per_factor;
  int64_t tiles;         // of kRows rows
  int64_t scale_stride;  // n_groups, or 0 where all rows share the scale
  int cols;              // a factor of more columns than an int holds fits no memory
  int group_size;
  float qmin;
  float qmax;
};

// kRows rows at work. Columns are counted in the order of processing.
struct Tile {
  int64_t first;          // row of the weight
  int rows;               // kRows, or what is left of the factor's rows
  const float* feedback;  // [cols, cols]
  const int64_t* order;   // [cols]
  float* shift;           // [kRows, cols]: what the panels before ask of the columns behind them
};

template <int kRows>
struct Panel {
  float feedback[kPanel][kPanel];  // of its columns to one another, 0 from the diagonal down
  float missed[kPanel][kRows];     // weight minus quantized weight
};

template <int kRows>
__device__ __forceinline__ void load_panel(
    const GptqPointers& s, const Tile& tile, int start, Panel<kRows>& panel) {
  constexpr int kAtOnce = kThreadsOf<kRows> / kPanel;  // rows
  const int to = static_cast<int>(threadIdx.x % kPanel);
#pragma unroll 4  // loads on their way at once
  for (int first = 0; first < kPanel; first += kAtOnce) {
    const int from = first + static_cast<int>(threadIdx.x / kPanel);
    const bool read = from < to && start + to < s.cols;
    const int64_t at = static_cast<int64_t>(start + from) * s.cols + start + to;
    panel.feedback[from][to] = read ? __ldg(tile.feedback + at) : 0.0f;
  }
}

// A column of one row. Where the order names no column, or the tile lacks the row: without effect.
struct Column {
  int64_t at = -1;  // in the weight
  float weight = 0.0f;
  float shift = 0.0f;
  Grid<float> grid{1.0f, 0.0f, 0.0f, 0.0f};

  __device__ __forceinline__ float code() const { return nearest_code(weight + shift, grid); }
  __device__ __forceinline__ float missed() const {
    return at < 0 ? 0.0f : weight - dequantize(code(), grid);
  }
};

__device__ __forceinline__ Column
read_column(const GptqPointers& s, const Tile& tile, int row, int k) {
  Column column;
  // An order that is none is refused on the CPU; to know it here would take a synchronisation.
  const int64_t j = k < s.cols && row < tile.rows ? __ldg(tile.order + k) : -1;
  if (j < 0 || j >= s.cols) {
    return column;
  }
  column.at = (tile.first + row) * s.cols + j;
  column.weight = __ldg(s.weight + column.at);
  if (k >= kPanel) {  // the first panel comes after none
    column.shift = tile.shift[static_cast<int64_t>(row) * s.cols + k];
  }
  const int64_t run = (tile.first + row) * s.scale_stride + static_cast<int>(j) / s.group_size;
  const auto zero_point = static_cast<float>(__ldg(s.zero_point + run));
  column.grid = {__ldg(s.scale + run), zero_point, s.qmin, s.qmax};
  return column;
}

// Rounds the columns of the panel, a warp a row.
template <int kRows>
__device__ __forceinline__ void round_panel(
    const GptqPointers& s, const Tile& tile, int start, Panel<kRows>& panel) {
  const int row = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (row >= kRows) {
    return;
  }
  Column columns[kPerLane];
#pragma unroll
  for (int part = 0; part < kPerLane; ++part) {
    columns[part] = read_column(s, tile, row, start + 32 * part + lane);
  }
#pragma unroll
  for (int part = 0; part < kPerLane; ++part) {
#pragma unroll 4
    for (int turn = 0; turn < 32; ++turn) {
      // Every lane computes what its column would miss; that of the lane whose turn it is counts.
      const float missed = __shfl_sync(0xffffffffu, columns[part].missed(), turn);
      const float* feedback = panel.feedback[32 * part + turn];
#pragma unroll
      for (int behind = part; behind < kPerLane; ++behind) {
        if (behind > part || lane > turn) {
          columns[behind].shift += missed * feedback[32 * behind + lane];
        }
      }
    }
  }
#pragma unroll
  for (int part = 0; part < kPerLane; ++part) {
    panel.missed[32 * part + lane][row] = columns[part].missed();
    if (columns[part].at >= 0) {
      const auto code = static_cast<int>(columns[part].code());
      s.codes[columns[part].at] = static_cast<uint8_t>(code);  // the byte of an int8_t too
    }
  }
}

// Adds what the panel missed to the shift of the columns behind it, kSize of all rows a thread.
template <int kRows, int kSize>
__device__ __forceinline__ void shift_behind(
    const GptqPointers& s, const Tile& tile, int start, const Panel<kRows>& panel) {
  const int size = s.cols / kSize;
  for (int i = (start + kPanel) / kSize + threadIdx.x; i < size; i += kThreadsOf<kRows>) {
    Pack<float, kSize> sums[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float* shift = tile.shift + static_cast<int64_t>(row) * s.cols;
      sums[row] = start > 0 ? pack<kSize>(shift, i) : Pack<float, kSize>();
    }
    const float* feedback = tile.feedback + static_cast<int64_t>(start) * s.cols;
#pragma unroll 1
    for (int first = 0; first < kPanel; first += kBatch) {
      Pack<float, kSize> factors[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        factors[k] = pack<kSize>(feedback + static_cast<int64_t>(first + k) * s.cols, i);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
#pragma unroll
          for (int e = 0; e < kSize; ++e) {
            sums[row].at[e] += panel.missed[first + k][row] * factors[k].at[e];
          }
        }
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      pack<kSize>(tile.shift + static_cast<int64_t>(row) * s.cols, i) = sums[row];
    }
  }
}

template <int kRows, bool kShared, int kSize>
__global__ void __launch_bounds__(kThreadsOf<kRows>)
    gptq_kernel(const __grid_constant__ GptqPointers s) {
  extern __shared__ float4 shift_memory[];
  __shared__ Panel<kRows> panel;
  uint8_t* scratch = s.scratch + blockIdx.x * (sizeof(float) * kRows * s.cols);
  float* shift = reinterpret_cast<float*>(kShared ? static_cast<void*>(shift_memory) : scratch);
  for (int64_t index = blockIdx.x; index < s.tiles; index += gridDim.x) {
    const int64_t factor = index / s.tiles_per_factor;
    const int64_t begin = index % s.tiles_per_factor * kRows;
    const Tile tile{
        factor * s.rows_per_factor + begin,
        static_cast<int>(min(static_cast<int64_t>(kRows), s.rows_per_factor - begin)),
        s.feedback + factor * s.cols * s.cols, s.order + factor * s.cols, shift};
    load_panel(s, tile, 0, panel);
    __syncthreads();
    for (int start = 0; start < s.cols; start += kPanel) {
      round_panel(s, tile, start, panel);
      __syncthreads();
      load_panel(s, tile, start + kPanel, panel);
      shift_behind<kRows, kSize>(s, tile, start, panel);
      __syncthreads();
    }
  }
}

template <int kRows, bool kShared, int kSize>
void launch_gptq(GptqPointers s, const Tensor& codes, int64_t bytes, int64_t limit) {
  const auto kernel = gptq_kernel<kRows, kShared, kSize>;
  constexpr int kBlock = kThreadsOf<kRows>;
  const WorkingMemory memory(kernel, kShared, codes, kBlock, s.tiles, bytes, limit);
  s.scratch = memory.scratch ? output_pointer<uint8_t>(*memory.scratch) : nullptr;
  kernel<<<memory.blocks, kBlock, memory.shared_bytes, current_stream(codes)>>>(s);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int kRows>
void run_gptq(GptqPointers s, const Tensor& codes) {
  s.tiles_per_factor = (s.rows_per_factor + kRows - 1) / kRows;
  s.tiles = codes.size(0) / s.rows_per_factor * s.tiles_per_factor;
  const int64_t limit = shared_limit(codes, sizeof(Panel<kRows>));
  const int64_t bytes = static_cast<int64_t>(kRows * sizeof(float)) * s.cols;
  const bool wide = s.cols % 4 == 0 && aligned(s.feedback);
  const auto launch = bytes <= limit
                          ? (wide ? launch_gptq<kRows, true, 4> : launch_gptq<kRows, true, 1>)
                          : (wide ? launch_gptq<kRows, false, 4> : launch_gptq<kRows, false, 1>);
  launch(s, codes, bytes, limit);
}

Tensor gptq_cuda(
    const Tensor& weight, const Tensor& feedback, const Tensor& order, const Tensor& scale,
    const Tensor& zero_point, int64_t qmin, int64_t qmax) {
  const GptqArguments args(weight, feedback, order, scale, zero_point, qmin, qmax);
  const Tensor codes = allocate(args.weight, args.weight.sizes(), code_dtype(qmin));
  if (codes.numel() == 0) {
    return codes;
  }
  const DeviceGuard guard(codes.get_device_index());
  // Columns that an order leaves out, see read_column, have this code.
  STD_CUDA_CHECK(cudaMemsetAsync(
      output_pointer<uint8_t>(codes), static_cast<int>(qmin & 0xff),
      static_cast<size_t>(codes.numel()), current_stream(codes)));
  const RowLayout layout(args.weight, args.feedback, args.scale);
  const GptqPointers s{
      input_pointer<float>(args.weight),
      input_pointer<float>(args.feedback),
      input_pointer<int64_t>(args.order),
      input_pointer<float>(args.scale),
      input_pointer<int32_t>(args.zero_point),
      output_pointer<uint8_t>(codes),
      nullptr,
      layout.rows_per_gram,
      0,
      0,
      layout.scale_stride,
      static_cast<int>(layout.cols),
      static_cast<int>(layout.group_size),
      static_cast<float>(qmin),
      static_cast<float>(qmax)};
  // Eight rows halve the reading of the factor, where that leaves a tile for every processor.
  const int64_t tiles = args.feedback.size(0) * ((s.rows_per_factor + 7) / 8);
  (s.rows_per_factor > 4 && tiles >= processor_count(codes) ? run_gptq<8> : run_gptq<4>)(s, codes);
  return codes;
}

}  // namespace
}  // namespace adaround_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CUDA, m) {
  m.impl("gptq", TORCH_BOX(&adaround_ext::cuda::gptq_cuda));
}
