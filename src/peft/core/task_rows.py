"""Rows of a batch that have tasks: how the number of a task stands in what a batch's plan calls a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .mixed import Names

_TASK = "\0"
"""Stands between an adapter's name and the number of a task: no adapter's name holds it."""

NO_TASKS = "`task_ids` is for multitask prompts; this adapter's method has none. Leave it out."


def adapter_of(name: str) -> str:
    """The adapter that a row's name means."""
    return name.partition(_TASK)[0]


def without_tasks(names: Names) -> Names:
    """The adapters that a row's names mean."""
    return adapter_of(names) if isinstance(names, str) else tuple(adapter_of(n) for n in names)


def with_task(names: Names, task: int, tasks: Mapping[str, int]) -> Names:
    """A row's names with the number of its task, for adapters that have tasks."""
    if isinstance(names, str):
        return f"{names}{_TASK}{task}" if tasks[names] else names
    return tuple(f"{n}{_TASK}{task}" if tasks[n] else n for n in names)


def task_of(name: str) -> int | None:
    """The task that a row's name means, if it has one."""
    task = name.partition(_TASK)[2]
    return int(task) if task else None


def task_numbers(task_ids: Any, rows: int | None) -> list[int]:
    """Task numbers of a batch as a list.

    Raises:
        ValueError: They are no whole numbers, or not one per row.
    """
    ids = task_ids.tolist() if isinstance(task_ids, torch.Tensor) else task_ids
    if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(
            f"`task_ids` should be whole numbers of shape (batch,), one per row, got {task_ids!r}. For one task give "
            "torch.full((batch,), task)."
        )
    if rows is not None and len(ids) != rows:
        raise ValueError(
            f"`task_ids` has {len(ids)} numbers, but the batch has {rows} rows. Give one per row: torch.full((batch,), task) "
            "for one task."
        )
    return list(ids)
