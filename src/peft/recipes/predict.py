"""Answers of a trained model for new inputs, and its metrics on new data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .data import Roles, find_columns, load_rows, load_splits
from .errors import RecipeError
from .inference import run
from .recipe import read_recipe
from .runs import load_run, read_task
from .sources import Row, read_file
from .tasks import Task
from .tasks.base import ANSWERS


def predict(
    model: Any, task: Task, rows: Sequence[Row], batch_size: int = 32, **options: Any
) -> Iterator[dict[str, Any]]:
    """Answers, one for each row.

    Args:
        model: The model.
        task: Its task.
        rows: By role.
        batch_size: Rows at once.
        **options: For transformers' ``generate``, where the task generates.

    Raises:
        RecipeError: A row lacks what the task reads.
    """
    for number, row in enumerate(rows, 1):
        if (wrong := task.check_input(row)) is not None:
            raise RecipeError(f"Input {number} of {len(rows)} cannot be answered: {wrong}.")
    if task.generates:
        settings = {k: v for k, v in task.generation.model_dump().items() if v is not None}
        if not settings["do_sample"]:
            settings = {k: v for k, v in settings.items() if k not in ("temperature", "top_p")}
        with torch.no_grad():
            yield from task.generate(model, rows, min(batch_size, 8), **{**settings, **options})  # type: ignore[attr-defined]
        return
    for start in range(0, len(rows), 8 * batch_size):  # answers of a long file come while it is read
        part = rows[start : start + 8 * batch_size]
        features = task.encode(part)
        yield from task.decode(part, features, run(model, task, features, batch_size))


def rows_of_file(path: Path, task: Task) -> list[Row]:
    """Rows of a file whose answers are wanted: labels are not needed, columns are found as in training.

    Raises:
        RecipeError: The file cannot be read, or lacks a column.
    """
    table = read_file(path)
    wanted = _inputs(task)
    given = {r: c for r, c in task.data.columns.items() if r in wanted.all}
    columns = find_columns(table, given, wanted)
    if table.problems:
        raise RecipeError(f"{len(table.problems)} rows of {path} cannot be read: {table.problems[0]}.")
    return [
        {role: row.get(c) if isinstance(c, str) else {n: row.get(n) for n in c} for role, c in columns.items()}
        for row in table.rows
    ]


def rows_of_run(folder: Path, task: Task) -> tuple[list[Row], list[str]]:
    """The rows that a run held back: of the test, else of the validation; and notes.

    Raises:
        RecipeError: It held none back, or its data are not there any more.
    """
    recipe = read_recipe(folder)
    assert recipe.data is not None
    splits = load_splits(recipe.data, task.roles, recipe.seed, task.group, task.check)
    rows = splits.test or splits.validation
    if not rows:
        raise RecipeError(f"The run in {str(folder)!r} held no rows back; name data to measure on with --data.")
    return rows, splits.notes


def _inputs(task: Task) -> Any:
    """A task's roles without what it is to answer."""
    choices = tuple(tuple(r for r in choice if r not in ANSWERS) for choice in task.roles.choices)
    return Roles(choices=choices, optional=tuple(r for r in task.roles.optional if r not in ANSWERS))


def evaluate_run(
    folder: Path, source: str | None, batch_size: int = 32, limit: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Metrics of a run on a source's test split, or on the recipe's own test rows.

    Args:
        folder: The run's folder.
        source: As ``data.train`` in a recipe; ``None``: the test rows that the run held back.
        batch_size: Rows at once.
        limit: Measure on so many rows.

    Returns:
        Metrics and notes.
    """
    from .training import evaluate

    task, _ = read_task(folder)
    if source is None:
        rows, notes = rows_of_run(folder, task)
    else:
        rows, notes = load_rows(source, task.data, task.roles, task.check)
        task.check_labels("given", rows)
    model, task = load_run(folder)
    rows = rows[:limit]
    features = task.encode(rows, "given")
    return evaluate(model, task, rows, features, batch_size), [*notes, *task.notes]
