"""A CUDA device that is not there: tensors that say they are on it, and hold CPU tensors.

Operands on two devices fail as on CUDA, and the package's branches for CUDA are taken. Kernels are
those of the CPU; there are no streams and no graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._copy_from.default}
_ACROSS = {*_COPIES, _aten._to_copy.default}  # may have operands on both devices
# Take indices from the CPU.
_INDEXING = {
    _aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default,
    _aten._index_put_impl_.default,
}  # fmt: skip


class Pretended(Tensor):
    """``inner``, on the CPU, as a tensor of cuda:0."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        # To torch a meta tensor: for one of CUDA it lacks what only builds with CUDA have.
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[no-any-return]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device="meta",
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    device = property(lambda self: _DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    # What torch does without telling a subclass.

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.inner!r})"

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Pretended) or value.shape != self.shape:
            raise NotImplementedError("a pretended tensor takes the data of another one alone")
        self.inner = value.inner

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made: Tensor = Pretended(self.inner.detach().clone())
            if isinstance(self, nn.Parameter):
                made = nn.Parameter(made, self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]  # type: ignore[no-any-return]

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def new_tensor(self, data: Any, **how: Any) -> Tensor:
        return Pretended(self.inner.new_tensor(data, **how))

    def __getitem__(self, index: Any) -> Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        # Of lists torch makes meta tensors, without their values.
        made = [torch.tensor(part) if isinstance(part, list) else part for part in parts]
        return super().__getitem__(tuple(made))


class _Mode(TorchDispatchMode):
    """For calls without a pretended operand: new tensors, and moves to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    _check_devices(func, tensors)
    pretended = {id(t.inner): t for t in tensors if isinstance(t, Pretended)}
    to_device = isinstance(args[0], Pretended) if func in _COPIES else bool(pretended)
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if kwargs.get("device") is not None:
        # torch takes them for meta tensors, and makes some for them.
        to_device = torch.device(kwargs["device"]).type in ("cuda", "meta")
        kwargs["device"] = torch.device("cpu")

    def unwrap(leaf: Any) -> Any:
        if isinstance(leaf, Pretended):
            return leaf.inner
        if isinstance(leaf, Tensor) and leaf.is_meta and pretended:
            if func.namespace != "adaround_ext":
                raise NotImplementedError(f"{func}: a tensor without its values")
            return torch.zeros(leaf.shape, dtype=leaf.dtype)  # a gradient that is not there
        return leaf

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in pretended:  # written in place
            return pretended[id(leaf)]
        given = any(leaf is t for t in tensors)
        return Pretended(leaf) if to_device and not given else leaf

    return tree_map(wrap, func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


def _check_devices(func: Any, tensors: list[Tensor]) -> None:
    """RuntimeError for operands on two devices; a number may come from the CPU."""
    on = {isinstance(t, Pretended) for t in tensors if t.dim() > 0 or isinstance(t, Pretended)}
    indexing = func in _INDEXING and isinstance(tensors[0], Pretended)
    if len(on) == 2 and func not in _ACROSS and not indexing:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({func})"
        )


class _Generator(torch.Generator):
    """The processor's, whatever device is asked for."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


_tensor, _as_tensor = torch.tensor, torch.as_tensor


def _make(data: Any, *, device: Any = None, **how: Any) -> Tensor:
    """torch.tensor, which moves what it makes where no mode sees it."""
    made = _tensor(data, device="cpu", **how)
    return made if device is None else made.to(device)


def _make_as(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    """torch.as_tensor, likewise."""
    made = data if isinstance(data, Tensor) else _as_tensor(data)
    return made.to(device=device or made.device, dtype=dtype or made.dtype)


_FAKES: dict[str, Any] = {
    "torch.tensor": _make,
    "torch.as_tensor": _make_as,
    "torch.Generator": _Generator,
    "torch.cuda._lazy_init": lambda: None,
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.get_device_capability": lambda device=None: (9, 0),
    "torch.cuda.device": lambda device: nullcontext(),
    "torch.cuda.synchronize": lambda device=None: None,
    "torch.cuda.max_memory_allocated": lambda device=None: 0,
    "torch.cuda.mem_get_info": lambda device=None: (1 << 30, 1 << 31),
    "torch.cuda.get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "torch.cuda.set_rng_state": lambda state, device="cuda": None,
    "torch.cuda.manual_seed": lambda seed: None,
    "torch.cuda.manual_seed_all": lambda seed: None,
    "adaround_ext.ops.library._CUDA_LOADED": True,
    "adaround_ext.linalg.cuda_graph._MIN_GRAPHS": 1 << 40,  # steps are launched one by one
}


@contextmanager
def cuda_device() -> Iterator[torch.device]:
    """Within it there is cuda:0."""
    conversion = torch.__future__
    overwritten = conversion.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, fake in _FAKES.items():
            stack.enter_context(mock.patch(name, fake))
        # A module that is moved gets new parameters: the old ones cannot change their device.
        conversion.set_overwrite_module_params_on_conversion(True)
        stack.callback(conversion.set_overwrite_module_params_on_conversion, overwritten)
        stack.enter_context(_Mode())
        yield _DEVICE
