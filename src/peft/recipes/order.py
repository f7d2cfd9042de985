"""The order in which a run sees its rows."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

MEGABATCH = 50
"""Batches within which rows are sorted by length."""


class Order(Sampler):
    """Rows in a random order that depends on the seed and the epoch alone, so that a resumed run sees the same one.

    Args:
        lengths: Of the inputs.
        batch_size: Of one step's batches together.
        seed: Of the order.
        grouped: Put inputs of like length into the same batch.
        kinds: Of each row, if there are several: a batch is of one kind. The last one of each is filled up with rows that come again.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        grouped: bool,
        kinds: Sequence[Hashable] | None = None,
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.grouped = lengths, batch_size, seed, grouped
        self.rows: dict[Hashable, list[int]] = {}
        for row, kind in enumerate(kinds if kinds is not None else [None] * len(lengths)):
            self.rows.setdefault(kind, []).append(row)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        if len(self.rows) == 1:
            return len(self.lengths)
        return sum(-(-len(rows) // self.batch_size) for rows in self.rows.values()) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        several = len(self.rows) > 1
        batches = []
        for rows in self.rows.values():
            order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            if not self.grouped and not several:
                return iter(order)
            if several:
                missing = -len(order) % self.batch_size
                order += [order[i % len(order)] for i in range(missing)]
            size = self.batch_size * MEGABATCH
            for start in range(0, len(order), size):
                part = order[start : start + size]
                if self.grouped:
                    part.sort(key=lambda i: -self.lengths[i])
                batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        # A short last batch stays last: in the middle it would shift all that follow.
        whole = [b for b in batches if len(b) == self.batch_size]
        rest = [b for b in batches if len(b) < self.batch_size]
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        return iter([i for batch in (*shuffled, *rest) for i in batch])
