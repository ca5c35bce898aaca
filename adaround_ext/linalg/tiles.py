"""Tile sizes: how many elements are worked on at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TileSize(NamedTuple):
    """Elements at a time: what a processor's caches hold, and what is worth a GPU's launches."""

    cpu: int
    cuda: int

    def on(self, device: torch.device) -> int:
        return self.cuda if device.type == "cuda" else self.cpu
