// The threads of a block as fibers on one thread of the processor.
#include <cuda_runtime.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

dim3 thread, block, block_size, grid_size;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kMaxThreads = 1024;
constexpr unsigned kWarp = 32;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kDone;
  uint64_t value = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

std::mutex one_launch;
std::vector<Fiber> fibers(kMaxThreads);
ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
const std::function<void()>* running = nullptr;
uint64_t exchanged[kMaxThreads];
std::unique_ptr<float[]> shared;  // of its size to the word, for AddressSanitizer
std::mt19937 random;

// AddressSanitizer is told of every change of stacks; without it these do nothing.
#if defined(__SANITIZE_ADDRESS__)
void leave(void** fake_stack, const void* to, size_t size) {
  __sanitizer_start_switch_fiber(fake_stack, to, size);
}
void arrive(void* fake_stack, const void** from, size_t* size) {
  __sanitizer_finish_switch_fiber(fake_stack, from, size);
}
#else
void leave(void**, const void*, size_t) {}
void arrive(void*, const void**, size_t*) {}
#endif

Fiber& current() { return fibers[thread.x]; }

void suspend(State state) {
  Fiber& own = current();
  own.state = state;
  leave(&own.fake_stack, scheduler_stack, scheduler_stack_size);
  swapcontext(&own.context, &scheduler);
  arrive(own.fake_stack, &scheduler_stack, &scheduler_stack_size);
}

void run_thread() {
  arrive(nullptr, &scheduler_stack, &scheduler_stack_size);
  (*running)();
  current().state = State::kDone;
  leave(nullptr, scheduler_stack, scheduler_stack_size);  // for good
  swapcontext(&current().context, &scheduler);
}

void start(unsigned index) {
  Fiber& fiber = fibers[index];
  if (!fiber.stack) {
    fiber.stack = std::make_unique<char[]>(kStack);
  }
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  fiber.fake_stack = nullptr;
  makecontext(&fiber.context, run_thread, 0);
  fiber.state = State::kReady;
}

void resume(unsigned index) {
  thread = {index};
  Fiber& fiber = fibers[index];
  leave(&scheduler_fake_stack, fiber.stack.get(), kStack);
  swapcontext(&scheduler, &fiber.context);
  arrive(scheduler_fake_stack, nullptr, nullptr);
}

unsigned count(State state, unsigned begin, unsigned end) {
  unsigned found = 0;
  for (unsigned i = begin; i < end; ++i) {
    found += fibers[i].state == state;
  }
  return found;
}

void release(unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) {
    fibers[i].state = State::kReady;
  }
}

enum class Order { kForward, kBackward, kRandom };

Order wanted_order() {
  const char* wanted = std::getenv("EMULATION_ORDER");
  const std::string order = wanted ? wanted : "forward";
  if (order == "forward") {
    return Order::kForward;
  }
  if (order == "backward") {
    return Order::kBackward;
  }
  if (order == "random") {
    return Order::kRandom;
  }
  throw std::runtime_error("EMULATION_ORDER must be forward, backward or random, got " + order);
}

// Calls f with 0 to size - 1 until it returns true; in random order they begin anywhere.
template <typename F>
bool visit(unsigned size, Order order, const F& f) {
  const unsigned first = order == Order::kRandom ? random() % size : 0;
  for (unsigned i = 0; i < size; ++i) {
    if (f(order == Order::kBackward ? size - 1 - i : (first + i) % size)) {
      return true;
    }
  }
  return false;
}

// Runs what can run of a warp; an exchange that all of it has come to is made.
void run_warp(unsigned begin, Order order) {
  const unsigned end = std::min(begin + kWarp, block_size.x);
  visit(end - begin, order, [&](unsigned lane) {
    if (fibers[begin + lane].state == State::kReady) {
      resume(begin + lane);
    }
    return false;
  });
  if (count(State::kAtExchange, begin, end) == kWarp) {
    for (unsigned i = begin; i < end; ++i) {
      exchanged[i] = fibers[i].value;
    }
    release(begin, end);
  }
}

// A warp may be ahead of the others as far as the barriers allow: one after the other runs to the
// next barrier, or, in random order, any is next at every exchange.
void run_block(Order order) {
  const unsigned threads = block_size.x;
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  while (true) {
    const bool ran = visit(warps, order, [&](unsigned warp) {
      const unsigned begin = warp * kWarp;
      if (count(State::kReady, begin, std::min(begin + kWarp, threads)) == 0) {
        return false;
      }
      run_warp(begin, order);
      return true;
    });
    if (ran) {
      continue;
    }
    const unsigned done = count(State::kDone, 0, threads);
    const unsigned waiting = count(State::kAtBarrier, 0, threads);
    if (done == threads) {
      return;
    }
    if (waiting < threads) {
      throw std::runtime_error(
          "emulated kernel: of " + std::to_string(threads) + " threads " + std::to_string(waiting) +
          " wait at a barrier, " + std::to_string(done) +
          " have ended, the others wait for their warp");
    }
    release(0, threads);
  }
}

}  // namespace

void launch(
    unsigned blocks, int threads, size_t shared_bytes, cudaStream_t,
    const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (blocks == 0 || threads < 1 || threads > kMaxThreads ||
      shared_bytes > static_cast<size_t>(shared_memory_size())) {
    throw std::runtime_error(
        "emulated kernel: " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
        " threads with " + std::to_string(shared_bytes) + " bytes of shared memory");
  }
  const size_t words = (shared_bytes + sizeof(float) - 1) / sizeof(float);
  shared = std::make_unique<float[]>(words);
  running = &kernel;
  block_size = {static_cast<unsigned>(threads)};
  grid_size = {blocks};
  const Order order = wanted_order();
  visit(blocks, order, [&](unsigned index) {
    block = {index};
    std::fill_n(shared.get(), words, std::nanf(""));
    for (unsigned i = 0; i < block_size.x; ++i) {
      start(i);
    }
    run_block(order);
    return false;
  });
}

void* shared_memory() { return shared.get(); }

int shared_memory_size() {
  const char* wanted = std::getenv("EMULATION_SHARED");
  return wanted ? std::atoi(wanted) : 227 << 10;  // that of an H100
}

void barrier() { suspend(State::kAtBarrier); }

const uint64_t* exchange(uint64_t value) {
  current().value = value;
  suspend(State::kAtExchange);
  return exchanged + thread.x / kWarp * kWarp;
}

}  // namespace emulation
