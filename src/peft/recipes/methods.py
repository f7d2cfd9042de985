"""Which methods a recipe can name, and what they start from."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from typing import Any

from ..core.errors import did_you_mean
from ..registry import get_method, registered_types
from .errors import RecipeError
from .recipe import MethodSection

FULL, HEAD = "full", "head"

# Names that stand for a method with certain fields set.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("LORA", {"use_dora": True}),
    "rslora": ("LORA", {"use_rslora": True}),
}

# Fields that a recipe sets unless it says otherwise, where the method's configuration has them.
START: dict[str, dict[str, Any]] = {
    "LORA": {"r": 8, "lora_alpha": 16},
    "LOHA": {"r": 8, "alpha": 16},
    "LOKR": {"r": 8, "alpha": 16},
    "PREFIX_TUNING": {"num_virtual_tokens": 20},
    "PROMPT_TUNING": {"num_virtual_tokens": 20},
    "P_TUNING": {"num_virtual_tokens": 20, "encoder_hidden_size": 128},
    "P_TUNING_V2": {"num_virtual_tokens": 20},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 20},
    "CARTRIDGE": {"num_virtual_tokens": 20},
}


@dataclass(frozen=True)
class MethodInfo:
    """A method that a recipe can name.

    Args:
        name: As in recipes.
        title: What it trains, from the first line of its module.
        paper: arXiv number, if its documentation gives one.
        peft_type: As in ``adapter_config.json``; ``None`` for full training and the head alone.
        options: Fields that the name sets.
    """

    name: str
    title: str
    paper: str | None
    peft_type: str | None
    options: dict[str, Any]

    @property
    def config_cls(self) -> Any:
        """The class of its configuration."""
        return get_method(self.peft_type).config_cls


def recipe_name(peft_type: str) -> str:
    """A PEFT type as recipes write it: ``PREFIX_TUNING`` is ``prefix-tuning``."""
    return peft_type.lower().replace("_", "-")


def methods() -> dict[str, MethodInfo]:
    """All methods that are built, by name: the registry's, their variants, ``full`` and ``head``."""
    found = {}
    for peft_type in registered_types():
        title, paper = _described(get_method(peft_type).config_cls)
        found[recipe_name(peft_type)] = MethodInfo(recipe_name(peft_type), title, paper, peft_type, {})
    for name, (peft_type, options) in VARIANTS.items():
        base = found.get(recipe_name(peft_type))
        if base is None or name in found:
            continue
        try:
            base.config_cls(**options)
        except NotImplementedError:
            continue
        said = {
            "dora": ("low-rank updates of the direction, and the magnitude", "2402.09353"),
            "rslora": ("LoRA with a scale that suits high ranks", "2312.03732"),
        }
        title, paper = said.get(name, (f"{base.title} with {', '.join(options)}", None))
        found[name] = MethodInfo(name, title, paper, peft_type, options)
    found[FULL] = MethodInfo(FULL, "every weight", None, None, {})
    found[HEAD] = MethodInfo(HEAD, "the new head alone", None, None, {})
    return found


def _described(config_cls: Any) -> tuple[str, str | None]:
    """What a method trains, and the number of its paper, as its module and its configuration say them."""
    module = sys.modules[config_cls.__module__]
    package = sys.modules.get(module.__package__ or "")
    about = package if package is not None and (package.__name__.rpartition(".")[2] != "tuners") else module
    line = (about.__doc__ or config_cls.__doc__ or "").strip().partition("\n")[0]
    title = re.sub(r"\s*\(.*?\)|\.$", "", line.partition(": ")[2] or line.removeprefix("Configuration of "))
    paper = re.search(r"arXiv[: ]+(\d{4}\.\d{4,5})", f"{line} {config_cls.__doc__}")
    return title, paper and paper[1]


def method_info(name: str) -> MethodInfo:
    """Look a method up.

    Raises:
        RecipeError: There is none of this name.
    """
    known = methods()
    asked = name.lower().replace("_", "-")
    if asked not in known:
        hint = did_you_mean(asked, known) or "."
        raise RecipeError(f"There is no method {name!r}{hint} Built are {', '.join(known)}.", "method.name")
    return known[asked]


def build_config(section: MethodSection, task_type: str | None) -> Any:
    """The method's configuration.

    Args:
        section: The recipe's method.
        task_type: The value of ``TaskType``.

    Returns:
        The configuration, or ``None`` for full training and the head alone.

    Raises:
        RecipeError: An option that the method does not have, or that has an impossible value.
    """
    info = method_info(section.name)
    if info.peft_type is None:
        if section.options:
            key = f"method.{next(iter(section.options))}"
            raise RecipeError(f"{key}: the method {info.name!r} has no options.", key)
        return None
    known = {f.name for f in dataclasses.fields(info.config_cls) if f.init} - {"task_type", "peft_type"}
    for option in section.options:
        if option not in known:
            hint = did_you_mean(option, known) or f". Its options are {', '.join(sorted(known))}."
            raise RecipeError(f"method.{option}: the method {info.name!r} has no such option{hint}", f"method.{option}")
    start = {k: v for k, v in START.get(info.peft_type, {}).items() if k in known}
    try:
        return info.config_cls(task_type=task_type, **{**start, **info.options, **section.options})
    except (ValueError, TypeError, NotImplementedError) as error:
        # Messages of configurations name the field, in backticks.
        named = next((o for o in section.options if f"`{o}`" in str(error)), "name")
        raise RecipeError(f"method {info.name!r}: {error}", f"method.{named}") from None
