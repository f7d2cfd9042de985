"""How an adapter's low-rank product acts on a layer: added as it is (plain LoRA), or as a variant does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.low_rank import low_rank_linear

if TYPE_CHECKING:
    from .layer import LoraLayer


class Plain:
    """Plain LoRA: ``W' = W + s B A``. Variants subclass this; they keep no state of their own."""

    needs_weight = False
    """Whether ΔW depends on the weight that it is added to."""

    def shapes(self, layer: LoraLayer) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters beside A and B."""
        return {}

    def check(self, layer: LoraLayer, config: Any) -> None:
        """Refuse a layer or a configuration.

        Raises:
            ValueError: With the reason.
        """

    def start(self, layer: LoraLayer, tensors: dict[str, torch.Tensor], change: torch.Tensor | None) -> None:
        """Fill the parameters beside A and B, in place.

        Args:
            layer: The layer.
            tensors: Parameters of the new adapter.
            change: s B A of its start, as a matrix; ``None`` where it is zero.
        """

    def delta(self, layer: LoraLayer, name: str, weight: torch.Tensor | None) -> torch.Tensor:
        """ΔW of an adapter, as a matrix."""
        return layer.change(name)

    def after(
        self, layer: LoraLayer, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str]
    ) -> torch.Tensor:
        """The layer's output with the adapter applied; see :meth:`~peft.core.layer.AdapterLayer.after`."""
        return layer.add_change(name, x, y)

    def whole(
        self, layer: LoraLayer, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The output of a plain linear layer in one go; see :meth:`~peft.core.layer.AdapterLayer.whole`."""
        a, b, scale = layer.scaled_factors(name)
        if not layer.fits(x, weight, a, b):
            return None
        dropped, rate = layer.dropout_of(name, x)
        return low_rank_linear(x, weight, bias, a, b, scale, rate, layer.memo) if dropped is x else None


PLAIN = Plain()
