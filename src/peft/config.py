"""Configurations: the base class of every method's config, the PEFT types and the task types."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers.utils import PushToHubMixin

from .core.errors import PeftWarning, shorten
from .core.files import CONFIG_NAME, fetch, hub_kwargs, write_atomically
from .field_checks import check_regex, check_types
from .registry import foreign_reader, get_method, is_registered


class PeftType(str, enum.Enum):
    """The methods of the field, by the name that ``adapter_config.json`` carries; ``peft.registry`` tells which are built."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"
    BOTTLENECK = "BOTTLENECK"  # not among the peer's
    P_TUNING_V2 = "P_TUNING_V2"  # likewise

    @classmethod
    def _missing_(cls, value: object) -> PeftType | None:
        """Types registered by code outside the package become members when first asked for."""
        if not isinstance(value, str) or not is_registered(value) or value != value.upper():
            return None
        member = str.__new__(cls, value)
        member._name_ = member._value_ = value
        cls._value2member_map_[value] = member
        cls._member_map_[value] = member
        return member


class TaskType(str, enum.Enum):
    """The tasks that have a model class of their own."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class PeftConfig(PushToHubMixin):
    """What every method's configuration holds.

    Args:
        task_type: The task, one of :class:`TaskType` or its name; chooses the model class and the head to train.
        peft_type: The method.
        auto_mapping: For adapters without a task type: the class of the base model and the library it comes from.
        peft_version: Version of the library that wrote the file.
        base_model_name_or_path: Hub id or folder of the base model.
        revision: Revision of the base model on the Hub.
        inference_mode: Whether the adapter is frozen.
        num_labels: Number of outputs of the trained classification head; written only for adapters that train one.
        id2label: Names of the labels, for the same adapters.
        problem_type: ``regression``, ``single_label_classification`` or ``multi_label_classification``, for the same adapters.

    Raises:
        ValueError: Unknown task type, or a field of another type than it declares.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    num_labels: int | None = field(default=None, kw_only=True)
    id2label: dict | None = field(default=None, kw_only=True)
    problem_type: str | None = field(default=None, kw_only=True)

    # Written only when set: the peer warns about keys that it does not know.
    _optional_keys: ClassVar[tuple[str, ...]] = ("num_labels", "id2label", "problem_type")
    # Never written.
    _transient_keys: ClassVar[tuple[str, ...]] = ("runtime_config",)
    # Fields in which adapters must agree to take each other's place while in use; None: they cannot.
    swap_keys: ClassVar[tuple[str, ...] | None] = None

    def __post_init__(self) -> None:
        if self.task_type is not None and str(getattr(self.task_type, "value", self.task_type)) not in set(TaskType):
            raise ValueError(
                f"Unknown task_type {self.task_type!r}. Use None or one of {', '.join(t.value for t in TaskType)}."
            )
        if isinstance(self.task_type, str):
            self.task_type = TaskType(self.task_type)
        if isinstance(self.peft_type, str):
            self.peft_type = PeftType(self.peft_type)
        check_types(self)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method adds virtual tokens."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is Adaption Prompt (LLaMA-Adapter)."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return dataclasses.asdict(self)

    def to_json_dict(self) -> dict[str, Any]:
        """The fields as they stand in ``adapter_config.json``: sets as sorted lists, enums as names."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        skip = set(self._transient_keys) | {k for k in self._optional_keys if values.get(k) is None}
        return {k: _jsonable(v) for k, v in sorted(values.items()) if k not in skip}

    def to_file(self) -> bytes:
        """The content of ``adapter_config.json``."""
        if self.peft_version is None:
            from . import __version__

            self.peft_version = __version__
        return (json.dumps(self.to_json_dict(), indent=2, sort_keys=True) + "\n").encode()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` into a folder, atomically.

        Args:
            save_directory: The folder; made if missing.
            **kwargs: ``auto_mapping_dict`` is stored as ``auto_mapping``; arguments for ``push_to_hub`` are accepted.

        Raises:
            ValueError: The path is a file.
        """
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        if auto_mapping is not None:
            self.auto_mapping = auto_mapping
        write_atomically(save_directory, {CONFIG_NAME: self.to_file()})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Make the configuration class that ``peft_type`` names.

        Args:
            **kwargs: Fields of that class. Fields that it does not have are left out with a warning that names them.

        Raises:
            ValueError: Unknown ``peft_type``.
        """
        peft_type = kwargs.get("peft_type")
        config_cls: Any = get_method(peft_type).config_cls if peft_type is not None else cls
        known = {f.name for f in dataclasses.fields(config_cls) if f.init}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            wrote = f" (the file was written by peft {v})" if (v := kwargs.get("peft_version")) else ""
            warnings.warn(
                f"{config_cls.__name__} does not know the keys {shorten(unknown)}{wrote}. They are ignored; if the "
                "adapter relies on them its outputs may differ.",
                PeftWarning,
                stacklevel=3,
            )
        return config_cls(**{k: v for k, v in kwargs.items() if k in known})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read ``adapter_config.json`` from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path: Folder, or Hub id.
            subfolder: Folder inside it.
            **kwargs: Download arguments (``revision``, ``token``, ``cache_dir``, …), or fields that replace those of the file.

        Returns:
            The configuration, of the class that the file's ``peft_type`` names.

        Raises:
            ValueError: No such file, or it is not a JSON object, or its ``peft_type`` is unknown.
        """
        download, overrides = hub_kwargs(kwargs)
        path = fetch(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **download)
        if path is None:
            where = os.path.join(str(pretrained_model_name_or_path), *([subfolder] if subfolder else []))
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{where}'. Is it the folder or Hub id of an adapter?")
        values = cls.from_json_file(path)
        if (reader := foreign_reader(values)) is not None:
            values = reader.read_config(values)
        values |= overrides
        if cls is not PeftConfig and values.get("peft_type") is None:
            return cls(**values)
        return cls.from_peft_type(**values)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """Read the file's fields.

        Raises:
            ValueError: The file is not a JSON object.
        """
        with open(path_json_file, encoding="utf-8") as file:
            try:
                values = json.load(file)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ValueError(f"{str(path_json_file)!r} is not valid JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{str(path_json_file)!r} should hold a JSON object, found a {type(values).__name__}.")
        return values

    @classmethod
    def _get_peft_type(cls, model_id: str, **kwargs: Any) -> str | PeftType | None:
        """The method of a saved adapter; other libraries ask for it."""
        return cls.from_pretrained(model_id, **kwargs).peft_type


# Other libraries import this name; there is no difference between the two here.
PeftConfigMixin = PeftConfig


@dataclass
class PromptLearningConfig(PeftConfig):
    """What configurations of methods with virtual tokens share.

    Args:
        num_virtual_tokens: Number of virtual tokens.
        token_dim: Hidden size of the base model.
        num_transformer_submodules: 1 for encoders and decoders, 2 for encoder-decoders.
        num_attention_heads: Heads of the base model.
        num_layers: Layers of the base model.
        modules_to_save: Modules that are trained in full and saved with the adapter.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        return True


@dataclass
class WeightConfig(PeftConfig):
    """What configurations of methods that wrap layers share: checks of fields that several methods have."""

    # Fields that give single modules another value, by name, suffix or regular expression.
    _pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    # Those of them whose values are pairs of positive integers, not numbers.
    _pair_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name, None)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
            elif isinstance(value, str):
                check_regex(name, value)
        targets = getattr(self, "target_modules", None)
        layers, pattern = getattr(self, "layers_to_transform", None), getattr(self, "layers_pattern", None)
        if isinstance(targets, str) and targets != "all-linear":
            for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
                if value is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is a regular expression ({targets!r}): put the "
                        "layers into the expression, or give `target_modules` as a list."
                    )
        if pattern and layers is None:
            raise ValueError("`layers_pattern` has no effect without `layers_to_transform`: specify both, or neither.")
        r = getattr(self, "r", 1)
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r!r}.")
        for regex in [pattern] if isinstance(pattern, str) else pattern or ():
            check_regex("layers_pattern", regex)
        for name in self._pattern_fields:
            for key, value in (getattr(self, name, None) or {}).items():
                check_regex(name, str(key))
                self._check_pattern(name, key, value)

    def _check_pattern(self, field_name: str, key: Any, value: Any) -> None:
        if field_name in self._pair_fields:
            numbers = value if isinstance(value, (list, tuple)) and len(value) == 2 else [None]
            if not all(type(n) is int and n > 0 for n in numbers):
                raise ValueError(
                    f"`{field_name}` gives {key!r} the value {value!r}, which is no pair of positive integers."
                )
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"`{field_name}` gives {key!r} the value {value!r}, which is no number.")

    def idle_patterns(self, module_names: Iterable[str]) -> list[tuple[str, str]]:
        """Pattern fields and keys of theirs that mean none of these modules, and so do nothing.

        Args:
            module_names: Full names of the adapted modules.
        """
        names = list(module_names)
        return [
            (field_name, key)
            for field_name in self._pattern_fields
            for key in (getattr(self, field_name, None) or {})
            if not any(pattern_matches(key, name) for name in names)
        ]

    def check_probability(self, name: str) -> None:
        """Refuse a field that is no probability below 1.

        Raises:
            ValueError: With the field's name.
        """
        value = getattr(self, name)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"`{name}` is a probability, at least 0 and below 1, got {value!r}.")

    def pattern_value(self, field_name: str, module_name: str, default: Any) -> Any:
        """The value that a pattern field (``rank_pattern``, …) gives a module, else the default.

        Args:
            field_name: The field: a dictionary from a name, suffix or regular expression to a value.
            module_name: Full name of the module in the base model.
            default: Returned where no key matches. The first matching key wins.
        """
        for key, value in (getattr(self, field_name, None) or {}).items():
            if pattern_matches(key, module_name):
                return value
        return default


def pattern_matches(key: str, module_name: str) -> bool:
    """Whether a key of a pattern field means this module: it matches the name's end, at a dot."""
    return re.match(rf"(.*\.)?({key})$", module_name) is not None


def _jsonable(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _jsonable(dataclasses.asdict(value))
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return value
