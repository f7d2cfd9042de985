"""The methods: one file or folder each, none of which knows another. Their public classes are found by name on first use."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from ..registry import class_by_name

    if not name.startswith("_") and (found := class_by_name(name)) is not None:
        return found
    raise AttributeError(f"module 'peft.tuners' has no attribute {name!r}")
