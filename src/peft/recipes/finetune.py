"""The whole job: data, model, method, training, measuring, saving. ``peft train`` and :func:`peft.finetune` both end here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from ..core.files import write_atomically
from ..core.status import count_parameters
from . import models
from .costs import peak_memory
from .data import Splits, load_splits
from .errors import RecipeError, blame, need
from .predict import predict
from .recipe import Recipe, as_recipe
from .runs import METRICS_FILE, RECIPE_FILE, TASK_FILE, load_run, task_file
from .tasks import TASKS, Task
from .tasks.base import Feature

for _package in ("datasets", "sklearn"):
    need(_package, "Training by recipe")

from .training import (  # noqa: E402
    Interrupted,
    Progress,
    RecipeTrainer,
    check_training,
    evaluate,
    last_checkpoint,
    tensorboard_in,
    training_arguments,
)

Tell = Callable[[str], None]


@dataclass
class Result:
    """What a run gave.

    Args:
        metrics: On the test rows, else on the validation rows.
        report: Everything that ``metrics.json`` holds, among it ``examples``: answers to the recipe's examples.
        folder: Where the adapter (or model), its tokenizer, recipe and metrics are.
        history: Losses and evaluations by step.
    """

    metrics: dict[str, float]
    report: dict[str, Any]
    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Result:
        """The result of a finished run."""
        report = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        if "tasks" in report:
            return cls(metrics_of_tasks(report["tasks"]), report, folder)
        return cls(report["test"] or report["validation"] or {}, report, folder, report["history"])

    def load(self) -> tuple[Any, Task]:
        """The trained model and its task."""
        return load_run(self.folder)

    def write_report(self) -> Path:
        """Write ``report.html`` and its pictures into the folder."""
        from .report import write_report

        return write_report(self.folder)


def metrics_of_tasks(reports: dict[str, Any]) -> dict[str, float]:
    """What each of several tasks is judged by, on its test rows, else on its validation rows."""
    found = {name: (report["test"] or report["validation"] or {}, report["metric"]) for name, report in reports.items()}
    return {f"{name}.{metric}": values[metric] for name, (values, metric) in found.items() if metric in values}


def finetune(
    recipe: Recipe | dict[str, Any] | str | os.PathLike,
    *overrides: str,
    resume: bool = False,
    overwrite: bool = False,
    tell: Tell | None = print,
    advance: Callable[[int, int, float], None] | None = None,
) -> Result:
    """Train by a recipe, measure, and save.

    Args:
        recipe: A :class:`~peft.recipes.recipe.Recipe`, a dictionary like one, or the path of a YAML file.
        *overrides: ``key=value``, as on the command line.
        resume: Go on from the last checkpoint, if there is one; a finished run is read and returned.
        overwrite: Replace an earlier run in the same folder.
        tell: Called with each line for the user; ``None``: say nothing.
        advance: Called after each step with the step, the number of steps and the last loss.

    Returns:
        Metrics, history and the folder. For a recipe with ``tasks``, those of all tasks together.

    Raises:
        RecipeError: The recipe, the data or the model cannot be used as asked.
    """
    recipe = as_recipe(recipe, overrides)
    main = int(os.environ.get("RANK", "0")) == 0
    say = tell if tell is not None and main else (lambda line: None)
    if recipe.tasks and recipe.shared:
        from .together import finetune_together

        with recipe.pointing(), _folder(recipe.folder, main):
            return finetune_together(recipe, resume=resume, overwrite=overwrite, tell=say, advance=advance, main=main)
    if recipe.tasks:
        from .multitask import finetune_tasks

        return finetune_tasks(recipe, resume=resume, overwrite=overwrite, tell=say, advance=advance)
    with recipe.pointing(), _folder(recipe.folder, main):
        return _finetune_one(recipe, resume, overwrite, say, advance, main)


@contextlib.contextmanager
def _folder(folder: Path, main: bool) -> Iterator[None]:
    """Make the folder of the result before anything long is begun; a run that fails at once does not leave it behind."""
    new = not folder.exists()
    try:
        if main:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        is_file = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "a file is in its way" if is_file else error.strerror
        raise RecipeError(
            f"`out` is {str(folder)!r}, which cannot be made: {reason}. Name another folder.", "out"
        ) from None
    try:
        yield
    except BaseException:
        if new and main:
            with contextlib.suppress(OSError):
                folder.rmdir()  # does nothing unless it is empty
        raise


def _finetune_one(recipe: Recipe, resume: bool, overwrite: bool, say: Tell, advance: Any, main: bool) -> Result:
    folder = recipe.folder
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    checkpoint = begin(folder, recipe, resume, overwrite, main)
    if isinstance(checkpoint, Result):
        say(f"{folder} holds the finished run already.")
        return checkpoint
    torch.manual_seed(recipe.seed)
    task, splits, tokenizer, model = prepare(recipe, note)
    encoded = encode(task, splits, note)
    trained, total = count_parameters(model)
    announce(say, recipe.method.name, trained, total)

    checkpoints = folder / "checkpoints"
    if main:
        write_atomically(checkpoints, {RECIPE_FILE: recipe.to_yaml().encode()})
    args = training_arguments(recipe, checkpoints, task.name, len(encoded["train"]), bool(splits.validation))
    progress = Progress(say, advance)
    with tensorboard_in(folder / "tensorboard"):
        trainer = RecipeTrainer(
            task=task, recipe=recipe, features=encoded["train"], validation=(splits.validation, encoded["validation"]),
            model=model, args=args, callbacks=[progress], processing_class=tokenizer,
        )  # fmt: skip
    start = time.perf_counter()
    train(trainer, progress, checkpoint, say)
    seconds = time.perf_counter() - start

    found = held_back(trainer.model, task, splits, encoded, recipe.training.eval_batch_size)
    report = report_of(recipe, task, trainer, progress, found, seconds, (trained, total))
    report |= {"notes": notes, "rows": {s: len(getattr(splits, s)) for s in ("train", "validation", "test")}}
    report["examples"] = list(predict(trainer.model, task, task.rows_from_text(recipe.examples)))
    write_result(recipe, task, tokenizer, report, main, lambda where: _save(trainer, where, main))
    return Result(report["test"] or report["validation"] or {}, report, folder, report["history"])


def encode(task: Task, splits: Splits, note: Tell) -> dict[str, list[Feature]]:
    """The rows of all splits as features; what happened to them is said."""
    words = {"train": "training", "validation": "validation", "test": "test"}
    encoded = {split: task.encode(getattr(splits, split), word) for split, word in words.items()}
    for line in task.notes:
        note(line)
    return encoded


def held_back(
    model: Any, task: Task, splits: Splits, encoded: dict[str, list[Feature]], batch_size: int
) -> dict[str, dict[str, Any] | None]:
    """Metrics on the validation and the test rows, where there are any."""
    return {
        s: evaluate(model, task, getattr(splits, s), encoded[s], batch_size) if encoded[s] else None
        for s in ("validation", "test")
    }


def announce(say: Tell, method: str, trained: int, total: int) -> None:
    """Say what trains, and where."""
    place = "cuda" if torch.cuda.is_available() else "cpu"
    say(f"Method {method} on {place}: {trained:,} of {total:,} parameters train ({trained / total:.2%}).")


def train(trainer: RecipeTrainer, progress: Progress, checkpoint: Path | None, say: Tell) -> None:
    """Train, from a checkpoint if there is one, and take the best weights.

    Raises:
        Interrupted: It was stopped.
    """
    progress.catch_up = trainer.catch_up
    if checkpoint is not None:
        say(f"Going on from {checkpoint}.")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    if progress.stopped:
        raise Interrupted(
            f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}. `--resume` goes on from there."
        )
    if trainer.recipe.training.keep_best:
        trainer.load_best()


def write_result(
    recipe: Recipe, task: Task, tokenizer: Any, report: dict[str, Any], main: bool, save: Callable[[Path], object]
) -> None:
    """Write the result; its metrics come last, and say that it is whole.

    Args:
        recipe: The recipe.
        task: Its task.
        tokenizer: The tokenizer.
        report: The metrics.
        main: Whether this process writes; the model is saved by all.
        save: Saves the model into a folder.
    """
    folder = recipe.folder
    save(folder)
    if main:
        tokenizer.save_pretrained(folder)
        report["bytes"] = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        files = {TASK_FILE: json.dumps(task_file(recipe, task), indent=2), RECIPE_FILE: recipe.to_yaml()}
        write_atomically(folder, {name: text.encode() for name, text in files.items()})
        write_atomically(folder, {METRICS_FILE: json.dumps(report, indent=1, default=float).encode()})
        if not recipe.training.keep_checkpoints:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def prepare(recipe: Recipe, say: Tell) -> tuple[Task, Any, Any, Any]:
    """Task, splits, tokenizer and model with the method in it, ready to train."""
    task, splits, tokenizer, model = load(recipe, say)
    with blame("method"):
        model = models.apply_method(model, recipe.method, task)
    if any(p.requires_grad and p.dtype == torch.float16 for p in model.parameters()):
        raise RecipeError(
            f"The method {recipe.method.name!r} would train weights in float16, where updates get lost and overflow. Set model.dtype to "
            "bfloat16, or to float32 with training.mixed_precision.",
            "model.dtype",
        )
    return task, splits, tokenizer, model


def load(recipe: Recipe, say: Tell) -> tuple[Task, Any, Any, Any]:
    """Task, splits, tokenizer and base model with the task's head."""
    assert recipe.task is not None and recipe.data is not None
    check_training(recipe)
    task = TASKS[recipe.task](recipe.data, recipe.generation)
    if task.name == "causal-lm" and recipe.data.packing and models.virtual_tokens(recipe.method):
        raise RecipeError(
            "data.packing does not go with virtual tokens: they would belong to the first text of a row alone.",
            "data.packing",
        )
    with blame("examples"):
        for row in task.rows_from_text(recipe.examples):
            if (wrong := task.check_input(row)) is not None:
                raise RecipeError(f"An example cannot be answered: {wrong}.")
    with blame("data"):
        splits = load_splits(recipe.data, task.roles, recipe.seed, task.group, task.check)
        task.learn(splits)
    for key in ("early_stopping", "eval_every"):
        if getattr(recipe.training, key) and not splits.validation:
            raise RecipeError(
                f"training.{key} needs rows to evaluate on, and there are none: set data.validation_size or data.validation.",
                f"training.{key}",
            )
    for note in splits.notes:
        say(note)
    if task.labels:
        names = ", ".join(task.labels[:12]) + (f" and {len(task.labels) - 12} more" if len(task.labels) > 12 else "")
        say(f"Labels: {names}.")
    with blame("model"):
        tokenizer = models.load_tokenizer(recipe.model, words=task.name == "token-classification")
        model, notes = models.load_base(recipe.model, task, tokenizer)
        task.check_model(model)
    for note in notes:
        say(note)
    task.prepare(tokenizer, models.longest_input(model.config, tokenizer), models.virtual_tokens(recipe.method))
    return task, splits, tokenizer, model


def begin(folder: Path, recipe: Recipe, resume: bool, overwrite: bool, main: bool) -> Path | Result | None:
    """What of an earlier run is there: a result, a checkpoint, or nothing."""
    checkpoints = folder / "checkpoints"
    if overwrite:
        if main:
            shutil.rmtree(checkpoints, ignore_errors=True)
            remove_result(folder)
        return None
    finished, begun = (folder / METRICS_FILE).exists(), any(checkpoints.glob("checkpoint-*"))
    if not finished and not begun:
        return None
    if not resume:
        what = "a finished run" if finished else "a run that was not finished: --resume goes on with it"
        raise RecipeError(f"{folder} holds {what}. Choose another folder (out=…), or --overwrite it.", "out")
    before = yaml.safe_load(((folder if finished else checkpoints) / RECIPE_FILE).read_text(encoding="utf-8"))
    now = recipe.dump()
    for values in (before, now):
        values.pop("out", None)
    if before != now:
        changed = sorted(k for k in {*_flat(before), *_flat(now)} if _flat(before).get(k) != _flat(now).get(k))
        raise RecipeError(
            f"The run in {folder} was started with another recipe: {', '.join(changed)} changed. Use the same, or --overwrite it."
        )
    return Result.read(folder) if finished else last_checkpoint(checkpoints)


def remove_result(folder: Path) -> None:
    """Remove an earlier result: a full model beside an adapter would leave open which of them counts."""
    if (folder / METRICS_FILE).exists() or (folder / TASK_FILE).exists():
        for pattern in (
            METRICS_FILE,
            TASK_FILE,
            "adapter_*",
            "model*.safetensors*",
            "config.json",
            "report.html",
            "*.png",
        ):
            for path in folder.glob(pattern):
                path.unlink()


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {path: values}
    return {k: v for key, value in values.items() for k, v in _flat(value, f"{path}.{key}".lstrip(".")).items()}


def _save(trainer: RecipeTrainer, folder: Path, main: bool) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # every process has a part
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        trainer.model.save_pretrained(folder, state_dict=state, is_main_process=main)  # type: ignore[union-attr, operator]
    elif main:
        with models.quiet():
            trainer.model.save_pretrained(folder)  # type: ignore[union-attr, operator]


def report_of(
    recipe: Recipe,
    task: Task,
    trainer: RecipeTrainer,
    progress: Progress,
    found: dict[str, Any],
    seconds: float,
    counts: Sequence[int],
) -> dict[str, Any]:
    from .. import __version__

    details = (found["test"] or found["validation"] or {}).get("details", {})
    numbers = {s: {k: v for k, v in f.items() if k != "details"} if f else None for s, f in found.items()}
    steps = progress.seconds[min(2, len(progress.seconds) - 1) :]
    return {
        "task": task.name, "model": recipe.model.name, "data": recipe.dump()["data"]["train"],
        "method": recipe.method.name, "options": recipe.method.options, "seed": recipe.seed,
        "metric": task.metric, "greater_is_better": task.greater_is_better, "validation": numbers["validation"], "test": numbers["test"],
        "best": trainer.best, "trained_parameters": counts[0], "parameters": counts[1], "learning_rate": trainer.args.learning_rate,
        "steps": trainer.state.global_step, "epochs": trainer.state.epoch, "seconds": round(seconds, 2),
        "step_ms": round(1000 * statistics.median(steps), 2) if steps else None, "peak_mb": round(peak_memory() / 2**20, 1), "bytes": 0,
        "device": str(next(trainer.model.parameters()).device.type),  # type: ignore[union-attr]
        "history": trainer.state.log_history, "details": details,
        "versions": {"peft": __version__, "torch": torch.__version__},
    }  # fmt: skip
