#!/usr/bin/env bash
# Everything that needs a CUDA device: build in place, the GPU half of the tests, compute-sanitizer,
# benchmarks. Run it from anywhere; needs torch with CUDA, nvcc, pybind11, ninja, pytest, hypothesis,
# and transformers for the decoder.
#   scripts/gpu_check.sh [--parts "build tests sanitizers kernels models"] [folder for logs, results]
# Parts are cut to be run one at a time, for who has the machine for minutes. LIBRARIES=folder takes
# _C_cpu.so and _C_cuda.so from there (built elsewhere, with another torch) instead of building them.
set -euo pipefail
cd "$(dirname "$0")/.."
parts="build tests sanitizers kernels models"
if [[ ${1:-} == --parts ]]; then
  parts=$2
  shift 2
fi
out=${1:-gpu_check_output}
mkdir -p "$out"
python=${PYTHON:-python3}
wanted() { [[ " $parts " == *" $1 "* ]]; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
if wanted build; then
  FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} \
    "$python" setup.py -q build_ext --inplace 2>&1 | tee "$out/build.log" | tail -n 3
  if [[ -n ${LIBRARIES:-} ]]; then cp "$LIBRARIES"/_C_{cpu,cuda}.so adaround_ext; fi
fi
"$python" -c "import json, adaround_ext; print(json.dumps(adaround_ext.build_info(), indent=1))"

if wanted tests; then
  # A failure is reported and what follows still runs: time on such machines is short.
  "$python" -m pytest -q -k cuda 2>&1 | tee "$out/tests.log" | tail -n 40 || true
fi

if wanted sanitizers; then # the op tests alone: the tools slow kernels down by a factor of tens
  for tool in memcheck racecheck initcheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 140 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 "$python" -m pytest -q -x -k "cuda and (sizes or refine or gptq or tabu)" \
      tests/test_ops.py tests/test_rounding_step.py tests/test_refine.py tests/test_gptq.py \
      tests/test_tabu_search.py tests/test_packing.py tests/test_packed_linear.py \
      >"$out/$tool.log" 2>&1 && echo "$tool: clean" || echo "$tool: status $?, see $out/$tool.log"
  done
fi

if wanted kernels; then
  "$python" -m benchmarks ops --device cuda --output "$out/ops.json"
  "$python" -m benchmarks loop --device cuda --output "$out/loop.json"
  "$python" -m benchmarks packed --device cuda --output "$out/packed.json"
fi

if wanted models; then
  shapes() { "$python" -m examples.shapes --device cuda "$@"; }
  shapes --models resnet18 resnet50 mobilenet_v2 --images 1024 --output "$out/shapes_cnn.json"
  shapes --models resnet18 mobilenet_v2 --images 1024 --mode parallel --output "$out/shapes_cnn_parallel.json"
  for preset in fast balanced; do
    shapes --models llama-8b --dtype bfloat16 --group-size 128 --preset "$preset" \
      --output "$out/shapes_llama_8b_$preset.json"
  done
  "$python" -m benchmarks layer --device cuda --quick --output "$out/layer.json"
fi
