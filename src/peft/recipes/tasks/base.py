"""What a task says: its columns, its head, how rows become features, how outputs become metrics and answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch

from ..data import Roles, Splits
from ..errors import RecipeError
from ..recipe import DataSection, GenerationSection
from ..sources import Row

Feature = dict[str, Any]
ANSWERS = ("label", "tags", "answers", "response", "target")
"""Roles of what a model is to answer."""
IGNORED = -100
"""Label of positions that the loss leaves out."""


class Task(ABC):
    """One kind of task.

    Args:
        data: The recipe's data section.
        generation: The recipe's generation section.

    Attributes:
        labels: Names of the labels, in the order of their numbers; set by :meth:`learn` or :meth:`restore`.
        kind: What the labels are, where a task knows several kinds.
        metric: The metric that checkpoints are chosen by.
    """

    name: ClassVar[str]
    task_type: ClassVar[str]
    """The value of ``TaskType``."""
    auto_class: ClassVar[str]
    """transformers' class for it."""
    roles: ClassVar[Roles]
    generates: ClassVar[bool] = False
    """Whether its answers are generated text."""
    loss_counts_tokens: ClassVar[bool] = False
    """Whether models for it divide their loss by the number of tokens that they are told."""
    greater_is_better: bool = True
    metric: str

    def __init__(self, data: DataSection, generation: GenerationSection) -> None:
        self.data = data
        self.generation = generation
        self.labels: list[str] = []
        self.kind = ""
        self.max_length = 512
        self.tokenizer: Any = None
        self.notes: list[str] = []

    # -- rows ------------------------------------------------------------------------------------------------------

    def check(self, row: Row) -> str | None:
        """What is wrong with a row, or nothing."""
        for role, value in row.items():
            if role not in self.roles.optional and (value is None or value == "" or value == []):
                return f"{role} is empty"
        return None

    def check_input(self, row: Row) -> str | None:
        """What is wrong with a row that is to be answered, or nothing."""
        choices = [[r for r in choice if r not in ANSWERS] for choice in self.roles.choices]
        roles = next((c for c in choices if all(row.get(r) is not None for r in c)), None)
        if roles is None:
            return f"it has no {choices[0][0]}"
        for role in roles:
            if not isinstance(row[role], str):
                return f"its {role} is no text"
            if not row[role].strip():
                return f"its {role} is empty"
        return None

    def check_labels(self, split: str, rows: Sequence[Row]) -> None:  # noqa: B027 - not all tasks have labels
        """Refuse rows with labels that the model does not know."""

    def group(self, row: Row) -> Hashable:
        """What rows are stratified by."""
        return None

    def learn(self, splits: Splits) -> None:  # noqa: B027 - a task without labels has nothing to learn
        """Take from the training rows what the model's head needs to know; check the other splits against it."""

    def state(self) -> dict[str, Any]:
        """What has to be known to use the trained model."""
        return {"labels": self.labels, "kind": self.kind, "max_length": self.max_length, "metric": self.metric}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        for name, value in state.items():
            setattr(self, name, value)

    def model_options(self) -> dict[str, Any]:
        """Arguments for the model's ``from_pretrained``."""
        if not self.labels:
            return {}
        names = dict(enumerate(self.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {v: k for k, v in names.items()}}

    def check_model(self, model: Any) -> None:  # noqa: B027 - a head of the right kind is all that most tasks need
        """Refuse a model that has the head, but cannot do the task."""

    def prepare(self, tokenizer: Any, longest: int, reserved: int = 0) -> None:
        """Settle the tokenizer and the length of inputs.

        Args:
            tokenizer: The model's.
            longest: Tokens that the model can take.
            reserved: Tokens that the method puts before them.
        """
        self.tokenizer = tokenizer
        usable = longest - reserved
        asked = self.data.max_length
        if asked is not None and asked > usable:
            self.notes.append(
                f"data.max_length is {asked}, but this model takes {usable} tokens: inputs are cut there."
            )
        self.max_length = min(asked or 512, usable)

    # -- features and outputs --------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, rows: Sequence[Row], what: str = "") -> list[Feature]:
        """Rows as features: token ids and, where rows have them, labels.

        Args:
            rows: By role.
            what: Name of the split, for notes.
        """

    @abstractmethod
    def step(self, model: Any, batch: dict[str, torch.Tensor], features: Sequence[Feature]) -> list[Any]:
        """Run a batch; one result for each feature."""

    @abstractmethod
    def score(self, rows: Sequence[Row], features: Sequence[Feature], results: Sequence[Any]) -> dict[str, Any]:
        """Metrics: numbers, and ``details`` (tables, wrong examples) for the report."""

    def decode(self, rows: Sequence[Row], features: Sequence[Feature], results: Sequence[Any]) -> list[dict[str, Any]]:
        """An answer for each row, ready for JSON."""
        raise RecipeError(f"{self.name} has no answers to show.")

    def rows_from_text(self, texts: Sequence[str]) -> list[Row]:
        """Rows for texts typed by the user: plain, or a JSON object with the columns."""
        import json

        rows = []
        for text in texts:
            row: Any = None
            if text.lstrip().startswith("{"):
                try:
                    row = json.loads(text)
                except json.JSONDecodeError:
                    row = None
            rows.append(row if isinstance(row, dict) else self.row_from_text(text))
        return rows

    def row_from_text(self, text: str) -> Row:
        """A row for one plain text."""
        return {"text": text}

    def collate(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """Features as one batch, padded to the longest. Keys that begin with an underscore stay behind."""
        pads = {"input_ids": self.tokenizer.pad_token_id or 0, "labels": IGNORED}
        left = self.tokenizer.padding_side == "left"
        batch = {}
        for key in (k for k in features[0] if not k.startswith("_")):
            values = [feature[key] for feature in features]
            if isinstance(values[0], list) and key not in ("targets",):
                length = max(map(len, values))
                pad = pads.get(key, 0)
                values = [[pad] * (length - len(v)) + v if left else v + [pad] * (length - len(v)) for v in values]
            batch["labels" if key == "targets" else key] = torch.tensor(values)
        return batch

    def note_cut(self, count: int, total: int, what: str) -> None:
        """Say how many inputs were cut."""
        if count and what:
            self.notes.append(
                f"{count:,} of {total:,} {what} inputs are longer than {self.max_length} tokens and were cut."
            )


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Cross-entropy, averaged over labelled positions."""
    return torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED).item()
