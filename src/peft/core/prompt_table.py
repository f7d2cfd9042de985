"""The table of an adapter's virtual tokens or prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .sharding import fill

FILE_KEY = "prompt_embeddings"
"""The table's name in an adapter's file."""


@dataclass(frozen=True)
class OwnLoss:
    """A method's own loss.

    Args:
        function: Takes logits of virtual and real tokens, (batch, virtual tokens + length, vocabulary), labels of the real ones, and
            ``inputs`` by name.
        inputs: Arguments of a call that it alone reads.
    """

    function: Callable[..., torch.Tensor]
    inputs: tuple[str, ...]


class PromptTable(nn.Module):
    """One adapter's virtual tokens, shape (tokens, embedding size), or prefix, (tokens, layers · 2 · key size).

    A method that makes the table from other parameters subclasses this and overrides ``forward``. Saving folds it into a table.

    Args:
        rows: Number of virtual tokens.
        columns: Size of each.
    """

    folded = True
    """Whether the table itself is the parameter."""

    file_keys: ClassVar[Mapping[str, str]] = {FILE_KEY: "embedding.weight"}
    """What the file of a folded table holds: keys there, and keys in this module."""

    is_always_needed: ClassVar[bool] = False
    """Whether an adapter that is only used needs this module too, rather than a plain table."""

    takes_table: ClassVar[bool] = False
    """Whether the parameters of a table that is not folded follow from the finished table, see :meth:`take`."""

    tasks: int = 0
    """Number of tasks with virtual tokens of their own; 0: all rows of a batch get the same."""

    stride: int = 1
    """Layer i of n reads the keys and values at place stride · i modulo n."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, columns)
        self.loss: OwnLoss | None = None
        """What the method computes the loss by, where it is not the base model's."""
        self.length = rows
        """Number of virtual tokens. Files of encoder-decoders have more rows, of which the first are read."""

    def forward(self) -> torch.Tensor:
        """The table, (rows, columns)."""
        return self.embedding.weight

    def tokens(self, task: int | torch.Tensor | None = None) -> torch.Tensor:
        """The virtual tokens that are read, (length, columns).

        Args:
            task: The task, for tables with several; or those of all rows, (batch,), which give (batch, length, columns).
        """
        return self()[: self.length]

    def take(self, table: torch.Tensor) -> None:
        """Give the parameters values that make this table, (rows, columns), in place."""
        fill(self.embedding.weight, table)

    def expect(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Get ready for the parameters of another table of the same configuration."""

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Some columns of the table."""
        return self()[:, start:stop]
