"""Multitask prompt tuning: shared virtual tokens, changed for each task by a product of low rank (Wang et al. 2023, arXiv 2303.02861)."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftType, PromptLearningConfig
from ..core.files import load_peft_weights, read_tensors
from ..core.prompt_table import FILE_KEY
from ..core.prompt_tuner import Geometry, TokenTuner
from ..core.prompts import Prompts, PromptTable
from ..core.tokens import TEXT_FIELDS, checked_start, text_tokens


class MultitaskPromptTuningInit(str, enum.Enum):
    """How virtual tokens start.

    ``TEXT``: the shared ones from the embeddings of a text; ``RANDOM``: from normal random numbers. The others start from an adapter that
    was trained on several source tasks: ``AVERAGE_SOURCE_TASKS`` from the average of its tasks, ``EXACT_SOURCE_TASK`` from one of them,
    ``ONLY_SOURCE_SHARED`` from its shared tokens alone.
    """

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


_Init = MultitaskPromptTuningInit
_FROM_SOURCE = (_Init.AVERAGE_SOURCE_TASKS, _Init.EXACT_SOURCE_TASK, _Init.ONLY_SOURCE_SHARED)


@dataclass
class MultitaskPromptTuningConfig(PromptLearningConfig):
    """Configuration of multitask prompt tuning.

    Args:
        prompt_tuning_init: How virtual tokens start, see :class:`MultitaskPromptTuningInit`.
        prompt_tuning_init_text: The text, for ``TEXT``. It is repeated or cut to the number of virtual tokens.
        tokenizer_name_or_path: Its tokenizer, for ``TEXT``.
        tokenizer_kwargs: Arguments for the tokenizer's ``from_pretrained``.
        prompt_tuning_init_state_dict_path: The adapter to start from: its file, its folder or its Hub id.
        prompt_tuning_init_task: Number of the source task, for ``EXACT_SOURCE_TASK``.
        num_ranks: Rank of what a task adds.
        num_tasks: Number of tasks.

    Raises:
        ValueError: Unknown start, or one that lacks what it starts from; no tasks or no ranks.
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def __post_init__(self) -> None:
        self.peft_type = PeftType.MULTITASK_PROMPT_TUNING
        super().__post_init__()
        source = (("prompt_tuning_init_state_dict_path", "the adapter"),)
        needs = {"TEXT": TEXT_FIELDS, **{start.value: source for start in _FROM_SOURCE}}
        self.prompt_tuning_init = checked_start(self, _Init, needs)
        for name, what in (("num_tasks", "tasks"), ("num_ranks", "ranks")):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` should be a whole number from 1 on, got {value!r}: the number of {what}.")


class MultitaskPromptEmbedding(PromptTable):
    """The virtual tokens of each task: P_k = P ∘ (U_k V_k), P being shared by all tasks (section 3.1, eq. 1).

    Args:
        config: The adapter's configuration, its sizes filled in. P has (tokens, size) numbers, all U together (tasks, tokens, ranks), all V
            (tasks, ranks, size).
    """

    file_keys = {FILE_KEY: "embedding.weight", "prefix_task_cols": "prefix_task_cols", "prefix_task_rows": "prefix_task_rows"}  # fmt: skip
    is_always_needed = True

    def __init__(self, config: Any) -> None:
        rows = config.num_virtual_tokens * config.num_transformer_submodules
        super().__init__(rows, config.token_dim)
        self.tasks = config.num_tasks
        self.prefix_task_cols = nn.Parameter(torch.normal(0, 0.02, (self.tasks, rows, config.num_ranks)))
        self.prefix_task_rows = nn.Parameter(torch.normal(0, 0.02, (self.tasks, config.num_ranks, config.token_dim)))

    def tokens(self, task: int | torch.Tensor | None = None) -> torch.Tensor:
        """The virtual tokens of a task, (tokens, size), or of each row's, (batch, tokens, size).

        Raises:
            ValueError: No task was named, and there are several.
        """
        if task is None:
            if self.tasks > 1:
                raise ValueError(
                    f"The adapter has virtual tokens for {self.tasks} tasks, so `task_ids` has to be given: the number of the task of "
                    "each row, from 0 on. A model without a PeftModel around it takes none."
                )
            task = 0
        cols: torch.Tensor = self.prefix_task_cols
        rows: torch.Tensor = self.prefix_task_rows
        if isinstance(task, torch.Tensor):  # index_select, since it refuses negative numbers
            cols, rows = (t.index_select(0, task.to(t.device)) for t in (cols, rows))
        else:
            cols, rows = cols[task], rows[task]
        return self()[: self.length] * (cols[..., : self.length, :] @ rows)


class MultitaskPromptTuningModel(TokenTuner):
    """A base model with virtual tokens of several tasks; see :class:`~peft.core.prompt_tuner.PromptTuner`."""

    table_cls = MultitaskPromptEmbedding

    @classmethod
    def make_table(cls, config: Any, geometry: Geometry, model: Any) -> PromptTable:
        return MultitaskPromptEmbedding(config)

    @classmethod
    def start(cls, table: PromptTable, config: Any, holder: Prompts, model: Any) -> None:
        weight = table.embedding.weight
        if config.prompt_tuning_init is _Init.TEXT:
            words = model.get_input_embeddings()
            ids = text_tokens(config, weight.shape[0], words.weight.shape[0])
            weight.copy_(words(torch.tensor(ids, device=words.weight.device)))
        elif config.prompt_tuning_init in _FROM_SOURCE:
            source = _read_source(config.prompt_tuning_init_state_dict_path)
            _copy(weight, source[FILE_KEY], "prompt_embeddings", "num_virtual_tokens")
            if config.prompt_tuning_init is not _Init.ONLY_SOURCE_SHARED:
                for name in ("prefix_task_cols", "prefix_task_rows"):
                    target = getattr(table, name)
                    _copy(target, _chosen(source[name], config).expand(table.tasks, -1, -1), name, "num_ranks")


def _chosen(source: torch.Tensor, config: Any) -> torch.Tensor:
    """What the new tasks start from, of the tensors of all source tasks, (1, …, …)."""
    if config.prompt_tuning_init is _Init.AVERAGE_SOURCE_TASKS:
        return source.mean(dim=0, keepdim=True)
    task = config.prompt_tuning_init_task
    if task is None or not 0 <= task < source.shape[0]:
        raise ValueError(
            f"`prompt_tuning_init_task` is {task}, but the adapter to start from has {source.shape[0]} tasks: "
            f"0 to {source.shape[0] - 1}."
        )
    return source[task : task + 1]


def _copy(target: torch.Tensor, source: torch.Tensor, name: str, field: str) -> None:
    if target.shape != source.shape:
        raise ValueError(
            f"`prompt_tuning_init_state_dict_path`: its {name} has shape {tuple(source.shape)}, but this configuration needs "
            f"{tuple(target.shape)}. Start from an adapter of the same base model, with the same `num_virtual_tokens` and `{field}`."
        )
    target.copy_(source)


def _read_source(path: str) -> Mapping[str, torch.Tensor]:
    """The tensors of an adapter by their plain keys."""
    found = read_tensors(path) if os.path.isfile(path) else load_peft_weights(path, device="cpu")
    source = {key.rpartition(".")[2]: tensor for key, tensor in found.items()}
    lacking = [key for key in MultitaskPromptEmbedding.file_keys if key not in source]
    if lacking:
        raise ValueError(
            f"`prompt_tuning_init_state_dict_path`: {path} lacks {', '.join(lacking)}. It should be an adapter of multitask prompt "
            "tuning that was trained on the source tasks."
        )
    return source
