"""Token rows: single rows of an embedding, and of layers tied to it, that an adapter trains in full."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from .errors import did_you_mean, shorten
from .holder import BaseTunerLayer
from .kinds import embedding_scale
from .layer import AdapterLayer
from .targets import base_modules, last_names, match


class TokenIndex(nn.Module):
    """Which row of an adapter stands for which token.

    Args:
        tokens: Token of each row.
        device: Where the layer's weight is.
    """

    listed: torch.Tensor
    ordered: torch.Tensor
    rows: torch.Tensor

    def __init__(self, tokens: Sequence[int], device: torch.device) -> None:
        super().__init__()
        listed = torch.tensor(list(tokens), device="cpu" if device.type == "meta" else device)
        ordered, rows = listed.sort()
        for name, value in (("listed", listed), ("ordered", ordered), ("rows", rows)):
            self.register_buffer(name, value, persistent=False)

    def lookup(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each id is one of the tokens, and its row where it is."""
        place = torch.searchsorted(self.ordered, ids.long()).clamp(max=len(self.ordered) - 1)
        return self.ordered[place] == ids, self.rows[place]


class TokenRowsLayer(AdapterLayer):
    """An embedding, or an output head, of which adapters replace single rows.

    ``trainable_tokens_delta[name]`` has shape (tokens, embedding_dim): the new rows themselves, which start as those of the layer.
    """

    parameter_slots = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "token_index")
    delta_depends_on_weight = True
    ties = True
    file_prefix = "token_adapter."

    @classmethod
    def wrap(cls, base_layer: nn.Module, config: Any) -> TokenRowsLayer:
        """Wrap a layer."""
        return cls(base_layer)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        if self.kind.name not in ("Embedding", "Linear"):
            raise ValueError(
                f"single tokens are trained on embeddings and linear heads, and this is a {self.kind.name}"
            )
        self.token_indices: dict[str, list[int]] = {}
        self.token_index = nn.ModuleDict()

    def settings(self, config: Any, target: str) -> dict[str, Any]:
        tokens = tokens_of(config, target)
        rows, count = self.get_base_layer().weight.shape[0], len(set(tokens))
        wrong = [t for t in tokens if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < rows]
        if wrong or count < len(tokens) or not tokens:
            reason = f"{shorten(map(str, wrong))} are none of its" if wrong else "each can be given once: there are"
            raise ValueError(f"token indices {reason} {rows} rows; got {tokens}")
        return {"token_indices": list(tokens), "token_index": TokenIndex(tokens, self.device_and_dtype()[0])}

    def shapes(self, config: Any, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        base: Any = self.get_base_layer()
        return {"trainable_tokens_delta": (len(settings["token_indices"]), base.weight.shape[1])}

    def start(self, tensors: dict[str, torch.Tensor], config: Any, settings: dict[str, Any]) -> None:
        rows = tensors["trainable_tokens_delta"]
        if getattr(config, "init_weights", True):
            weight = self.get_base_layer().weight
            rows.copy_(weight[settings["token_index"].listed.to(weight.device)])
        else:
            rows.normal_()

    def delta(self, name: str, weight: torch.Tensor | None) -> torch.Tensor:
        assert weight is not None
        dim = 1 if self.kind.takes_indices else 0  # the matrix of an embedding is transposed
        index = cast(TokenIndex, self.token_index[name])
        rows = self.kind.to_matrix(None, self.trainable_tokens_delta[name])
        change = rows.to(weight.dtype) - weight.index_select(dim, index.listed)
        return torch.zeros_like(weight).index_copy(dim, index.listed, change)

    def after(self, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str] = ()) -> torch.Tensor:
        return self._replace(self, name, x, y, earlier)

    def after_tied(
        self, layer: AdapterLayer, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str] = ()
    ) -> torch.Tensor:
        return self._replace(layer, name, x, y, earlier)

    def _replace(
        self, layer: AdapterLayer, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str]
    ) -> torch.Tensor:
        rows, index = self.trainable_tokens_delta[name], cast(TokenIndex, self.token_index[name])
        if layer.kind.takes_indices:
            hit, row = index.lookup(x)
            new, scale = F.embedding(row, rows), embedding_scale(layer.get_base_layer())
            new = new if scale is None else new * scale.to(new.dtype)
            return torch.where(hit[..., None], new.to(y.dtype), y)
        # Added rather than replaced: a product of few rows is not rounded like that of all.
        change = rows - layer.matrix(earlier).detach().index_select(0, index.listed)
        return y.index_add(-1, index.listed, F.linear(layer.cast_input(x, rows.dtype), change).to(y.dtype))


def tokens_of(config: Any, target: str) -> list[int]:
    """The tokens that a configuration trains on a module.

    Raises:
        ValueError: None.
    """
    tokens = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None)
    if isinstance(tokens, dict):
        tokens = next((value for key, value in tokens.items() if match({key}, target) is not None), None)
    if tokens is None:
        raise ValueError(f"the configuration has no tokens for {target!r}, of which single rows are trained")
    return tokens


def find_token_rows(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """The modules of which a configuration trains single rows besides what its method does, by name.

    Args:
        model: The base model.
        config: Configuration; ``trainable_token_indices`` is a list of tokens for the input embedding, or lists by module name.

    Raises:
        ValueError: There is no such module.
    """
    tokens = getattr(config, "trainable_token_indices", None)
    if not tokens:
        return {}
    modules = base_modules(model)
    keys = tokens if isinstance(tokens, dict) else [input_embedding_name(model)]
    found = {name: module for name, module in modules.items() if match(set(keys), name) is not None}
    for key in keys:
        if not any(match({key}, name) for name in found):
            raise ValueError(
                f"trainable_token_indices names {key!r}, which is no module of the model{did_you_mean(key, last_names(modules))}."
            )
    first: dict[int, str] = {}
    for name, module in list(found.items()):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        twin = first.setdefault(id(getattr(base, "weight", base)), name)
        if twin != name:
            if tokens_of(config, name) != tokens_of(config, twin):
                raise ValueError(
                    f"trainable_token_indices has other tokens for {name!r} than for {twin!r}, but the two share one weight. Give the "
                    "tokens of one of them: the other follows."
                )
            del found[name]
    return found


def input_embedding_name(model: nn.Module) -> str:
    """Full name of the model's input embedding.

    Raises:
        ValueError: The model does not tell which it is.
    """
    embedding = None
    with contextlib.suppress(AttributeError, NotImplementedError):
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    for name, module in base_modules(model).items():
        if module is embedding:
            return name
    raise ValueError(
        f"A {type(model).__name__} does not tell which module is its input embedding: name the module, as in "
        "{'embed_tokens': [1, 2]}."
    )
