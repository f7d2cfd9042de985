"""CPT: bounded changes of the embeddings of examples in front of the input (Blau et al. 2024, arXiv 2410.17222)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftType, PromptLearningConfig, TaskType
from ..core.errors import PeftWarning, doubt
from ..core.prompt_tuner import Geometry, TokenTuner
from ..core.prompts import PromptTable
from ..core.sharding import fill, is_dtensor, whole

_WIDTH = 2048
"""The size of embeddings that bounds are given for: at another size d they are scaled by √(d / 2048)."""


@dataclass
class CPTConfig(PromptLearningConfig):
    """Configuration of CPT.

    Args:
        cpt_token_ids: Tokens of the context: an instruction and examples, as the base model's tokenizer gives them.
        cpt_mask: One number for each of them, 1. It has no effect, and other numbers get a warning.
        cpt_tokens_type_mask: What each of them is: 0 for the instruction, and for example j, counted from 0, 4 j + 1 for the words before
            its input, 4 j + 2 for the input, 4 j + 3 for the words before its label, and 4 j + 4 for the label. All 1 when not given.
        opt_weighted_loss_type: ``"decay"``: labels of earlier examples count less; ``"none"`` or ``None``: all count the same.
        opt_loss_decay_factor: The factor for each example further back, with ``"decay"``.
        opt_projection_epsilon: Largest change of an input's embedding, as a norm, for embeddings of size 2048.
        opt_projection_format_epsilon: The same for the words around inputs and labels.
        tokenizer_name_or_path: Where the tokens are from. It is recorded only.

    Raises:
        ValueError: The task is not a causal language model's, lists are of different lengths or hold impossible numbers, or unknown or
            negative values.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        self.peft_type = PeftType.CPT
        if self.task_type is None:
            self.task_type = TaskType.CAUSAL_LM
        super().__post_init__()
        task = getattr(self.task_type, "value", self.task_type)
        if task != "CAUSAL_LM":
            raise ValueError(f"CPT is for causal language models: `task_type` should be 'CAUSAL_LM', got {task!r}.")
        for name in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            value = getattr(self, name)
            if value is None or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` should be a number from 0 on, got {value!r}.")
        if self.cpt_token_ids is not None:
            self._check_context(self.cpt_token_ids)

    def _check_context(self, ids: list[int]) -> None:
        if not ids or min(ids) < 0:
            raise ValueError(
                f"`cpt_token_ids` should be tokens of the base model's tokenizer, at least one, got {ids}."
            )
        count = len(ids)
        if self.num_virtual_tokens is None:
            self.num_virtual_tokens = count
        if self.num_virtual_tokens != count:
            raise ValueError(
                f"`num_virtual_tokens` is {self.num_virtual_tokens!r}, but `cpt_token_ids` has {count} tokens, each of which becomes a "
                "virtual one. Leave `num_virtual_tokens` out."
            )
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            value = getattr(self, name)
            if value is None:
                setattr(self, name, [1] * count)
            elif len(value) != count:
                raise ValueError(
                    f"`{name}` has {len(value)} numbers, but `cpt_token_ids` has {count} tokens. Give one for each."
                )
        if set(self.cpt_mask or ()) != {1}:
            doubt(
                f"`cpt_mask` has no effect: every token of the context is seen. Leave out tokens that should not be; got {self.cpt_mask}."
            )
        if min(self.cpt_tokens_type_mask or ()) < 0:
            raise ValueError(f"`cpt_tokens_type_mask` should hold numbers from 0 on, got {self.cpt_tokens_type_mask}.")


class _Frozen(nn.Module):
    """Embeddings that are not trained.

    Args:
        weight: (tokens, size).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.register_buffer("weight", weight)


class CPTEmbedding(PromptTable):
    """The context with its changes: P = E + δ, ‖δᵢ‖ ≤ εᵢ.

    Each step of training begins by shortening the changes that have become too long, so that the optimiser goes on from the bounded ones
    (projected gradient descent).

    Args:
        config: The adapter's configuration, its sizes filled in.
        word_embeddings: The base model's embeddings, which E is taken from.
    """

    folded = False
    takes_table = True

    def __init__(self, config: Any, word_embeddings: Any) -> None:
        weight = word_embeddings.weight
        super().__init__(config.num_virtual_tokens, config.token_dim)
        with torch.no_grad():
            ids = torch.tensor(config.cpt_token_ids, device=weight.device)
            context = word_embeddings(ids).detach().float()
        self.embedding = _Frozen(context)  # type: ignore[assignment]
        self.delta_embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
        nn.init.zeros_(self.delta_embedding.weight)
        bounds = [_bound(kind, config) for kind in config.cpt_tokens_type_mask]
        self.bounds: torch.Tensor
        self.register_buffer("bounds", torch.tensor(bounds, dtype=torch.float32)[:, None])

    def forward(self) -> torch.Tensor:
        delta = self.delta_embedding.weight
        if torch.is_grad_enabled() and delta.requires_grad:
            with torch.no_grad():
                delta.copy_(self._bounded(delta))
            delta = self._with_shards(delta)
        else:
            delta = self._bounded(delta)
        return self.embedding.weight + delta * (self.bounds > 0)

    def _with_shards(self, delta: torch.Tensor) -> torch.Tensor:
        """The changes as they are. Where ``fully_shard`` gathered them for this forward pass, what was written into them is lost, so the
        parts are shortened too, as soon as the backward pass has ended."""
        if torch.compiler.is_compiling() or not torch.distributed.is_initialized():
            return delta
        delta = delta.view_as(delta)

        def shorten() -> None:
            weight = self.delta_embedding.weight
            if is_dtensor(weight):
                with torch.no_grad():
                    fill(weight, self._bounded(whole(weight, "delta_embedding")))

        def at_the_end(gradient: torch.Tensor) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(shorten)  # type: ignore[attr-defined]

        delta.register_hook(at_the_end)
        return delta

    def take(self, table: torch.Tensor) -> None:
        delta = table - self.embedding.weight
        bounded = self._bounded(delta)
        if not torch.allclose(bounded, delta, atol=1e-5 * float(table.abs().max())):
            warnings.warn(
                "The virtual tokens that were read are further from the embeddings of `cpt_token_ids` than this configuration allows, and "
                "are moved within its bounds. Are they of the same base model, context and `opt_projection_epsilon`?",
                PeftWarning,
                stacklevel=2,
            )
        fill(self.delta_embedding.weight, bounded)

    def _bounded(self, delta: torch.Tensor) -> torch.Tensor:
        """The changes, (tokens, size), those that are too long shortened to their bounds."""
        length = delta.norm(dim=1, keepdim=True)
        return torch.where(length > self.bounds, delta * (self.bounds / length), delta)


def _bound(kind: int, config: Any) -> float:
    """The largest change of a token: none for instructions and labels."""
    part = kind % 4
    bound = {0: 0.0, 2: config.opt_projection_epsilon}.get(part, config.opt_projection_format_epsilon)
    return bound * math.sqrt(config.token_dim / _WIDTH)


class CPTModel(TokenTuner):
    """A base model with a trained context; see :class:`~peft.core.prompt_tuner.PromptTuner`."""

    table_cls = CPTEmbedding
    loss_inputs = ("input_type_mask",)

    @classmethod
    def fill(cls, config: Any, geometry: Geometry) -> dict[str, Any]:
        if not config.cpt_token_ids:
            raise ValueError("CPT needs a context: give `cpt_token_ids`, the tokens of an instruction and of examples.")
        if not geometry.is_causal:
            raise ValueError(
                "CPT is for causal language models, which predict every token from those before it; this model is none."
            )
        if config.num_virtual_tokens != len(config.cpt_token_ids):
            raise ValueError(
                f"`num_virtual_tokens` is {config.num_virtual_tokens!r}, but `cpt_token_ids` has {len(config.cpt_token_ids)} tokens."
            )
        if max(config.cpt_token_ids) >= geometry.vocabulary:
            raise ValueError(
                f"`cpt_token_ids` holds {max(config.cpt_token_ids)}, but the model knows only {geometry.vocabulary} tokens. Use the "
                "model's own tokenizer."
            )
        return super().fill(config, geometry)

    @classmethod
    def make_table(cls, config: Any, geometry: Geometry, model: Any) -> PromptTable:
        return CPTEmbedding(config, model.get_input_embeddings())

    @classmethod
    def loss(cls, config: Any, logits: torch.Tensor, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The mean over label tokens of the context and of the input of γʲ · cross entropy, j examples back.

        Args:
            config: The adapter's configuration.
            logits: (batch, context + length, vocabulary).
            labels: (batch, length); -100 does not count.
            **inputs: ``input_type_mask``, (batch, length): what each token of the input is, as in ``cpt_tokens_type_mask`` and counted from
                the first example of the input; labels throughout when not given.

        Raises:
            ValueError: ``input_type_mask`` has another shape than the labels.
        """
        own = inputs.get("input_type_mask")
        own = torch.full_like(labels, 4) if own is None else own.to(labels)
        if own.shape != labels.shape:
            raise ValueError(
                f"`input_type_mask` has shape {tuple(own.shape)}, but `labels` {tuple(labels.shape)}. Give a number for each token."
            )
        rows = labels.shape[0]
        context = torch.tensor([config.cpt_token_ids, config.cpt_tokens_type_mask], device=labels.device)
        ids, kinds = (part.expand(rows, -1) for part in context)
        behind = 4 * math.ceil(max(config.cpt_tokens_type_mask) / 4)  # the input's examples come after the context's
        kinds = torch.cat([kinds, torch.where(own > 0, own + behind, 0)], dim=1)[:, 1:]
        targets = torch.cat([ids, labels], dim=1)[:, 1:]
        is_label = (kinds > 0) & (kinds % 4 == 0)
        counts = is_label & (targets != -100)
        losses = nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), targets.masked_fill(~counts, -100), reduction="none"
        )
        if config.opt_weighted_loss_type == "decay":
            losses = losses * config.opt_loss_decay_factor ** _examples_after(kinds, is_label)
        return losses.sum() / counts.sum()


def _examples_after(kinds: torch.Tensor, is_label: torch.Tensor) -> torch.Tensor:
    """For each token of a row, how many different later examples have label tokens there, (batch, tokens)."""
    examples = torch.where(is_label, kinds // 4, 0)
    most = int(examples.max()) if examples.numel() else 0
    there = torch.zeros(kinds.shape[0], most + 2, dtype=torch.long, device=kinds.device)
    there.scatter_(1, examples, 1)
    after = there.flip(1).cumsum(1).flip(1)[:, 1:]  # how many from the next example on
    return after.gather(1, examples)
