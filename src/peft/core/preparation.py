"""Preparing a model for training: quantised bases, mixed precision, sharding, labels."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .errors import doubt
from .files import accepts
from .holder import BaseTunerLayer, adapted_modules
from .layer import HALF, AdapterLayer


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Make a quantised model ready for adapters: freeze it, keep its small layers in float32, let gradients reach its blocks.

    Args:
        model: The base model.
        use_gradient_checkpointing: Recompute activations in the backward pass to save memory.
        gradient_checkpointing_kwargs: For the model's ``gradient_checkpointing_enable``.
        auto_clear_cache: Free the accelerator memory that casting left over.

    Returns:
        The same model.
    """
    keeps_dtype = getattr(model, "quantization_method", None) in ("gptq", "aqlm", "eetq", "torchao", "hqq") or getattr(
        model, "is_quantized_with_own_dtype", False
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if not keeps_dtype and parameter.dtype in HALF and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(torch.float32)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if use_gradient_checkpointing:
        arguments = dict(gradient_checkpointing_kwargs or {})
        if arguments.get("use_reentrant", True):
            enable_input_gradients(model)
        enable: Callable[..., Any] = model.gradient_checkpointing_enable  # type: ignore[assignment]
        if arguments and not accepts(enable, "gradient_checkpointing_kwargs"):
            raise ValueError(
                f"gradient_checkpointing_kwargs={arguments} was given, but {type(model).__name__}.gradient_checkpointing_enable "
                "takes none. Update transformers, or leave them out."
            )
        enable(**({"gradient_checkpointing_kwargs": arguments} if arguments else {}))
    return model


def is_checkpointing(model: nn.Module) -> bool:
    """Whether the model recomputes activations in the backward pass."""
    current = getattr(type(model), "is_activation_checkpointing", None)  # the newer name in transformers
    name = "is_gradient_checkpointing" if current is None else "is_activation_checkpointing"
    return bool(getattr(model, name, False))


def enable_input_gradients(model: nn.Module) -> None:
    """Let the embeddings' output require gradients, as checkpointed blocks over a frozen embedding need."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
        return
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None:
        doubt("The model has no input embeddings to let gradients flow from; checkpointed blocks may not train.")
    else:
        embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Put frozen parameters into a half precision and trainable ones into float32.

    Args:
        model: The model.
        dtype: ``torch.float16`` or ``torch.bfloat16``.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> torch.Tensor:
    """Decoder inputs for labels: shifted by one, the start token first, ``-100`` replaced by padding.

    Args:
        input_ids: Labels, shape (batch, length).
        pad_token_id: Padding token.
        decoder_start_token_id: First token of the decoder.

    Raises:
        ValueError: No padding token.
    """
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined: labels of -100 are replaced by it.")
    shifted = input_ids.new_zeros(input_ids.shape)
    shifted[:, 1:] = input_ids[:, :-1]
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """A wrapping policy for FSDP that keeps trainable adapters apart from frozen weights.

    An adapted layer is a unit of its own, and so is the frozen layer in it: the adapter's parameters, which are read in the layer's
    forward, are then gathered for it, and no unit holds both trained and frozen ones, as ``use_orig_params=False`` needs.

    Args:
        model: The model; its transformer blocks are those of ``FSDP_TRANSFORMER_CLS_TO_WRAP``, else ``model._no_split_modules``.

    Raises:
        ValueError: A class named there is not in the model.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    names = [n.strip() for n in named.split(",") if n.strip()] or list(getattr(model, "_no_split_modules", None) or [])
    by_name = {type(m).__name__: type(m) for m in model.modules()}
    missing = [n for n in names if n not in by_name]
    if missing and named:
        raise ValueError(f"FSDP_TRANSFORMER_CLS_TO_WRAP names {missing}, which are not in the model.")
    layers = [m for _, m in adapted_modules(model) if isinstance(m, AdapterLayer)]
    apart = {id(m) for layer in layers for m in (layer, layer.get_base_layer())}
    inside = {id(m) for layer in layers for n in layer.adapter_names() for m in _modules_of(layer, n)}

    def stands_alone(module: nn.Module) -> bool:
        if id(module) in apart:
            return True
        weight = getattr(module, "weight", None)
        is_leaf = not isinstance(module, BaseTunerLayer) and not module._modules and id(module) not in inside
        return is_leaf and isinstance(weight, torch.Tensor) and weight.requires_grad

    units = functools.partial(lambda_auto_wrap_policy, lambda_fn=stands_alone)
    blocks = functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={by_name[n] for n in names if n in by_name}
    )
    return functools.partial(_or_policy, policies=[units, blocks])


def _modules_of(layer: BaseTunerLayer, name: str) -> Iterator[nn.Module]:
    for _, entry in layer.adapter_entries(name):
        if isinstance(entry, nn.Module):
            yield from entry.modules()
