"""Errors, warnings and the strict switch: what was asked, what was found, how to mend it."""

from __future__ import annotations

import contextlib
import difflib
import os
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar


class PeftError(RuntimeError):
    """Base class of errors that are peculiar to this library."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """None of the configured targets exists in the model."""


class MismatchError(PeftError, ValueError):
    """Tensors of a file do not have the shapes that the model needs."""


class PeftWarning(UserWarning):
    """A doubtful call: it works, but perhaps not as meant. An error under ``strict=True`` or ``PEFT_STRICT=1``."""


_strict: ContextVar[bool | None] = ContextVar("peft_strict", default=None)


def is_strict() -> bool:
    """Whether doubtful calls raise: the innermost :func:`strictness`, else the environment variable ``PEFT_STRICT``."""
    chosen = _strict.get()
    if chosen is not None:
        return chosen
    return os.environ.get("PEFT_STRICT", "").lower() in {"1", "true", "yes", "on"}


@contextlib.contextmanager
def strictness(strict: bool | None) -> Iterator[None]:
    """Within this context doubtful calls raise (``True``), warn (``False``) or do what is set outside (``None``)."""
    if strict is None:
        yield
        return
    token = _strict.set(strict)
    try:
        yield
    finally:
        _strict.reset(token)


def doubt(message: str, error: type[Exception] = ValueError, stacklevel: int = 3) -> None:
    """Report a doubtful call.

    Args:
        message: The thing, the reason and the mend.
        error: Raised instead of the warning when strict.

    Raises:
        ValueError: Or whatever ``error`` says, when strict.
    """
    if is_strict():
        raise error(message)
    warnings.warn(message, PeftWarning, stacklevel=stacklevel)


def did_you_mean(asked: str, known: Iterable[str], *, count: int = 3) -> str:
    """`` (did you mean 'q_proj'?)``, or an empty string where nothing is close."""
    close = difflib.get_close_matches(asked, list(known), n=count, cutoff=0.6)
    if not close:
        return ""
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)"


def shorten(names: Iterable[str], limit: int = 8) -> str:
    """A readable list of names that does not flood the terminal."""
    names = list(names)
    head = ", ".join(repr(n) for n in names[:limit])
    return head if len(names) <= limit else f"{head} and {len(names) - limit} more"
