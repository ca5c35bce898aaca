#!/usr/bin/env bash
# Runs the wheel in dist/ (make wheel) against a torch: an environment of its own, the op tests and a
# choice of the rest, and a row of the table in docs/measured.md. Prints the row last.
#   scripts/compat.sh TORCH_VERSION [pytest arguments]
#   PYTHON=python3.12 scripts/compat.sh 2.12.0
# RESULTS=FILE.json adds the row to a file, in the place of an older one of the same versions.
# ENVIRONMENT=folder keeps the environment (torch with CUDA: 7 GB); else it goes when the run ends.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=$1
shift
python=${PYTHON:-python3}
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
wheel=$(echo "$PWD"/dist/*-"$tag"-"$tag"-*.whl)
[[ -e "$wheel" ]] || { echo "one wheel for $tag must be in dist/: run make wheel" >&2; exit 1; }

results=${RESULTS:+$(realpath "$RESULTS")}
commit=$(git rev-parse HEAD)
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
environment=${ENVIRONMENT:-$work/venv}
cp -r tests "$work/tests" # away from the tree: adaround_ext must be the installed one
[[ -e "$environment" ]] || "$python" -m venv "$environment"
pip=("$environment/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" "torch==$torch" numpy safetensors tqdm pytest hypothesis
"${pip[@]}" --no-deps --force-reinstall "$wheel"

cd "$work"
tests=(tests/ops/test_*.py tests/{rounding/test_{scales,optimize},statistics/test_moments}.py
  tests/{promises/test_determinism,model/test_{quantize,checkpoint},export/test_safetensors}.py)
status=0
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$environment/bin/python" -m pytest -q -p no:cacheprovider \
  --import-mode=importlib --junitxml=result.xml "${tests[@]}" "$@" || status=$?
"$environment/bin/python" - "$results" "$commit" <<'END'
import json
import platform
import sys
from pathlib import Path
from xml.etree import ElementTree

import torch

import adaround_ext

sys.path.insert(0, ".")
from tests.support.helpers import INSTRUCTION_SETS  # those that this processor has, all of which the tests use

assert "site-packages" in adaround_ext.__file__, adaround_ext.__file__
info = adaround_ext.build_info()
suite = ElementTree.parse("result.xml").getroot().find("testsuite").attrib
tests, skipped = int(suite["tests"]), int(suite["skipped"])
failed = int(suite["failures"]) + int(suite["errors"])
if not torch.version.cuda:
    cuda = "torch without CUDA"
elif not info["cuda_toolkit"]:
    cuda = f"{torch.version.cuda}, wheel without CUDA"
else:
    cuda = f"{torch.version.cuda}, `_C_cuda` " + ("loads" if info["cuda_loaded"] else "DOES NOT LOAD")
    cuda += ", GPU" if torch.cuda.is_available() else ", no GPU"
row = {
    "Python": platform.python_version(),
    "torch": info["torch"],
    "CUDA": cuda,
    "instruction sets": " ".join(INSTRUCTION_SETS),
    "passed": tests - skipped - failed,
    "skipped": skipped,
    "failed": failed,
}
print("| " + " | ".join(row) + " |")
print("| " + " | ".join(map(str, row.values())) + " |")
results, commit = sys.argv[1:]
if results:
    path = Path(results)
    rows = json.loads(path.read_text()) if path.exists() else []
    same = ("Python", "torch", "CUDA")
    rows = [old for old in rows if any(old[name] != row[name] for name in same)]
    path.write_text(json.dumps([*rows, row | {"commit": commit}], indent=1) + "\n")
END
exit $status
