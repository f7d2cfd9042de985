"""LoRA's model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...core.checkpoints import PREFIX, file_prefix
from ...core.combining import combine
from ...core.errors import doubt, shorten
from ...core.files import load_peft_weights
from ...core.holder import adapted_modules
from ...core.tuner import BaseTuner
from ...kernels.combining import SignMethod
from .combining import LoraCombination
from .layer import FACTORS, Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer
from .starts import as_plain, doubled_alpha, reads_weight


class LoraModel(BaseTuner):
    """A base model with LoRA adapters (Hu et al. 2021, arXiv 2106.09685); see :class:`~peft.core.tuner.BaseTuner`."""

    layer_cls = LoraLayer
    layers = {
        "Linear": Linear,
        "Conv1D": Linear,
        "opaque linear": Linear,
        "Embedding": Embedding,
        "Conv1d": Conv1d,
        "Conv2d": Conv2d,
        "Conv3d": Conv3d,
    }
    default_role = "attention"
    prefix = "lora_"

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: SignMethod = "total",
    ) -> None:
        """Add an adapter that stands for a weighted combination of others; it is inactive until :meth:`set_adapter`.

        With ΔWᵢ = sᵢ Bᵢ Aᵢ and weights wᵢ the aim is Σ wᵢ ΔWᵢ:

        - ``"cat"``: exactly that, with stacked factors; the new rank is the sum of the ranks.
        - ``"svd"``: its best approximation of rank ``svd_rank``.
        - ``"linear"``: sums of the A and of the B, each with √|wᵢ sᵢ|. The product also holds every Bᵢ Aⱼ, so it is exact for
          one adapter only (or where each Bᵢ Aⱼ happens to vanish); otherwise a warning tells the measured relative error.
        - ``"ties"`` (Yadav et al. 2023, arXiv 2306.01708): trim, elect signs, take the mean of what agrees.
        - ``"dare_linear"``, ``"dare_ties"`` (Yu et al. 2023, arXiv 2311.03099): drop at random and rescale, then sum, or elect signs.
        - ``"magnitude_prune"``: keep the largest entries, then sum.
        - the last four with ``_svd``: the same on the ΔWᵢ, followed by a truncated decomposition; without, on the factors.

        Args:
            adapters: Names of the adapters.
            weights: A weight for each; it may be negative.
            adapter_name: Name of the new adapter.
            combination_type: One of those above.
            svd_rank: Rank of the new adapter for ``svd`` types; the largest rank of the adapters when not given.
            svd_clamp: For ``svd`` types: clamp the entries of the new factors to this quantile of them, between 0 and 1.
            svd_full_matrices: No effect: the reduced decomposition holds all that is kept.
            svd_driver: For ``svd`` types on CUDA: the driver, see ``torch.linalg.svd``.
            density: For ``ties``, ``dare`` and ``magnitude_prune`` types: fraction of entries to keep, between 0 and 1.
            majority_sign_method: For ``ties`` types: ``"total"``, the sign with the larger sum of magnitudes, or ``"frequency"``.

        Raises:
            ValueError: Unknown names or type, adapters of different ranks for types that need equal ones, modules trained in
                full, or grouped convolutions. The model is as it was.
        """
        how = LoraCombination(combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
        combine(self.model, adapters, weights, adapter_name, how)

    # -- starts that were read off the base weights ----------------------------------------------------------------

    def unload(self) -> nn.Module:
        """Take adapters and this library's layers out.

        Returns:
            The plain base model, with its own weights. Where an adapter started from a part of the weights (``"pissa"``, ``"olora"``)
            and its configuration was set to ``init_lora_weights=True`` since, which says that its file is for weights without
            that part, it is the model that the file fits: that part is left out of the weights.
        """
        self.unmerge_adapter()
        for _, layer in adapted_modules(self.model):
            if isinstance(layer, LoraLayer):
                layer.leave_out([n for n in layer.lora_start if self._is_for_the_rest(n)])
        return super().unload()

    def _is_for_the_rest(self, adapter_name: str) -> bool:
        """Whether the configuration says that the base weights lack the part from which the adapter started."""
        return not reads_weight(getattr(self.peft_config[adapter_name], "init_lora_weights", True))

    def _started(self, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
        for name, layer in adapted_modules(self.model):
            if isinstance(layer, LoraLayer) and adapter_name in layer.lora_start:
                yield PREFIX + file_prefix(name), layer

    def for_file(
        self, adapter_name: str, tensors: dict[str, torch.Tensor], config: Any, initial: str | None = None
    ) -> tuple[dict[str, torch.Tensor], Any]:
        started = [layer for _, layer in self._started(adapter_name)]
        if not started:  # also adapters of another method in a mixed model
            return super().for_file(adapter_name, tensors, config, initial)
        if initial is None:
            if self._is_for_the_rest(adapter_name) and any(m.has_moved(adapter_name) for m in started):
                doubt(
                    f"Adapter {adapter_name!r} started from a part of the base weights and was trained, but its configuration has "
                    f"init_lora_weights={config.init_lora_weights!r}: its file fits only the weights without that part, which "
                    "unload() gives. For a file that fits the base model, save with path_initial_model_for_weight_conversion, or "
                    "set init_lora_weights back to what it was."
                )
            return tensors, config
        start = load_peft_weights(initial, device="cpu")
        self._check_start(adapter_name, tensors, start, initial)
        return {k: t.contiguous() for k, t in _doubled(tensors, start).items()}, _doubled_config(config)

    def _check_start(
        self, adapter_name: str, tensors: dict[str, torch.Tensor], start: dict[str, torch.Tensor], source: str
    ) -> None:
        factors = [k for k in tensors if k.endswith(FACTORS[0] + FACTORS[1])]
        unfit = [k for k in factors if k not in start or start[k].shape != tensors[k].shape]
        if unfit:
            raise ValueError(
                f"{source!r} does not hold the start of adapter {adapter_name!r}: {shorten(unfit, 4)} are missing there or have "
                "another shape. Give the folder that the fresh adapter was saved to."
            )
        for name, layer in self._started(adapter_name):
            a, b = next((start[f"{name}.{a}"], start[f"{name}.{b}"]) for a, b in FACTORS if f"{name}.{a}" in start)
            known: Any = layer.lora_start[adapter_name]
            wanted = known.b.float() @ known.a.float()
            found = b.flatten(1).to(wanted) @ a.flatten(1).to(wanted)
            if not torch.allclose(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())):
                raise ValueError(
                    f"{source!r} does not hold the start of adapter {adapter_name!r}: at {name!r} it differs from what the adapter "
                    "started from. Give the folder that the fresh adapter was saved to."
                )


def _doubled(tensors: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the plain adapter of twice the rank whose change is that of ``B A − B₀ A₀``."""
    result = dict(tensors)
    for a_name, b_name in FACTORS:
        for a_key in [k for k in tensors if k.endswith(a_name)]:
            b_key = a_key.removesuffix(a_name) + b_name
            a, b = tensors[a_key].detach(), tensors[b_key].detach()
            result[a_key], result[b_key] = as_plain(a, b, start[a_key], start[b_key])
    return result


def _doubled_config(config: Any) -> Any:
    config.init_lora_weights = True
    config.r = 2 * config.r
    config.lora_alpha = doubled_alpha(config.lora_alpha, config.use_rslora)
    config.rank_pattern = {k: 2 * r for k, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {k: doubled_alpha(a, config.use_rslora) for k, a in (config.alpha_pattern or {}).items()}
    return config
