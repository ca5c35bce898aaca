// The CPU ops in the CPU library as torch calls them, on threads that ThreadSanitizer understands:
// no data races, and the bits of one thread. scripts/sanitize.sh builds and runs it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "thread_pool.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int kThreads = 4;

void require(bool condition, const std::string& message) {
  if (!condition) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::quick_exit(1);  // other threads may still run
  }
}

template <size_t outputs, typename... Args>
std::array<StableIValue, outputs> call(const char* op, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  const std::string name = std::string("adaround_ext::") + op;
  require(
      torch_call_dispatcher(name.c_str(), "", stack.data(), TORCH_ABI_VERSION) ==
          AOTI_TORCH_SUCCESS,
      name + " failed");
  std::array<StableIValue, outputs> results;
  std::copy_n(stack.begin(), outputs, results.begin());
  return results;
}

template <size_t outputs, typename... Args>
Tensors call_for_tensors(const char* op, const Args&... args) {
  Tensors tensors;
  for (const StableIValue result : call<outputs>(op, args...)) {
    tensors.push_back(torch::stable::detail::to<Tensor>(result));
  }
  return tensors;
}

std::string use_instruction_set(const std::string& name) {
  return torch::stable::detail::to<std::string>(call<1>("_use_instruction_set", name)[0]);
}

std::vector<std::string> instruction_sets() {
  const std::string best = use_instruction_set("auto");
  std::vector<std::string> names;
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    names.push_back(name);
    if (best == name) {
      break;
    }
  }
  return names;
}

// A random tensor, in [low, high); the same each time.
Tensor random(
    const std::vector<int64_t>& shape, double low, double high,
    ScalarType dtype = ScalarType::Float) {
  const Tensor t = torch::stable::empty(shape, ScalarType::Double);
  double* values = t.mutable_data_ptr<double>();
  uint64_t state = 1;
  for (int64_t i = 0; i < t.numel(); ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    values[i] = low + (high - low) * static_cast<double>(state >> 11) / 9007199254740992.0;
  }
  return torch::stable::to(t, dtype);
}

// Positive definite: 1 on the diagonal, small and symmetric beside it.
Tensor random_gram(int64_t groups, int64_t cols, ScalarType dtype) {
  const Tensor gram = random({groups, cols, cols}, 0.0, 0.02, ScalarType::Double);
  double* values = gram.mutable_data_ptr<double>();
  for (int64_t i = 0; i < groups * cols; ++i) {
    for (int64_t j = 0; j < i % cols; ++j) {
      values[i * cols + j] = values[(i - i % cols + j) * cols + i % cols];
    }
    values[i * cols + i % cols] = 1.0;
  }
  return torch::stable::to(gram, dtype);
}

// Something an op is asked to do; returns all that it has written.
struct Case {
  std::string name;
  std::function<Tensors()> run;
};

Case rounding_step_case(
    const Tensor& weight, const Tensor& v, const Tensor& scale, const Tensor& zero_point) {
  return {"rounding_step_", [=] {
            const std::vector<float> row{20.0f, 0.1f, 0.01f, 0.1f, 0.03f};
            const Tensor schedule = random({1, 5}, 0.0, 1.0);
            std::copy(row.begin(), row.end(), schedule.mutable_data_ptr<float>());
            const Tensors written{
                torch::stable::clone(v), torch::stable::clone(v),
                torch::stable::full(v.sizes(), 1.0, v.scalar_type()), torch::stable::clone(weight),
                torch::stable::full({1}, 0, ScalarType::Long)};
            call<0>(
                "rounding_step_", written[0], written[1], written[2], written[3], weight, weight,
                scale, zero_point, int64_t{0}, int64_t{15}, schedule, written[4], true, false);
            return written;
          }};
}

// A matrix of several chunks a thread, whose rows end within chunks.
void add_rounding_cases(ScalarType dtype, std::vector<Case>& cases) {
  const int64_t rows = 37, cols = 1031;
  const ScalarType arithmetic = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  const Tensor weight = random({rows, cols}, -1.0, 1.0, dtype);
  const Tensor v = random({rows, cols}, -4.0, 4.0, arithmetic);
  const Tensor scale = random({rows, 1}, 0.05, 0.15, arithmetic);
  const Tensor zero_point = random({rows, 1}, 0.0, 15.0, ScalarType::Int);
  const Tensor codes = random({rows, cols}, 0.0, 16.0, ScalarType::Byte);
  const Tensor one = torch::stable::full({}, 1.0, arithmetic);
  const int64_t qmin = 0, qmax = 15;
  const double beta = 8.0;
  const auto add = [&](const char* name, const std::function<Tensors()>& run) {
    cases.push_back({name, run});
  };
  add("soft_quantize", [=] {
    return call_for_tensors<2>("soft_quantize", weight, v, scale, zero_point, qmin, qmax, beta);
  });
  add("soft_quantize_with_grad", [=] {
    return call_for_tensors<4>(
        "soft_quantize_with_grad", weight, v, scale, zero_point, qmin, qmax, beta);
  });
  add("_soft_quantize_backward", [=] {
    return call_for_tensors<1>(
        "_soft_quantize_backward", weight, one, weight, v, scale, zero_point, qmin, qmax, beta);
  });
  add("hard_quantize", [=] {
    return call_for_tensors<1>("hard_quantize", weight, v, scale, zero_point, qmin, qmax);
  });
  add("dequantize",
      [=] { return call_for_tensors<1>("dequantize", codes, scale, zero_point, dtype); });
  cases.push_back(rounding_step_case(weight, v, scale, zero_point));
}

// Rows that no number of threads divides, in two groups with a Gram matrix each.
void add_search_cases(ScalarType dtype, std::vector<Case>& cases) {
  const int64_t rows = 26, cols = 37, qmin = 0, qmax = 15;
  const Tensor codes = random({rows, cols}, 0.0, 16.0, ScalarType::Byte);
  const Tensor residual = random({rows, cols}, -1.0, 1.0, dtype);
  const Tensor gram = random_gram(2, cols, dtype);
  const Tensor scale = random({rows, 1}, 0.05, 0.15, dtype);
  const Tensor zero_point = random({rows, 1}, 0.0, 15.0, ScalarType::Int);
  const Tensor order = torch::stable::empty({2, cols}, ScalarType::Long);
  for (int64_t i = 0; i < 2 * cols; ++i) {
    order.mutable_data_ptr<int64_t>()[i] = cols - 1 - i % cols;
  }
  cases.push_back(
      {"refine_", [=] {
         const Tensors written{torch::stable::clone(codes), torch::stable::clone(residual)};
         call<0>("refine_", written[0], written[1], gram, scale, qmin, qmax, int64_t{10});
         return written;
       }});
  cases.push_back({"tabu_search_", [=] {
                     const Tensors written{
                         torch::stable::clone(codes), torch::stable::clone(residual)};
                     call<0>(
                         "tabu_search_", written[0], written[1], gram, scale, qmin, qmax,
                         int64_t{50}, int64_t{1});
                     return written;
                   }});
  cases.push_back({"gptq", [=] {
                     return call_for_tensors<1>(
                         "gptq", residual, gram, order, scale, zero_point, qmin, qmax);
                   }});
}

// Rows that are cut between threads. Where bits are no whole lane, stores overlap within a run.
void add_packing_cases(int64_t bits, std::vector<Case>& cases) {
  const int64_t rows = 5, cols = 20011, qmin = 0;
  const Tensor codes = random({rows, cols}, 0.0, static_cast<double>(1 << bits), ScalarType::Byte);
  const Tensor packed = call_for_tensors<1>("pack_bits", codes, bits, qmin)[0];
  cases.push_back(
      {"pack_bits", [=] { return call_for_tensors<1>("pack_bits", codes, bits, qmin); }});
  cases.push_back({"unpack_bits", [=] {
                     return call_for_tensors<1>("unpack_bits", packed, bits, cols, qmin);
                   }});
}

void add_linear_case(int64_t positions, int64_t rows, int64_t bits, std::vector<Case>& cases) {
  const int64_t cols = 200, qmin = 0;
  const Tensor x = random({positions, cols}, -1.0, 1.0);
  const Tensor codes = random({rows, cols}, 0.0, static_cast<double>(1 << bits), ScalarType::Byte);
  const Tensor packed = call_for_tensors<1>("pack_bits", codes, bits, qmin)[0];
  const Tensor scale = random({rows, 5}, 0.05, 0.15);
  const Tensor zero_point = random({rows, 5}, 0.0, 15.0, ScalarType::Int);
  const std::optional<Tensor> bias = random({rows}, -1.0, 1.0);
  cases.push_back({"packed_linear", [=] {
                     return call_for_tensors<1>(
                         "packed_linear", x, packed, scale, zero_point, bias, bits, qmin);
                   }});
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const ScalarType dtype :
       {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double}) {
    add_rounding_cases(dtype, cases);
  }
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::Double}) {
    add_search_cases(dtype, cases);
  }
  for (int64_t bits = 1; bits <= 8; ++bits) {
    add_packing_cases(bits, cases);
  }
  add_linear_case(1, 1001, 3, cases);
  add_linear_case(2, 1001, 4, cases);
  add_linear_case(70, 33, 8, cases);
  return cases;
}

bool same_bits(const Tensors& a, const Tensors& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const size_t bytes = static_cast<size_t>(a[i].numel()) * a[i].element_size();
    if (std::memcmp(a[i].const_data_ptr(), b[i].const_data_ptr(), bytes) != 0) {
      return false;
    }
  }
  return true;
}

void test_threads_give_the_bits_of_one() {
  const std::vector<Case> cases = all_cases();
  for (const std::string& set : instruction_sets()) {
    use_instruction_set(set);
    for (const Case& c : cases) {
      set_threads(1);
      const Tensors alone = c.run();
      set_threads(kThreads);
      const Tensors together = c.run();
      require(most_threads() == kThreads, c.name + " was not divided");
      require(same_bits(alone, together), c.name + " differs on threads with " + set);
    }
  }
}

// Runs the case while a thread chooses instruction sets: every result is that of one of them.
void check_while_sets_change(
    const Case& c, const std::vector<std::string>& sets, const std::vector<Tensors>& expected) {
  std::atomic<bool> done = false;
  std::thread chooser([&] {
    for (size_t i = 0; !done; ++i) {
      use_instruction_set(sets[i % sets.size()]);
    }
  });
  for (int i = 0; i < 20; ++i) {
    const Tensors got = c.run();
    bool found = false;
    for (const Tensors& one : expected) {
      found = found || same_bits(one, got);
    }
    require(found, c.name + " mixed instruction sets");
  }
  done = true;
  chooser.join();
}

void test_instruction_sets_change_between_ops() {
  std::vector<Case> cases;
  add_rounding_cases(ScalarType::Float, cases);
  add_search_cases(ScalarType::Float, cases);
  add_packing_cases(3, cases);
  add_linear_case(70, 33, 3, cases);
  const std::vector<std::string> sets = instruction_sets();
  set_threads(kThreads);
  size_t unlike = 0;
  for (const Case& c : cases) {
    std::vector<Tensors> expected;
    for (const std::string& set : sets) {
      use_instruction_set(set);
      expected.push_back(c.run());
    }
    unlike += !same_bits(expected.front(), expected.back());
    check_while_sets_change(c, sets, expected);
  }
  require(sets.size() == 1 || unlike > 0, "instruction sets cannot be told apart");
}

}  // namespace

int main() {
  test_threads_give_the_bits_of_one();
  test_instruction_sets_change_between_ops();
  std::printf("threads: no races, the bits of one thread\n");
}
