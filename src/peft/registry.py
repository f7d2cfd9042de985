"""The one table of methods: which configuration and which layer or model class belong to a PEFT type.

Adding a method is one file in ``peft/tuners`` and one line here. Classes are named by path and imported on first use, so that
``import peft`` stays cheap. Code outside the package registers its own method with :func:`register_method`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True, eq=False)
class Method:
    """One registered method.

    Args:
        peft_type: The value that ``adapter_config.json`` carries, upper case, for example ``"LORA"``.
        module: Import path of the method's file.
        config: Name of its configuration class in that file.
        tuner: Name of its :class:`~peft.core.tuner.BaseTuner` subclass in that file.
    """

    peft_type: str
    module: str
    config: str
    tuner: str

    @cached_property
    def config_cls(self) -> type[Any]:
        return getattr(importlib.import_module(self.module), self.config)

    @cached_property
    def tuner_cls(self) -> type[Any]:
        return getattr(importlib.import_module(self.module), self.tuner)


_METHODS: dict[str, Method] = {
    m.peft_type: m
    for m in (
        Method("LORA", "peft.tuners.lora", "LoraConfig", "LoraModel"),
        Method("IA3", "peft.tuners.ia3", "IA3Config", "IA3Model"),
        Method("LOHA", "peft.tuners.loha", "LoHaConfig", "LoHaModel"),
        Method("LOKR", "peft.tuners.lokr", "LoKrConfig", "LoKrModel"),
        Method("BOTTLENECK", "peft.tuners.bottleneck", "BottleneckConfig", "BottleneckModel"),
        Method("TRAINABLE_TOKENS", "peft.tuners.trainable_tokens", "TrainableTokensConfig", "TrainableTokensModel"),
        Method("PREFIX_TUNING", "peft.tuners.prefix_tuning", "PrefixTuningConfig", "PrefixTuningModel"),
        Method("PROMPT_TUNING", "peft.tuners.prompt_tuning", "PromptTuningConfig", "PromptTuningModel"),
        Method("P_TUNING", "peft.tuners.p_tuning", "PromptEncoderConfig", "PromptEncoderModel"),
        Method("P_TUNING_V2", "peft.tuners.p_tuning_v2", "PTuningV2Config", "PTuningV2Model"),
        Method(
            "MULTITASK_PROMPT_TUNING", "peft.tuners.multitask_prompt_tuning", "MultitaskPromptTuningConfig",
            "MultitaskPromptTuningModel",
        ),
        Method("CARTRIDGE", "peft.tuners.cartridge", "CartridgeConfig", "CartridgeModel"),
        Method("CPT", "peft.tuners.cpt", "CPTConfig", "CPTModel"),
    )
}  # fmt: skip


# Modules that read the adapter folders of other libraries. Each has ``recognises``, ``read_config`` and ``read_weights``.
_READERS = ("peft.tuners.bottleneck.adapter_hub",)


def foreign_reader(values: Mapping[str, Any]) -> Any:
    """The module that reads an adapter folder of another library, or ``None``.

    Args:
        values: What stands in the folder's ``adapter_config.json``.
    """
    if values.get("peft_type") is not None or "config" not in values:
        return None
    readers = (importlib.import_module(path) for path in _READERS)
    return next((reader for reader in readers if reader.recognises(values)), None)


def register_method(peft_type: str, *, config_cls: type[Any], tuner_cls: type[Any]) -> Method:
    """Make a method known to the library.

    Args:
        peft_type: Upper-case name, stored in the adapter's configuration file.
        config_cls: A :class:`~peft.PeftConfig` dataclass.
        tuner_cls: A :class:`~peft.core.tuner.BaseTuner` subclass.

    Returns:
        The registered method.

    Raises:
        ValueError: The name is not upper case, or another class already has it.
    """
    if peft_type != peft_type.upper() or not peft_type:
        raise ValueError(f"A PEFT type is an upper-case name, got {peft_type!r}.")
    known = _METHODS.get(peft_type)
    if known is not None and known.config_cls is not config_cls:
        raise ValueError(f"{peft_type!r} is already registered with {known.config_cls.__name__}; choose another name.")
    method = Method(peft_type, config_cls.__module__, config_cls.__qualname__, tuner_cls.__qualname__)
    # Classes defined inside a function cannot be found by path: fill the cached properties directly.
    method.__dict__["config_cls"] = config_cls
    method.__dict__["tuner_cls"] = tuner_cls
    _METHODS[peft_type] = method
    return method


def is_registered(peft_type: Any) -> bool:
    """Whether a method of this type is built or registered."""
    return _name(peft_type) in _METHODS


def registered_types() -> list[str]:
    """The names of all registered methods, sorted."""
    return sorted(_METHODS)


def class_by_name(name: str) -> type[Any] | None:
    """A configuration or model class of a registered method by its name, or ``None``."""
    for method in _METHODS.values():
        if name == method.config:
            return method.config_cls
        if name == method.tuner:
            return method.tuner_cls
    return None


def get_method(peft_type: Any) -> Method:
    """Look a method up.

    Args:
        peft_type: A :class:`~peft.PeftType` or its string value.

    Raises:
        NotImplementedError: The type is a known one of the field, but not built here.
        ValueError: The type is unknown.
    """
    from .config import PeftType
    from .core.errors import did_you_mean

    if peft_type is None:
        raise ValueError(
            f"The configuration does not say which method it is for: `peft_type` is missing. Known types: {', '.join(registered_types())}."
        )
    name = _name(peft_type)
    if name in _METHODS:
        return _METHODS[name]
    if name in PeftType.__members__:
        raise NotImplementedError(
            f"The method {name} is not built in this version of peft. Built: {', '.join(registered_types())}."
        )
    raise ValueError(
        f"Unknown PEFT type {name!r}{did_you_mean(name, _METHODS)}. Known types: {', '.join(registered_types())}."
    )


def in_form(peft_type: Any, tensors: dict[str, Any], config: Any) -> tuple[dict[str, Any], Any]:
    """An adapter's tensors and configuration as those of another method that gives the same outputs.

    Args:
        peft_type: The other method.
        tensors: The adapter's tensors by file key, as :func:`~peft.get_peft_model_state_dict` gives them.
        config: Its configuration, as it stands in a model's ``peft_config``.

    Raises:
        ValueError: There is no such adapter of the other method; the message says why.
    """
    return get_method(config.peft_type).tuner_cls.in_form(get_method(peft_type), tensors, config)


def _name(peft_type: Any) -> str:
    return str(getattr(peft_type, "value", peft_type)).upper()
