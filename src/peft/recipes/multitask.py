"""Several tasks on one base model: an adapter and a head for each, trained one after the other, used in the same batch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, TaskType
from ..core.checkpoints import set_peft_model_state_dict
from ..core.files import CONFIG_NAME, load_peft_weights, write_atomically
from ..mapping import get_peft_model
from . import models
from .errors import RecipeError
from .recipe import Recipe
from .runs import METRICS_FILE, read_task
from .tasks import Task
from .tasks.base import Feature

KEYS = "base_model.model."


def finetune_tasks(recipe: Recipe, *, resume: bool, overwrite: bool, tell: Any, advance: Any) -> Any:
    """Train one adapter for each of a recipe's tasks, into folders beside each other.

    Args:
        recipe: With ``tasks``.
        resume: As for :func:`~peft.finetune`.
        overwrite: The same.
        tell: The same.
        advance: The same.
    """
    from .finetune import finetune

    folder = recipe.folder
    reports = {}
    for name, entry in recipe.tasks.items():
        tell(f"— {name}: {entry.task} —")
        one = recipe.entry(name)
        reports[name] = finetune(one, resume=resume, overwrite=overwrite, tell=tell, advance=advance).report
    return tasks_result(folder, reports)


def tasks_result(folder: Path, reports: dict[str, Any], main: bool = True) -> Any:
    """The result of several tasks, whose folders lie in one.

    Args:
        folder: That one.
        reports: Of the tasks.
        main: Whether this process writes.
    """
    from .finetune import Result, metrics_of_tasks

    costs = list(_costs(folder, reports)) if main else []
    report = {"tasks": reports, "costs": costs, "history": [], "test": None, "validation": None}
    if main:
        write_atomically(folder, {METRICS_FILE: json.dumps(report, indent=1, default=float).encode()})
    return Result(metrics_of_tasks(reports), report, folder)


def _costs(folder: Path, reports: dict[str, Any]) -> Iterator[str]:
    """What the adapters take together, next to a full model for each task."""
    together = sum(report["bytes"] for report in reports.values())
    whole = sum(4 * report["parameters"] for report in reports.values())
    yield f"{len(reports)} adapters take {together / 1e6:,.1f} MB on disk; a full model for each task would take {whole / 1e6:,.1f} MB."
    try:
        shared = SharedBase({name: folder / name for name in reports})
    except RecipeError as error:
        yield f"They are not served over one base here: {error}"
        return
    names, rounds, start = list(reports), 100, time.perf_counter()
    for i in range(rounds):
        shared.model.set_adapter(names[i % len(names)])
    took = 1000 * (time.perf_counter() - start) / rounds
    yield f"Switching from one to the next takes {took:.2f} ms; in a mixed batch there is nothing to switch."


class Given(nn.Module):
    """Stands in a task's model where the base model stood, and gives outputs that were computed before."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs."""
        return self.outputs


class SharedBase:
    """One encoder with an adapter for each task, and the tasks' heads.

    Args:
        folders: Of runs, by adapter name. All were trained on the same base model.

    Raises:
        RecipeError: They were not, or a task generates text.
    """

    model: Any = None

    def __init__(self, folders: dict[str, Path]) -> None:
        import transformers

        self.tasks: dict[str, Task] = {}
        self.heads: dict[str, Any] = {}
        first = None
        for name, folder in folders.items():
            task, section = read_task(folder)
            if not (folder / CONFIG_NAME).exists():
                raise RecipeError(f"{name} is a whole model, not an adapter: it shares no base with others.")
            if first is None:
                first = section
            if task.generates:
                raise RecipeError(f"{name} generates text; several adapters in one batch are for tasks with labels.")
            if section.name != first.name:
                raise RecipeError(
                    f"{name} was trained on {section.name!r}, the first adapter on {first.name!r}: they share no base."
                )
            task.tokenizer = models.load_tokenizer(section, words=task.name == "token-classification", folder=folder)
            head, _ = models.load_base(section, task, task.tokenizer, on_meta=True)
            self.tasks[name] = task
            self._add(name, folder, head, section, transformers)
        self.model.eval()

    def _add(self, name: str, folder: Path, head: Any, section: Any, transformers: Any) -> None:
        """Put an adapter into the encoder, and its head beside it."""
        config = PeftConfig.from_pretrained(folder)
        prefix, parts = head.base_model_prefix, models.head_names(head)
        inner, outer = {}, {}
        for key, tensor in load_peft_weights(folder, device="cpu").items():
            bare = key.removeprefix("base_model.").removeprefix("model.")  # prompts write one of the two
            if bare.partition(".")[0] in parts:
                outer[bare] = tensor
            else:
                inner[key.replace(f"{KEYS}{prefix}.", KEYS, 1)] = tensor
        config.task_type, config.inference_mode = TaskType.FEATURE_EXTRACTION, True
        if hasattr(config, "modules_to_save"):
            config.modules_to_save = None
        if self.model is None:
            where, options = models.locate(section)
            with models.quiet():
                encoder = transformers.AutoModel.from_pretrained(where, **options)
            self.model = get_peft_model(encoder, config, adapter_name=name)
        else:
            self.model.add_adapter(name, config)
        set_peft_model_state_dict(self.model, inner, adapter_name=name)
        setattr(head, prefix, Given())
        head.load_state_dict(outer, strict=False, assign=True)
        if left := [n for n, p in head.named_parameters() if p.device.type == "meta"]:
            raise RecipeError(f"The head of {name} is not whole in its folder: {', '.join(left)} is missing.")
        self.heads[name] = head.eval()

    def predict(self, texts: Sequence[str], batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """Answers of all adapters for each text: one pass of the encoder over a batch of all of them.

        Args:
            texts: Plain texts.
            batch_size: Texts at once.
        """
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            rows = {name: task.rows_from_text(part) for name, task in self.tasks.items()}
            features = {name: task.encode(rows[name]) for name, task in self.tasks.items()}
            results = self._run(features)
            answers = {
                name: task.decode(rows[name], features[name], results[name]) for name, task in self.tasks.items()
            }
            for i, text in enumerate(part):
                yield {"text": text, **{n: {k: v for k, v in a[i].items() if k != "text"} for n, a in answers.items()}}

    @torch.no_grad()
    def _run(self, features: dict[str, list[Feature]]) -> dict[str, list[Any]]:
        task = next(iter(self.tasks.values()))
        names = [name for name, some in features.items() for _ in some]
        keys = set.intersection(*(set(f) for some in features.values() for f in some)) - {"labels", "targets"}
        together = [{k: f[k] for k in keys if not k.startswith("_")} for some in features.values() for f in some]
        outputs = self.model(**task.collate(together), adapter_names=names)
        results, done = {}, 0
        for name, some in features.items():
            rows = slice(done, done + len(some))
            done += len(some)
            # The first len(some) rows of each output belong to this adapter; padding on the right stays.
            given = type(outputs)(**{k: v[rows] for k, v in outputs.items() if isinstance(v, torch.Tensor)})
            head = self.heads[name]
            getattr(head, head.base_model_prefix).outputs = given
            width = given[0].shape[1]
            batch = self.tasks[name].collate(
                [{k: v for k, v in f.items() if k not in ("labels", "targets")} for f in some]
            )
            batch = {k: nn.functional.pad(v, (0, width - v.shape[1])) if v.dim() == 2 else v for k, v in batch.items()}
            results[name] = self.tasks[name].step(head, batch, some)
        return results


def parse_adapters(text: str) -> dict[str, Path]:
    """``name=folder,name=folder``.

    Raises:
        RecipeError: It is not written so.
    """
    found = {}
    for part in text.split(","):
        name, equals, folder = part.partition("=")
        if not equals or not name.strip() or not folder.strip():
            raise RecipeError(f"--adapters is written name=folder,name=folder; {part!r} is not.")
        if name.strip() in found:
            raise RecipeError(f"--adapters names {name.strip()!r} twice. Give each adapter a name of its own.")
        found[name.strip()] = Path(folder.strip())
    return found


def task_folders(folder: Path) -> dict[str, Path]:
    """Folders of the adapters of a run with several tasks; empty for any other folder."""
    path = folder / METRICS_FILE
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: folder / name for name in report.get("tasks", {})}


def predict_tasks(folders: dict[str, Path], texts: Sequence[str], batch_size: int) -> Iterator[dict[str, Any]]:
    """Answers of several adapters for each text, in mixed batches over one base model."""
    if not texts:
        raise RecipeError("There is nothing to answer: give texts, or lines on stdin.")
    yield from SharedBase(folders).predict(texts, batch_size)
