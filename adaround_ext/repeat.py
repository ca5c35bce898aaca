"""The same step over and over; on CUDA as a graph, which the host starts once for many steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

_CHUNK = 25  # steps in a graph: the last ones of a run, fewer than these, are plain
_BEFORE = 3  # plain steps first, in which buffers are made and libraries set themselves up
_LEAST = 4 * _CHUNK  # fewer steps are not worth a capture


def repeat(
    step: Callable[[], None],
    count: int,
    device: torch.device,
    generator: torch.Generator | None,
    done: Callable[[int], object],
) -> None:
    """Does ``step`` ``count`` times.

    On CUDA a step must work on the same memory every time and ask the device for nothing; where it
    cannot be captured, a RuntimeWarning says so and the steps are launched one by one. generator:
    what it draws from, on ``device``. done: called with the number of steps that were added.
    """
    left = count
    if device.type == "cuda" and count >= _LEAST:
        with torch.cuda.device(device):
            left -= _replayed(step, count, generator, done)
    for _ in range(left):
        step()
        done(1)


def _replayed(
    step: Callable[[], None],
    count: int,
    generator: torch.Generator | None,
    done: Callable[[int], object],
) -> int:
    """How many of the steps were done."""
    step()  # what it keeps belongs to the caller's stream
    caller, own = torch.cuda.current_stream(), torch.cuda.Stream()
    own.wait_stream(caller)
    with torch.cuda.stream(own):
        for _ in range(_BEFORE - 1):
            step()
        done(_BEFORE)
        steps = _BEFORE
        if graph := _captured(step, generator):
            for _ in range((count - _BEFORE) // _CHUNK):
                graph.replay()
                done(_CHUNK)
                steps += _CHUNK
    caller.wait_stream(own)
    own.synchronize()  # before the graph's memory is given back
    return steps


def _captured(
    step: Callable[[], None], generator: torch.Generator | None
) -> torch.cuda.CUDAGraph | None:
    """A graph of a chunk of steps, none of which is done yet; None where that cannot be."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    try:
        # torch.cuda.graph would also collect garbage and empty the allocator's cache each time.
        # Other threads may use CUDA meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(_CHUNK):
                step()
        finally:
            graph.capture_end()
    except RuntimeError as error:
        text = f"steps are launched one by one, since they do not fit into a CUDA graph: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return None
    return graph
