"""LoRA+: a larger learning rate for B than for A (Hayou et al. 2024, arXiv 2402.12354)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimiser with LoRA+'s learning rates (Hayou et al. 2024, arXiv 2402.12354).

    In wide models B should learn faster than A: ``lr_B = loraplus_lr_ratio · lr_A``.

    Args:
        model: The model; its trainable parameters are optimised.
        optimizer_cls: Class of the optimiser, such as ``torch.optim.AdamW``.
        lr: Learning rate of A and of everything that is not named below.
        loraplus_lr_ratio: λ, by which the learning rate of B, of DoRA's magnitudes and of biases and norms is larger.
        **kwargs: For the optimiser, but for ``loraplus_weight_decay`` (weight decay, 0 when not given; biases and norms
            have none) and ``loraplus_lr_embedding`` (learning rate of adapters on embeddings, 1e-6 when not given).

    Returns:
        The optimiser, with a group of parameters for each of these kinds.

    Raises:
        ValueError: Nothing trains, or a rate is not positive.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    lr_embedding = kwargs.pop("loraplus_lr_embedding", 1e-6)
    for name, value in {
        "lr": lr,
        "loraplus_lr_ratio": loraplus_lr_ratio,
        "loraplus_lr_embedding": lr_embedding,
    }.items():
        if not value > 0:
            raise ValueError(f"`{name}` should be positive, got {value!r}.")
    faster = lr * loraplus_lr_ratio
    settings = {
        "A": {"lr": lr, "weight_decay": decay},
        "embedding": {"lr": lr_embedding, "weight_decay": decay},
        "B": {"lr": faster, "weight_decay": decay},
        "vector": {"lr": faster, "weight_decay": 0.0},
    }
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in settings}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_kind(name, parameter)].append(parameter)
    if not any(groups.values()):
        raise ValueError("No parameter of the model trains. Activate an adapter first: model.set_adapter(name).")
    make: Any = optimizer_cls  # the base class's own signature has no learning rate
    return make([{"params": groups[kind], **settings[kind]} for kind in settings], lr=lr, **kwargs)


def _kind(name: str, parameter: nn.Parameter) -> str:
    if parameter.dim() == 1 and (name.endswith("bias") or "lora_" not in name):
        return "vector"
    if "lora_embedding_" in name:
        return "embedding"
    return "B" if "lora_B" in name or parameter.dim() == 1 else "A"  # DoRA's magnitudes learn like B
