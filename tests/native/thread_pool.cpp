#include "thread_pool.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace {

std::atomic<int> wanted = 1;
std::atomic<int> most = 0;

}  // namespace

void set_threads(int count) {
  wanted = count;
  most = 0;
}

int most_threads() { return most; }

// The executable's symbol goes before libtorch's. Ranges are those of at::parallel_for.
AOTITorchError torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func, void* ctx) {
  if (begin >= end) {
    return AOTI_TORCH_SUCCESS;
  }
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t parts = std::min<int64_t>(wanted, divide_up(end - begin, grain_size));
  const int64_t size = divide_up(end - begin, parts);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += size) {
    threads.emplace_back(func, first, std::min(end, first + size), ctx);
  }
  most = std::max<int>(most, static_cast<int>(threads.size()));
  for (std::thread& thread : threads) {
    thread.join();
  }
  return AOTI_TORCH_SUCCESS;
}
