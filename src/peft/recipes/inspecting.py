"""Looking: what an adapter holds, what the methods cost on a model, what a run will cost before it is begun."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..config import PeftConfig
from ..core.files import CONFIG_NAME, load_peft_weights
from ..core.holder import adapted_modules
from ..core.layer import AdapterLayer
from ..core.status import count_parameters
from ..registry import get_method
from . import models
from .converting import open_adapter
from .costs import peak_memory
from .errors import RecipeError
from .methods import MethodInfo, methods
from .recipe import DataSection, GenerationSection, MethodSection, ModelSection, as_recipe
from .runs import read_task
from .tasks import TASKS


def inspect_adapter(folder: Path, with_base: bool = True) -> dict[str, Any]:
    """What is in an adapter's folder.

    Args:
        folder: The folder.
        with_base: Load the base model too, to measure each layer's change against its weight.

    Returns:
        Method, base, task, fields that differ from the method's defaults, tensors, sizes, and for each layer the norm of its
        change (Frobenius) and, with the base, that norm over the weight's.

    Raises:
        RecipeError: There is no adapter.
    """
    if not (folder / CONFIG_NAME).exists():
        read_task(folder)  # says what is wrong, where it is no run at all
        raise RecipeError(f"{str(folder)!r} holds a whole model and no adapter: there is nothing to inspect.")
    config = PeftConfig.from_pretrained(folder)
    tensors = load_peft_weights(folder, device="cpu")
    plain = type(config)()
    skip = {
        "peft_version",
        "base_model_name_or_path",
        "inference_mode",
        "task_type",
        "num_labels",
        "id2label",
        "revision",
        "auto_mapping",
    }
    changed = {k: v for k, v in config.to_json_dict().items() if k not in skip and v != plain.to_json_dict().get(k)}
    found = {
        "folder": str(folder), "method": str(getattr(config.peft_type, "value", config.peft_type)), "base": config.base_model_name_or_path,
        "task": str(getattr(config.task_type, "value", config.task_type)), "version": config.peft_version, "options": changed,
        "labels": list((config.id2label or {}).values()), "tensors": len(tensors), "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
        "dtypes": dict(Counter(str(t.dtype) for t in tensors.values())),
        "layers": [], "not_finite": [n for n, t in tensors.items() if not torch.isfinite(t).all()],
    }  # fmt: skip
    found["note"] = None
    if with_base:
        found["layers"], found["note"] = _changes(folder)
    if not found["layers"]:
        parts = {n: part for name, tensor in tensors.items() for n, part in _by_layer(config, name, tensor)}
        found["layers"] = [{"name": n, "norm": t.float().norm().item(), "share": None} for n, t in parts.items()]
    return found


def _by_layer(config: Any, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A table of prefixes as the keys and values of each layer, any other tensor as it is."""
    layers, width = getattr(config, "num_layers", None) or 0, getattr(config, "token_dim", None) or 0
    if layers and tensor.dim() == 2 and tensor.shape[1] == layers * 2 * width:
        for i, part in enumerate(tensor.split(width, 1)):
            yield f"{name}: layer {i // 2}, {'values' if i % 2 else 'keys'}", part
    else:
        yield name, tensor


def _changes(folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Norm of ΔW of each layer; nothing, and the reason, where the method has no ΔW or the base cannot be loaded."""
    try:
        model, _, _ = open_adapter(folder, None)
        layers = []
        for name, module in adapted_modules(model.get_base_model()):
            if isinstance(module, AdapterLayer):
                delta = module.get_delta_weight("default").float()
                weight = module.get_base_layer().weight.float().norm().item()  # type: ignore[union-attr, operator]
                norm = delta.norm().item()
                layers.append({"name": name, "norm": norm, "share": norm / weight if weight else None})
        reason = None if layers else "the method changes no weights"
    except (RecipeError, ValueError, NotImplementedError, OSError, AttributeError) as error:
        layers, reason = [], str(error).rstrip(".")
    return layers, reason and f"The norms are of the adapter's tensors: {reason}."


def method_table(section: ModelSection | None, task_name: str = "sequence-classification") -> list[dict[str, Any]]:
    """All methods: what they are, and what they would train on a model.

    Args:
        section: The model; ``None``: without numbers.
        task_name: The task.
    """
    rows = []
    tokenizer = models.load_tokenizer(section) if section is not None else None
    for name, info in methods().items():
        row: dict[str, Any] = {
            "method": name,
            "what": info.title,
            "paper": info.paper,
            "parameters": None,
            "share": None,
            "problem": None,
        }
        row["merges"] = _merges(info)
        row["supports"] = _supports(info)
        if section is not None:
            task = TASKS[task_name](DataSection(train=""), GenerationSection())
            task.labels = ["0", "1"] if task_name in ("sequence-classification", "token-classification") else []
            try:
                model, _ = models.load_base(section, task, tokenizer, on_meta=True)
                with torch.device("meta"):
                    model = models.apply_method(model, MethodSection(name=name), task)
                trained, total = count_parameters(model)
                row |= {"parameters": trained, "share": trained / total}
            except Exception as error:
                row["problem"] = str(error).strip().splitlines()[0]
        rows.append(row)
    return rows


def _merges(info: MethodInfo) -> bool | None:
    """Whether a method can be added to the weights; ``None`` where there is nothing to add."""
    if info.peft_type is None:
        return None
    layer = getattr(get_method(info.peft_type).tuner_cls, "layer_cls", None)
    return layer is not None and layer.why_no_merge is None


def _supports(info: MethodInfo) -> list[str]:
    """What can be done with a trained model: mixed batches are for every adapter, the others for what can be added to the weights."""
    if info.peft_type is None:
        return ["export"]
    return ["mixed batches", *(["merge", "export"] if _merges(info) else [])]


def plan(recipe: Any, *overrides: str, probe: int = 3, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """What a run will do and cost: modules, parameters, memory, time, after some steps on real rows that change nothing.

    Args:
        recipe: As :func:`~peft.finetune` takes it.
        *overrides: ``key=value``.
        probe: Steps to measure.
        tell: Called with each line for the user.
    """
    from .finetune import prepare
    from .training import training_arguments

    recipe = as_recipe(recipe, overrides)
    if recipe.tasks:
        raise RecipeError("A recipe with several tasks cannot be planned as a whole: plan one task at a time.")
    with recipe.pointing():
        task, splits, _, model = prepare(recipe, tell)
    size = recipe.training.batch_size
    features = task.encode(splits.train[: max(64, size * 8)])
    features.sort(key=lambda f: len(f["input_ids"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    names = [n for n, m in adapted_modules(model) if isinstance(m, AdapterLayer)]
    trained, total = count_parameters(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    longest = features[-size:]
    saved = _saved_bytes(model, task, longest, device)
    # What was measured of the whole process, and what the optimiser will add to it.
    process = peak_memory() + 2 * gradients
    middle = max(0, (len(features) - size) // 2)
    seconds = _seconds(model, task, features[middle : middle + size], device, probe)
    args = training_arguments(recipe, Path("unused"), task.name, len(splits.train), bool(splits.validation))
    per_epoch = len(splits.train) / size / args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else round(per_epoch * args.num_train_epochs)
    return {
        "method": recipe.method.name, "modules": names, "kinds": dict(Counter(n.rpartition(".")[2] for n in names)),
        "trained_parameters": trained, "parameters": total, "weights": weights, "gradients": gradients, "optimizer": 2 * gradients,
        "activations": saved, "process": process,
        "longest": max(len(f["input_ids"]) for f in longest), "step_seconds": seconds, "steps": steps,
        "seconds": seconds * steps * args.gradient_accumulation_steps, "learning_rate": args.learning_rate, "device": device.type,
    }  # fmt: skip


def _batch(task: Any, features: Any, device: torch.device) -> dict[str, torch.Tensor]:
    return {k: v.to(device) for k, v in task.collate(features).items()}


def _saved_bytes(model: Any, task: Any, features: Any, device: torch.device) -> int:
    """Bytes that autograd keeps for the backward pass of one batch, parameters left out, each storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**_batch(task, features, device)).loss
    total = sum(seen.values())
    seen.clear()
    loss.backward()  # the peak of memory lies in here
    model.zero_grad(set_to_none=True)
    return total


def _seconds(model: Any, task: Any, features: Any, device: torch.device, probe: int) -> float:
    """Median time of forward and backward on one batch; nothing is updated."""
    batch = _batch(task, features, device)
    times = []
    for _ in range(probe + 1):
        start = time.perf_counter()
        model(**batch).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return statistics.median(times[1:])
