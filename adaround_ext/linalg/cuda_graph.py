"""CUDA graphs of a step that is done over and over: the host starts one for many steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

_STEPS_PER_GRAPH = 25  # small ones
_PLAIN_STEPS = 3  # at first, in which buffers are made and libraries set themselves up
_MIN_GRAPHS = 4  # so many graphs, or a capture is not worth it


def repeat_captured(
    step: Callable[[], None],
    count: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    done: Callable[[int], object] = lambda _: None,
    chunk: int = _STEPS_PER_GRAPH,
) -> None:
    """Does ``step`` ``count`` times.

    On CUDA a step must work on the same memory every time and ask the device for nothing; where it
    cannot be captured, a RuntimeWarning says so and the steps are launched one by one. generator:
    what it draws from, on ``device``. done: called with the number of steps that were added.
    chunk: about how many steps are one graph; those left over at the end are plain.
    """
    left = count
    if device.type == "cuda" and count >= _PLAIN_STEPS + _MIN_GRAPHS * chunk:
        with torch.cuda.device(device):
            left -= _replayed(step, count, generator, done, chunk)
    for _ in range(left):
        step()
        done(1)


def _replayed(
    step: Callable[[], None],
    count: int,
    generator: torch.Generator | None,
    done: Callable[[int], object],
    chunk: int,
) -> int:
    """How many of the steps were done."""
    chunk = _fitting(count - _PLAIN_STEPS, chunk)
    step()  # what it keeps belongs to the caller's stream
    caller, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        for _ in range(_PLAIN_STEPS - 1):
            step()
        done(_PLAIN_STEPS)
        steps = _PLAIN_STEPS
        if graph := _graph_of(step, generator, chunk):
            for _ in range((count - _PLAIN_STEPS) // chunk):
                graph.replay()
                done(chunk)
                steps += chunk
    caller.wait_stream(stream)
    stream.synchronize()  # before the graph's memory is given back
    return steps


def _fitting(count: int, chunk: int) -> int:
    """Of the numbers around ``chunk`` the one that leaves the fewest of ``count`` steps over."""
    return min(range(chunk, chunk + chunk // 2 + 1), key=lambda size: count % size)


def _graph_of(
    step: Callable[[], None], generator: torch.Generator | None, chunk: int
) -> torch.cuda.CUDAGraph | None:
    """A graph of a chunk of steps, none of which is done yet; None where that cannot be."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    if reason := _capture(graph, step, chunk):
        text = f"steps are launched one by one, since {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return None
    return graph


def _capture(graph: torch.cuda.CUDAGraph, step: Callable[[], None], chunk: int) -> str:
    """What prevented it; empty where nothing did."""
    reason = ""
    try:
        # torch.cuda.graph would also collect garbage and empty the allocator's cache each time.
        # Other threads may use CUDA meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(chunk):
                step()
        except RuntimeError as error:
            reason = _reason(error)  # as text: the error itself would hold on to the step's memory
            raise
        finally:
            graph.capture_end()  # raises an error of its own where the capture has failed
    except RuntimeError as error:
        return reason or _reason(error)
    return ""


def _reason(error: RuntimeError) -> str:
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return f"memory ran out while they were captured in a CUDA graph: {error}"
    return f"they do not fit into a CUDA graph: {error}"
