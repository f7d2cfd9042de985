"""Base model and adapter in one call: ``AutoPeftModelFor….from_pretrained(adapter_folder)``."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from .config import PeftConfig, TaskType
from .core.files import fetch, hub_kwargs
from .model import PeftModel
from .task_models import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)


class _AutoPeftModel:
    _auto_class: ClassVar[str | None] = None
    _model_class: ClassVar[type[PeftModel]] = PeftModel
    _task: ClassVar[TaskType | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            f"{type(self).__name__} is made by `{type(self).__name__}.from_pretrained(adapter)`, not by its constructor."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter names, and the adapter onto it.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of the adapter.
            adapter_name: Name it gets here.
            is_trainable: Load it for further training.
            config: Use this configuration instead of the file's.
            revision: Revision of the adapter.
            import_allowlist: Packages besides ``transformers`` from which the class of the base model may be imported, where the
                adapter names one. An adapter's file decides what is imported, so others are refused.
            **kwargs: For the base model's ``from_pretrained``; download arguments serve both.

        Raises:
            ValueError: No adapter there, or its task is another one than this class's.
        """
        download, _ = hub_kwargs(kwargs)
        if revision is not None:
            download["revision"] = revision
        subfolder = kwargs.pop("subfolder", None)
        peft_config = config or PeftConfig.from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **download
        )
        base_name = peft_config.base_model_name_or_path
        if not base_name:
            raise ValueError(
                f"The adapter {str(pretrained_model_name_or_path)!r} does not name its base model. Load the base model yourself "
                "and use PeftModel.from_pretrained(base_model, adapter)."
            )
        task = TaskType(peft_config.task_type) if peft_config.task_type is not None else None
        if cls._task is not None and task is not None and task is not cls._task:
            raise ValueError(
                f"Expected an adapter for {cls._task.value}, but this one is for {task.value}. Use the matching Auto class."
            )
        base_cls = _base_class(cls._auto_class, task, peft_config, import_allowlist or [])
        base_kwargs = {k: v for k, v in kwargs.items() if k != "revision"}
        if peft_config.num_labels is not None and "num_labels" not in kwargs and "config" not in kwargs:
            base_kwargs["num_labels"] = peft_config.num_labels
        base = base_cls.from_pretrained(base_name, revision=peft_config.revision or "main", **base_kwargs)
        cls._fit_vocabulary(base, pretrained_model_name_or_path, subfolder, download, kwargs)
        model_cls = cls._model_class if cls._task is not None else PeftModel
        return model_cls.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            subfolder=subfolder,
            **download,
        )

    @staticmethod
    def _fit_vocabulary(base: Any, adapter: Any, subfolder: str | None, download: dict[str, Any], kwargs: Any) -> None:
        """Where a tokenizer lies beside the adapter and has more tokens than the model, make room for them."""
        if fetch(adapter, "tokenizer_config.json", subfolder, **download) is None or not hasattr(
            base, "get_input_embeddings"
        ):
            return
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            adapter, subfolder=subfolder or "", trust_remote_code=kwargs.get("trust_remote_code", False), **download
        )
        if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(len(tokenizer))


def _base_class(auto_class: str | None, task: TaskType | None, config: PeftConfig, allowed: list[str]) -> Any:
    import transformers

    if auto_class is not None:
        return getattr(transformers, auto_class)
    by_task = {sub._task: sub._auto_class for sub in _AutoPeftModel.__subclasses__() if sub._task is not None}
    if task is not None:
        return getattr(transformers, by_task[task] or "AutoModel")
    mapping = config.auto_mapping or {}
    if {"base_model_class", "parent_library"} <= mapping.keys():
        package = mapping["parent_library"].partition(".")[0]
        if package not in {"transformers", *(a.partition(".")[0] for a in allowed)}:
            raise ValueError(
                f"The adapter asks to import its base model's class from {mapping['parent_library']!r}. If you trust that, pass "
                f"import_allowlist=[{package!r}]; else load the base model yourself and use PeftModel.from_pretrained."
            )
        return getattr(importlib.import_module(mapping["parent_library"]), mapping["base_model_class"])
    raise ValueError(
        "The adapter records neither a task type nor the class of its base model. Use one of the AutoPeftModelFor… classes, or "
        "PeftModel.from_pretrained(base_model, adapter)."
    )


class AutoPeftModel(_AutoPeftModel):
    """Any adapter; the base model's class is found from its task or its record."""


class AutoPeftModelForCausalLM(_AutoPeftModel):
    """Adapters for causal language models."""

    _auto_class, _model_class, _task = "AutoModelForCausalLM", PeftModelForCausalLM, TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(_AutoPeftModel):
    """Adapters for encoder-decoders."""

    _auto_class, _model_class, _task = "AutoModelForSeq2SeqLM", PeftModelForSeq2SeqLM, TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(_AutoPeftModel):
    """Adapters for sequence classifiers."""

    _auto_class = "AutoModelForSequenceClassification"
    _model_class, _task = PeftModelForSequenceClassification, TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(_AutoPeftModel):
    """Adapters for token classifiers."""

    _auto_class, _model_class = "AutoModelForTokenClassification", PeftModelForTokenClassification
    _task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(_AutoPeftModel):
    """Adapters for extractive question answering."""

    _auto_class, _model_class = "AutoModelForQuestionAnswering", PeftModelForQuestionAnswering
    _task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(_AutoPeftModel):
    """Adapters for encoders whose hidden states are used."""

    _auto_class, _model_class, _task = "AutoModel", PeftModelForFeatureExtraction, TaskType.FEATURE_EXTRACTION
