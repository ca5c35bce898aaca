#!/usr/bin/env bash
# Everything that needs a CUDA device: build in place, the GPU half of the tests, compute-sanitizer,
# benchmarks. Run it from anywhere; needs torch with CUDA, nvcc, pybind11, ninja, pytest, hypothesis.
#   scripts/gpu_check.sh [folder for logs and results]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_check_output}
mkdir -p "$out"
python=${PYTHON:-python3}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} \
  "$python" setup.py -q build_ext --inplace 2>&1 | tee "$out/build.log" | tail -n 3
"$python" -c "import json, adaround_ext; print(json.dumps(adaround_ext.build_info(), indent=1))"

"$python" -m pytest -q -k cuda 2>&1 | tee "$out/tests.log" | tail -n 15

# The op tests alone: the tools slow kernels down by a factor of tens.
for tool in memcheck racecheck initcheck synccheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 240 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$python" -m pytest -q -x -k "cuda and (sizes or refine or gptq or tabu)" \
    tests/test_ops.py tests/test_refine.py tests/test_gptq.py tests/test_tabu_search.py \
    tests/test_packing.py tests/test_packed_linear.py \
    >"$out/$tool.log" 2>&1 && echo "$tool: clean" || echo "$tool: see $out/$tool.log"
done

"$python" -m benchmarks ops --device cuda --output "$out/bench_ops.json"
"$python" -m benchmarks layer --device cuda --quick --output "$out/bench_layer.json"
