"""The native libraries: what build_info says, and the choice of the instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import adaround_ext
from adaround_ext import ops
from adaround_ext.ops import library
from tests.emulation import EMULATED, PRETENDED
from tests.emulation.pretended import cuda_device
from tests.support.helpers import INSTRUCTION_SETS, make_sample


def test_build_info() -> None:
    info = adaround_ext.build_info()
    assert set(info) == {
        "version",
        "compiler",
        "torch_built_with",
        "instruction_sets",
        "cuda_toolkit",
        "cuda_architectures",
        "torch",
        "instruction_set",
        "cuda_loaded",
    }
    assert info["torch"] == torch.__version__
    assert info["instruction_set"] in info["instruction_sets"]
    assert info["instruction_sets"][0] == "baseline"
    assert bool(info["cuda_toolkit"]) == bool(info["cuda_architectures"])
    assert not info["cuda_loaded"] or info["cuda_toolkit"]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_use_instruction_set(name: str) -> None:
    before = library.use_instruction_set()
    try:
        assert library.use_instruction_set(name) == name
        assert library.use_instruction_set() == name  # asking changes nothing
        assert library.build_info()["instruction_set"] == name
    finally:
        assert library.use_instruction_set("auto") == INSTRUCTION_SETS[-1]  # the best
        library.use_instruction_set(before)


def test_unknown_instruction_set() -> None:
    before = library.use_instruction_set()
    with pytest.raises(ValueError, match=r'name must be "auto", "baseline" or .* got "sse9"'):
        library.use_instruction_set("sse9")
    assert library.use_instruction_set() == before


def test_instruction_sets_agree() -> None:
    sample = make_sample(torch.device("cpu"), 16, 67, grid=(8, False, "each", 1))
    results = []
    try:
        for name in INSTRUCTION_SETS:
            library.use_instruction_set(name)
            codes = ops.hard_quantize(*sample.args)
            results.append((*ops.soft_quantize_with_grad(*sample.args, 4.0), codes))
    finally:
        library.use_instruction_set("auto")
    for other in results[1:]:
        assert torch.equal(other[-1], results[0][-1])
        torch.testing.assert_close(other[:-1], results[0][:-1], rtol=1e-5, atol=1e-5)


def test_environment_variable_makes_the_first_choice() -> None:
    code = "from adaround_ext.ops import library; print(library.use_instruction_set())"
    environment = os.environ | {"ADAROUND_EXT_ISA": "baseline"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "baseline"


def test_loading_the_libraries_keeps_denormals() -> None:
    # Code built with -ffast-math would flush them to zero in the whole process.
    tiny = torch.full((64,), torch.finfo(torch.float32).tiny)
    assert ((tiny / 4) * 4 == tiny).all()


PACKAGE = Path(adaround_ext.__file__).parent


def unbuilt(root: Path) -> Path:
    """A copy of the package without its libraries."""
    shutil.copytree(PACKAGE, root / "adaround_ext", ignore=shutil.ignore_patterns("*.so", "__py*"))
    return root


def said_by_import(folder: Path, *path: Path) -> str:
    """The last line of an import in ``folder`` with these on the path behind it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    out = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, ''); import adaround_ext"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return out.stderr.splitlines()[-1] if out.returncode else ""


def test_an_unbuilt_source_tree_says_what_it_hides(tmp_path: Path) -> None:
    clone, installed = unbuilt(tmp_path / "clone"), tmp_path / "site-packages"
    (clone / "csrc").mkdir()
    (clone / "setup.py").touch()
    (installed / "adaround_ext").mkdir(parents=True)
    (installed / "adaround_ext" / "_C_cpu.so").touch()
    said = said_by_import(clone, installed)
    assert said.startswith(f"ImportError: adaround_ext is imported from its source tree {clone}, ")
    assert f"hides the one that is installed in {installed / 'adaround_ext'}. Start Py" in said
    assert said.endswith(f"pip install --no-build-isolation -e {clone}")


def test_an_unbuilt_source_tree_alone(tmp_path: Path) -> None:
    clone = unbuilt(tmp_path)
    (clone / "csrc").mkdir()
    (clone / "setup.py").touch()
    said = library.missing_libraries(clone / "adaround_ext", [str(clone), "/nowhere"])
    assert said.startswith(f"adaround_ext is imported from its source tree {clone}, which is not ")
    assert f"(pip install {clone})" in said and "hides" not in said


def test_an_installation_without_libraries_is_no_source_tree(tmp_path: Path) -> None:
    said = said_by_import(unbuilt(tmp_path))
    assert said.startswith(f"ImportError: adaround_ext in {tmp_path / 'adaround_ext'} is not whole")
    assert "source tree:" in said and "hides" not in said


needs_a_cpu_build = pytest.mark.skipif(
    library._CUDA_LOADED or EMULATED or PRETENDED, reason="there are kernels for CUDA"
)


@needs_a_cpu_build
def test_ops_say_that_there_are_no_kernels_for_cuda() -> None:
    """Each op, where torch would send tensors of CUDA."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    names = [name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("adaround_ext::")]  # fmt: skip
    assert {"rounding_step_", "packed_linear", "gptq"} <= set(names)
    for name in set(names) - library._DISPATCHED:
        op = getattr(torch.ops.adaround_ext, name).default
        arguments = [_example(argument.type) for argument in op._schema.arguments]
        with pytest.raises(ValueError, match=r"must be on the CPU, got some on CUDA: .*CUDA"):
            op.redispatch(keys, *arguments)


def _example(kind: torch.Type) -> object:
    plain = {"int": 0, "float": 1.0, "bool": False, "str": ""}
    return torch.zeros(2, 2) if str(kind) == "Tensor" else plain.get(str(kind), torch.float32)


@pytest.mark.parametrize(
    ("device", "rule"),
    [("cuda:1", r"layer\.weight must be on the CPU, got cuda:1: "),
     ("mps", r"layer\.weight must be on the CPU or on CUDA, got mps"),
     ("xpu:0", r"layer\.weight must be on the CPU or on CUDA, got xpu:0")],
)  # fmt: skip
def test_a_device_without_kernels(device: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_CUDA_LOADED", False)
    with pytest.raises(ValueError, match=rule):
        library.check_device("layer.weight", torch.device(device))


def test_devices_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_CUDA_LOADED", True)
    for device in ("cpu", "cuda:3", "meta"):
        library.check_device("weight", torch.device(device))


def test_what_is_missing_is_said_for_the_build_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "Install the CUDA toolkit 12.8 (nvcc)" in library.without_cuda()
    assert "FORCE_CUDA=1 pip install" in library.without_cuda()
    monkeypatch.setattr(torch.version, "cuda", None)  # as that of ROCm is
    assert "Install the CUDA toolkit (nvcc)" in library.without_cuda()
    (tmp_path / "_C_cuda.so").touch()
    assert torch.__version__ in library.without_cuda()


def test_calls_refuse_a_device_without_kernels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before calibration, which may take minutes, is even looked at."""

    def batches() -> object:
        raise AssertionError("the data were read")
        yield

    layer = nn.Linear(8, 4)
    with cuda_device() as device:
        monkeypatch.setattr(library, "_CUDA_LOADED", False)
        model = nn.Sequential(nn.Linear(8, 4)).to(device)
        rule = "must be on the CPU, got cuda:0: adaround_ext"
        with pytest.raises(ValueError, match=f"^weight of Linear.* {rule}"):
            adaround_ext.optimize_layer(model[0], batches())
        with pytest.raises(ValueError, match=f"^device {rule}"):
            adaround_ext.quantize_(model, batches(), progress=False)
        with pytest.raises(ValueError, match=f"^device {rule}"):
            adaround_ext.quantize_(nn.Sequential(layer), batches(), device=device, progress=False)
        with pytest.raises(ValueError, match=rf"^0\.weight {rule}"):
            adaround_ext.sensitivity(model, batches(), progress=False)
        split = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4).to(device))
        with pytest.raises(ValueError, match=rf"^1\.weight {rule}"):
            adaround_ext.quantize_(split, batches(), progress=False)
        monkeypatch.undo()
