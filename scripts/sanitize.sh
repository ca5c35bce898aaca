#!/usr/bin/env bash
# The ops under sanitizers, with gcc, in builds of their own in build:
#   scripts/sanitize.sh                                all
#   scripts/sanitize.sh address [arguments of pytest]  the op tests, or those named in the
#                                                      arguments, under AddressSanitizer and
#                                                      UndefinedBehaviorSanitizer
#   scripts/sanitize.sh threads                        tests/native under ThreadSanitizer
#   scripts/sanitize.sh cuda [arguments of pytest]     the CUDA kernels as address has the CPU's: run
#                                                      on the processor, see tests/emulation; a
#                                                      block's threads in random order, then in
#                                                      reverse order with little shared memory
# Exits with 3 where a build fails. PYTHON and WORKERS as in the Makefile, CXX as in setup.py;
# SANITIZERS=address leaves out the second one, which halves the time of a build.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
cxx=${CXX:-c++}
searches=(refine gptq tabu_search)
kernels=(emulation ops{,_errors,_kinks,_torch} rounding_step packing "${searches[@]}")
others=(gptq_factor packed_linear library determinism degenerate bad_input) # of the CPU

# build NAME SANITIZERS SYMBOL: a copy of the package whose CPU library needs the symbol.
build() {
  local folder=build/sanitize/$1
  local library=$folder/adaround_ext/_C_cpu.so
  mkdir -p "$folder"
  SANITIZE=$2 USE_CUDA=0 "$python" setup.py --quiet build --build-base "$folder" \
    --build-lib "$folder" > "$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 3; }
  [[ $(nm --dynamic --undefined-only "$library") == *"$3"* ]] ||
    { echo "$library was built without $2" >&2; exit 3; }
}

# tests_in FOLDER NAMES [arguments of pytest]: tests/*/test_NAME.py, from a folder, with
# AddressSanitizer's runtime.
tests_in() {
  # Of what goes to stderr nothing is seen when a test ends the process: pytest holds it back.
  local reports=$1/report
  rm -f "$reports".*
  # The runtime has to be there first, and with it libstdc++, whose exceptions it watches.
  local preload
  preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
  local names name tests=()
  read -ra names <<< "$2"
  cd "$1"
  shift 2
  if [[ "$*" != *.py* ]]; then
    for name in "${names[@]}"; do
      tests+=("$root"/tests/*/test_"$name".py)
    done
  fi
  env LD_PRELOAD="$preload" PYTHONMALLOC=malloc PYTHONPATH="$root" OMP_NUM_THREADS=1 \
    ASAN_OPTIONS="detect_leaks=0:log_path=$reports" \
    UBSAN_OPTIONS="print_stacktrace=1:log_path=$reports" \
    "$python" -m pytest --quiet -p no:cacheprovider --rootdir "$root" \
    --config-file "$root/pyproject.toml" --numprocesses "${WORKERS:-2}" -k "not cuda" \
    "$@" "${tests[@]}" || { cat "$reports".* >&2 2> /dev/null; exit 1; }
  cd "$root"
}

address() {
  build address "${SANITIZERS:-address,undefined}" __asan_report
  # The package there goes before the source tree's.
  tests_in "$root/build/sanitize/address" "${kernels[*]} ${others[*]}" "$@"
}

cuda() {
  export SANITIZE=${SANITIZERS:-address,undefined}
  local folder=$root/build/emulation-${SANITIZE//,/-}
  mkdir -p "$folder"
  PATH=$(dirname "$python"):$PATH # of ninja: the tests build
  EMULATION_ORDER=random tests_in "$folder" "${kernels[*]}" "$@"
  EMULATION_ORDER=backward EMULATION_SHARED=700 tests_in "$folder" "${searches[*]}" "$@"
}

threads() {
  build threads thread __tsan_write
  local folder=build/sanitize/threads torch
  torch=$("$python" -c 'import torch; print(torch.__path__[0])')
  "$cxx" -std=c++17 -O1 -g1 -Wall -fsanitize=thread -DTORCH_TARGET_VERSION=0x020a000000000000 \
    -isystem "$torch/include" tests/native/*.cpp -o "$folder/threads_test" -rdynamic \
    -Wl,--no-as-needed "$folder/adaround_ext/_C_cpu.so" -L"$torch/lib" -ltorch -ltorch_cpu -lc10 \
    -Wl,-rpath,"$root/$folder/adaround_ext",-rpath,"$torch/lib" || exit 3
  OMP_NUM_THREADS=1 "$folder/threads_test"
}

case ${1:-all} in
  all)
    address
    threads
    cuda
    ;;
  address | threads | cuda) "$@" ;;
  *)
    sed -n '2,/^[^#]/s/^# \?//p' "$0" >&2
    exit 2
    ;;
esac
