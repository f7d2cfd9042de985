"""Several tasks that train one adapter together: every batch is of one task, and each task has a head of its own.

As multitask learning of P-tuning v2 does it (Liu et al. 2022, arXiv 2110.07602, section 3.3): the prompts are shared, the heads are not.
"""

from __future__ import annotations

import functools
import inspect
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.checkpoints import get_peft_model_state_dict, set_peft_model_state_dict
from ..core.extra_modules import is_fresh
from ..core.files import write_atomically
from ..core.status import count_parameters
from ..mapping import get_peft_model
from . import models
from .data import Splits
from .errors import RecipeError, blame
from .finetune import (
    Result,
    Tell,
    announce,
    begin,
    encode,
    held_back,
    load,
    remove_result,
    report_of,
    train,
    write_result,
)
from .inference import run
from .methods import build_config
from .multitask import KEYS, Given, tasks_result
from .order import Order
from .predict import predict
from .rates import learning_rate
from .recipe import Recipe
from .runs import METRICS_FILE, RECIPE_FILE
from .tasks import Task
from .tasks.base import Feature
from .training import Progress, RecipeTrainer, tensorboard_in, training_arguments

SHARED = "shared"
WHICH = "task_number"


@dataclass
class Part:
    """One of the tasks.

    Args:
        recipe: Its own recipe.
        task: The task, its labels learnt.
        splits: Its rows.
        features: They, encoded, by split.
        tokenizer: The model's, as this task uses it.
        head: The base model with the task's head, an encoder of its own at first.
    """

    recipe: Recipe
    task: Task
    splits: Splits
    features: dict[str, list[Feature]]
    tokenizer: Any
    head: Any


class JointModel(nn.Module):
    """One encoder with one adapter, and the heads of all tasks.

    Args:
        encoder: The encoder with the adapter.
        heads: Models of the tasks, by name; what the encoder gives is handed to them.
    """

    def __init__(self, encoder: Any, heads: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(heads.values())
        self.names = list(heads)
        self.taken = set(inspect.signature(type(encoder.get_base_model()).forward).parameters)

    def forward(self, **batch: Any) -> Any:
        """The outputs of the task's model for a batch of its rows; ``task_number`` says which task."""
        number = int(batch.pop(WHICH)[0])
        head: Any = self.heads[number]
        inputs = {k: v for k, v in batch.items() if k in self.taken}
        # As rows of a mixed batch: outputs of virtual tokens stay away then.
        names = [SHARED] * len(batch["input_ids"])
        getattr(head, head.base_model_prefix).outputs = self.encoder(
            **inputs, adapter_names=names, allow_mixed_training=True
        )
        return head(**batch)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("encoder"), name)  # what the Trainer asks of a model, the encoder knows


class View(nn.Module):
    """The joint model as the model of one task.

    Args:
        joint: The joint model.
        name: The task's name.
    """

    def __init__(self, joint: JointModel, name: str) -> None:
        super().__init__()
        self.joint, self.number = joint, joint.names.index(name)

    def forward(self, **batch: Any) -> Any:
        """The outputs of the task's model."""
        return self.joint(**batch, **{WHICH: torch.tensor([self.number])})


class Together:
    """What the Trainer asks of a task, for all of them.

    Args:
        tasks: The tasks by name.
    """

    name = "several tasks"
    metric = "score"
    greater_is_better = True
    loss_counts_tokens = False

    def __init__(self, tasks: dict[str, Task]) -> None:
        self.tasks = tasks

    def collate(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """A batch of one task."""
        name = features[0]["_of"]
        return self.tasks[name].collate(features) | {WHICH: torch.tensor([list(self.tasks).index(name)])}


class JointTrainer(RecipeTrainer):
    """A Trainer for several tasks.

    Args:
        parts: The tasks.
        **kwargs: For :class:`~peft.recipes.training.RecipeTrainer`.
    """

    def __init__(self, *, parts: dict[str, Part], **kwargs: Any) -> None:
        self.parts = parts
        features = {
            s: [{**f, "_of": n} for n, p in parts.items() for f in p.features[s]] for s in ("train", "validation")
        }
        super().__init__(
            task=Together({n: p.task for n, p in parts.items()}),  # type: ignore[arg-type]
            features=features["train"], validation=([], features["validation"]), **kwargs,
        )  # fmt: skip

    def order(self, lengths: Sequence[int], size: int, grouped: bool) -> Order:
        names = [f["_of"] for f in self.train_dataset]  # type: ignore[union-attr]
        return Order(lengths, size, self.recipe.seed, grouped, names)

    def measure(self) -> dict[str, Any]:
        """Metrics of each task, and over all of them: ``score`` is the mean of what each is judged by, ``loss`` that of the losses."""
        found: dict[str, Any] = {}
        scores, losses = [], []
        for name, part in self.parts.items():
            rows, features = part.splits.validation, part.features["validation"]
            if not features:
                continue
            results = run(View(self.model, name), part.task, features, self.recipe.training.eval_batch_size)  # type: ignore[arg-type]
            metrics = part.task.score(rows, features, results)
            found |= {f"{name}.{k}": v for k, v in metrics.items() if k != "details"}
            value = metrics[part.task.metric]
            scores.append(value if part.task.greater_is_better else -value)
            losses.append(metrics["loss"])
        return {"score": sum(scores) / len(scores), "loss": sum(losses) / len(losses)} | found


def finetune_together(recipe: Recipe, *, resume: bool, overwrite: bool, tell: Tell, advance: Any, main: bool) -> Result:
    """Train one adapter for all of a recipe's tasks; each gets a folder with that adapter and its own head.

    Args:
        recipe: With ``tasks`` and ``shared``.
        resume: As for :func:`~peft.finetune`.
        overwrite: The same.
        tell: The same.
        advance: The same.
        main: Whether this process writes.
    """
    if recipe.training.gradient_checkpointing:
        raise RecipeError(
            "training.gradient_checkpointing is not there for `shared` tasks. Leave it out.",
            "training.gradient_checkpointing",
        )
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        tell(line)

    folder = recipe.folder
    checkpoint = begin(folder, recipe, resume, overwrite, main)
    if isinstance(checkpoint, Result):
        tell(f"{folder} holds the finished run already.")
        return checkpoint
    for part_folder in (folder / name for name in recipe.tasks):
        if (part_folder / METRICS_FILE).exists() and not overwrite and checkpoint is None:
            raise RecipeError(
                f"{part_folder} holds a finished run. Choose another folder (out=…), or --overwrite it.", "out"
            )
        if main:
            remove_result(part_folder)
    torch.manual_seed(recipe.seed)
    parts = {name: _part(name, recipe.entry(name), note, tell) for name in recipe.tasks}
    model = _join(recipe, parts)
    trained, total = count_parameters(model)
    announce(tell, recipe.method.name, trained, total)

    checkpoints = folder / "checkpoints"
    if main:
        write_atomically(checkpoints, {RECIPE_FILE: recipe.to_yaml().encode()})
    careful = min((p.task.name for p in parts.values()), key=lambda t: learning_rate(recipe.method.name, t))
    rows = sum(len(p.features["train"]) for p in parts.values())
    args = training_arguments(
        recipe, checkpoints, careful, rows, any(p.splits.validation for p in parts.values()), joint=True
    )
    progress = Progress(tell, advance)
    with tensorboard_in(folder / "tensorboard"):
        trainer = JointTrainer(parts=parts, recipe=recipe, model=model, args=args, callbacks=[progress])
    start = time.perf_counter()
    train(trainer, progress, checkpoint, tell)
    seconds = time.perf_counter() - start

    reports = {}
    for name, part in parts.items():
        alone = _alone(part, recipe, model)
        found = held_back(alone, part.task, part.splits, part.features, recipe.training.eval_batch_size)
        report = report_of(part.recipe, part.task, trainer, progress, found, seconds, count_parameters(alone))
        report["history"] = _history_of(name, report["history"])
        report |= {"notes": notes, "rows": {s: len(getattr(part.splits, s)) for s in part.features}}
        report["examples"] = list(predict(alone, part.task, part.task.rows_from_text(recipe.examples)))
        save = functools.partial(alone.save_pretrained, is_main_process=main)
        write_result(part.recipe, part.task, part.tokenizer, report, main, save)
        reports[name] = report
    if main:
        write_atomically(folder, {RECIPE_FILE: recipe.to_yaml().encode()})
    result = tasks_result(folder, reports, main)
    if main and not recipe.training.keep_checkpoints:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def _part(name: str, recipe: Recipe, note: Tell, tell: Tell) -> Part:
    tell(f"— {name}: {recipe.task} —")
    task, splits, tokenizer, head = load(recipe, note)
    if task.generates:
        raise RecipeError(f"{name} generates text; `shared` is for tasks with labels.")
    return Part(recipe, task, splits, encode(task, splits, note), tokenizer, head)


def _join(recipe: Recipe, parts: dict[str, Part]) -> JointModel:
    """One encoder under all heads, with the adapter in it."""
    heads = {name: part.head for name, part in parts.items()}
    inner = {name: getattr(head, head.base_model_prefix, None) for name, head in heads.items()}
    if any(encoder is None or encoder is heads[name] for name, encoder in inner.items()):
        raise RecipeError(f"The model {recipe.model.name!r} is not an encoder under a head; `shared` needs one.")
    # Some heads want more of it than others: a pooler.
    encoder: Any = max(inner.values(), key=lambda e: sum(p.numel() for p in e.parameters()))
    new = [n for n, m in encoder.named_children() if any(True for _ in m.parameters()) and is_fresh(m)]
    if new and not is_fresh(encoder):
        raise RecipeError(
            f"The file of {recipe.model.name!r} lacks {', '.join(new)}, which each task would have to learn by itself. Train the "
            "tasks apart: leave out `shared`."
        )
    with blame("method"):
        config = build_config(recipe.method, "FEATURE_EXTRACTION")
        if config is None:
            raise RecipeError(f"`shared` is for adapters; {recipe.method.name!r} is none.", "method.name")
        try:
            adapted = get_peft_model(encoder, config, adapter_name=SHARED)
        except (ValueError, NotImplementedError) as error:
            raise RecipeError(f"The method {recipe.method.name!r} does not suit this model: {error}") from None
    for head in heads.values():
        setattr(head, head.base_model_prefix, Given())
        head.requires_grad_(True)
    return JointModel(adapted, heads)


def _alone(part: Part, recipe: Recipe, joint: JointModel) -> Any:
    """A task's model as it is saved: the base model, the shared adapter, and the task's head."""
    base, _ = models.load_base(recipe.model, part.task, part.tokenizer)
    prefix, parts, device = base.base_model_prefix, models.head_names(base), next(joint.parameters()).device
    model = models.apply_method(base, recipe.method, part.task)
    shared, own = get_peft_model_state_dict(joint.encoder, adapter_name=SHARED), part.head.state_dict()
    found = {}
    for key in get_peft_model_state_dict(model):
        bare = key.removeprefix("base_model.").removeprefix("model.")
        is_head = bare.partition(".")[0] in parts
        found[key] = own[bare] if is_head else shared[key.replace(f"{KEYS}{prefix}.", KEYS, 1)]
    set_peft_model_state_dict(model, found)
    return model.to(device).eval()


def _history_of(name: str, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The history of all tasks, as one of them would have it."""
    begins = f"eval_{name}."
    entries = []
    for entry in history:
        if "eval_score" in entry:
            own = {f"eval_{k.removeprefix(begins)}": v for k, v in entry.items() if k.startswith(begins)}
            entry = {k: v for k, v in entry.items() if not k.startswith("eval_")} | own
        entries.append(entry)
    return entries
