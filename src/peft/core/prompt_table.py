"""The table of an adapter's virtual tokens or prefix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class PromptTable(nn.Module):
    """One adapter's virtual tokens, shape (tokens, embedding size), or prefix, (tokens, layers · 2 · key size).

    A method that makes the table from other parameters subclasses this and overrides ``forward``. Saving folds it into a table.

    Args:
        rows: Number of virtual tokens.
        columns: Size of each.
    """

    folded = True
    """Whether the table itself is the parameter."""

    stride: int = 1
    """Layer i of n reads the keys and values at place stride · i modulo n."""

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

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Some columns of the table."""
        return self()[:, start:stop]
