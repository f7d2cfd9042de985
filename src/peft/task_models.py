"""The model classes of the tasks: which head each trains, and in which order its ``forward`` takes arguments."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .config import PeftConfig, TaskType
from .core.task_rows import NO_TASKS
from .model import PeftModel


def _task_forward(*names: str) -> Any:
    """A ``forward`` with a task's own order of positional arguments, whatever the order of the base model's.

    Args:
        *names: Names of the arguments. Those not given are not passed on, so that a base model need not know them.
    """

    def forward(self: PeftModel, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        if len(args) > len(names):
            raise TypeError(
                f"forward() takes at most {len(names)} positional arguments ({', '.join(names)}), got {len(args)}."
            )
        given = dict(zip(names, args, strict=False))
        if twice := sorted(given.keys() & kwargs.keys()):
            raise TypeError(f"forward() got {twice} both by position and by name.")
        given = {k: v for k, v in {**given, **kwargs}.items() if v is not None or k not in names}
        if task_ids is not None:
            if not self.takes_tasks:
                raise ValueError(NO_TASKS)
            given["task_ids"] = task_ids
        return PeftModel.forward(self, **given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", kind)]
        + [inspect.Parameter(n, kind, default=None) for n in (*names, "task_ids")]
        + [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
    )
    forward.__doc__ = PeftModel.forward.__doc__
    return forward


_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")


class _TaskModel(PeftModel):
    """A model class of one task."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)


class PeftModelForSequenceClassification(_TaskModel):
    """A sequence classifier; its head is trained and saved with the adapter."""

    head_names = ("classifier", "score")
    forward = _task_forward("input_ids", "attention_mask", "inputs_embeds", "labels", *_OUTPUTS)


class PeftModelForTokenClassification(_TaskModel):
    """A token classifier; its head is trained and saved with the adapter."""

    head_names = ("classifier", "score")
    position_labels = ("labels",)
    forward = _task_forward("input_ids", "attention_mask", "inputs_embeds", "labels", *_OUTPUTS)

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig | None = None, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        if peft_config is None:  # the field's signature gives it a default here, but there is nothing to build then
            raise ValueError("PeftModelForTokenClassification needs a `peft_config`.")
        super().__init__(model, peft_config, adapter_name, **kwargs)


class PeftModelForQuestionAnswering(_TaskModel):
    """An extractive question answerer; its head is trained and saved with the adapter."""

    head_names = ("qa_outputs",)
    position_labels = ()
    forward = _task_forward(
        "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "start_positions", "end_positions",
        *_OUTPUTS,
    )  # fmt: skip


class PeftModelForFeatureExtraction(_TaskModel):
    """An encoder whose hidden states are used."""

    position_labels = ()
    forward = _task_forward("input_ids", "attention_mask", "inputs_embeds", *_OUTPUTS)


class _Generating(_TaskModel):
    """A model class of a task that generates text."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.base_model_prepare_inputs_for_generation = getattr(model, "prepare_inputs_for_generation", None)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """What the base model prepares for a step of generation."""
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]


class PeftModelForCausalLM(_Generating):
    """A causal language model."""

    position_labels = ("labels",)
    forward = _task_forward("input_ids", "attention_mask", "inputs_embeds", "labels", *_OUTPUTS)


class PeftModelForSeq2SeqLM(_Generating):
    """An encoder-decoder."""

    forward = _task_forward(
        "input_ids", "attention_mask", "inputs_embeds", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds",
        "labels", *_OUTPUTS,
    )  # fmt: skip


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS.value: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM.value: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM.value: PeftModelForCausalLM,
    TaskType.TOKEN_CLS.value: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS.value: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION.value: PeftModelForFeatureExtraction,
}
