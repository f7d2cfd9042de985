"""Starting prefixes from the keys and values of a text, and composing cartridges."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...config import PeftConfig
from ...core import activation
from ...core.files import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    load_peft_weights,
    safetensors_writer,
    warn_pickle,
    write_atomically,
)
from ...core.holder import require_adapters
from ...core.prefixes import Pair
from ...core.prompt_table import FILE_KEY, MAIN, Layout, Where
from ...core.prompt_tuner import pieces_of
from ...core.prompts import NAME, Prompts, PromptTable


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> torch.Tensor:
    """Start a prefix from the keys and values that the base model gives the first tokens of a text.

    Args:
        model: A model with an adapter that is a prefix: a cartridge, or prefix tuning without a projection.
        tokenizer: The base model's.
        text: The text. It should have at least as many tokens as the adapter.
        adapter_name: The adapter; the active one when not given.
        num_virtual_tokens: Its number of virtual tokens, to be checked.
        use_chat_template: Make the text a system message by the tokenizer's chat template, if it has one.
        max_length: Read at most so many tokens.

    Returns:
        The table, (virtual tokens, layers · 2 · key size).

    Raises:
        ValueError: The adapter is no such prefix, or the text is too short.
    """
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(
            message, tokenize=True, add_generation_prompt=False, return_dict=False, return_tensors="pt"
        )
    else:
        ids = tokenizer(text, return_tensors="pt", truncation=max_length is not None, max_length=max_length)[
            "input_ids"
        ]
    holder, name, table = _prefix(model, adapter_name)
    ids = ids[:1, :max_length]
    _check_count(name, table, num_virtual_tokens, ids.shape[1])
    with activation.disabled(model):
        pairs = holder.keys_values_of(ids)
    return _fill(table, pairs)


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> torch.Tensor:
    """Start a prefix from the first tokens of a cache, which the base model filled from one sequence.

    Args:
        model: A model with an adapter that is a prefix: a cartridge, or prefix tuning without a projection.
        adapter_name: The adapter; the active one when not given.
        past_key_values: A cache of transformers, or keys and values by layer, (1, heads, tokens, head size) each.
        num_virtual_tokens: The adapter's number of virtual tokens, to be checked.

    Returns:
        The table, (virtual tokens, layers · 2 · key size).

    Raises:
        ValueError: The adapter is no such prefix, or the cache is too short, of several sequences, or of another model.
    """
    pairs = _pairs(past_key_values)
    _, name, table = _prefix(model, adapter_name)
    _check_count(name, table, num_virtual_tokens, _length(pairs))
    return _fill(table, pairs)


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> torch.Tensor:
    """The table that the first tokens of a cache make, as an adapter's file holds it.

    Args:
        past_key_values: A cache of transformers, or keys and values by layer, (1, heads, tokens, head size) each.
        num_virtual_tokens: How many tokens.

    Returns:
        (virtual tokens, layers · 2 · key size): key and value of the first layer, key and value of the second, ….

    Raises:
        ValueError: The cache is empty, too short, or of several sequences.
    """
    pairs = _pairs(past_key_values)
    if _length(pairs) < num_virtual_tokens:
        raise ValueError(f"The cache holds {_length(pairs)} tokens, but `num_virtual_tokens` is {num_virtual_tokens}.")
    layout = Layout({where: place for place, where in enumerate(pairs)}, (num_virtual_tokens,) * len(pairs))
    return layout.join(pieces_of(pairs, layout))


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike], *, output_path: str | os.PathLike, safe_serialization: bool = True
) -> None:
    """Write a cartridge that has the tokens of several, one after the other.

    Args:
        adapter_paths: Folders or Hub ids of the cartridges, all of one base model. The first one's ``num_frozen_tokens`` holds.
        output_path: Folder to write into.
        safe_serialization: Only ``True`` has an effect: adapters are written as safetensors.

    Raises:
        ValueError: Fewer than two, one that is no cartridge, cartridges of different models, or with trained modules beside the table.
    """
    if len(adapter_paths) < 2:
        raise ValueError(f"Composing needs at least two cartridges, got {len(adapter_paths)}.")
    if not safe_serialization:
        warn_pickle()
    configs: list[Any] = [PeftConfig.from_pretrained(path) for path in adapter_paths]
    tables: list[torch.Tensor] = []
    for path, config in zip(adapter_paths, configs, strict=True):
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "CARTRIDGE":
            raise ValueError(f"{str(path)!r} is no cartridge, but an adapter of type {kind}.")
        for field in ("num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"):
            found, first = getattr(config, field), getattr(configs[0], field)
            if found != first:
                raise ValueError(
                    f"{str(path)!r} has {field}={found}, but {str(adapter_paths[0])!r} has {first}: they are of different base models."
                )
        tensors = load_peft_weights(path, device="cpu")
        others = sorted(key for key in tensors if not key.endswith(FILE_KEY))
        if others or len(tensors) != 1:
            raise ValueError(
                f"{str(path)!r} holds {others or 'no table'}: only cartridges of virtual tokens alone can be composed."
            )
        tables += tensors.values()
    config = configs[0]
    config.num_virtual_tokens = sum(len(table) for table in tables)
    config.inference_mode = True
    files: dict[str, Any] = {
        SAFETENSORS_WEIGHTS_NAME: safetensors_writer({FILE_KEY: torch.cat(tables)}),
        CONFIG_NAME: config.to_file(),
    }
    write_atomically(output_path, files)


def _prefix(model: Any, adapter_name: str | None) -> tuple[Prompts, str, PromptTable]:
    """What holds a prefix, its adapter's name and its table.

    Raises:
        ValueError: There is none, or its table is made from other parameters.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    holder = base._modules.get(NAME)
    known = [] if holder is None else [n for n, place in holder.placements.items() if place == "prefix"]
    name = adapter_name
    if name is None:
        name = next((n for n in known if n in holder.active_adapters), None)
    if name is not None and holder is not None:
        require_adapters(base, name, holder.prompt_encoder if holder.has_adapter(name) else known)
    if name is None or name not in known:
        raise ValueError(
            f"Keys and values of a text can start a cartridge or prefix tuning, but {'no adapter' if name is None else repr(name)} "
            f"is {'active that is one' if name is None else 'none'}. Prefixes here: {', '.join(known) or 'none'}."
        )
    table = holder.prompt_encoder[name]
    if not (table.folded or table.takes_table):
        raise ValueError(
            f"The prefix of adapter {name!r} is made by a projection, which cannot be given a start. Use prefix_projection=False."
        )
    return holder, name, table


def _check_count(name: str, table: PromptTable, asked: int | None, found: int) -> None:
    if asked is not None and asked != table.length:
        raise ValueError(f"`num_virtual_tokens` is {asked}, but adapter {name!r} has {table.length}. Leave it out.")
    if found < table.length:
        raise ValueError(
            f"The text has {found} tokens, but adapter {name!r} has {table.length} virtual ones. Give a longer text, or make the adapter "
            f"with num_virtual_tokens={found} or fewer."
        )


def _fill(table: PromptTable, pairs: Mapping[Where, Pair]) -> torch.Tensor:
    layout = table.layout
    assert layout is not None
    lacking = layout.places.keys() - pairs.keys()
    found = None if lacking else layout.join(pieces_of(pairs, layout))
    with torch.no_grad():
        current = table()
        if found is None or current.shape != found.shape:
            raise ValueError(
                f"The cache has {len(pairs)} layers and keys of {_width(pairs)} numbers, which does not fit the adapter's table of shape "
                f"{tuple(current.shape)}. Is it of the same base model?"
            )
        table.take(found.to(current))
        return table().clone()


def _length(pairs: Mapping[Where, Pair]) -> int:
    """Number of tokens."""
    return next(iter(pairs.values()))[0].shape[1]


def _width(pairs: Mapping[Where, Pair]) -> int:
    """Numbers in a token's keys."""
    key = next(iter(pairs.values()))[0]
    return key.shape[0] * key.shape[2]


def _pairs(past_key_values: Any) -> dict[Where, Pair]:
    """Keys and values of each layer of a cache, (heads, tokens, head size).

    Raises:
        ValueError: It is empty, or of several sequences.
    """
    cache = getattr(past_key_values, "self_attention_cache", past_key_values)
    layers = getattr(cache, "layers", None)
    found = (
        [(layer.keys, layer.values) for layer in layers] if layers is not None else [(p[0], p[1]) for p in cache or ()]
    )
    if not found or any(t is None for pair in found for t in pair):
        raise ValueError("`past_key_values` is empty. Call the base model on the text with use_cache=True.")
    rows = found[0][0].shape[0]
    if rows != 1:
        raise ValueError(f"`past_key_values` should be of one sequence (a batch of 1), got a batch of {rows}.")
    return {(MAIN, i): (key[0], value[0]) for i, (key, value) in enumerate(found)}
