#!/usr/bin/env bash
# The CPU ops under sanitizers, with gcc, in builds of their own in build/sanitize:
#   scripts/sanitize.sh                                both
#   scripts/sanitize.sh address [arguments of pytest]  the op tests, or those named in the
#                                                      arguments, under AddressSanitizer and
#                                                      UndefinedBehaviorSanitizer
#   scripts/sanitize.sh threads                        tests/native under ThreadSanitizer
# Exits with 3 where a build fails. PYTHON and WORKERS as in the Makefile, CXX as in setup.py;
# SANITIZERS=address leaves out the second one, which halves the time of a build.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
cxx=${CXX:-c++}
op_tests=(ops{,_errors,_kinks,_torch} rounding_step refine gptq gptq_factor tabu_search packing
  packed_linear native determinism degenerate bad_input)

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

address() {
  build address "${SANITIZERS:-address,undefined}" __asan_report
  # Of what goes to stderr nothing is seen when a test ends the process: pytest holds it back.
  local reports=$root/build/sanitize/address/report
  rm -f "$reports".*
  # The runtime has to be there first, and with it libstdc++, whose exceptions it watches.
  local preload
  preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
  local tests=("${op_tests[@]/#/$root/tests/test_}")
  if [[ "$*" == *.py* ]]; then tests=(); else tests=("${tests[@]/%/.py}"); fi
  cd build/sanitize/address # the package here goes before the source tree's
  env LD_PRELOAD="$preload" PYTHONMALLOC=malloc PYTHONPATH="$root" OMP_NUM_THREADS=1 \
    ASAN_OPTIONS="detect_leaks=0:log_path=$reports" \
    UBSAN_OPTIONS="print_stacktrace=1:log_path=$reports" \
    "$python" -m pytest --quiet -p no:cacheprovider --rootdir "$root" \
    --config-file "$root/pyproject.toml" --numprocesses "${WORKERS:-2}" -k "not cuda" \
    "$@" "${tests[@]}" || { cat "$reports".* >&2 2> /dev/null; exit 1; }
  cd "$root"
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

case ${1:-both} in
  both)
    address
    threads
    ;;
  address | threads) "$@" ;;
  *)
    sed -n '2,/^[^#]/s/^# \?//p' "$0" >&2
    exit 2
    ;;
esac
