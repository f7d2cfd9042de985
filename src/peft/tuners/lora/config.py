"""LoRA's configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ...config import PeftType, WeightConfig
from .starts import reads_weight

STARTS = "True, False, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_N' with a number N, or 'olora'"


@dataclass
class LoraRuntimeConfig:
    """Settings of LoRA that are not saved.

    Args:
        ephemeral_gpu_offload: Move offloaded weights to the accelerator for single operations.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(WeightConfig):
    """Configuration of LoRA (Hu et al. 2021, arXiv 2106.09685).

    A layer ``y = W x`` becomes ``y = W x + s B A x`` (eq. 3) with A of shape (r, in_features), B of shape (out_features, r) and
    ``s = lora_alpha / r``; W stays frozen.

    Args:
        r: Rank of the update.
        target_modules: Names or suffixes of the modules to adapt, a regular expression for the full name, or ``"all-linear"``;
            the model type's default when not given.
        exclude_modules: Names, suffixes or a regular expression of modules to leave out.
        lora_alpha: Scale of the update before it is divided by ``r``.
        lora_dropout: Probability of dropping an input element on the adapter's way.
        fan_in_fan_out: The layers store their weight as (in_features, out_features). Found out from the layer; a wrong value is
            corrected with a warning.
        bias: Which biases of the base model train: ``"none"``, ``"all"`` or those of adapted layers (``"lora_only"``).
        use_rslora: ``s = lora_alpha / sqrt(r)`` (Kalajdzievski 2023, arXiv 2312.03732).
        modules_to_save: Modules trained in full and saved with the adapter.
        init_lora_weights: ``True``: A Kaiming-uniform, B zero; ``"gaussian"``: A normal with deviation 1/r, B zero; ``False``:
            both random, for tests only. On embeddings A is zero and B standard normal. ``"pissa"``: the principal part of the
            weight, ``"pissa_niter_N"``: the same by N steps of a fast randomised decomposition (Meng et al. 2024,
            arXiv 2404.02948); ``"olora"``: the first part of its QR decomposition (Büyükakyüz 2024, arXiv 2406.01775);
            ``"orthogonal"``: neither zero, but orthogonal to one another. With the first three the adapter's change is measured
            against its start, so that a fresh one changes nothing.
        layers_to_transform: Numbers of the layers to adapt.
        layers_pattern: Name of the list that holds the layers, where it is not found by itself.
        rank_pattern: Ranks that differ from ``r``, by name, suffix or regular expression.
        alpha_pattern: The same for ``lora_alpha``.
        layer_replication: Ranges ``[start, end)`` of the base model's layers that follow one another in a deeper model. Layers that
            occur several times share their weights; each place has an adapter of its own.
        trainable_token_indices: Tokens whose rows of the input embedding are trained too: a list, or lists by module name. Heads that
            share the weight follow.
        use_dora: Adapt the weight's magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353).
        lora_bias: Give B a trained bias, which merging adds to the layer's.
        ensure_weight_tying: Modules that share the weight of an adapted one, or of one in ``modules_to_save``, get the same change: an
            embedding and the head tied to it stay tied, and the adapter can be merged.

    The other fields are those of the field's common configuration. Any that is not built yet raises ``NotImplementedError`` when it
    is set; none is ignored.

    Raises:
        ValueError: A field has an impossible value.
        NotImplementedError: A field is set that is not built yet.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    _not_built = (
        "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "target_parameters",
        "use_bdlora", "arrow_config", "kasa_config",
    )  # fmt: skip

    swap_keys = ("use_dora", "lora_bias", "lora_dropout", "bias", "trainable_token_indices", "ensure_weight_tying")

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        super().__post_init__()
        self.check_probability("lora_dropout")
        if self.lora_bias and self.use_dora:
            raise ValueError(
                "`lora_bias=True` does not go with `use_dora=True`: the magnitude would scale the bias too. Leave one of them out."
            )
        self._check_built()

    def _check_built(self) -> None:
        empty: tuple[Any, ...] = (None, False, {}, [])
        unbuilt = [name for name in self._not_built if getattr(self, name) not in empty]
        if self.runtime_config is not None and any(vars(self.runtime_config).values()):
            unbuilt.append("runtime_config")
        if unbuilt:
            listed = ", ".join(f"{n}={getattr(self, n)!r}" for n in unbuilt)
            raise NotImplementedError(f"LoraConfig: {listed} is not built in this version of peft. Leave it out.")
        start = self.init_lora_weights
        if start in ("eva", "corda", "loftq", "mica", "lora_ga"):
            raise NotImplementedError(
                f"LoraConfig: init_lora_weights={start!r} is not built in this version of peft. Built: {STARTS}."
            )
        if not isinstance(start, bool) and start not in ("gaussian", "orthogonal") and not reads_weight(start):
            raise ValueError(f"`init_lora_weights` should be {STARTS}, got {start!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary, settings that are not saved left out."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self._transient_keys}
