"""Errors of recipes, meant to be read by the person at the terminal; and the check that the extra is installed."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator


class RecipeError(ValueError):
    """A recipe, its data or its model cannot be used as asked; the message says what, where and how to mend it.

    Args:
        message: For the user.
        key: Key of the recipe that is to blame, such as ``data.columns.text``: its line is put before the message.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


@contextlib.contextmanager
def blame(key: str) -> Iterator[None]:
    """Within this context an error that names no key of the recipe is put down to this one."""
    try:
        yield
    except RecipeError as error:
        error.key = error.key or key
        raise


def need(package: str, what: str, extra: str = "train") -> None:
    """Refuse with the command that helps when a package of an extra is missing.

    Args:
        package: Import name.
        what: What needs it.
        extra: The extra of this distribution that brings it.

    Raises:
        RecipeError: The package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise RecipeError(f"{what} needs the package {package}, which is not installed: pip install 'peft[{extra}]'.")
