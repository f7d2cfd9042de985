"""Reads the files that LyCORIS writes for LoHa and LoKr (Yeh et al. 2023, arXiv 2309.14859)."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import PeftConfig
from .core.checkpoints import report, set_peft_model_state_dict
from .core.errors import doubt, shorten, strictness
from .core.holder import BaseTunerLayer
from .core.kinds import LayerKind, kind_of
from .core.targets import base_modules, match
from .mapping import get_peft_model
from .model import PeftModel
from .tuners.loha import LoHaConfig
from .tuners.lokr import LoKrConfig, factorization

PREFIXES = ("lycoris_", "lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "")


def load_lycoris(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = "default",
    is_trainable: bool = False,
    prefix: str | None = None,
    strict: bool | None = None,
) -> PeftModel:
    """Load a LoHa or LoKr adapter from a file that LyCORIS wrote.

    Args:
        model: The base model, changed in place, or a model with adapters, which gets one more.
        path: The ``.safetensors`` file.
        adapter_name: Name it gets here.
        is_trainable: Load it for further training; otherwise it is frozen, and a new model put into evaluation mode.
        prefix: Load only keys that begin so, where a file holds adapters of several models (``"lora_unet_"``, ``"lora_te_"``);
            found out when not given.
        strict: Raise instead of warning about keys that are not used.

    Returns:
        The model with the adapter in it.

    Raises:
        ValueError: The file holds something else, or does not fit the model. The model is as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"Cannot read {str(path)!r} as a .safetensors file: {error}.") from error
    with strictness(strict):
        config, state = convert_lycoris(
            model.get_base_model() if isinstance(model, PeftModel) else model, tensors, prefix
        )
        config.inference_mode = not is_trainable
        if isinstance(model, PeftModel):
            holder = model
            holder.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
        else:
            holder = get_peft_model(model, config, adapter_name, low_cpu_mem_usage=True)
        try:
            report(set_peft_model_state_dict(holder, state, adapter_name), adapter_name, str(path))
        except Exception:
            with contextlib.suppress(Exception):
                holder.delete_adapter(adapter_name) if holder is model else holder.base_model._unload([], False)
            raise
    if holder is not model and not is_trainable:
        holder.eval()
    elif is_trainable:
        holder.set_requires_grad(adapter_name)
    return holder


def convert_lycoris(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str | None = None
) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Turn the tensors of a LyCORIS file into a configuration and the tensors of an adapter.

    Args:
        model: The base model, to find the modules that the flattened names of the file mean.
        tensors: The file's tensors.
        prefix: As in :func:`load_lycoris`.

    Returns:
        A :class:`~peft.LoHaConfig` or :class:`~peft.LoKrConfig`, and tensors by the keys of an adapter's file.

    Raises:
        ValueError: The tensors are of another method, have no counterpart here, or do not fit the model.
    """
    groups = _by_module(model, tensors, prefix)
    found = {slot for group in groups.values() for slot in group}
    known = {"alpha"}
    if any(slot.startswith("hada_") for slot in found):
        config_cls: Any = LoHaConfig
        known |= {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}
    else:
        config_cls = LoKrConfig
        known |= {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
    if found - known:
        raise ValueError(
            f"The file holds {shorten(sorted(found - known))}, which a {config_cls.__name__} cannot express. Of LyCORIS' methods LoHa "
            "and LoKr are read, without weight decomposition, trained scalars or trained norms, one of the two a file."
        )
    modules = base_modules(model)
    options: dict[str, Any] = {"use_effective_conv2d": bool(found & {"hada_t1", "lokr_t2"})}
    if config_cls is LoKrConfig:
        options["decompose_both"] = "lokr_w1_a" in found
        groups = {name: _plain_conv1d(modules[name], group) for name, group in groups.items()}
        options["decompose_factor"], shapes = _factor({name: _shape(modules[name]) for name in groups}, groups)
        options["w1_shapes"] = {f"^{re.escape(n)}": list(shape) for n, shape in shapes.items()} or None
    ranks = {name: _rank(group, _shape(modules[name])) for name, group in groups.items()}
    alphas = {name: _alpha(group, ranks[name]) for name, group in groups.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = config_cls(
        target_modules=_exact_targets(list(groups), list(modules)),
        r=r,
        alpha=alpha,
        rank_pattern={f"^{re.escape(n)}": v for n, v in ranks.items() if v != r},
        alpha_pattern={f"^{re.escape(n)}": v for n, v in alphas.items() if v != alpha},
        **options,
    )
    state = {
        f"{name}.{slot}": t[..., None] if slot.endswith(("_t1", "_t2")) and t.dim() == 3 else t
        for name, group in groups.items()
        for slot, t in group.items()
        if slot != "alpha"
    }
    return config, state


def _by_module(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str | None
) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors by full module name, then by slot."""
    flat: dict[str, list[str]] = {}
    for name, module in base_modules(model).items():
        if _kind(module) is not None:
            flat.setdefault(name.replace(".", "_"), []).append(name)
    stems = {key: key.partition(".")[0] for key in tensors}
    candidates = PREFIXES if prefix is None else (prefix,)
    prefix = max(candidates, key=lambda p: sum(s.startswith(p) and s.removeprefix(p) in flat for s in stems.values()))
    groups: dict[str, dict[str, torch.Tensor]] = {}
    unused = []
    for key, stem in stems.items():
        names = flat.get(stem.removeprefix(prefix), []) if stem.startswith(prefix) else []
        if len(names) > 1:
            raise ValueError(f"The name {stem!r} may mean any of {shorten(names)}, whose names differ only in dots.")
        if names:
            groups.setdefault(names[0], {})[key.partition(".")[2]] = tensors[key]
        elif candidates is PREFIXES or stem.startswith(prefix):
            unused.append(key)
    if not groups:
        raise ValueError(
            f"None of the file's modules is in the model. The file names {shorten(sorted(set(stems.values())), 4)}; the model has "
            f"{shorten(flat, 4)}. Is the base model the right one?"
        )
    if unused:
        doubt(f"The file holds {len(unused)} tensors for modules that the model does not have: {shorten(unused, 4)}.")
    return groups


def _kind(module: nn.Module) -> LayerKind | None:
    return kind_of(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)


def _shape(module: nn.Module) -> tuple[int, int]:
    """Output and input channels of a module."""
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    kind = kind_of(base)
    assert kind is not None
    rows, columns = kind.shape(base)
    for size in getattr(base, "kernel_size", ()):
        columns //= size
    return rows, columns


def _rank(group: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> int:
    """Rank of a module's factors; where none is a product, one that leaves them whole."""
    factor = next((group[s] for s in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if s in group), None)
    return max(shape) if factor is None else factor.shape[0]


def _alpha(group: Mapping[str, torch.Tensor], rank: int) -> float:
    """Alpha of a module; LyCORIS applies factors that are no products without a scale."""
    if "alpha" not in group or not any(slot.endswith("_b") for slot in group):
        return rank
    return float(group["alpha"])


def _factor(
    shapes: Mapping[str, tuple[int, int]], groups: Mapping[str, Mapping[str, torch.Tensor]]
) -> tuple[int, dict[str, tuple[int, int]]]:
    """The ``decompose_factor`` that splits most modules as the file does, and the shapes of w1 in the others.

    Where LyCORIS' factor divides a dimension the smaller part goes to w1, here the factor itself.
    """
    sizes = {}
    for name, group in groups.items():
        rows = group["lokr_w1"].shape[0] if "lokr_w1" in group else group["lokr_w1_a"].shape[0]
        columns = group["lokr_w1"].shape[1] if "lokr_w1" in group else group["lokr_w1_b"].shape[1]
        sizes[name] = (rows, columns)
    others = {}
    for factor in (-1, *sorted({size for pair in sizes.values() for size in pair})):
        made = {name: tuple(factorization(n, factor)[0] for n in shape) for name, shape in shapes.items()}
        others[factor] = {name: size for name, size in sizes.items() if size != made[name]}
    best = min(others, key=lambda factor: len(others[factor]))
    return best, others[best]


def _plain_conv1d(module: nn.Module, group: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's tensors; of an ``nn.Conv1d`` with a whole w2, whose files here have another order, the product with w1 = 1."""
    kind = _kind(module)
    if kind is None or kind.name != "Conv1d" or "lokr_w2" not in group:
        return group
    w1 = group["lokr_w1"] if "lokr_w1" in group else group["lokr_w1_a"] @ group["lokr_w1_b"]
    scale = float(group["alpha"]) / group["lokr_w1_b"].shape[0] if {"alpha", "lokr_w1_b"} <= group.keys() else 1.0
    return {"lokr_w1": torch.ones(1, 1, dtype=w1.dtype), "lokr_w2": torch.kron(w1[..., None], group["lokr_w2"]) * scale}


def _exact_targets(names: list[str], modules: list[str]) -> set[str] | str:
    """Targets that mean these modules and no other."""
    targets = set(names)
    if all(match(targets, name) is None for name in modules if name not in targets):
        return targets
    return "|".join(re.escape(name) for name in names)
