"""The configuration of bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ...config import PeftType, WeightConfig
from ...core.errors import did_you_mean
from ...field_checks import check_regex

DEFAULT_REDUCTION = 16


@dataclass
class BottleneckConfig(WeightConfig):
    """Configuration of bottleneck adapters.

    An adapter is a small network with a skip connection, ``y + s · (W_up f(W_down z + b_down) + b_up)``, with W_down of shape
    (bottleneck_dim, width) and W_up of shape (width, bottleneck_dim).

    Args:
        placement: Where adapters sit, and what z is.
            ``"houlsby"`` (Houlsby et al. 2019, arXiv 1902.00751): after the attention and after the feed-forward network of each
            layer, before the residual sum; z is y.
            ``"pfeiffer"`` (Pfeiffer et al. 2020, arXiv 2005.00247): once a layer, after the residual sum of the feed-forward
            network; z is y, or what the layer's closing norm makes of it.
            ``"parallel"`` (He et al. 2021, arXiv 2110.04366): beside the feed-forward network; z is its input, y its output.
        bottleneck_dim: Width of the bottleneck.
        reduction_factor: Instead of it: how many times narrower than the layer the bottleneck is; 16 when neither is given.
        non_linearity: f, by its name in transformers' ``ACT2FN``.
        dropout: Probability of dropping a feature of the bottleneck.
        init: ``"mam_adapter"``: W_down Kaiming-uniform and W_up zero, so that a fresh adapter changes nothing (He et al. 2021);
            ``"bert"``: both normal with deviation 0.02, near the identity.
        scaling: s, or ``"learned"``: one trained number for each layer that starts at 1.
        ln_before: Normalise z first, by a layer norm of the adapter's own.
        ln_after: Normalise what is added to y, by a layer norm of the adapter's own.
        original_ln_after: Where the adapted module is a norm N with input x: run it again on the sum, N(x + f(N(x))), as Pfeiffer
            adapters do in models that normalise after the residual sum. Otherwise N(x) + f(N(x)).
        use_gating: Multiply what is added by a gate, ``sigmoid(w z + c)``, one number for each token.
        phm_dim: n of Compacter (Karimi Mahabadi et al. 2021, arXiv 2106.04647): both projections are sums of n Kronecker products,
            ``sum_i A_i ⊗ B_i`` with A_i of shape (n, n). ``None``: plain matrices.
        phm_rank: Rank of B_i, which is a product of two factors then; ``None``: full.
        phm_shared: One set of A_i for all layers of the adapter; otherwise one for each projection.
        target_modules: Names or suffixes of the modules to adapt, or a regular expression for the full name: linear layers,
            embeddings, norms, or whole blocks that give a tensor or a tuple that begins with one. The placement's modules in the
            model's type when not given.
        exclude_modules: Names, suffixes or a regular expression of modules to leave out.
        input_modules: For ``"parallel"``: expressions for full names of adapted modules, and templates of the name of the module
            whose input the adapter reads, for example ``{r"(.*)\\.fc2": r"\\1.fc1"}``. Modules that match none read their own.
        modules_to_save: Modules trained in full and saved with the adapter.
        layers_to_transform: Numbers of the layers to adapt.
        layers_pattern: Name of the list that holds the layers, where it is not found by itself.
        bottleneck_dim_pattern: Widths that differ, by name, suffix or regular expression of the adapted module.
        reduction_factor_pattern: The same for the reduction factor.

    Raises:
        ValueError: A field has an impossible value.
    """

    _pattern_fields = ("bottleneck_dim_pattern", "reduction_factor_pattern")

    placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    bottleneck_dim: int | None = None
    reduction_factor: float | None = None
    non_linearity: str = "relu"
    dropout: float = 0.0
    init: Literal["mam_adapter", "bert"] = "mam_adapter"
    scaling: float | Literal["learned"] = 1.0
    ln_before: bool = False
    ln_after: bool = False
    original_ln_after: bool = True
    use_gating: bool = False
    phm_dim: int | None = None
    phm_rank: int | None = 1
    phm_shared: bool = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    input_modules: dict[str, str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bottleneck_dim_pattern: dict[str, int] = field(default_factory=dict)
    reduction_factor_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.peft_type = PeftType.BOTTLENECK
        super().__post_init__()
        if self.bottleneck_dim is not None and self.reduction_factor is not None:
            raise ValueError(
                f"Give `bottleneck_dim` ({self.bottleneck_dim!r}) or `reduction_factor` ({self.reduction_factor!r}), not both: "
                "each sets the width of the bottleneck."
            )
        for name in ("bottleneck_dim", "phm_dim", "phm_rank"):
            if (value := getattr(self, name)) is not None:
                positive(name, value, whole=True)
        if self.reduction_factor is not None:
            positive("reduction_factor", self.reduction_factor)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` is a probability, at least 0 and below 1, got {self.dropout!r}.")
        for pattern in self.input_modules or {}:
            check_regex("input_modules", pattern)
        if self.input_modules and self.placement != "parallel":
            raise ValueError(
                f"`input_modules` has no effect with placement={self.placement!r}: use placement='parallel'."
            )
        activation(self.non_linearity)


def activation(name: str) -> Any:
    """A fresh activation module by its name in transformers' ``ACT2FN``.

    Raises:
        ValueError: Unknown name, or the activation has parameters of its own, which no adapter file would hold.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(
            f"Unknown `non_linearity` {name!r}{did_you_mean(name, ACT2FN)}. Known: {', '.join(sorted(ACT2FN))}."
        )
    module = ACT2FN[name]
    if any(True for _ in module.parameters()):
        raise ValueError(
            f"`non_linearity` {name!r} has trained parameters of its own, which is not supported. Choose another."
        )
    return module


def positive(name: str, value: Any, whole: bool = False) -> None:
    """Refuse what is no positive number.

    Raises:
        ValueError: With the name.
    """
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value <= 0:
        raise ValueError(f"`{name}` should be a positive {'integer' if whole else 'number'}, got {value!r}.")
