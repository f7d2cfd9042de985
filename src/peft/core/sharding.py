"""Tensors that lie spread over several processes: recognised, gathered, and filled from whole ones."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .errors import PeftError


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``, as ``fully_shard`` and tensor parallelism make them."""
    module = sys.modules.get("torch.distributed.tensor")  # where it was never imported there are none
    return module is not None and isinstance(tensor, module.DTensor)


def full_shape(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The shape of the tensor with all its parts, or ``None`` where it cannot be told from one of them."""
    if hasattr(tensor, "_fsdp_flattened"):
        return None
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of the tensor only, by any of the ways that are known here."""
    return is_dtensor(tensor) or full_shape(tensor) != tuple(tensor.shape)


def whole(tensor: torch.Tensor, key: str) -> torch.Tensor:
    """The tensor with all its values. Every process of the group has to call this in the same order.

    Args:
        tensor: A tensor, a part of which may lie in other processes.
        key: Its name, for messages.

    Raises:
        PeftError: The values are elsewhere and cannot be fetched from here.
    """
    if is_dtensor(tensor):
        return tensor.full_tensor()  # type: ignore[attr-defined]
    if tensor.device.type == "meta":
        raise PeftError(
            f"{key!r} has no values yet: it is on the meta device. Load the adapter's weights first, or build it elsewhere."
        )
    if tuple(tensor.shape) != full_shape(tensor):
        raise PeftError(
            f"{key!r} is sharded, and this process holds a part of it only. Gather the weights in all processes and pass them on: "
            "`model.save_pretrained(folder, state_dict=accelerator.get_state_dict(wrapped), is_main_process=...)`."
        )
    return tensor


def fill(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy whole values into a tensor in place; of a ``DTensor`` each process keeps its own part, without talking to the others."""
    if is_dtensor(values) and not is_dtensor(target):
        values = values.full_tensor()  # type: ignore[attr-defined]
    if is_dtensor(target) and not is_dtensor(values):
        from torch.distributed.tensor import distribute_tensor

        spread: Any = target
        values = values.to(device=spread.device, dtype=spread.dtype)
        values = distribute_tensor(values, spread.device_mesh, spread.placements, src_data_rank=None)
    with torch.no_grad():
        target.copy_(values)


def reshard(model: nn.Module) -> None:
    """Put parameters that ``fully_shard`` has gathered for a forward pass back into their parts: what is written into the whole
    ones is lost."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None or not torch.distributed.is_initialized():
        return
    for unit in model.modules():
        if isinstance(unit, module.FSDPModule):
            unit.reshard()


def plain_name(name: str) -> str:
    """Name of a module or parameter without the parts that wrappers of FSDP, checkpointing and compilation add."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name
