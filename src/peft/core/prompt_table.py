"""The table of an adapter's virtual tokens or prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

Where = tuple[str, int]
"""An attention layer that takes prefixes: which part of the model it is of, and its number among that part's layers."""
MAIN, ENCODER, CROSS = "main", "encoder", "cross"
"""Parts of a model: self-attention of its only stack or its decoder, of the encoder, and attention of the decoder to the encoder."""

ACTIVE = ""
"""Stands for the active adapters, where all rows have the same."""


def stack_of(part: str) -> str:
    """The part that stands for the stack that runs the layers of a part: a decoder's two kinds of attention are of one stack."""
    return ENCODER if part == ENCODER else MAIN


def turn(where: Where) -> int:
    """When a layer runs in its stack: cross-attention after the self-attention of the same number."""
    part, index = where
    return 2 * index + (part == CROSS)


@dataclass(frozen=True, eq=False)
class Layout:
    """Which keys and values of a table belong to which attention layer.

    Args:
        places: For each layer that has a prefix the place in the table that it reads.
        lengths: Number of virtual tokens at each place.
        flat: ``True``: the table, (sum of lengths, 2 · key size), has the rows of one place after those of another, each a key and a
            value. ``False``: the table, (length, places · 2 · key size), has the places side by side, all of the same length.
    """

    places: Mapping[Where, int]
    lengths: tuple[int, ...]
    flat: bool = False
    reach: Mapping[str, int] = field(init=False)
    """For each part that has prefixes the number of virtual tokens in front of the layer that has the most."""
    turns: Mapping[str, tuple[int, int]] = field(init=False)
    """For each stack that has prefixes the turns of the first and last layer that do."""

    def length(self, where: Where) -> int:
        """Number of virtual tokens in front of a layer."""
        place = self.places.get(where)
        return 0 if place is None else self.lengths[place]

    def __post_init__(self) -> None:
        reach: dict[str, int] = {}
        turns: dict[str, tuple[int, int]] = {}
        for where, place in self.places.items():
            part, now = where[0], turn(where)
            reach[part] = max(reach.get(part, 0), self.lengths[place])
            first, last = turns.get(stack_of(part), (now, now))
            turns[stack_of(part)] = min(first, now), max(last, now)
        object.__setattr__(self, "reach", reach)
        object.__setattr__(self, "turns", turns)

    def split(self, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each place holds, (length, 2 · key size)."""
        return table.split(self.lengths) if self.flat else table.chunk(len(self.lengths), 1)

    def join(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of :meth:`split`."""
        return torch.cat(list(pieces), 0 if self.flat else 1)


class PromptTable(nn.Module):
    """One adapter's virtual tokens, shape (tokens, embedding size), or prefix, whose shape its layout tells.

    A method that makes the table from other parameters subclasses this and overrides ``forward``. Saving folds it into a table.

    Args:
        rows: Number of rows.
        columns: Size of each.
    """

    folded = True
    """Whether the table itself is the parameter."""

    layout: Layout | None = None
    """Where the keys and values of a prefix belong."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, columns)
        self.length = rows
        """Number of virtual tokens. Files of encoder-decoders have more rows, of which the first are read."""

    def forward(self) -> torch.Tensor:
        """The table, (rows, columns)."""
        return self.embedding.weight

    def expect(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Get ready for the parameters of another table of the same configuration."""

    def piece(self, place: int) -> torch.Tensor:
        """What one place of a prefix holds, (length, 2 · key size)."""
        assert self.layout is not None
        return self.layout.split(self())[place]

    def begin(self, pieces: Sequence[torch.Tensor]) -> None:
        """Start from these keys and values, one piece for each place, in place."""
        assert self.layout is not None
        self.take(self.layout.join(pieces))

    def take(self, table: torch.Tensor) -> None:
        """Give the parameters values that make this table, (rows, columns), in place."""
        self.embedding.weight.copy_(table)


class PrefixNetwork(PromptTable):
    """What makes a prefix from smaller parameters: T = S + W₂ tanh(W₁ E + b₁) + b₂, S being a fixed start.

    (Li & Liang 2021, arXiv 2101.00190, section 4.3, with the start added.)

    Args:
        rows: Number of virtual tokens: rows of E, and of T.
        size: Numbers in a row of E.
        hidden: Width of the hidden layer.
        places: Number of places, each of which takes up a part of a row of T.
        width: Numbers in that part: twice the key size.
        has_start: Whether there is an S.
    """

    folded = False

    def __init__(self, rows: int, size: int, hidden: int, places: int, width: int, has_start: bool) -> None:
        super().__init__(rows, size)
        self.width = width
        self.transform = nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, places * width))
        self.start: torch.Tensor | None
        self.register_buffer("start", torch.zeros(rows, places * width) if has_start else None)

    def forward(self) -> torch.Tensor:
        table = self.transform(self.embedding.weight)
        table = table if self.start is None else self.start + table
        if self.layout is None or not self.layout.flat:
            return table
        wide = table.split(self.width, 1)
        return self.layout.join([part[:n] for part, n in zip(wide, self.layout.lengths, strict=True)])

    def expect(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if "start" not in tensors:
            self.start = None
        elif self.start is None:
            self.start = torch.zeros_like(tensors["start"], device=self.embedding.weight.device)

    def piece(self, place: int) -> torch.Tensor:
        assert self.layout is not None
        last, columns = self.transform[2], slice(place * self.width, (place + 1) * self.width)
        hidden = self.transform[1](self.transform[0](self.embedding.weight))
        part = nn.functional.linear(hidden, last.weight[columns], last.bias[columns])  # type: ignore[index]
        part = part if self.start is None else self.start[:, columns] + part
        return part[: self.layout.lengths[place]]

    def begin(self, pieces: Sequence[torch.Tensor]) -> None:
        """Start from these keys and values, with a last layer of zero: they are S, or the network gives nothing where there is none."""
        last = self.transform[2]
        last.weight.zero_()  # type: ignore[operator]
        last.bias.zero_()  # type: ignore[operator]
        if self.start is not None:
            for part, piece in zip(self.start.split(self.width, 1), pieces, strict=True):
                part[: len(piece)] = piece
