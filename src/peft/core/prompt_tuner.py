"""The prompt family: what a method with virtual tokens says, and how its adapters enter a base model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import PromptLearningConfig
from . import prefixes
from .injection import Placed
from .layer import HALF
from .positions import has_relative_bias, known_positions, position_modules
from .prefixes import Pair
from .prompt_table import CROSS, ENCODER, FILE_KEY, MAIN, Layout, OwnLoss, Where
from .prompts import NAME, Placement, Prompts, PromptTable
from .tokens import real_tokens
from .tuner import BaseTuner


@dataclass(frozen=True)
class Geometry:
    """What virtual tokens have to fit in a base model.

    Args:
        layers: Number of layers that take prefixes; 0 where there are none.
        heads: Number of key heads in each.
        head_size: Their size.
        embedding_size: Size of an input embedding.
        queries: Number of query heads; ``None`` where the model does not say.
        positions: Number of positions that the model knows; ``None``: no limit.
        stacks: 2 for encoder-decoders, 1 for others.
        is_decoder: Whether the layers are those of a decoder.
        is_causal: Whether it is a causal language model.
        vocabulary: Number of tokens that the model knows.
        others: Number of layers of further parts that take prefixes: an encoder's, and those of attention to it.
        refused: Why parts of the model take none.
    """

    layers: int
    heads: int
    head_size: int
    embedding_size: int
    queries: int | None
    positions: int | None
    stacks: int
    is_decoder: bool
    is_causal: bool
    vocabulary: int
    others: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def key_size(self) -> int:
        """Numbers in one token's keys of one layer."""
        return self.heads * self.head_size


PARTS = {MAIN: "self-attention", ENCODER: "encoder", CROSS: "cross-attention"}
"""Parts of a model in words."""

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Heads that a task trains besides the adapter."""


class PromptTuner(BaseTuner):
    """Adapters with virtual tokens on a base model. The base model stays the model that is called; this holds the verbs.

    A method says where its tokens stand (``placement``), the values that it fills into a configuration (:meth:`fill`), the module
    that makes its table while it trains (:meth:`make_table`) and how that starts (:meth:`start`).
    """

    placement: ClassVar[Placement]
    table_cls: ClassVar[type[PromptTable]] = PromptTable
    """The class of the module that :meth:`make_table` gives, where loading has to know it."""
    loss_inputs: ClassVar[tuple[str, ...] | None] = None
    """Arguments of a call that :meth:`loss` alone reads; ``None``: the loss is the base model's own."""
    is_outer = False

    # -- what a method says ----------------------------------------------------------------------------------------

    @classmethod
    def fill(cls, config: Any, geometry: Geometry) -> dict[str, Any]:
        """Values of configuration fields that follow from the base model.

        Raises:
            ValueError: The configuration does not suit the model.
        """
        raise NotImplementedError

    @classmethod
    def table_shape(cls, config: Any, geometry: Geometry) -> tuple[int, int]:
        """Rows and columns of the table."""
        raise NotImplementedError

    @classmethod
    def layout(cls, config: Any) -> Layout | None:
        """Which keys and values of the table belong where, for prefixes.

        Args:
            config: The configuration, filled.
        """
        return None

    @classmethod
    def make_table(cls, config: Any, geometry: Geometry, model: Any) -> PromptTable:
        """The module that makes the table while it trains."""
        return PromptTable(*cls.table_shape(config, geometry))

    @classmethod
    def start(cls, table: PromptTable, config: Any, holder: Prompts, model: nn.Module) -> None:
        """Give a new table its first values, in place."""

    @classmethod
    def loss(cls, config: Any, logits: torch.Tensor, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The loss of a batch, for methods with ``loss_inputs``.

        Args:
            config: The adapter's configuration.
            logits: Those of virtual and real tokens, (batch, virtual tokens + length, vocabulary).
            labels: Those of the real tokens, (batch, length); -100 does not count.
            **inputs: Those of ``loss_inputs`` that were given.
        """
        raise NotImplementedError

    # -- the engine ------------------------------------------------------------------------------------------------

    @classmethod
    def plan(
        cls,
        model: nn.Module,
        config: Any,
        heads: dict[str, nn.Module],
        on_meta: bool,
        state_dict: Mapping[str, Any] | None,
        autocast_adapter_dtype: bool,
    ) -> tuple[list[Placed], dict[str, Any]]:
        holder = getattr(model, NAME, None)
        is_new = holder is None
        geometry, candidate = survey(model, cls.placement)
        if holder is None:
            holder = candidate
            holder.training = model.training
        check_architecture(config, model)
        check_network(config)
        values = cls.fill(config, geometry)
        check_length(config, geometry)
        filled = copy.copy(config)
        for name, value in values.items():
            setattr(filled, name, value)
        table = build_table(cls, filled, geometry, holder, model, on_meta=on_meta, in_float32=autocast_adapter_dtype)
        return [Placed(NAME, holder, is_new, (cls.placement, table))], values

    @classmethod
    def default_heads(cls, config: Any) -> tuple[str, ...]:
        return _HEADS.get(getattr(config.task_type, "value", config.task_type), ())

    @classmethod
    def file_renamings(cls, adapter_name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        # These files say `base_model` where those of weight methods say `base_model.model`; transformers writes the latter for all.
        heads = "|".join(dict.fromkeys(h for names in _HEADS.values() for h in names))
        keys = "|".join(cls.table_cls.file_keys)
        outer = [(rf"^base_model\.model\.(?=({keys}|{heads})\b)", ""), (r"^base_model\.", "")]
        table = f"{NAME}.prompt_encoder.{adapter_name}"
        return outer, [(rf"^{key}$", f"{table}.{own}") for key, own in cls.table_cls.file_keys.items()]


class TokenTuner(PromptTuner):
    """Methods whose virtual tokens stand in front of the input's embeddings."""

    placement = "tokens"

    @classmethod
    def fill(cls, config: Any, geometry: Geometry) -> dict[str, Any]:
        check_size(config, "token_dim", geometry.embedding_size, "the size of an input embedding")
        if config.num_transformer_submodules not in (None, 1, 2):
            raise ValueError(
                f"`num_transformer_submodules` should be 1, or 2 for encoder-decoders, got {config.num_transformer_submodules}. Leave it "
                "out, and the model tells it."
            )
        return {
            "token_dim": geometry.embedding_size,
            "num_layers": config.num_layers or geometry.layers,
            "num_attention_heads": config.num_attention_heads or geometry.queries,
            "num_transformer_submodules": config.num_transformer_submodules or geometry.stacks,
        }

    @classmethod
    def table_shape(cls, config: Any, geometry: Geometry) -> tuple[int, int]:
        return config.num_virtual_tokens * config.num_transformer_submodules, geometry.embedding_size


class PrefixTuner(PromptTuner):
    """Methods that put keys and values in front of those of attention layers, wherever their :meth:`layout` says: unless they say
    otherwise, in all layers of a model's only stack or its decoder.

    What such an adapter holds can be written as an adapter of any other such method that has a place for it: :meth:`unpack` tells what
    is in front of each layer, :meth:`pack` puts it into a table.
    """

    placement = "prefix"

    @classmethod
    def fill(cls, config: Any, geometry: Geometry) -> dict[str, Any]:
        check_size(config, "token_dim", geometry.key_size, "the size of a token's keys")
        check_size(config, "num_layers", geometry.layers, "the number of attention layers")
        check_size(config, "num_attention_heads", geometry.heads, "the number of key heads")
        # 2 means in the field's files that layer i reads place 2i; no other number is understood for encoder-decoders.
        check_size(config, "num_transformer_submodules", geometry.stacks, "the number of stacks")
        return {
            "num_layers": geometry.layers,
            "token_dim": geometry.key_size,
            "num_attention_heads": geometry.heads,
            "num_transformer_submodules": geometry.stacks,
        }

    @classmethod
    def table_shape(cls, config: Any, geometry: Geometry) -> tuple[int, int]:
        return config.num_virtual_tokens, geometry.layers * 2 * geometry.key_size

    @classmethod
    def layout(cls, config: Any) -> Layout | None:
        layers, stride = config.num_layers, config.num_transformer_submodules
        places = {(MAIN, i): stride * i % layers for i in range(layers)}
        return Layout(places, (config.num_virtual_tokens,) * layers)

    @classmethod
    def pack(cls, pieces: Mapping[Where, torch.Tensor], values: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        """Configuration fields and table of an adapter of this method that puts these keys and values in front.

        Args:
            pieces: What stands in front of each layer that has a prefix, (tokens, 2 · key size).
            values: Fields that all such methods have: sizes of the model, and what any configuration holds.

        Raises:
            ValueError: The method has no place for them.
        """
        raise ValueError(f"No other adapter becomes one of {cls.__name__}: make a new one.")

    @classmethod
    def unpack(cls, config: Any, table: torch.Tensor) -> dict[Where, torch.Tensor]:
        """What stands in front of each layer that has a prefix, (tokens, 2 · key size).

        Args:
            config: The configuration, filled.
            table: The table as the adapter's file holds it.
        """
        layout = cls.layout(config)
        assert layout is not None
        pieces = layout.split(table)
        return {where: pieces[place] for where, place in layout.places.items()}

    @classmethod
    def in_form(cls, method: Any, tensors: dict[str, torch.Tensor], config: Any) -> tuple[dict[str, torch.Tensor], Any]:
        if not issubclass(method.tuner_cls, PrefixTuner) or method.tuner_cls is cls:
            return super().in_form(method, tensors, config)
        left_out = {"peft_type", "num_virtual_tokens"}
        names = {f.name for f in dataclasses.fields(PromptLearningConfig)} - left_out
        values = {name: getattr(config, name) for name in names}
        values, table = method.tuner_cls.pack(cls.unpack(config, tensors[FILE_KEY]), values)
        return {**tensors, FILE_KEY: table.contiguous()}, method.config_cls(**values)

    @classmethod
    def start(cls, table: PromptTable, config: Any, holder: Prompts, model: nn.Module) -> None:
        """Start from the base model's own keys and values: a prefix that every layer already knows how to read."""
        layout = table.layout
        assert layout is not None
        table.begin(pieces_of(holder.keys_values_of(real_tokens(model, max(layout.lengths)), layout.reach), layout))


def pieces_of(pairs: Mapping[Where, Pair], layout: Layout) -> list[torch.Tensor]:
    """What each place of a layout holds if layers get the first of these keys and values, (length, 2 · key size), in float32.

    Args:
        pairs: For each layer its keys and its values, (heads, tokens, head size).
        layout: The layout. Of layers that share a place the last one counts; a place that no layer reads is zero.
    """
    heads, _, size = next(iter(pairs.values()))[0].shape
    pieces = [torch.zeros(n, 2 * heads * size, device="cpu") for n in layout.lengths]
    for where, place in layout.places.items():
        key, value = (t.transpose(0, 1).flatten(1).float().cpu() for t in pairs[where])
        pieces[place] = torch.cat([key, value], 1)[: layout.lengths[place]]
    return pieces


def check_length(config: Any, geometry: Geometry) -> None:
    """Refuse numbers of virtual tokens that make no sense for the model.

    Raises:
        ValueError: With what to change.
    """
    counts = config.num_virtual_tokens if isinstance(config.num_virtual_tokens, list) else [config.num_virtual_tokens]
    for count in counts:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(
                f"`num_virtual_tokens` should be a whole number from 1 on, got {count!r}. 20 is a common choice."
            )
        if geometry.positions is not None and count >= geometry.positions:
            raise ValueError(
                f"`num_virtual_tokens` is {count}, but the model has only {geometry.positions} positions, and virtual tokens take them "
                f"up: nothing would be left for the input. Use fewer than {geometry.positions}."
            )


def check_architecture(config: Any, model: nn.Module) -> None:
    """Refuse an adapter whose file says that it was trained in a model of another architecture: its numbers mean nothing here.

    Raises:
        ValueError: With both architectures.
    """
    trained = _architecture(str((config.auto_mapping or {}).get("parent_library")))
    here = {found for cls in type(model).__mro__ if (found := _architecture(cls.__module__)) is not None}
    if trained is not None and here and trained not in here:
        raise ValueError(
            f"The adapter was trained in a {config.auto_mapping.get('base_model_class')} ({trained}), but this model is a "
            f"{type(model).__name__} ({', '.join(sorted(here))}). Virtual tokens mean nothing to another architecture: load it into "
            f"{config.base_model_name_or_path or 'its own base model'}, or train a new one."
        )


def _architecture(module: str) -> str | None:
    """The architecture of transformers that a module belongs to."""
    package, _, rest = module.partition("transformers.models.")
    return rest.partition(".")[0] or None if not package else None


def check_network(config: Any) -> None:
    """Refuse sizes that no network that makes a table can have.

    Raises:
        ValueError: With what to change.
    """
    for name in ("encoder_hidden_size", "encoder_num_layers"):
        size = getattr(config, name, None)
        if size is not None and size < 1:
            raise ValueError(f"`{name}` should be a whole number from 1 on, got {size}. Leave it out for the default.")


def check_size(config: Any, name: str, found: int, what: str) -> None:
    """Refuse a configuration that was made for a model of another size.

    Raises:
        ValueError: With both sizes.
    """
    asked = getattr(config, name)
    if asked is not None and asked != found:
        raise ValueError(
            f"The configuration has {name}={asked}, but {what} of this model is {found}. The adapter was made for another model; to "
            f"make a new one, leave `{name}` out."
        )


def check_part(geometry: Geometry, part: str) -> None:
    """Refuse a prefix in a part of a model that cannot carry one.

    Raises:
        NotImplementedError: With the reason.
    """
    if part in geometry.refused:
        raise NotImplementedError(f"This model cannot carry a prefix in its {PARTS[part]}: {geometry.refused[part]}.")


def build_table(
    tuner: type[PromptTuner],
    config: Any,
    geometry: Geometry,
    holder: Prompts,
    model: nn.Module,
    *,
    on_meta: bool,
    in_float32: bool,
) -> PromptTable:
    """A new adapter's table, on the base model's device and in its dtype, unless asked for none or for float32."""
    device, dtype = holder.device_and_dtype()
    if in_float32 and dtype in HALF:
        dtype = torch.float32
    kind = tuner.table_cls
    if on_meta and (config.inference_mode or not kind.takes_table):
        device = torch.device("meta")
    # Where a file is to be read that holds the table alone, a plain one will do.
    is_plain = not kind.is_always_needed and (config.inference_mode or (on_meta and not kind.takes_table))
    with torch.device("meta") if device.type == "meta" else contextlib.nullcontext():
        if is_plain:
            table = PromptTable(*tuner.table_shape(config, geometry))
        else:
            table = tuner.make_table(config, geometry, model)
    table.layout = tuner.layout(config)
    table.length = config.num_virtual_tokens if table.layout is None else max(table.layout.lengths)
    if tuner.loss_inputs is not None:
        table.loss = OwnLoss(functools.partial(tuner.loss, config), tuner.loss_inputs)
    if not is_plain and not config.inference_mode and device.type != "meta":
        with torch.no_grad():
            tuner.start(table, config, holder, model)
    return table.to(device=device, dtype=dtype)


def survey(model: nn.Module, placement: Placement) -> tuple[Geometry, Prompts]:
    """What virtual tokens have to fit in a base model, and a holder for them that is not a part of the model yet.

    Raises:
        NotImplementedError: The model cannot carry them; the message says why.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings") or not hasattr(model, "get_decoder"):
        raise NotImplementedError(
            f"Virtual tokens need a model of transformers, with a config and input embeddings; this is a {type(model).__name__}."
        )
    two = bool(getattr(config, "is_encoder_decoder", False))
    stacks: dict[str, nn.Module] = {MAIN: model.get_decoder()}  # type: ignore[operator]
    layers = {MAIN: prefixes.attention_layers(stacks[MAIN])}
    if two:
        stacks |= {ENCODER: model.get_encoder(), CROSS: stacks[MAIN]}  # type: ignore[operator]
        layers |= {
            ENCODER: prefixes.attention_layers(stacks[ENCODER]),
            CROSS: prefixes.attention_layers(stacks[MAIN], cross=True),
        }
    positions = {part: position_modules(stack) for part, stack in stacks.items()}
    shape, refused = (0, 0), {}
    for part, found in layers.items():
        reason, shapes = _why_no_prefix(stacks[part], found, positions[part], part), set()
        try:
            shapes = {prefixes.key_value_shape(m) for m, _ in found if reason is None}
        except NotImplementedError as error:
            reason = str(error).rstrip(".")
        if len(shapes) > 1:
            reason = f"its layers have keys of different shapes {sorted(shapes)}, which one table cannot hold"
        elif reason is None and shape != (0, 0) and shapes != {shape}:
            reason = f"the keys of these layers are of the shape {shapes.pop()}, those of its other layers of {shape}"
        if reason is not None:
            refused[part] = reason
            layers[part] = []
        elif shape == (0, 0):
            shape = shapes.pop()
    if placement == "prefix" and MAIN in refused and len(refused) == len(layers):
        raise NotImplementedError(f"A {type(model).__name__} cannot carry a prefix: {refused[MAIN]}.")
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    geometry = Geometry(
        layers=len(layers[MAIN]),
        heads=shape[0],
        head_size=shape[1],
        embedding_size=embedding.weight.shape[1],
        queries=getattr(config, "num_attention_heads", None),
        positions=known_positions(positions[MAIN], config),
        stacks=2 if two else 1,
        is_decoder=all(getattr(m, "is_causal", True) for m, _ in layers[MAIN]),
        is_causal=False,
        vocabulary=embedding.weight.shape[0],
        others={part: len(found) for part, found in layers.items() if part != MAIN},
        refused=refused,
    )
    holder = Prompts(model, layers, shape, stacks)
    return dataclasses.replace(geometry, is_causal=_is_causal(model, holder)), holder


def _is_causal(model: Any, holder: Prompts) -> bool:
    """Whether a model predicts each token from those before it."""
    try:
        has_head = model.get_output_embeddings() is not None
    except (AttributeError, NotImplementedError):
        has_head = False
    known = bool(holder.sites[MAIN]) or not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return has_head and (holder.is_decoder if known else True)


def _why_no_prefix(stack: nn.Module, layers: Sequence[Any], positions: dict[str, nn.Module], part: str) -> str | None:
    if not layers:
        return (
            "its attention layers do not take their function from transformers' attention interface, so that nothing can be put "
            "in front of their keys. Use a method that adapts layers, or virtual tokens at the input"
        )
    if part != CROSS and not positions and not has_relative_bias(stack) and not hasattr(stack, "build_alibi_tensor"):
        return "how it counts positions is not known here, so that they cannot be shifted by the prefix"
    return None


__all__ = [
    "Geometry", "PrefixTuner", "PromptTuner", "TokenTuner", "check_length", "check_part", "check_size", "pieces_of", "survey"
]  # fmt: skip
