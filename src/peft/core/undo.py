"""Undoing: a model as it was, where a call fails on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .activation import configs_of
from .holder import BaseTunerLayer, adapted_modules
from .replication import is_replicated, restore


@contextlib.contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Within this context an error takes out what was added to a model: adapters, layers, heads, flags and configurations.

    The weights of adapters that were there before are not kept. The cost does not grow with the number of adapters.

    Args:
        model: The base model.
    """
    modules = list(_outside_adapters(model))
    children = [(m, dict(m._modules)) for m in modules]
    flags = [(p, p.requires_grad) for m in modules for p in m._parameters.values() if p is not None]
    config: Any = getattr(model, "config", None)
    values = dict(vars(config)) if hasattr(config, "__dict__") else {}
    labels = model.__dict__.get("num_labels")
    had, known = "peft_config" in model.__dict__, configs_of(model)
    before = dict(known)
    was_replicated = is_replicated(model)
    layers = {id(layer) for _, layer in adapted_modules(model)}
    try:
        yield
    except BaseException:
        if not was_replicated:
            restore(model)
        for _, layer in adapted_modules(model):
            if id(layer) not in layers:
                layer.let_go()
        for module, named in children:
            module._modules.clear()
            module._modules.update(named)
        for _, layer in adapted_modules(model):
            for name in [n for n in layer.adapter_names() if n not in before]:
                layer.delete_adapter(name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        if values:
            config.__dict__.clear()
            config.__dict__.update(values)
        if labels is not None:
            model.num_labels = labels
        if had:
            known.clear()
            known.update(before)
        else:
            model.__dict__.pop("peft_config", None)
        raise


def _outside_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The base model's own modules; of adapted layers what lies under them."""
    stack: list[nn.Module] = [model]
    seen: set[int] = set()
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, BaseTunerLayer):
            stack += [m for key in ("base_layer", "original_module") if (m := module._modules.get(key)) is not None]
            continue
        yield module
        stack += [m for m in module._modules.values() if m is not None]
