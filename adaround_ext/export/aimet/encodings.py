"""AIMET encodings: what a file says of a tensor, in both of its versions, and reading it back.

A tensor x is scale (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point). Version 2.0.0
states that as ONNX QuantizeLinear does. 1.0.0 states offset = -zero_point, less 2^(bits-1) for
signed codes, as if codes were unsigned; axes go without saying, those of the operator (AXES); and
blocks of a MatMul are listed output by output. Source: aimet_onnx 2.42, _encoding.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np

from adaround_ext.grid import quant_range

VERSIONS = ("1.0.0", "2.0.0")
# Of the operators that weights belong to: the axes of output channels, and of blocks of inputs.
AXES = {"Conv": (0, 1), "ConvTranspose": (1, 0), "MatMul": (1, 0)}


@dataclass(frozen=True, eq=False)
class Encoding:
    """The grid of a tensor.

    scale float64 and zero_point int64: []; [channels], along ``channel_axis``; or, with block_size,
    of as many dimensions as the tensor, 1 but along ``channel_axis`` and, the number of blocks,
    along ``block_axis``.
    """

    bits: int
    symmetric: bool
    scale: np.ndarray
    zero_point: np.ndarray
    channel_axis: int | None = None
    block_axis: int | None = None
    block_size: int | None = None

    def along(self, operator: str, runs: np.ndarray) -> Encoding:
        """The same with scales along the axes of an operator.

        runs: which of all scales each number of the weight has, in the weight's shape there.
        ValueError where they do not lie along those axes.
        """
        scale, zero_point = self.scale.reshape(-1), self.zero_point.reshape(-1)
        if scale.size == 1:
            return replace(self, scale=scale[0], zero_point=zero_point[0])
        channel, block = AXES[operator]
        size = _run_length(runs, block)
        # One number for each channel and block.
        starts = [slice(0, 1)] * runs.ndim
        starts[channel], starts[block] = slice(None), slice(None, None, size)
        which = runs[tuple(starts)]
        if not (which.repeat(size, block) == runs).all():
            axes = f"output channels and blocks of inputs, axes {channel} and {block}"
            rule = f"AIMET has scales along {axes} of the {list(runs.shape)} of {operator}"
            raise ValueError(f"{rule}, got {scale.size} that lie otherwise")
        if size == runs.shape[block]:
            block_axis, block_size, which = None, None, which.reshape(-1)
        else:
            block_axis, block_size = block, size
        return Encoding(
            self.bits,
            self.symmetric,
            scale[which],
            zero_point[which],
            channel,
            block_axis,
            block_size,
        )

    def entry(self, name: str, version: str) -> dict[str, Any]:
        """What a file of this version has for the tensor ``name``."""
        return {"name": name} | (self._entry_1() if version == "1.0.0" else self._entry_2())

    def _entry_1(self) -> dict[str, Any]:
        scale, zero_point = self.scale, self.zero_point
        if self._transposed:
            scale, zero_point = scale.T, zero_point.T
        shift = 1 << (self.bits - 1) if self.symmetric else 0
        entry: dict[str, Any] = {
            "dtype": "INT",
            "bw": self.bits,
            "is_sym": self.symmetric,
            "enc_type": self._type,
            "scale": scale.reshape(-1).tolist(),
            "offset": (-zero_point.reshape(-1) - shift).astype(np.float64).tolist(),
        }
        return entry if self.block_size is None else entry | {"block_size": self.block_size}

    def _entry_2(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "output_dtype": f"{'' if self.symmetric else 'u'}int{self.bits}",
            "y_scale": self.scale.tolist(),
        }
        if self.zero_point.any():
            entry["y_zero_point"] = self.zero_point.tolist()
        axis = self.channel_axis if self.block_size is None else self.block_axis
        if axis is not None:
            entry["axis"] = axis
        return entry if self.block_size is None else entry | {"block_size": self.block_size}

    @classmethod
    def read(
        cls, entry: Mapping[str, Any], version: str, shape: Sequence[int], operator: str | None
    ) -> Encoding:
        """An entry for a tensor of this shape, a weight of ``operator`` (None: an activation)."""
        channel, block = (None, None) if operator is None else AXES[operator]
        blocks = entry.get("block_size")
        if version == "1.0.0":
            bits, symmetric, kind = entry["bw"], entry["is_sym"], entry["enc_type"]
            scale = np.asarray(entry["scale"], np.float64)
            shift = 1 << (bits - 1) if symmetric else 0
            zero_point = -np.asarray(entry["offset"], np.int64) - shift
        else:
            sign, _, width = entry["output_dtype"].partition("int")
            bits, symmetric = int(width), not sign
            scale = np.asarray(entry["y_scale"], np.float64)
            zero_point = np.zeros(scale.shape, np.int64) + entry.get("y_zero_point", 0)
            kind = "PER_TENSOR" if "axis" not in entry else "PER_CHANNEL"
            if blocks is not None:
                kind, block = "PER_BLOCK", entry["axis"]
        if kind == "PER_TENSOR":
            return cls(bits, symmetric, scale.reshape(()), zero_point.reshape(()))
        if kind == "PER_CHANNEL":
            return cls(bits, symmetric, scale, zero_point, channel)
        full = [1] * len(shape)
        assert channel is not None and block is not None and blocks is not None
        full[channel], full[block] = shape[channel], shape[block] // blocks
        if version == "1.0.0" and (len(shape), channel) == (2, 1):
            scale, zero_point = (t.reshape(full[::-1]).T for t in (scale, zero_point))
        scale, zero_point = scale.reshape(full), zero_point.reshape(full)
        return cls(bits, symmetric, scale, zero_point, channel, block, blocks)

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """x on the grid, float32, computed in float64."""
        scale, zero_point = (self._spread(t, x.shape) for t in (self.scale, self.zero_point))
        codes = np.round(x.astype(np.float64) / scale) + zero_point
        codes = np.clip(codes, *quant_range(self.bits, self.symmetric))
        steps: np.ndarray = (codes - zero_point).astype(np.float32)
        return steps * scale.astype(np.float32)

    @property
    def _type(self) -> str:
        if self.block_size is not None:
            return "PER_BLOCK"
        return "PER_TENSOR" if self.channel_axis is None else "PER_CHANNEL"

    @property
    def _transposed(self) -> bool:
        """Version 1.0.0 orders blocks of matrices by output, also where those are columns."""
        return self.block_size is not None and self.scale.ndim == 2 and self.channel_axis == 1

    def _spread(self, values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """To what broadcasts to a tensor of this shape."""
        if self.channel_axis is None:
            return values
        if self.block_size is not None:
            assert self.block_axis is not None
            return values.repeat(self.block_size, self.block_axis)
        sizes = [1] * len(shape)
        sizes[self.channel_axis] = -1
        return values.reshape(sizes)


def _run_length(runs: np.ndarray, axis: int) -> int:
    """The length of the longest equal blocks along ``axis`` in which nothing changes."""
    lines = np.moveaxis(runs, axis, 0).reshape(runs.shape[axis], -1)
    changes = np.flatnonzero((lines[1:] != lines[:-1]).any(1)) + 1
    return gcd(runs.shape[axis], *changes.tolist())
