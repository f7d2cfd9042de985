"""IA³, the whole method: learned vectors that rescale activations (Liu et al. 2022, arXiv 2205.05638, section 3.3)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ...config import PeftType, WeightConfig
from ...core.architectures import default_targets
from ...core.combining import Combination, Share, combine
from ...core.layer import AdapterLayer, Parts
from ...core.targets import match, resolve_defaults
from ...core.tuner import BaseTuner
from ...kernels.scaling import scaled_linear


@dataclass
class IA3Config(WeightConfig):
    """Configuration of IA³ (Liu et al. 2022, arXiv 2205.05638).

    A layer ``y = W x + b`` becomes ``y = l ⊙ (W x + b)``; one in the feed-forward network ``y = W (l ⊙ x) + b``. W and b stay frozen,
    l is learned.

    Args:
        target_modules: Names or suffixes of the modules to adapt, a regular expression for the full name, or ``"all-linear"``;
            keys, values and the end of the feed-forward network, by the model type, when not given.
        exclude_modules: Names, suffixes or a regular expression of modules to leave out.
        feedforward_modules: Those of the targets whose input is rescaled instead of their output, named likewise; by the model
            type when not given.
        fan_in_fan_out: The layers store their weight as (in_features, out_features). Found out from the layer; a wrong value is
            corrected with a warning.
        modules_to_save: Modules trained in full and saved with the adapter.
        init_ia3_weights: Start with ones; ``False``: at random, for tests only.

    Raises:
        ValueError: A field has an impossible value.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.IA3
        super().__post_init__()
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)  # type: ignore[assignment]
        targets, feedforward = self.target_modules, self.feedforward_modules
        if isinstance(targets, set) and isinstance(feedforward, set) and not feedforward <= targets:
            raise ValueError(
                "`feedforward_modules` should be a subset of `target_modules`, but "
                f"{sorted(feedforward - targets)} are not among {sorted(targets)}."
            )


class IA3Layer(AdapterLayer):
    """A layer with IA³ adapters.

    ``ia3_l[name]`` has shape (out_features, 1), or (1, in_features) where it rescales the input; on convolutions (1, channels, 1, …).
    """

    parameter_slots = ("ia3_l",)
    other_param_names = ("feedforward",)
    delta_depends_on_weight = True
    adds_up = True

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.feedforward: dict[str, bool] = {}

    def _get_name(self) -> str:
        return type(self).__name__  # status tables in the field show this method without its name

    @property
    def is_feedforward(self) -> bool:
        """Whether the first adapter rescales the layer's input."""
        return next(iter(self.feedforward.values()), False)

    def settings(self, config: IA3Config, target: str) -> dict[str, Any]:
        self.correct_layout(config, target)
        if config.feedforward_modules is None:
            raise ValueError("please specify `feedforward_modules`, an empty list if there are none")
        feedforward = match(config.feedforward_modules, target) is not None  # type: ignore[arg-type]
        if feedforward and self.kind.takes_indices:
            raise ValueError("its input is indices, which cannot be rescaled; leave it out of `feedforward_modules`")
        return {"feedforward": feedforward}

    def shapes(self, config: IA3Config, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        dims = len(getattr(self.get_base_layer(), "kernel_size", ()))
        channels = self.in_features if settings["feedforward"] else self.out_features
        if dims:
            return {"ia3_l": (1, channels, *(1,) * dims)}
        return {"ia3_l": (1, channels) if settings["feedforward"] else (channels, 1)}

    def start(self, tensors: dict[str, torch.Tensor], config: IA3Config, settings: dict[str, Any]) -> None:
        tensors["ia3_l"].fill_(1.0)
        if not config.init_ia3_weights:
            tensors["ia3_l"].normal_()

    def scale(self, name: str) -> torch.Tensor:
        """The scales of an adapter, shaped to broadcast against the layer's input or output."""
        return self.kind.channels(self.get_base_layer(), self.ia3_l[name].flatten())

    def before(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale(name)).to(x.dtype) if self.feedforward[name] else x

    def after(self, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str] = ()) -> torch.Tensor:
        return y if self.feedforward[name] else y * self.scale(name)

    def whole(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        scale, of_input = self.ia3_l[name].flatten(), self.feedforward[name]
        return scaled_linear(x, weight, bias, scale, self.memo, of_input=of_input)

    def delta(self, name: str, weight: torch.Tensor | None) -> torch.Tensor:
        assert weight is not None
        change = self.ia3_l[name].flatten() - 1
        return weight * (
            self.kind.columns(self.get_base_layer(), change) if self.feedforward[name] else change[:, None]
        )

    def delta_bias(self, name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None or self.feedforward[name] else bias * (self.ia3_l[name].flatten() - 1)


class Linear(IA3Layer):
    """IA³ on a linear layer."""


class Conv2d(IA3Layer):
    """IA³ on a two-dimensional convolution."""


class Conv3d(IA3Layer):
    """IA³ on a three-dimensional convolution."""


@dataclass
class IA3Combination(Combination):
    """The weighted sum of scales; an adapter that is not on a layer has the scale 1 there.

    Args:
        total: Sum of all weights.
    """

    total: float

    layer_cls = IA3Layer

    def config(self, configs: Sequence[Any], shares: Sequence[Share]) -> Any:
        new = super().config(configs, shares)
        if any(c.feedforward_modules != new.feedforward_modules for c in configs):
            new.feedforward_modules = {s.target for s in shares if cast(IA3Layer, s.layer).feedforward[s.names[0]]}
        return new

    def parts(self, share: Share, config: Any) -> Parts:
        layer = cast(IA3Layer, share.layer)
        if len({layer.feedforward[name] for name in share.names}) > 1:
            raise ValueError("some rescale its input and some its output")
        parts = super().parts(share, config)
        parts.tensors["ia3_l"] += self.total - sum(share.weights)
        return parts


class IA3Model(BaseTuner):
    """A base model with IA³ adapters (Liu et al. 2022, arXiv 2205.05638); see :class:`~peft.core.tuner.BaseTuner`."""

    layer_cls = IA3Layer
    layers = {"Linear": Linear, "Conv1D": Linear, "opaque linear": Linear, "Conv2d": Conv2d, "Conv3d": Conv3d}
    default_role = "key_value_feedforward"
    prefix = "ia3_"

    @classmethod
    def find_defaults(cls, config: IA3Config, model: nn.Module) -> set[str] | str:
        targets = super().find_defaults(config, model)
        look_up = functools.partial(default_targets, role="feedforward")
        config.feedforward_modules = resolve_defaults(config, model, look_up, field="feedforward_modules")  # type: ignore[assignment]
        return targets

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose scales are the weighted sum of others'; it is inactive until :meth:`set_adapter`.

        Args:
            adapters: Names of the adapters.
            weights: A weight for each.
            adapter_name: Name of the new adapter.

        Raises:
            ValueError: Unknown names, or adapters of which some rescale a layer's input and some its output. The model is as it was.
        """
        combine(self.model, adapters, weights, adapter_name, IA3Combination(float(sum(weights))))
