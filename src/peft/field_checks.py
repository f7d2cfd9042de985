"""Checks that the fields of a configuration hold what their annotations declare."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal, Union, get_args, get_origin

_UNFIT = object()
_WORDS: dict[Any, str] = {
    bool: "True or False", int: "an integer", float: "a number", str: "a string", dict: "a dictionary",
    list: "a list", type(None): "None",
}  # fmt: skip
_PLURALS = {int: "integers", str: "strings", float: "numbers", bool: "truth values", list: "lists", tuple: "pairs"}


def check_types(config: Any) -> None:
    """Check every field of a configuration against its annotation, and put values that JSON cannot hold into plain types.

    Integers of numpy become ``int``, ranges and other sequences become lists; ``None`` stands for the default of a flag.

    Args:
        config: A dataclass instance.

    Raises:
        ValueError: A field holds another type. The message names the field, what it should be and what was found.
    """
    for name, (hint, default) in _hints(type(config)).items():  # type: ignore[arg-type]
        value = getattr(config, name)
        if value is None and hint is bool:  # "null" in files of other writers
            setattr(config, name, default)
            continue
        settled = _settled(value, hint)
        if settled is _UNFIT:
            raise ValueError(
                f"`{name}` should be {_words(hint)}, got {_short(value)} ({type(value).__name__}).{_mend(value, hint)}"
            )
        if settled is not value:
            setattr(config, name, settled)


def check_regex(name: str, pattern: str) -> None:
    """Refuse an invalid regular expression.

    Raises:
        ValueError: Naming the field and the fault.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{name}` holds {pattern!r}, which is no valid regular expression ({error}). A plain name needs no special "
            "characters; write a literal one with a backslash."
        ) from error


@functools.cache
def _hints(cls: type) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each field; empty where the annotations cannot be resolved."""
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError):  # names known to type checkers only
        return {}
    return {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls) if f.init and f.name in hints}


def _settled(value: Any, hint: Any) -> Any:
    """The value in the form that the annotation asks for, or ``_UNFIT``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return next((s for a in arguments if (s := _settled(value, a)) is not _UNFIT), _UNFIT)
    if origin is Literal:
        return value if any(type(value) is type(a) and value == a for a in arguments) else _UNFIT
    kind = origin or hint
    if kind is Any:
        return value
    if kind is bool or kind is str:
        return value if isinstance(value, kind) else _UNFIT
    if kind is int or kind is float:
        return _number(value, kind)
    if kind in (list, set, tuple):
        return _collection(value, kind, arguments)
    if kind is dict:
        return _mapping(value, arguments)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, (kind, Mapping)) else _UNFIT  # type: ignore[arg-type]
    if isinstance(kind, type):
        return value if isinstance(value, kind) else _UNFIT
    return value


def _number(value: Any, kind: type) -> Any:
    accepted = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, accepted) or not math.isfinite(value):
        return _UNFIT
    return value if isinstance(value, (int, float)) else kind(value)


def _collection(value: Any, kind: type, arguments: tuple[Any, ...]) -> Any:
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, Set)):
        return _UNFIT
    if not isinstance(value, (list, tuple, set, frozenset)):
        value = list(value)
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        items = (
            [_settled(v, a) for v, a in zip(value, arguments, strict=False)]
            if len(value) == len(arguments)
            else [_UNFIT]
        )
    else:
        items = [_settled(v, arguments[0] if arguments else Any) for v in value]
    if any(item is _UNFIT for item in items):
        return _UNFIT
    changed = any(item is not old for item, old in zip(items, value, strict=True))
    return type(value)(items) if changed else value


def _mapping(value: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(value, Mapping):
        return _UNFIT
    if arguments:
        pairs = [(_settled(k, arguments[0]), _settled(v, arguments[1])) for k, v in value.items()]
        if any(part is _UNFIT for pair in pairs for part in pair):
            return _UNFIT
    return value if isinstance(value, dict) else dict(value)


def _words(hint: Any) -> str:
    """An annotation in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType, Literal):
        words = [repr(a) for a in arguments] if origin is Literal else [_words(a) for a in arguments]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    kind = origin or hint
    if kind in (list, set, tuple) and arguments:
        inner = get_origin(arguments[0]) or arguments[0]
        return f"a {'tuple' if kind is tuple else 'list'} of {_PLURALS.get(inner, 'values')}"
    return _WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _mend(value: Any, hint: Any) -> str:
    """A further sentence where the mend is plain."""
    if isinstance(value, str):
        if _settled([value], hint) is not _UNFIT:
            return f" Write [{value!r}]."
        with contextlib.suppress(Exception):
            if _settled(ast.literal_eval(value), hint) is not _UNFIT:
                return " Write it without quotes."
        choices = [a for part in (hint, *get_args(hint)) if get_origin(part) is Literal for a in get_args(part)]
        if close := difflib.get_close_matches(value, [a for a in choices if isinstance(a, str)], 1):
            return f" Did you mean {close[0]!r}?"
    return ""
