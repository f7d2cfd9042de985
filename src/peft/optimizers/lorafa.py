"""LoRA-FA: A stays frozen, and B follows the projected gradient of the whole weight (Zhang et al. 2023, arXiv 2308.03303)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..core.errors import shorten
from ..core.holder import adapted_modules
from ..tuners.lora import LoraLayer


class LoraFAOptimizer(Optimizer):
    """AdamW that corrects the gradients of LoRA's B for a frozen A.

    With ``W' = W + s B A`` and A frozen, B's gradient is ``g_B = s g Aᵀ`` for g = ∂L/∂W'. The step of B whose change ``s ΔB A`` is
    nearest to g is ``ĝ_B = s⁻² g_B (A Aᵀ)⁻¹``: then ``s ĝ_B A`` is g projected on the rows of A. AdamW runs on ĝ_B.

    Args:
        params: Groups of parameters. A group's ``names`` tell the B's, each with an A of the same name; its ``scaling_factors`` are
            s for each parameter.
        lr: Learning rate.
        betas: Decay of the running means of the gradient and its square.
        eps: Added to the root of the latter.
        weight_decay: Decoupled weight decay.
        correct_bias: Correct the means for their start at zero.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0.0:
            raise ValueError(f"`lr` should be at least 0, got {lr!r}.")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"`betas` should be at least 0 and below 1, got {betas!r}.")
        if eps < 0.0:
            raise ValueError(f"`eps` should be at least 0, got {eps!r}.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters.

        Args:
            closure: Evaluates the loss anew.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            factors = dict(zip(group["names"], group["params"], strict=True))
            for (name, parameter), scaling in zip(factors.items(), group["scaling_factors"], strict=True):
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if "lora_B" in name:
                    a = factors[name.replace("lora_B", "lora_A")]
                    gradient = projected(gradient, a, scaling)
                self._adam(parameter, gradient, group)
        return loss

    def _adam(self, parameter: nn.Parameter, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def projected(gradient: torch.Tensor, a: torch.Tensor, scaling: float) -> torch.Tensor:
    """ĝ_B = s⁻² g_B (A Aᵀ)⁻¹.

    Args:
        gradient: g_B, (out_features, r), or with further dimensions of size 1.
        a: A, (r, in_features), or with those of a kernel.
        scaling: s.
    """
    rows, flat = a.float().flatten(1), gradient.float().flatten(1)
    gram = rows @ rows.T
    gram.diagonal().add_(1e-8)
    return torch.linalg.solve(gram, flat.T).T.view_as(gradient).to(gradient) / scaling**2


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """LoRA-FA's optimiser (Zhang et al. 2023, arXiv 2308.03303). A is frozen in the model.

    Args:
        model: The model, with LoRA adapters on linear layers or convolutions.
        r: Rank of the adapters. The scaling of this library's layers is taken from them; r and lora_alpha give that of others.
        lora_alpha: Their ``lora_alpha``.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        use_rslora: Whether they have ``use_rslora``; read off the layers when not given.

    Returns:
        The optimiser.

    Raises:
        ValueError: ``use_rslora`` is not what the adapters have, or a layer is a grouped convolution.
    """
    configs = getattr(model, "peft_config", {})
    other = [n for n in getattr(model, "active_adapters", []) if getattr(configs[n], "use_rslora", None) != use_rslora]
    if use_rslora is not None and other:
        raise ValueError(
            f"use_rslora={use_rslora} is given, but the configuration of {shorten(other)} says otherwise. Leave it out: the "
            "scaling is read off the layers."
        )
    scalings: dict[int, float] = {}
    for name, layer in adapted_modules(model):
        if isinstance(layer, LoraLayer):
            if layer.why_no_merge is not None:
                raise ValueError(
                    f"LoRA-FA is for layers whose A reads what the weight reads, but at {name!r}: {layer.why_no_merge}."
                )
            scalings.update({id(layer.lora_B[n].weight): layer.scaling[n] for n in layer.lora_B})
    common = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
    names, parameters = [], []
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
        if parameter.requires_grad or "lora_A" in name:
            names.append(name)
            parameters.append(parameter)
    factors = [scalings.get(id(parameter), common) for parameter in parameters]
    group = {"params": parameters, "names": names, "scaling_factors": factors}
    return LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay)
