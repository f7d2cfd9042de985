"""Targets: which modules of a model a configuration means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .architectures import DEFAULTS, Targets, closest_model_types, model_types_of
from .errors import NoMatchingPeftModuleError, did_you_mean, doubt, shorten
from .holder import BaseTunerLayer
from .kinds import kind_of, supported_kinds

ALL_LINEAR = "all-linear"
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


def resolve_defaults(
    config: Any,
    model: nn.Module,
    look_up: Callable[[str], Targets | list[str] | None],
    known: Iterable[str] = DEFAULTS,
    field: str = "target_modules",
) -> set[str] | str:
    """The configured modules, or those that the model's type has by default.

    Args:
        config: Configuration with that field.
        model: The base model.
        look_up: The method's defaults for a model type, or ``None``.
        known: The types that it knows, for the message.
        field: The field that names the modules.

    Raises:
        ValueError: None are configured, and the model's type is not known.
    """
    if (configured := getattr(config, field)) is not None:
        return configured
    model_config = getattr(model, "config", None)
    candidates = model_types_of(model_config) if model_config is not None else []
    for model_type in candidates:
        targets = look_up(model_type)
        if targets is not None:
            if model_type != candidates[0]:
                doubt(
                    f"No default {field} are known for models of type {candidates[0]!r}; those of the {model_type!r} inside "
                    f"it are used: {targets!r}. They may reach other parts of the model too: name {field} to be sure."
                )
            return targets if isinstance(targets, str) else set(targets)
    mend = "Name the modules to adapt, or use 'all-linear'." if field == "target_modules" else "Give [] for none."
    if not candidates:
        raise ValueError(
            f"Please specify `{field}` in `peft_config`: the model, a {type(model).__name__}, has no config.model_type "
            f"to look up defaults for. {mend}"
        )
    close = closest_model_types(candidates[0], known=known)
    hint = f" Known types with a similar name: {shorten(close)}." if close else ""
    raise ValueError(
        f"Please specify `{field}` in `peft_config`: no default is known for models of type {candidates[0]!r}.{hint} "
        f"{mend}"
    )


def find_targets(model: nn.Module, config: Any, targets: set[str] | str) -> dict[str, nn.Module]:
    """The modules that a configuration means, by full name, in the model's order.

    Args:
        model: The base model; it may already hold adapters.
        config: Configuration with any of ``exclude_modules``, ``layers_to_transform`` and ``layers_pattern``.
        targets: Names or suffixes, a regular expression for the full name, or ``"all-linear"``.

    Raises:
        NoMatchingPeftModuleError: Nothing matches; the message lists candidates.
    """
    modules = base_modules(model)
    excluded: set[str] | str | None = getattr(config, "exclude_modules", None)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        found = {name: modules[name] for name in all_linear_names(model, modules)}
        used: set[str] = set()
    else:
        found, used = {}, set()
        layer_filter = _layer_filter(config)
        for name, module in modules.items():
            hit = match(targets, name)
            if hit is not None:
                used.add(hit)
                if layer_filter(name):
                    found[name] = module
    kept = {n: m for n, m in found.items() if excluded is None or match(excluded, n) is None}
    if not kept:
        raise NoMatchingPeftModuleError(_nothing_message(config, modules, targets, found, used, excluded))
    if excluded is not None:
        names = [excluded] if isinstance(excluded, str) else sorted(excluded)
        idle = [e for e in names if not any(match(e if isinstance(excluded, str) else {e}, n) for n in found)]
        if idle:
            doubt(
                f"exclude_modules {shorten(idle)} match none of the targeted modules. Remove them, or mend the names."
            )
    if not isinstance(targets, str) and config.target_modules is not None:  # defaults may cover more than one variant
        idle = sorted(targets - used)
        if idle:
            known = last_names(modules)
            hints = "; ".join(f"{t!r}{did_you_mean(t.rsplit('.', 1)[-1], known)}" for t in idle)
            doubt(
                f"Some of the target_modules match no module of the model: {hints}. The others were adapted. Remove or mend "
                "these names."
            )
    return kept


def match(targets: set[str] | str, name: str) -> str | None:
    """The target that means this module name: equal, or its end at a dot; a string is a regular expression for all of it."""
    if isinstance(targets, str):
        return targets if re.fullmatch(targets, name) else None
    if name in targets:
        return name
    # Try the suffixes of the name rather than every target: names have few parts.
    position = name.find(".")
    while position >= 0:
        suffix = name[position + 1 :]
        if suffix in targets:
            return suffix
        position = name.find(".", position + 1)
    return None


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of the base model by name, as if no adapter had been added: adapted layers stand for their base layer."""
    modules: dict[str, nn.Module] = {}
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if name:
            modules[name] = module
        if isinstance(module, BaseTunerLayer):
            continue
        for child_name, child in reversed(module._modules.items()):
            attached = isinstance(child, BaseTunerLayer) and child.is_attached
            if (
                child is not None and not attached and child_name != "parametrizations"
            ):  # which torch adds, to compute weights
                stack.append((f"{name}.{child_name}" if name else child_name, child))
    return modules


def all_linear_names(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Names of all linear layers but the output head, which ``"all-linear"`` means."""
    heads: set[int] = set()
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        heads.add(id(output))
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) and type(model).__name__.endswith("ForSequenceClassification"):
        heads |= {id(m) for n, m in modules.items() if n in HEAD_NAMES or n.rsplit(".", 1)[0] in HEAD_NAMES}
    names = []
    for name, module in modules.items():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        kind = kind_of(base)
        if kind is not None and kind.name in ("Linear", "Conv1D", "opaque linear"):
            if id(module) not in heads and id(base) not in heads:
                names.append(name)
    return names


def shortest_names(found: Iterable[str], modules: Iterable[str]) -> set[str]:
    """The shortest suffixes that together mean exactly the modules found, and no other.

    Args:
        found: Full names to describe.
        modules: Names of all modules.
    """
    found = set(found)
    others = {name for name in modules if name not in found}
    taken = {suffix for name in others for suffix in _suffixes(name)}
    return {next((s for s in _suffixes(name) if s not in taken), name) for name in found}


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


HEAD_NAMES = ("classifier", "score")
"""Attribute names of classification heads in transformers."""


def last_names(modules: Iterable[str]) -> list[str]:
    """The distinct last parts of module names, in order, numbers apart."""
    return list(dict.fromkeys(last for name in modules if not (last := name.rsplit(".", 1)[-1]).isdigit()))


def check_supported(name: str, module: nn.Module, parent: nn.Module, any_module: bool = False) -> None:
    """Refuse a target that cannot be adapted.

    Args:
        name: Its name.
        module: The target.
        parent: The module that it is a child of.
        any_module: Whether the method also works on modules without a matrix.

    Raises:
        ValueError: The layer's kind is not supported, or its parent would pass over the adapter.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if kind_of(base, any_module) is None:
        raise ValueError(
            f"Target module {name!r} is a {type(base).__name__}, which cannot be adapted. Supported kinds of layers: "
            f"{', '.join(supported_kinds())}. Name the layers inside it, or leave it out with `exclude_modules`."
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"Target module {name!r} lies inside nn.MultiheadAttention, which reads its weight directly and would pass over "
            "the adapter. Leave it out with `exclude_modules`."
        )


def repeats_rows(parent: nn.Module) -> bool:
    """Whether a block gives its layers one row for all of the batch, and repeats what comes out: DeBERTa-v2's relative positions."""
    return type(parent).__name__ == "DisentangledSelfAttention" and hasattr(parent, "query_proj")


def _layer_filter(config: Any) -> Any:
    """A function that says whether a module lies in one of the layers of ``layers_to_transform``."""
    layers = getattr(config, "layers_to_transform", None)
    if layers is None:
        return lambda name: True
    wanted = {layers} if isinstance(layers, int) else set(layers)
    patterns = getattr(config, "layers_pattern", None) or []
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    regexes = [rf".*\.{p}\.(\d+)\." for p in patterns] or [r".*\.[^.]*\.(\d+)\."]

    def inside(name: str) -> bool:
        # A leading dot lets patterns match at the start of the name too, and one at the end the layer itself.
        for padded in (f".{name}", f".{name}."):
            for regex in regexes:
                if (found := re.match(regex, padded)) is not None:
                    return int(found.group(1)) in wanted
        return False

    return inside


def _nothing_message(
    config: Any,
    modules: dict[str, nn.Module],
    targets: set[str] | str,
    found: dict[str, nn.Module],
    used: set[str],
    excluded: set[str] | str | None,
) -> str:
    asked = repr(targets) if isinstance(targets, str) else shorten(sorted(targets))
    if found:
        return f"No modules are left to adapt: all matches of target_modules {asked} are excluded by {excluded!r}."
    layers = getattr(config, "layers_to_transform", None)
    if used and layers is not None:
        return (
            f"No modules were targeted: target_modules {asked} exist, but none in the layers_to_transform {layers} with "
            f"layers_pattern {getattr(config, 'layers_pattern', None)!r}. Check the numbers and the name of the layer list."
        )
    candidates = list(
        dict.fromkeys(
            n.rsplit(".", 1)[-1]
            for n, m in modules.items()
            if kind_of(m.get_base_layer() if isinstance(m, BaseTunerLayer) else m) is not None
        )
    )
    last = [t.rsplit(".", 1)[-1] for t in ([] if isinstance(targets, str) else targets)]
    hints = "".join(did_you_mean(t, candidates) or did_you_mean(t, last_names(modules)) for t in last)
    return (
        f"Target modules {asked} not found in the base model{hints}. Please check the target modules and try again. "
        f"Modules that can be adapted here: {shorten(candidates, 20)}."
    )
