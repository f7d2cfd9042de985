"""The oracle's view of public names, and of values and errors in JSON's terms."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
import inspect
import traceback
from typing import Any


def describe_error(error: BaseException) -> dict[str, Any]:
    """An exception as JSON."""
    return {
        "type": type(error).__name__,
        "kinds": [kind.__name__ for kind in type(error).__mro__],
        "message": str(error),
        "trace": "".join(traceback.format_exception(error)),
    }


def plain(value: Any) -> Any:
    """The value in JSON's terms; sets become sorted lists, objects their repr."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in value), key=repr)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, type):
        return value.__name__
    return repr(value)


def find(dotted: str) -> Any:
    """The object of a dotted name: the longest module, then attributes without calling properties."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            static = inspect.getattr_static(found, part) if isinstance(found, type) else None
            found = static if isinstance(static, property) else getattr(found, part)
        return found
    raise ImportError(f"No module of {dotted!r} can be imported.")


def surface(names: list[str]) -> dict[str, Any]:
    """What each public name is: its kind, its parameters, fields, members or value."""
    report: dict[str, Any] = {}
    for name in names:
        try:
            report[name] = describe(find(name))
        except Exception as error:
            report[name] = {"error": describe_error(error)}
    return report


def describe(found: Any) -> dict[str, Any]:
    """One object of the public surface."""
    if isinstance(found, property):
        return {"kind": "property"}
    if isinstance(found, type) and issubclass(found, enum.Enum):
        return {"kind": "enum", "members": {member.name: plain(member.value) for member in found}}
    if not callable(found):
        return {"kind": "value", "value": plain(found)}
    told: dict[str, Any] = {"kind": "class" if isinstance(found, type) else "function"}
    if isinstance(found, type):
        told["bases"] = [kind.__name__ for kind in found.__mro__]
        if dataclasses.is_dataclass(found):
            told["fields"] = [[f.name, field_default(f)] for f in dataclasses.fields(found) if f.init]
    with contextlib.suppress(ValueError):
        told["parameters"] = [
            [p.name, p.kind.name, None if p.default is p.empty else plain(p.default), p.default is p.empty]
            for p in inspect.signature(found).parameters.values()
        ]
    return told


def field_default(entry: dataclasses.Field) -> Any:
    """The default of a dataclass field, made if it has a factory."""
    if entry.default is not dataclasses.MISSING:
        return plain(entry.default)
    if entry.default_factory is not dataclasses.MISSING:
        return plain(entry.default_factory())
    return "no default"
