#!/usr/bin/env bash
# Makes a built wheel fit for other machines and proves it: a manylinux tag, stripped, no torch
# inside, and op libraries on the stable ABI of the oldest torch that setup.py promises.
#   scripts/check_wheel.sh WHEEL FOLDER
# Needs auditwheel, patchelf and torch-abi-audit on PATH; under Python 3.10, which the last one does
# not run on, the ABI is not checked. The op libraries are the same for every Python.
set -euo pipefail
wheel=$1
folder=$2
oldest_torch=2.10.0
unpacked=$(mktemp -d)
trap 'rm -r "$unpacked"' EXIT

# Torch's own libraries are already in the process that imports the package.
auditwheel repair --strip --exclude 'libtorch*.so' --exclude 'libc10*.so' \
  --wheel-dir "$unpacked/repaired" "$wheel"
repaired=$(echo "$unpacked"/repaired/*.whl)
python3 -m zipfile -e "$repaired" "$unpacked/files"

shopt -s nullglob
for name in _C.*.so _C_cpu.so; do
  found=("$unpacked"/files/adaround_ext/$name)
  [[ -e "${found[0]:-}" ]] || { echo "$wheel lacks $name" >&2; exit 1; }
done
[[ -e "$unpacked/files/adaround_ext/py.typed" ]] || { echo "$wheel lacks py.typed" >&2; exit 1; }
[[ ! -e "$unpacked/files/adaround_ext.libs" ]] || { echo "$wheel bundles libraries" >&2; exit 1; }
for library in "$unpacked"/files/adaround_ext/_C_*.so; do
  if ! command -v torch-abi-audit > /dev/null; then
    python3 -c 'import sys; sys.exit(sys.version_info >= (3, 11))'
    echo "${library##*/}: stable ABI not checked"
    continue
  fi
  report=$(torch-abi-audit --check torch "$library")
  grep -q "Min torch: *$oldest_torch\$" <<< "$report" || { echo "$report" >&2; exit 1; }
  echo "${library##*/}: stable ABI, torch >= $oldest_torch, $(stat -c %s "$library") bytes"
done
mkdir -p "$folder"
cp "$repaired" "$folder/"
echo "$folder/${repaired##*/}: $(stat -c %s "$repaired") bytes"
