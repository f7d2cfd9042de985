"""Replacing an adapter in use by another one, also in compiled models (``peft.utils.hotswap``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftConfig
from ..core.files import load_peft_weights
from ..core.swapping import check_compatible, prepare, swap


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace the values of an adapter by those of a saved one. Parameters stay the same objects.

    The saved adapter may adapt fewer layers, and have other ranks and alphas. A compiled model goes on without being compiled again if
    it was prepared by :func:`prepare_model_for_compiled_hotswap`.

    Args:
        model: The model, compiled or not.
        model_name_or_path: Folder or Hub id of the saved adapter.
        adapter_name: The adapter in the model.
        torch_device: Where to read the tensors to first.
        **kwargs: ``subfolder`` and download arguments (``revision``, ``token``, …).

    Raises:
        ValueError: Unknown adapter, or the saved one does not fit. The model is as it was.
        RuntimeError: The saved one adapts layers that this one does not.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    weights = load_peft_weights(model_name_or_path, device=torch_device or "cpu", **kwargs)
    swap(model, weights, adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace the values of an adapter by tensors; see :func:`hotswap_adapter`.

    Args:
        model: The model, compiled or not.
        state_dict: The new adapter's tensors by file key.
        adapter_name: The adapter in the model.
        config: The new adapter's configuration.
        parameter_prefix: Accepted for compatibility; the layers know their parameters.

    Raises:
        ValueError: Unknown adapter, or the new one does not fit. The model is as it was.
        RuntimeError: The new one adapts layers that this one does not.
    """
    swap(model, state_dict, adapter_name, config)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Check whether an adapter of one configuration can take the place of one of another.

    Raises:
        ValueError: It cannot; with the fields that differ.
    """
    check_compatible(config0, config1)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room for adapters of other ranks and alphas, before the model is compiled.

    Factors are filled up with zeros to the target rank, and scalings become tensors, so that later swaps change neither shapes nor
    constants. Saved files hold the adapter without that room.

    Args:
        model: A model with adapters, not compiled yet.
        target_rank: Largest rank of all adapters to come; the present one when not given.
        config: No effect: the configurations keep the adapters' own ranks.
        check_compiled: What to do where the model is compiled already: ``"error"``, ``"warn"`` or ``"ignore"``.

    Raises:
        ValueError: It is compiled already, or has no adapters that can be swapped, or one of a larger rank. The model is as it was.
    """
    prepare(model, target_rank, check_compiled)


__all__ = [
    "check_hotswap_configs_compatible", "hotswap_adapter", "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap",
]  # fmt: skip
