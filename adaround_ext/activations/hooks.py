"""Hooks of a model that quantize its activations: put in, observed, taken out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaround_ext.activations.placement import Kind, Place, Site
from adaround_ext.activations.quantizer import ActivationConfig, ActivationQuantizer
from adaround_ext.activations.ranges import RangeObserver
from adaround_ext.tensors import is_dense

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What a forward that runs through its own submodules, whatever they are, has to name.
_ENUMERATING = {"children", "named_children", "modules", "named_modules", "_modules"}


def attach(
    places: Iterable[Place], model: nn.Module, config: ActivationConfig | None = None
) -> dict[str, ActivationQuantizer]:
    """Registers a quantizer for each place, by its name, and the hooks that call it.

    A quantizer is a submodule of the modules it belongs to, "input_quantizer" or
    "output_quantizer". A module that runs through its own submodules (nn.Sequential and other
    containers, or a forward that asks for its children) must not get another: there the quantizer
    is a plain attribute, and a submodule of the first module within that is none of these, as
    "outer_input_quantizer" or the like. Hooks of other code that are registered later see
    quantized inputs. Raises ValueError, before anything is changed, for modules that are not there
    or have such an attribute already.
    """
    places = list(places)
    modules = dict(model.named_modules())
    for site in (site for place in places for site in place.sites):
        if site.module not in modules:
            raise ValueError(f"places must be of this model, which has no {site.module!r}")
        if hasattr(modules[site.module], site.attribute):
            raise ValueError(f"{site.module or 'the model'} already has {site.attribute!r}")
    attached = {}
    for place in places:
        quantizer = ActivationQuantizer(config)
        for site in place.sites:
            module = modules[site.module]
            _register(module, site.attribute, quantizer)
            hook = partial(
                _quantize_inputs if site.kind == "input" else _quantize_outputs,
                attribute=site.attribute,
                tensors=site.tensors,
            )
            if site.kind == "input":
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = module.register_forward_hook(hook)
            quantizer.handles.append(handle)
        attached[place.name] = quantizer.to(_device(modules[place.sites[0].module], model))
    return attached


def detach(model: nn.Module) -> None:
    """Removes all quantizers of activations from a model, and their hooks.

    Args:
        model: Changed in place; without quantizers nothing happens.
    """
    for quantizer in quantizers(model).values():
        for handle in quantizer.handles:
            handle.remove()
    for module in list(model.modules()):
        for where in (module._modules, module.__dict__):
            for name, value in list(where.items()):
                if isinstance(value, ActivationQuantizer):
                    del where[name]


def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """All quantizers of activations, by their names in ``model.named_modules()``; each once."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, ActivationQuantizer)}


def attached_sites(model: nn.Module) -> dict[str, tuple[Site, ...]]:
    """Where the quantizers of a model are called, by their names: what :func:`attach` was given."""
    sites: dict[ActivationQuantizer, list[Site]] = {q: [] for q in quantizers(model).values()}
    for name, module in model.named_modules():
        for kind, hooks in (
            ("input", module._forward_pre_hooks),
            ("output", module._forward_hooks),
        ):
            for hook in hooks.values():
                if getattr(hook, "func", None) in (_quantize_inputs, _quantize_outputs):
                    site = Site(name, cast(Kind, kind), hook.keywords["tensors"])
                    sites[getattr(module, hook.keywords["attribute"])].append(site)
    return {name: tuple(sites[quantizer]) for name, quantizer in quantizers(model).items()}


@contextmanager
def full_precision_activations(model: nn.Module) -> Iterator[None]:
    """All quantizers of a model let everything through; as they were afterwards."""
    before = {quantizer: quantizer.enabled for quantizer in quantizers(model).values()}
    try:
        for quantizer in before:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in before.items():
            quantizer.enabled = enabled


@dataclass(frozen=True)
class Observation:
    """Quantizers, by name, and what their observers saw."""

    quantizers: Mapping[str, ActivationQuantizer]
    observers: Mapping[str, RangeObserver]

    def set_ranges(self) -> None:
        """Gives every quantizer the range that its observer found.

        Raises ValueError naming one that saw no values; then no range is changed.
        """
        ranges = {name: observer.range() for name, observer in self.observers.items()}
        for name, (low, high) in ranges.items():
            self.quantizers[name].set_range(low, high)


@contextmanager
def observing(
    quantizers: Mapping[str, ActivationQuantizer],
    select: Callable[[str, Tensor], Tensor] | None = None,
) -> Iterator[Observation]:
    """Inside, these quantizers let everything through and their observers see it.

    ``select`` gets each quantizer's name and tensor, and returns what is to be seen of it: the
    tokens that count.
    """
    observers = {name: RangeObserver(q.config, name) for name, q in quantizers.items()}
    try:
        for name, quantizer in quantizers.items():
            chosen = None if select is None else partial(select, name)
            quantizer.observer = partial(_observe, observers[name], chosen)
        yield Observation(quantizers, observers)
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None


def _observe(observer: RangeObserver, select: Callable[[Tensor], Tensor] | None, x: Tensor) -> None:
    observer.observe(x if select is None else select(x))


def _register(module: nn.Module, attribute: str, quantizer: ActivationQuantizer) -> None:
    if not _enumerates(module):
        module.add_module(attribute, quantizer)
        return
    module.__dict__[attribute] = quantizer  # past nn.Module, which would make it a submodule
    holder = next((inner for inner in module.modules() if not _enumerates(inner)), module)
    attribute = f"outer_{attribute}"
    while hasattr(holder, attribute):
        attribute = f"outer_{attribute}"
    holder.add_module(attribute, quantizer)


def _enumerates(module: nn.Module) -> bool:
    """Whether it runs through its submodules, so that it must not get another."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return isinstance(module, _CONTAINERS) or not _ENUMERATING.isdisjoint(
        code.co_names if code else ()
    )


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    """Where its parameters are, or else the model's."""
    for source in (module, model):
        for parameter in source.parameters():
            return parameter.device
    return torch.device("cpu")


def _quantize_inputs(
    module: nn.Module, args: Any, kwargs: Any, *, attribute: str, tensors: tuple[int, ...]
) -> tuple[Any, Any]:
    args, kwargs = _with_quantized((args, kwargs), getattr(module, attribute), tensors)
    return args, kwargs


def _quantize_outputs(
    module: nn.Module, args: Any, output: Any, *, attribute: str, tensors: tuple[int, ...]
) -> Any:
    return _with_quantized(output, getattr(module, attribute), tensors)


def _with_quantized(tree: Any, quantizer: ActivationQuantizer, tensors: tuple[int, ...]) -> Any:
    """``tree`` with the given ones of its tensors, which are the same value, quantized once.

    Modules may ask whether two arguments are the same object: what was one stays one.
    """
    leaves, spec = pytree.tree_flatten(tree)
    dense = [i for i, leaf in enumerate(leaves) if is_dense(leaf)]
    quantized: dict[int, Tensor] = {}
    for number in tensors:
        if number < len(dense):
            leaf = leaves[dense[number]]
            if id(leaf) not in quantized:
                quantized[id(leaf)] = quantizer(leaf)
            leaves[dense[number]] = quantized[id(leaf)]
    return pytree.tree_unflatten(leaves, spec)
