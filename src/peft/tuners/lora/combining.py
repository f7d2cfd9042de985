"""Combining LoRA adapters into one: exactly, by truncation, or by sparse merging of their factors or of their ΔW."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from ...core.combining import Combination, Share
from ...core.errors import did_you_mean, doubt, shorten
from ...core.layer import Parts
from ...kernels import combining as kernels
from ...kernels.combining import SignMethod
from .layer import LoraLayer
from .starts import reads_weight

# By the first part of a combination type: how a list of tensors with weights becomes one tensor.
_SUMS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": lambda tensors, weights, how: kernels.task_arithmetic(tensors, weights),
    "ties": lambda tensors, weights, how: kernels.ties(tensors, weights, how.density, how.majority_sign_method),
    "dare_linear": lambda tensors, weights, how: kernels.dare_linear(tensors, weights, how.density),
    "dare_ties": lambda tensors, weights, how: kernels.dare_ties(
        tensors, weights, how.density, how.majority_sign_method
    ),
    "magnitude_prune": lambda tensors, weights, how: kernels.magnitude_prune(tensors, weights, how.density),
}
TYPES = ("svd", "linear", "cat", *(f"{name}{end}" for name in list(_SUMS)[1:] for end in ("", "_svd")))
INEXACT = 1e-3
"""Relative error above which "linear" warns; rounding stays far below."""


@dataclass
class LoraCombination(Combination):
    """How LoRA adapters are combined; see :meth:`~peft.LoraModel.add_weighted_adapter` for the arguments."""

    layer_cls = LoraLayer

    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: SignMethod = "total"

    def __post_init__(self) -> None:
        kind = self.combination_type
        if kind not in TYPES:
            raise ValueError(
                f"Invalid combination_type: {kind!r}{did_you_mean(str(kind), TYPES)}. Known: {', '.join(TYPES)}."
            )
        if self._sum_name not in (None, "linear"):
            if self.density is None or not self.density >= 0:
                raise ValueError(
                    f"combination_type={kind!r} needs `density`, the fraction of entries to keep, between 0 and 1; "
                    f"got {self.density!r}."
                )
            if self.density > 1:
                doubt(f"density={self.density} is more than 1: nothing is pruned.", stacklevel=5)
                self.density = 1.0
            if self.majority_sign_method not in get_args(SignMethod):
                raise ValueError(
                    f"Unknown majority_sign_method {self.majority_sign_method!r}. Use 'total' or 'frequency'."
                )
        if self.svd_rank is not None and (not isinstance(self.svd_rank, int) or self.svd_rank < 1):
            raise ValueError(f"`svd_rank` should be a positive whole number, got {self.svd_rank!r}.")
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            raise ValueError(f"`svd_clamp` is a quantile, between 0 and 1, got {self.svd_clamp!r}.")

    @property
    def _by_svd(self) -> bool:
        return self.combination_type.endswith("svd")

    @property
    def _sum_name(self) -> str | None:
        name = self.combination_type.removesuffix("_svd")
        return name if name in _SUMS else None

    def config(self, configs: Sequence[Any], shares: Sequence[Share]) -> Any:
        new = super().config(configs, shares)
        kept = [field for field in ("use_dora", "lora_bias") if any(getattr(c, field) for c in configs)]
        if kept:
            raise ValueError(
                f"Adapters with {shorten(kept)} cannot be combined: what they do is more than a product of two factors, so a sum of "
                "products would lose it. Merge them one after the other, or activate them together."
            )
        if reads_weight(new.init_lora_weights):
            new.init_lora_weights = True  # the factors hold what the start was measured against
        ranks = [[a.shape[0] for a in _factors(share)[0]] for share in shares]
        if self.combination_type == "cat":
            new.r = max(map(sum, ranks))
        elif self._by_svd:
            new.r = self.svd_rank or max(map(max, ranks))
        else:
            for share, here in zip(shares, ranks, strict=True):
                if len(set(here)) > 1:
                    raise ValueError(
                        f"All adapters must have the same r value for combination_type={self.combination_type!r}, but on "
                        f"{share.target!r} they have {dict(zip(share.names, here, strict=True))}. Use 'cat' or 'svd'."
                    )
            new.r = max(map(max, ranks))
        # The scales are in the factors now: one for every layer, whatever the patterns were.
        new.lora_alpha, new.rank_pattern, new.alpha_pattern, new.use_rslora = new.r, {}, {}, False
        return new

    def parts(self, share: Share, config: Any) -> Parts:
        layer: Any = share.layer
        a, b = _factors(share)
        if any(tb.shape[1] != ta.shape[0] for ta, tb in zip(a, b, strict=True)):
            raise ValueError("the change to a grouped convolution is not the product of two matrices")
        made = self._merge(a, b, share, config.r)
        config = copy.copy(config)
        config.fan_in_fan_out = layer.kind.name == "Conv1D"  # whoever added the sources was told already
        settings = layer.settings(config, share.target)
        shapes = layer.shapes(config, settings)
        # A layer with fewer or smaller adapters than others gets rows of zeros: the new rank is the same everywhere.
        sizes = ((config.r, made[0].shape[1]), (made[1].shape[0], config.r))
        return Parts(
            settings,
            {
                slot: kernels.pad_to(factor, size).reshape(shapes[slot])
                for slot, factor, size in zip(layer._slots(), made, sizes, strict=True)
            },
        )

    def _merge(
        self, a: list[torch.Tensor], b: list[torch.Tensor], share: Share, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors A and B of the new adapter from those of the sources; its scaling is 1."""
        scales = _scales(share)
        if self._sum_name is None:
            all_a, all_b = torch.cat(a), torch.cat([t * s for t, s in zip(b, scales, strict=True)], dim=1)
            if self.combination_type == "cat":
                return all_a, all_b
            made = kernels.factors_of_product(all_b, all_a, rank, clamp=self.svd_clamp, driver=self.svd_driver)
            return made[1], made[0]
        add, device = _SUMS[self._sum_name], a[0].device
        if self._by_svd:
            # Signs are elected among the ΔWᵢ as they are, before their weights.
            deltas = [tb @ ta * s for ta, tb, s in zip(a, b, _scalings(share), strict=True)]
            matrix = add(deltas, torch.tensor(share.weights, device=device), self)
            made = kernels.factors_of_matrix(matrix, rank, clamp=self.svd_clamp, driver=self.svd_driver)
            return made[1], made[0]
        # Each factor takes the root of the scale, and A its sign.
        roots = torch.tensor([math.sqrt(abs(s)) for s in scales], device=device)
        signs = torch.tensor([math.copysign(1, s) for s in scales], device=device)
        return add(a, roots * signs, self), add(b, roots, self)

    def check(self, shares: Sequence[Share], parts: Sequence[Parts]) -> None:
        if self.combination_type != "linear":
            return
        off = wanted = 0.0
        for share, made in zip(shares, parts, strict=True):
            a, b = _factors(share)
            exact_a, exact_b = torch.cat(a), torch.cat([t * s for t, s in zip(b, _scales(share), strict=True)], dim=1)
            new_a, new_b = (made.tensors[slot].flatten(1).float() for slot in share.layer._slots())
            wanted += kernels.product_norm(exact_b, exact_a) ** 2
            off += kernels.product_norm(torch.cat([new_b, -exact_b], dim=1), torch.cat([new_a, exact_a])) ** 2
        error = math.sqrt(off / wanted) if wanted else 0.0
        if error > INEXACT:
            doubt(
                "combination_type='linear' adds up the factors A and B, so that the product also holds each B with the A of the "
                f"others. Here the result differs from the weighted sum of the adapters by {error:.1%} (relative error of ΔW over "
                "all layers). 'cat' is exact and has the sum of the ranks; 'svd' is the best result at one rank.",
                stacklevel=5,
            )


def _factors(share: Share) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each source's A, (r, columns of the weight's matrix), and each one's B, (out_features, r), in float32."""
    factors = [share.layer.factors(name) for name in share.names]
    return [a.detach().float() for a, _ in factors], [b.detach().float() for _, b in factors]


def _scalings(share: Share) -> list[float]:
    return [float(share.layer.scaling[name]) for name in share.names]


def _scales(share: Share) -> list[float]:
    """What each source's B A is multiplied by in the sum: its weight times its own scaling."""
    return [w * s for w, s in zip(share.weights, _scalings(share), strict=True)]
