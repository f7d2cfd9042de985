"""LoRA's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...core.combining import combine
from ...core.holder import BaseTunerLayer
from ...core.kinds import kind_of
from ...core.tuner import BaseTuner
from ...kernels.combining import SignMethod
from .combining import LoraCombination
from .layer import LAYERS, Linear, LoraLayer


class LoraModel(BaseTuner):
    """A base model with LoRA adapters (Hu et al. 2021, arXiv 2106.09685); see :class:`~peft.core.tuner.BaseTuner`."""

    layer_cls = LoraLayer
    default_role = "attention"
    prefix = "lora_"

    @classmethod
    def make_layer(cls, base_layer: nn.Module, config: Any) -> LoraLayer:
        innermost = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        kind = kind_of(innermost)
        return LAYERS.get(kind.name if kind else "", Linear)(base_layer)

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
