"""P-tuning v2: deep prompts, trained keys and values at chosen layers of any part of a model (Liu et al. 2022, arXiv 2110.07602)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config import PeftType, PromptLearningConfig
from ..core.errors import did_you_mean
from ..core.prompt_table import CROSS, ENCODER, MAIN, Layout, PrefixNetwork, PromptTable, Where
from ..core.prompt_tuner import Geometry, PrefixTuner, check_part, check_size
from ..core.prompts import Prompts

_REPARAMETERIZATIONS = ("none", "embedding", "mlp")
_SWITCHES = {ENCODER: "encoder", MAIN: "decoder", CROSS: "cross_attention"}
"""Fields that switch parts of an encoder-decoder on and off."""


@dataclass
class PTuningV2Config(PromptLearningConfig):
    """Configuration of P-tuning v2.

    Args:
        num_virtual_tokens: Number of virtual tokens in front of each layer; or a list with a number for each layer that has any.
        layers: Numbers of the layers that have virtual tokens, from 0 on; all of them when not given. In an encoder-decoder they
            count in each part that is switched on.
        reparameterization: What is trained: ``"none"`` or ``"embedding"``, the paper's word for it: the keys and values themselves;
            ``"mlp"``: a network of one hidden layer that makes them.
        encoder_hidden_size: Width of that hidden layer; the size of a token's keys when not given.
        encoder: Virtual tokens in the self-attention of the encoder; on where there is one, unless switched off.
        decoder: The same for the decoder's self-attention.
        cross_attention: The same for the decoder's attention to the encoder.
        num_encoder_layers: Number of layers of an encoder-decoder's encoder; filled in.
        prompt_init: ``"tokens"``: start from the keys and values that the base model gives real tokens; ``"random"``: from random
            ones. Only training reads it, and it is not saved.

    Raises:
        ValueError: Unknown reparameterisation or start, layers given twice, or lengths that do not match the layers.
    """

    num_virtual_tokens: int | list[int] | None = None  # type: ignore[assignment]
    layers: list[int] | None = None
    reparameterization: str = "none"
    encoder_hidden_size: int | None = None
    encoder: bool | None = None
    decoder: bool | None = None
    cross_attention: bool | None = None
    num_encoder_layers: int | None = None
    prompt_init: str = field(default="tokens", kw_only=True)

    _transient_keys = (*PromptLearningConfig._transient_keys, "prompt_init")

    def __post_init__(self) -> None:
        self.peft_type = PeftType.P_TUNING_V2
        super().__post_init__()
        self.reparameterization = self.reparameterization.lower()
        if self.reparameterization not in _REPARAMETERIZATIONS:
            raise ValueError(
                f"Unknown `reparameterization` {self.reparameterization!r}"
                f"{did_you_mean(self.reparameterization, _REPARAMETERIZATIONS)}. Use one of {', '.join(_REPARAMETERIZATIONS)}."
            )
        if self.prompt_init not in ("tokens", "random"):
            raise ValueError(f"`prompt_init` should be 'tokens' or 'random', got {self.prompt_init!r}.")
        if self.layers is not None:
            self._check_layers(self.layers)
        lengths = self.num_virtual_tokens
        if isinstance(lengths, list) and self.layers is not None and len(lengths) != len(self.layers):
            raise ValueError(
                f"`num_virtual_tokens` has {len(lengths)} lengths, but `layers` names {len(self.layers)} layers. Give one length for "
                "each, or one number for all."
            )
        if not any(getattr(self, name) is not False for name in _SWITCHES.values()):
            raise ValueError(
                "`encoder`, `decoder` and `cross_attention` are all False, so there would be nothing to train. Leave one of them on."
            )

    def _check_layers(self, layers: list[int]) -> None:
        if not layers:
            raise ValueError(
                "`layers` is empty, so there would be nothing to train. Name layers, or leave it out for all."
            )
        if min(layers) < 0:
            raise ValueError(f"`layers` counts from 0 on, got {min(layers)}.")
        twice = sorted({i for i in layers if layers.count(i) > 1})
        if twice:
            raise ValueError(f"`layers` names {twice} more than once. Name each layer once.")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that have virtual tokens; known once the configuration is filled."""
        if self.num_transformer_submodules != 2:
            return (MAIN,)
        return tuple(part for part, name in _SWITCHES.items() if getattr(self, name))

    def lengths(self, part: str) -> dict[int, int]:
        """Number of virtual tokens in front of each layer of a part that has any; known once the configuration is filled."""
        count = self.num_encoder_layers if part == ENCODER else self.num_layers
        layers = self.layers if self.layers is not None else list(range(count or 0))
        tokens: Any = self.num_virtual_tokens
        return dict(zip(layers, tokens if isinstance(tokens, list) else [tokens] * len(layers), strict=True))


class PTuningV2Model(PrefixTuner):
    """A base model with deep prompts; see :class:`~peft.core.prompt_tuner.PromptTuner`."""

    @classmethod
    def fill(cls, config: Any, geometry: Geometry) -> dict[str, Any]:
        values = super().fill(config, geometry)
        if geometry.stacks == 2:
            check_size(config, "num_encoder_layers", geometry.others[ENCODER], "the number of the encoder's layers")
        switches = cls._switches(config, geometry)
        for part, name in _SWITCHES.items():
            if not switches[name]:
                continue
            part = part if geometry.stacks == 2 else MAIN
            check_part(geometry, part)
            count = geometry.layers if part == MAIN else geometry.others[part]
            cls._check_part(config, name, count, several=geometry.stacks == 2)
        return {
            **values,
            **switches,
            "num_encoder_layers": geometry.others[ENCODER] if geometry.stacks == 2 else None,
            "encoder_hidden_size": config.encoder_hidden_size or geometry.key_size,
        }

    @classmethod
    def _switches(cls, config: Any, geometry: Geometry) -> dict[str, bool]:
        """Which parts are on in this model."""
        if geometry.stacks == 2:
            found = dict.fromkeys(_SWITCHES.values(), True)
            what = "an encoder-decoder"
        else:
            own = "decoder" if geometry.is_decoder else "encoder"
            found = {name: name == own for name in _SWITCHES.values()}
            what = "a decoder alone" if geometry.is_decoder else "an encoder alone"
        for name, there in found.items():
            asked = getattr(config, name)
            if asked and not there:
                raise ValueError(f"`{name}` is True, but the model is {what}: it has no such part. Leave `{name}` out.")
            found[name] = there if asked is None else asked
        if not any(found.values()):
            off = " and ".join(f"`{name}`" for name in _SWITCHES.values() if getattr(config, name) is False)
            raise ValueError(f"{off} is False, and the model is {what}: nothing would be left to train. Leave it on.")
        return found

    @classmethod
    def _check_part(cls, config: Any, name: str, count: int, several: bool) -> None:
        """Refuse layers and lengths that a part, of several perhaps, has no place for."""
        outside = [i for i in config.layers or () if i >= count]
        if outside:
            raise ValueError(
                f"`layers` names {outside}, but the {name.replace('_', '-')} has {count} layers, 0 to {count - 1}. Name some of these"
                + (f", or switch `{name}` off." if several else ".")
            )
        tokens = config.num_virtual_tokens
        if isinstance(tokens, list) and config.layers is None and len(tokens) != count:
            raise ValueError(
                f"`num_virtual_tokens` has {len(tokens)} lengths, but the {name.replace('_', '-')} has {count} layers. Give one length "
                "for each layer, name fewer `layers`, or give one number for all."
            )

    @classmethod
    def table_shape(cls, config: Any, geometry: Geometry) -> tuple[int, int]:
        return sum(cls.layout(config).lengths), 2 * geometry.key_size

    @classmethod
    def layout(cls, config: Any) -> Layout:
        found = {(part, i): n for part in config.parts for i, n in config.lengths(part).items()}
        return Layout({where: place for place, where in enumerate(found)}, tuple(found.values()), flat=True)

    @classmethod
    def make_table(cls, config: Any, geometry: Geometry, model: Any) -> PromptTable:
        if config.reparameterization != "mlp":
            return super().make_table(config, geometry, model)
        lengths, size, hidden = cls.layout(config).lengths, config.token_dim, config.encoder_hidden_size
        return PrefixNetwork(max(lengths), size, hidden, len(lengths), 2 * size, config.prompt_init == "tokens")

    @classmethod
    def start(cls, table: PromptTable, config: Any, holder: Prompts, model: nn.Module) -> None:
        if config.prompt_init == "tokens":
            super().start(table, config, holder, model)

    @classmethod
    def pack(cls, pieces: Mapping[Where, torch.Tensor], values: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        if any(part != MAIN for part, _ in pieces):
            raise ValueError(
                "The adapter has prefixes in several parts of the model, which cannot be written as P-tuning v2."
            )
        lengths = {i: len(pieces[MAIN, i]) for i in range(values["num_layers"]) if (MAIN, i) in pieces}
        every = len(lengths) == values["num_layers"]
        same = len(set(lengths.values())) == 1
        two = values["num_transformer_submodules"] == 2
        fields = {
            "num_virtual_tokens": next(iter(lengths.values())) if same else list(lengths.values()),
            "layers": None if every else list(lengths),
            **({"encoder": False, "decoder": True, "cross_attention": False} if two else {}),
        }
        return {**values, **fields}, torch.cat([pieces[MAIN, i] for i in lengths])
