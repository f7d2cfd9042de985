"""transformers' Trainer, told what recipes need: own evaluation, a stable order of the rows, checkpoints that hold what trains."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from ..core.errors import did_you_mean
from ..core.files import safetensors_writer, write_atomically
from ..optimizers import create_loraplus_optimizer
from .errors import RecipeError
from .inference import run
from .methods import method_info
from .order import Order
from .rates import learning_rate
from .recipe import Recipe
from .sources import Row
from .tasks import Task
from .tasks.base import Feature

TRAINED = "trained.safetensors"
BEST = "best"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C, after writing a checkpoint."""


class RecipeTrainer(Trainer):
    """A Trainer for one recipe.

    Args:
        task: The task.
        recipe: The recipe.
        features: Training rows, encoded.
        validation: Rows and features to choose by; empty: none.
        **kwargs: For ``Trainer``.
    """

    def __init__(
        self,
        *,
        task: Task,
        recipe: Recipe,
        features: list[Feature],
        validation: tuple[list[Row], list[Feature]],
        **kwargs: Any,
    ) -> None:
        self.task, self.recipe, self.validation = task, recipe, validation
        self.best: dict[str, Any] | None = None
        super().__init__(
            train_dataset=features, eval_dataset=validation[1] or None, data_collator=task.collate, **kwargs
        )  # type: ignore[arg-type]
        for callback in (PrinterCallback, ProgressCallback):  # what they print is said by `Progress`
            self.remove_callback(callback)
        if not task.loss_counts_tokens:
            # The Trainer takes any model with **kwargs for one that divides its loss by the tokens of all batches of a step. Those
            # that do not would have their gradients multiplied by the number of batches.
            self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        training = self.recipe.training
        lengths = [len(f["input_ids"]) for f in self.train_dataset]  # type: ignore[union-attr]
        return self.order(lengths, training.batch_size * self.args.world_size, training.length_grouping)

    def order(self, lengths: Sequence[int], size: int, grouped: bool) -> Order:
        """The order of the rows, see :class:`Order`."""
        return Order(lengths, size, self.recipe.seed, grouped)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure on the validation rows, and remember the weights if they are the best so far."""
        start = time.perf_counter()
        found = self.measure()
        metrics = {f"eval_{k}": v for k, v in found.items() if isinstance(v, (int, float))}
        metrics["eval_seconds"] = round(time.perf_counter() - start, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._remember(found[self.task.metric], found["loss"])
        return metrics

    def measure(self) -> dict[str, Any]:
        """Metrics on the validation rows."""
        rows, features = self.validation
        return evaluate(self.model, self.task, rows, features, self.recipe.training.eval_batch_size)

    def _remember(self, value: float, loss: float) -> None:
        """Keep the weights if the metric is the best so far; of equal ones the lower loss decides."""
        training = self.recipe.training
        best = self.best
        equal = best is not None and value == best["value"] and loss < best["loss"]
        if best is None or math.isnan(best["value"]) or equal or better(value, best["value"], self.task):
            self.best = {
                "value": value,
                "loss": loss,
                "step": self.state.global_step,
                "epoch": self.state.epoch,
                "metric": self.task.metric,
            }
            if training.keep_best and self.args.should_save:
                folder = Path(self.args.output_dir or ".")
                write_trained(self.model, folder / f"{BEST}-{self.state.global_step}.safetensors")
                write_atomically(folder, {f"{BEST}.json": json.dumps(self.best).encode()})
                for old in folder.glob(f"{BEST}-*.safetensors"):
                    if old.stem != f"{BEST}-{self.state.global_step}":
                        old.unlink()
        if training.early_stopping and self._without_gain() >= training.early_stopping:
            self.control.should_training_stop = True

    def _without_gain(self) -> int:
        """Evaluations since the best one; read off the history, which a resumed run has too."""
        assert self.best is not None
        key = f"eval_{self.task.metric}"
        return sum(key in entry and entry["step"] > self.best["step"] for entry in self.state.log_history)

    def catch_up(self) -> None:
        """Evaluate now, where a run was cut off between the last step of an epoch and the evaluation after it."""
        step, epoch = self.state.global_step, float(self.state.epoch or 0)
        missed = not any("eval_loss" in entry and entry["step"] == step for entry in self.state.log_history)
        if step and epoch.is_integer() and missed and self.args.eval_strategy == "epoch":
            self.evaluate()

    def load_best(self) -> None:
        """Take the weights of the best evaluation."""
        path = Path(self.args.output_dir or ".") / f"{BEST}-{self.best['step']}.safetensors" if self.best else None
        if path is not None and path.exists() and self.best["step"] != self.state.global_step:  # type: ignore[index]
            read_trained(self.model, path)

    # -- checkpoints hold what trains, whatever the method -----------------------------------------------------------

    @property
    def _plain(self) -> bool:
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:  # torch says of a full disk that a stream failed
            folder = self.args.output_dir or "."
            if "stream" not in str(error).lower() and shutil.disk_usage(folder).free > 2**20:
                raise
            raise OSError(errno.ENOSPC, "No space left on device", folder) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self._plain:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        write_trained(self.model, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._plain:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        read_trained(self.model, Path(resume_from_checkpoint) / TRAINED)
        folder = Path(self.args.output_dir or ".")
        with open(Path(resume_from_checkpoint) / "trainer_state.json", encoding="utf-8") as file:
            step = json.load(file)["global_step"]
        try:
            found = json.loads((folder / f"{BEST}.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return
        # A best that came after this checkpoint will come again.
        if found["step"] <= step:
            self.best = found

    # -- optimiser -------------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """AdamW; with LoRA+ the B matrices learn faster."""
        ratio = self.recipe.training.lora_plus_ratio
        if ratio is None or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        model: Any = self.model
        if not any(".lora_B." in name for name, parameter in model.named_parameters() if parameter.requires_grad):
            raise RecipeError(
                "training.lora_plus_ratio is for methods with B matrices; this model has none. Leave it out.",
                "training.lora_plus_ratio",
            )
        rate, decay = self.args.learning_rate, self.args.weight_decay
        self.optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay
        )
        return self.optimizer


def better(value: float, than: float, task: Task) -> bool:
    """Whether a metric is better; NaN never is."""
    return value > than if task.greater_is_better else value < than


def evaluate(
    model: Any, task: Task, rows: Sequence[Row], features: Sequence[Feature], batch_size: int
) -> dict[str, Any]:
    """Metrics on rows."""
    return task.score(rows, features, run(model, task, features, batch_size))


# -- what trains, as a file --------------------------------------------------------------------------------------------


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters that train, by name, and the buffers of modules that have any such parameter."""
    found = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            found |= {f"{name}.{b}": t for b, t in module.named_buffers(recurse=False) if t is not None}
    return found


def write_trained(model: Any, path: Path) -> None:
    """Write what trains."""
    tensors = {n: t.cpu().contiguous().clone() for n, t in trained_tensors(model).items()}
    write_atomically(path.parent, {path.name: safetensors_writer(tensors)})


def read_trained(model: Any, path: Path) -> None:
    """Read it back.

    Raises:
        RecipeError: The file was written for another method or model.
    """
    tensors, own = load_file(path), trained_tensors(model)
    if tensors.keys() != own.keys() or any(tensors[n].shape != own[n].shape for n in own):
        raise RecipeError(
            f"The checkpoint {str(path.parent)!r} was written with another method, model or task. Change `out`, or remove the folder."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: one that a kill has cut off is passed over."""
    found = sorted(
        folder.glob("checkpoint-*"),
        key=lambda p: -int(p.name.rpartition("-")[2]) if p.name.rpartition("-")[2].isdigit() else 0,
    )
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            for name in ("optimizer.pt", "scheduler.pt"):
                if (path / name).exists():
                    torch.load(path / name, weights_only=True, map_location="cpu")
            if (path / TRAINED).exists():
                load_file(path / TRAINED)
            return path
        except Exception:
            continue
    return None


# -- arguments and callbacks -------------------------------------------------------------------------------------------


# Packages behind what `report_to` names, where they are called otherwise.
REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "dagshub": ("dagshub",), "azure_ml": ("azureml",)}


def check_training(recipe: Recipe) -> None:
    """Refuse what cannot work before data and model are read.

    Raises:
        RecipeError: Unknown method or arguments, a reporter that is not installed, a precision that this machine does not have.
    """
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    method_info(recipe.method.name)
    t = recipe.training
    known = set(TrainingArguments.__dataclass_fields__)
    for key in t.trainer:
        if key not in known:
            hint = did_you_mean(key, known) or "."
            raise RecipeError(
                f"training.trainer.{key}: transformers' TrainingArguments has no such argument{hint}",
                f"training.trainer.{key}",
            )
    for name in t.report_to:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            hint = did_you_mean(name, INTEGRATION_TO_CALLBACK) or "."
            raise RecipeError(
                f"training.report_to: {name!r} is not known{hint} Known are {', '.join(INTEGRATION_TO_CALLBACK)}.",
                "training.report_to",
            )
        packages = REPORTERS.get(name, (name,))
        if not any(importlib.util.find_spec(p) for p in packages):
            raise RecipeError(
                f"training.report_to: {name} is not installed: pip install {packages[0]}", "training.report_to"
            )
    if t.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise RecipeError(
            "training.mixed_precision is fp16, which needs a GPU. On a CPU it can be bf16.", "training.mixed_precision"
        )


@contextlib.contextmanager
def tensorboard_in(folder: Path) -> Iterator[None]:
    """Within this context a Trainer that is made writes for TensorBoard into a folder that stays, not among its checkpoints."""
    name = "TENSORBOARD_LOGGING_DIR"
    asked = os.environ.get(name)
    os.environ[name] = asked or str(folder)
    try:
        yield
    finally:
        if asked is None:
            del os.environ[name]


def training_arguments(
    recipe: Recipe, folder: Path, task_name: str, rows: int, evaluates: bool, joint: bool = False
) -> TrainingArguments:
    """What the recipe says, as transformers wants it.

    Args:
        recipe: The recipe.
        folder: Of the checkpoints.
        task_name: Whose learning rate is taken where the recipe has none.
        rows: Number of training rows.
        evaluates: Whether there are validation rows.
        joint: Whether a step may leave out parameters, as those of other tasks' heads.

    Raises:
        RecipeError: transformers does not take an argument.
    """
    t = recipe.training
    rate = t.learning_rate or learning_rate(recipe.method.name, task_name)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    steps = t.max_steps or math.ceil(math.ceil(rows / (t.batch_size * world)) / t.gradient_accumulation * t.epochs)
    every = t.save_every or t.eval_every
    known = set(TrainingArguments.__dataclass_fields__)
    values: dict[str, Any] = {
        "output_dir": str(folder), "num_train_epochs": t.epochs, "max_steps": t.max_steps or -1, "seed": recipe.seed,
        "per_device_train_batch_size": t.batch_size, "per_device_eval_batch_size": t.eval_batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation, "learning_rate": rate, "weight_decay": t.weight_decay,
        "warmup_steps": t.warmup if t.warmup < 1 else int(t.warmup), "lr_scheduler_type": t.schedule, "max_grad_norm": t.max_grad_norm,
        "bf16": t.mixed_precision == "bf16", "fp16": t.mixed_precision == "fp16",
        "eval_strategy": ("steps" if t.eval_every else "epoch") if evaluates else "no", "eval_steps": t.eval_every,
        "save_strategy": "steps" if every else "epoch", "save_steps": every or 500, "save_total_limit": t.checkpoints,
        "logging_steps": max(1, min(50, steps // 20)), "report_to": t.report_to or "none", "remove_unused_columns": False,
        "disable_tqdm": True, "log_level": "error", "logging_first_step": True, "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False, "run_name": recipe.folder.name,
    }  # fmt: skip
    if "project" in known:
        values["project"] = "peft"
    if joint:
        values["ddp_find_unused_parameters"] = True
    if not torch.accelerator.is_available():
        values["use_cpu"] = True  # else bf16 would be refused, and several processes would not know of each other
    if t.gradient_checkpointing:
        name = "activation_checkpointing"  # what newer versions call it
        name = name if name in known else "gradient_checkpointing"
        values |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    try:
        return TrainingArguments(**{**values, **t.trainer})
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training: {str(error).strip().splitlines()[0]}", "training.trainer") from None


class Progress(TrainerCallback):
    """Tells of each evaluation, measures steps, and turns Ctrl-C and SIGTERM into a checkpoint and a clean stop.

    Args:
        tell: Prints a line.
        advance: Moves a progress bar: called with the step, the number of steps and the last loss.
    """

    def __init__(self, tell: Callable[[str], None], advance: Callable[[int, int, float], None] | None = None) -> None:
        self.tell, self.advance = tell, advance
        self.seconds: list[float] = []
        self.stopped = False
        self.loss = float("nan")
        self._start = 0.0
        self.catch_up: Callable[[], None] = lambda: None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over Ctrl-C, and what a cluster sends before it ends a job, where this thread may."""
        self.catch_up()
        try:
            self._before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            self._before = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give them back."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _stop(self, *_: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        self.tell("Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the watch."""
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the watch; stop the run, if asked to."""
        self.seconds.append(time.perf_counter() - self._start)
        if self.stopped:
            control.should_save = control.should_training_stop = True
        if self.advance is not None:
            self.advance(state.global_step, state.max_steps, self.loss)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that was stopped within an epoch is not evaluated there: a run that was not stopped would not be."""
        if self.stopped and not float(state.epoch).is_integer():
            control.should_evaluate = control.should_save = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss for the bar; end a run that has lost its way."""
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])
            if not math.isfinite(self.loss):
                raise RecipeError(
                    f"The loss is {self.loss} at step {state.global_step}: nothing can be learnt from here. Lower training.learning_rate "
                    f"(it is {args.learning_rate:.1e}).",
                    "training.learning_rate",
                )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """One line."""
        shown = ", ".join(
            f"{k.removeprefix('eval_')} {v:.4g}" for k, v in (metrics or {}).items() if k != "eval_seconds"
        )
        self.tell(
            f"epoch {state.epoch:.2f}, step {state.global_step}/{state.max_steps}: training loss {self.loss:.3f}; validation {shown}"
        )
