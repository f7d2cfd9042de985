"""Running a model over encoded rows: batches of like length, results in the rows' order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .tasks import Task
from .tasks.base import Feature


@torch.no_grad()
def run(model: Any, task: Task, features: Sequence[Feature], batch_size: int, **options: Any) -> list[Any]:
    """Results of a task's :meth:`~peft.recipes.tasks.Task.step` for all features.

    Args:
        model: The model; it is put into evaluation mode and left as it was.
        task: The task.
        features: Encoded rows.
        batch_size: Rows at once.
        **options: For the model's forward.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(features)), key=lambda i: -len(features[i]["input_ids"]))
    results: list[Any] = [None] * len(features)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            chosen = [features[i] for i in part]
            batch = {k: v.to(device) for k, v in task.collate(chosen).items()}
            for i, result in zip(part, task.step(model, {**batch, **options}, chosen), strict=True):
                results[i] = result
    finally:
        model.train(was_training)
    return results
