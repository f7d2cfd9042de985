"""A run's folder: what lies there, and how the model comes back from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import PeftConfig
from ..core.files import CONFIG_NAME
from ..model import PeftModel
from . import models
from .errors import RecipeError
from .recipe import DataSection, GenerationSection, ModelSection, Recipe
from .tasks import TASKS, Task

METRICS_FILE, RECIPE_FILE, TASK_FILE = "metrics.json", "recipe.yaml", "task.json"


def task_file(recipe: Recipe, task: Task) -> dict[str, Any]:
    """What is needed to use the trained model, beside its weights."""
    data = {
        k: v
        for k, v in recipe.data.model_dump(exclude_defaults=True).items()
        if k not in ("train", "validation", "test")
    }  # type: ignore[union-attr]
    return {
        "task": task.name,
        "model": recipe.model.model_dump(exclude_defaults=True),
        "method": recipe.method.name,
        "data": data,
        "generation": recipe.generation.model_dump(exclude_defaults=True),
        "state": task.state(),
    }


def read_task(folder: Path) -> tuple[Task, ModelSection]:
    """The task and the base model of a run, or of an adapter that another program wrote.

    Raises:
        RecipeError: The folder holds neither.
    """
    if not folder.is_dir():
        raise RecipeError(f"There is no folder {str(folder)!r}.")
    path = folder / TASK_FILE
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        data = DataSection(train="", **saved["data"])
        task = TASKS[saved["task"]](data, GenerationSection(**saved["generation"]))
        task.restore(saved["state"])
        return task, ModelSection(**saved["model"])
    if not (folder / CONFIG_NAME).exists():
        several = sorted(str(p.parent) for p in folder.glob(f"*/{TASK_FILE}"))
        if (folder / METRICS_FILE).exists() and several:
            raise RecipeError(f"{str(folder)!r} holds several tasks: name one of {', '.join(several)}.")
        if (folder / "checkpoints").is_dir():
            raise RecipeError(f"The run in {str(folder)!r} is not finished: `peft train … --resume` goes on with it.")
        raise RecipeError(f"{str(folder)!r} holds neither a run of `peft train` nor an adapter.")
    config = PeftConfig.from_pretrained(folder)
    by_type = {t.task_type: t for t in TASKS.values()}
    name = str(getattr(config.task_type, "value", config.task_type))
    if name not in by_type or not config.base_model_name_or_path:
        raise RecipeError(
            f"The adapter in {str(folder)!r} does not say its task and base model; load it with PeftModel.from_pretrained."
        )
    task = by_type[name](DataSection(train=""), GenerationSection())
    task.labels = list((config.id2label or {}).values()) or [str(i) for i in range(config.num_labels or 0)]
    problem = {"multi_label_classification": "multi-label", "regression": "regression"}
    task.kind = problem.get(config.problem_type or "", "single")
    return task, ModelSection(name=config.base_model_name_or_path, revision=config.revision)


def load_run(folder: str | Path, base: Any = None) -> tuple[Any, Task]:
    """The trained model of a run, in evaluation mode, and its task with the tokenizer.

    Args:
        folder: The run's folder, or an adapter's.
        base: A base model to put the adapter on, in place of the one that the run names.

    Raises:
        RecipeError: It cannot be loaded.
    """
    import torch

    folder = Path(folder)
    task, section = read_task(folder)
    own_tokenizer = folder if (folder / "tokenizer_config.json").exists() else None
    tokenizer = models.load_tokenizer(section, words=task.name == "token-classification", folder=own_tokenizer)
    with models.quiet():
        if (folder / CONFIG_NAME).exists():
            if base is None:
                base, _ = models.load_base(section, task, tokenizer)
            model = PeftModel.from_pretrained(base, folder)
        else:
            own = ModelSection(name=str(folder), dtype=section.dtype, trust_remote_code=section.trust_remote_code)
            model, _ = models.load_base(own, task, tokenizer)
    task.tokenizer = tokenizer
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), task
