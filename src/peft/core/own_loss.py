"""Losses that a method with virtual tokens computes itself, in place of the base model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .prompts import Prompts


def own_loss(holder: Prompts, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any] | None]:
    """Take out of a call what the loss of its adapter is computed from, if that is not the base model's.

    Args:
        holder: What holds the virtual tokens.
        kwargs: Arguments of the call.

    Returns:
        Arguments for the base model, and what adds the loss to its output; ``None`` where there is nothing to add.

    Raises:
        ValueError: There are labels, and rows or tokens of several adapters.
    """
    losses = {name: loss for name in holder.token_adapters() if (loss := holder.loss_of(name)) is not None}
    if not losses:
        return kwargs, None
    own = {"labels", *(name for loss in losses.values() for name in loss.inputs)}
    rest = {k: v for k, v in kwargs.items() if k not in own}
    labels = kwargs.get("labels")
    if labels is None:
        return rest, None
    name, loss = next(iter(losses.items()))
    if holder.is_mixed or len(holder.token_adapters()) > 1:
        raise ValueError(
            f"`labels` are given, but the loss of adapter {name!r} is of a kind of its own, which is not defined for a batch with several "
            "adapters. Leave `labels` out, or call the model with this adapter alone."
        )
    inputs = {k: kwargs[k] for k in loss.inputs if kwargs.get(k) is not None}
    items = rest.pop("num_items_in_batch", None)

    def weigh(output: Any) -> Any:
        logits = output[0] if isinstance(output, tuple) else output["logits"]
        found = loss.function(logits, labels, **inputs)
        if items is not None:  # a part of a batch: trainers add the parts up
            found = found * (labels != -100).sum() / items
        return (found, *output) if isinstance(output, tuple) else type(output)(loss=found, **output)

    return rest, weigh


__all__ = ["own_loss"]
