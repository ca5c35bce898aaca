#!/usr/bin/env bash
# Everything that needs a CUDA device: build in place, the GPU half of the tests, compute-sanitizer,
# benchmarks. Run it from anywhere; needs torch with CUDA, nvcc, pybind11, ninja, pytest, pytest-xdist,
# hypothesis, and transformers for the decoder.
#   scripts/gpu_check.sh [--parts "build tests sanitizers kernels models decoder"] [folder for logs, results]
# Parts are cut to be run one at a time, for who has the machine for minutes. LIBRARIES=folder takes
# _C_cpu.so and _C_cuda.so from there (built elsewhere, with another torch) instead of building them.
set -euo pipefail
cd "$(dirname "$0")/.."
parts="build tests sanitizers kernels models decoder"
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
  "$python" -m pytest -q -n "$(nproc)" --dist worksteal -k "cuda and not emulation" 2>&1 |
    tee "$out/tests.log" | tail -n 40 || true
fi

if wanted sanitizers; then # the op tests alone, all tools at once: kernels are tens of times slower
  cores=$(($(nproc) / 4))
  for tool in memcheck racecheck initcheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --target-processes all \
      --error-exitcode 9 "$python" -m pytest -q -x -n "$((cores > 0 ? cores : 1))" \
      -k "cuda and baseline and (sizes or refine or gptq or tabu) and not long" \
      tests/ops/test_{ops,rounding_step,refine,gptq,tabu_search,packing,packed_linear}.py \
      >"$out/$tool.log" 2>&1 && echo "$tool: clean" || echo "$tool: status $?, see $out/$tool.log" &
  done
  wait
fi

bench() { "$python" -m benchmarks "$1" --device cuda --output "$out/$1.json" "${@:2}"; }
if wanted kernels; then
  bench ops
  bench loop
  bench search
  bench packed
  bench layer --shapes decoder.q_proj resnet18.layer1
fi

shapes() { "$python" -m examples.shapes --device cuda --output "$out/shapes_$1.json" "${@:2}"; }
if wanted models; then
  shapes cnn --models resnet18 resnet50 mobilenet_v2 --images 1024
  shapes cnn_parallel --models resnet18 mobilenet_v2 --images 1024 --mode parallel
fi

if wanted decoder; then
  for preset in fast balanced; do
    shapes "llama_8b_$preset" --models llama-8b --dtype bfloat16 --group-size 128 --preset "$preset"
  done
fi
