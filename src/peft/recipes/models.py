"""Base models, tokenizers, and the method put into them."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import did_you_mean
from ..mapping import get_peft_model
from . import packaged
from .errors import RecipeError, need
from .methods import FULL, HEAD, build_config, method_info
from .recipe import MethodSection, ModelSection
from .tasks import Task


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within this context transformers says only what is an error: that a new head is new needs no warning here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def locate(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """Where a model is, and the arguments that say so to transformers.

    Raises:
        RecipeError: A path that is not there.
    """
    name = section.name
    if name.startswith(packaged.PREFIX):
        name = str(packaged.packaged_path(name, packaged.MODELS))
    where: dict[str, Any] = {"revision": section.revision} if section.revision else {}
    if section.trust_remote_code:
        where["trust_remote_code"] = True
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        need("gguf", "A .gguf file")
        if not path.is_file():
            raise RecipeError(f"There is no file {str(path)!r}.")
        return str(path.parent), {**where, "gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").exists():
        if (path / "adapter_config.json").exists():
            raise RecipeError(f"{str(path)!r} is an adapter; model.name wants the base model that it was made for.")
        raise RecipeError(f"The folder {str(path)!r} holds no model: it has no config.json.")
    if not path.exists() and name.startswith((".", "/", "~")):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RecipeError(f"There is no model folder {name!r}{did_you_mean(path.name, beside) or '.'}")
    return str(path) if path.is_dir() else name, where


def load_tokenizer(section: ModelSection, words: bool = False, folder: Path | None = None) -> Any:
    """The tokenizer, with a padding token.

    Args:
        section: The recipe's model.
        words: Inputs come as lists of words.
        folder: Where a run has kept it; the model's own is taken when not given.

    Raises:
        RecipeError: There is none.
    """
    from transformers import AutoTokenizer

    if folder is not None:
        where, options = str(folder), dict[str, Any]()
    else:
        where, options = locate(ModelSection(name=section.tokenizer) if section.tokenizer else section)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            if words and "add_prefix_space" in tokenizer.init_kwargs:
                tokenizer = AutoTokenizer.from_pretrained(where, add_prefix_space=True, **options)
        except (OSError, ValueError, ImportError) as error:
            raise _cannot_load("tokenizer", section.tokenizer or section.name, error) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise RecipeError(f"The tokenizer of {section.name!r} has no token for padding, nor one to use in its place.")
    return tokenizer


def longest_input(config: Any, tokenizer: Any) -> int:
    """Tokens that a model can take."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(tokenizer, "model_max_length", None)]
    if getattr(text, "model_type", "") not in ("t5", "mt5", "umt5", "bloom"):  # relative positions: any length
        limits += [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**7]
    return min(known, default=10**6)


def load_base(section: ModelSection, task: Task, tokenizer: Any, on_meta: bool = False) -> tuple[Any, list[str]]:
    """The base model with the task's head.

    Args:
        section: The recipe's model.
        task: The task, its labels learnt.
        tokenizer: Its tokenizer.
        on_meta: Without weights.

    Returns:
        The model and notes for the user.

    Raises:
        RecipeError: It cannot be loaded, or has no such head.
    """
    import transformers

    auto = getattr(transformers, task.auto_class)
    where, options = locate(section)
    notes: list[str] = []
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(where, **options, **task.model_options())
        except (OSError, ValueError, ImportError) as error:
            raise _cannot_load("model", section.name, error) from None
        _change(config, section, notes)
        if getattr(config, "pad_token_id", None) is None and tokenizer is not None:
            config.pad_token_id = tokenizer.pad_token_id
        if type(config) not in auto._model_mapping:
            raise RecipeError(
                f"The model {section.name!r} is a {config.model_type}, which has no head for {task.name}. Choose another model or task."
            )
        try:
            if on_meta:
                with torch.device("meta"):
                    return auto.from_config(config), notes
            dtype = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
            if "gguf_file" in options:
                with contextlib.redirect_stderr(io.StringIO()):  # a bar that is not transformers' own
                    model = _plain(auto.from_pretrained(where, config=config, dtype=dtype, **options))
            else:
                model = auto.from_pretrained(where, config=config, dtype=dtype, **options)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise _cannot_load("model", section.name, error) from None
    model.config._name_or_path = model.name_or_path = section.name if "gguf_file" in options else where
    return model, notes


def _plain(model: Any) -> Any:
    """The weights of a .gguf file are plain numbers once they are read: marks that say otherwise keep the Trainer from training."""
    if all(p.is_floating_point() for p in model.parameters()):
        model.is_quantized = False
        for owner, name in (
            (model, "hf_quantizer"),
            (model, "quantization_method"),
            (model.config, "quantization_config"),
        ):
            if hasattr(owner, name):
                delattr(owner, name)
    return model


def _change(config: Any, section: ModelSection, notes: list[str]) -> None:
    known = {*config.to_dict(), *dir(type(config))}
    for key, value in section.config.items():
        if key not in known:
            raise RecipeError(
                f"model.config.{key}: the model's configuration has no such field{did_you_mean(key, known) or '.'}",
                f"model.config.{key}",
            )
        setattr(config, key, value)
    key = "attention_probs_dropout_prob"
    if not torch.cuda.is_available() and getattr(config, key, None) and key not in section.config:
        setattr(config, key, 0.0)
        notes.append(f"On a CPU attention with dropout takes seven times as long: model.config.{key} is set to 0.")


def apply_method(model: nn.Module, section: MethodSection, task: Task) -> Any:
    """Choose what trains: an adapter and the head, everything, or the head alone.

    Raises:
        RecipeError: The method does not suit the model.
    """
    name = method_info(section.name).name
    if name == FULL:
        return model.requires_grad_(True)
    if name == HEAD:
        model.requires_grad_(False)
        for head in head_names(model):
            model.get_submodule(head).requires_grad_(True)
        if not any(p.requires_grad for p in model.parameters()):
            raise RecipeError(
                f"The model has no head of its own for {task.name} to train; choose another method than 'head'."
            )
        return model
    config = build_config(section, task.task_type)
    heads = [] if task.generates else head_names(model)
    if hasattr(config, "modules_to_save"):
        # Some heads have parts beside the classifier (DistilBERT's pre_classifier): they are new too, and have to learn.
        config.modules_to_save = [*(config.modules_to_save or []), *heads] or None
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, NotImplementedError) as error:
        raise RecipeError(f"The method {name!r} does not suit this model: {error}") from None
    parts = [adapted.get_base_model().get_submodule(head) for head in heads]
    if parts and not any(p.requires_grad for part in parts for p in part.parameters()):
        raise RecipeError(f"The method {name!r} leaves the new head for {task.name} as it is: choose another method.")
    return adapted


def head_names(model: nn.Module) -> list[str]:
    """Names of the parts of a model that its base model does not have; for language models, the output layer."""
    prefix = getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]


def virtual_tokens(section: MethodSection) -> int:
    """Tokens that a method puts before the input."""
    config = build_config(section, None)
    count = getattr(config, "num_virtual_tokens", 0) if getattr(config, "is_prompt_learning", False) else 0
    return max(count) if isinstance(count, list) else int(count or 0)


def _cannot_load(what: str, name: str, error: Exception) -> RecipeError:
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return RecipeError(
        f"The {what} {name!r} cannot be loaded: {lines[0][:300].rstrip('.')}. Packaged: packaged:minilm, packaged:smollm2."
    )
