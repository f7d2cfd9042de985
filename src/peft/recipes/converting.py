"""Adapters in another form: any method, or a whole trained model, as LoRA; other libraries' files as those of this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig
from ..core.checkpoints import get_peft_model_state_dict, set_peft_model_state_dict
from ..core.files import CONFIG_NAME, write_atomically
from ..core.holder import adapted_modules
from ..core.layer import AdapterLayer
from ..mapping import get_peft_model
from ..model import PeftModel
from ..registry import get_method, in_form
from . import models
from .errors import RecipeError
from .recipe import ModelSection
from .runs import TASK_FILE, load_run, read_task
from .shipping import disagreement, must_be_empty, outputs

FORMS = ("lora", "peft")
PREFIXES = {"prefix-tuning": "PREFIX_TUNING", "p-tuning-v2": "P_TUNING_V2"}
"""Methods whose adapters become each other where they coincide, as recipes write them."""
Matrices = dict[str, torch.Tensor]
"""Changes of linear layers by name, shape (out, in)."""


def convert(source: Path, target: Path, to: str = "lora", rank: int = 16, base: str | None = None) -> Iterator[str]:
    """Write an adapter in another form, and compare the outputs.

    Args:
        source: Folder of a run (of an adapter or a whole model), folder of an adapter of this library or of adapter-hub's, or a
            ``.safetensors`` file of LyCORIS.
        target: For the new adapter.
        to: ``"lora"``: the best update of a rank (truncated singular values) in place of each layer's change; ``"peft"``: the same
            method, in this library's files; ``"prefix-tuning"`` and ``"p-tuning-v2"``: the one as the other.
        rank: Of the LoRA update.
        base: The base model, where the source does not name it.

    Yields:
        Lines for the user, with what was lost.

    Raises:
        RecipeError: The source cannot be read or has no such form.
    """
    if to not in (*FORMS, *PREFIXES):
        raise RecipeError(f"An adapter can be written as {', '.join((*FORMS, *PREFIXES))}, not as {to!r}.")
    must_be_empty(target)
    model, probe, tokenizer = open_adapter(source, base)
    before = probe(model)
    if to != "lora":
        if not isinstance(model, PeftModel):
            raise RecipeError(f"{source} holds a whole model and no adapter; it can be written as lora.")
        if to in PREFIXES:
            model = _in_form(model, PREFIXES[to])
        model.save_pretrained(target)
        names = {k: str(getattr(v.peft_type, "value", v.peft_type)) for k, v in model.peft_config.items()}
        difference = disagreement(before, probe(PeftModel.from_pretrained(model.unload(), target).eval()))
        yield f"{target} holds {', '.join(names.values())}, in this library's files."
    else:
        written, lines = _write_lora(model, source, target, rank)
        difference = disagreement(before, probe(written))
        yield from lines
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    if (source / TASK_FILE).exists():
        write_atomically(target, {TASK_FILE: (source / TASK_FILE).read_bytes()})
    yield f"Outputs differ by {difference:.1e} of the largest."


def open_adapter(source: Path, base: str | None) -> tuple[Any, Callable[[Any], torch.Tensor], Any]:
    """A model with its adapter, a function that gives outputs to compare, and the tokenizer where there is one.

    Args:
        source: As :func:`convert` takes it.
        base: The base model, where the source does not name it.

    Raises:
        RecipeError: Neither says what the base model is, or one of the two cannot be read.
    """
    if not source.exists():
        raise RecipeError(f"There is no folder or file {str(source)!r}.")
    if source.is_dir() and ((source / TASK_FILE).exists() or _says_task(source)):
        model, task = load_run(source)
        return model, lambda m: outputs(m, task), task.tokenizer
    if source.is_dir():
        if not (source / CONFIG_NAME).exists():
            read_task(source)  # says what is wrong
        base = base or PeftConfig.from_pretrained(source).base_model_name_or_path
    if not base:
        raise RecipeError(f"{source} does not say its base model: name it with --base.")
    plain = _plain_model(base)
    if source.is_dir():
        model = PeftModel.from_pretrained(plain, source)
    else:
        from ..lycoris import load_lycoris

        model = load_lycoris(plain, source)
    return model.eval(), _hidden, None


def _says_task(folder: Path) -> bool:
    if not (folder / CONFIG_NAME).exists():
        return False
    config = PeftConfig.from_pretrained(folder)
    return bool(config.base_model_name_or_path) and config.task_type is not None


def _plain_model(name: str) -> nn.Module:
    """A model of the class that it was saved as."""
    import transformers

    where, options = models.locate(ModelSection(name=name))
    with models.quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(where, **options)
            cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
            return cls.from_pretrained(where, **options).eval()
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(f"The model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from None


@torch.no_grad()
def _hidden(model: Any) -> torch.Tensor:
    """A model's first output for some token ids."""
    size = model.get_input_embeddings().num_embeddings
    ids = torch.arange(3, 15).reshape(2, 6) % size
    more = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    return model(input_ids=ids, **more)[0].float()


def _in_form(model: PeftModel, peft_type: str) -> PeftModel:
    """The model with its adapter as one of another method.

    Raises:
        RecipeError: The other method has no such adapter.
    """
    try:
        tensors, config = in_form(peft_type, get_peft_model_state_dict(model), model.peft_config["default"])
    except ValueError as error:
        raise RecipeError(str(error)) from None
    tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    written = get_peft_model(model.unload(), config)
    set_peft_model_state_dict(written, tensors)
    return written.eval()


# -- as LoRA -----------------------------------------------------------------------------------------------------------


def _write_lora(model: Any, source: Path, target: Path, rank: int) -> tuple[Any, list[str]]:
    if isinstance(model, PeftModel):
        old = model.peft_config["default"]
        changes, beside = _changes_of_adapter(model, source), 0.0
        own = [f".{name}." for name in changes]
        heads = {
            k: v.detach().clone() for k, v in get_peft_model_state_dict(model).items()
            if not any(o in f"{k.removeprefix('base_model.model')}." for o in own)
        }  # fmt: skip
        base, task_type, saved = model.unload(), old.task_type, getattr(old, "modules_to_save", None)
    else:
        task, section = read_task(source)
        base, _ = models.load_base(section, task, task.tokenizer)
        parts = models.head_names(base)
        changes, beside = _changes_of_model(base, model, parts)
        heads = {
            f"base_model.model.{n}": v.detach().clone() for n, v in model.state_dict().items() if n.partition(".")[0] in parts
        }  # fmt: skip
        task_type, saved = task.task_type, parts if not task.generates else None
    if not changes:
        raise RecipeError(f"{source} changes no linear layer: there is nothing to write as LoRA.")
    rank = min(rank, max(min(c.shape) for c in changes.values()))
    tensors, lost, whole, worst = {}, beside, beside, 0.0
    for name, change in changes.items():
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        root = s[:rank].sqrt()
        tensors[f"base_model.model.{name}.lora_A.weight"] = _to_rank(root[:, None] * v[:rank], rank, 0)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _to_rank(u[:, :rank] * root, rank, 1)
        lost, whole = lost + float((s[rank:] ** 2).sum()), whole + float((s**2).sum())
        worst = max(worst, float(s[rank:].norm() / s.norm().clamp_min(1e-12)))
    config = get_method("LORA").config_cls(
        r=rank, lora_alpha=rank, target_modules=list(changes), task_type=task_type, modules_to_save=saved
    )
    written = get_peft_model(base, config)
    set_peft_model_state_dict(written, {**tensors, **heads})
    written.save_pretrained(target)
    missed = (lost / whole) ** 0.5 if whole else 0.0
    lines = [
        f"{target} holds LoRA of rank {rank} on {len(changes)} layers.",
        f"It misses {missed:.2%} of the change (Frobenius), {worst:.2%} in the worst layer.",
    ]
    if beside and whole:
        lines.append(
            f"{(beside / whole) ** 0.5:.2%} of the change is in biases, norms and embeddings, which LoRA does not hold."
        )
    return written.eval(), lines


def _changes_of_adapter(model: PeftModel, source: Path) -> Matrices:
    changes: Matrices = {}
    for name, layer in adapted_modules(model.get_base_model()):
        if not isinstance(layer, AdapterLayer):
            continue
        try:
            delta = layer.get_delta_weight("default").float().cpu()
        except (ValueError, NotImplementedError) as error:
            raise RecipeError(f"The adapter in {source} cannot be written as LoRA: {error}") from None
        inner: Any = layer.get_base_layer()
        if delta.dim() != 2 or isinstance(inner, nn.Embedding):
            raise RecipeError(f"{name} is no linear layer; only adapters of linear layers can be written as LoRA.")
        changes[name] = delta if tuple(inner.weight.shape) == (layer.out_features, layer.in_features) else delta.T
    if not changes:
        raise RecipeError(
            f"The adapter in {source} cannot be written as LoRA: virtual tokens and prefixes are no change of a weight."
        )
    return changes


def _changes_of_model(base: nn.Module, trained: nn.Module, parts: list[str]) -> tuple[Matrices, float]:
    """What training changed of the linear layers, and the squared norm of what it changed of anything else but the head."""
    old, new = base.state_dict(), trained.state_dict()
    changes: Matrices = {}
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear) and name.partition(".")[0] not in parts:
            change = new[f"{name}.weight"].float() - old[f"{name}.weight"].float()
            if change.any():
                changes[name] = change
    rest = [
        n for n, t in old.items()
        if t.is_floating_point() and n.removesuffix(".weight") not in changes and n.partition(".")[0] not in parts
    ]  # fmt: skip
    return changes, sum(float(((new[n].float() - old[n].float()) ** 2).sum()) for n in rest)


def _to_rank(factor: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    """Zeros where a layer has fewer singular values than the rank."""
    missing = rank - factor.shape[axis]
    if missing <= 0:
        return factor.contiguous()
    shape = (missing, factor.shape[1]) if axis == 0 else (factor.shape[0], missing)
    return torch.cat([factor, torch.zeros(shape)], axis)
