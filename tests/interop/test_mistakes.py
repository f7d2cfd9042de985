"""Wrong calls: what the peer refuses is refused here too, with an error that the same ``except`` clause catches."""

from __future__ import annotations

import builtins

import pytest

from .conftest import Lab

MISTAKES = (
    "no target matches",
    "no regex matches",
    "target of a wrong kind",
    "all targets excluded",
    "rank zero",
    "unknown bias",
    "unknown start",
    "unknown task",
    "layers with a regex",
    "pattern with a regex",
    "pattern without layers",
    "no targets known",
    "second adapter with biases",
    "activate the unknown",
    "delete the unknown",
    "save the unknown",
    "status of a plain model",
    "layer status of a plain model",
    "load nothing",
    "load without weights",
    "load an unknown method",
    "load another rank",
    "load a string for targets that match nothing",
    "mixed batch: unknown adapter",
    "mixed batch: wrong length",
    "mixed batch: in training",
    "mixed batch: merged",
    "save into a file",
)

# Where the kind of error differs on purpose: the peer's says nothing to a reader.
BETTER_HERE = {"load an unknown method": "ValueError", "unknown bias": "ValueError"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_refused_as_by_the_peer(lab: Lab, mistake: str) -> None:
    answers = lab.ask("mistakes", folder=True, bases=str(lab.folder / "bases"))
    wanted, got = answers["peer"][mistake], answers["ours"][mistake]
    assert wanted is not None, "the peer accepts this call"
    assert got is not None, f"accepted; the peer raises {wanted['type']}: {wanted['message']}"
    # What a program can catch: the first built-in class above the error, and the peer's own public classes.
    kinds = [kind for kind in wanted["kinds"] if kind in ("PeftError", "NoMatchingPeftModuleError")]
    kinds += [next(kind for kind in wanted["kinds"] if hasattr(builtins, kind))]
    if mistake in BETTER_HERE:
        kinds = [BETTER_HERE[mistake]]
    assert [kind for kind in kinds if kind not in got["kinds"]] == [], f"raised {got['trace']}"
    assert got["message"].strip()


def test_the_table_names_every_mistake(lab: Lab) -> None:
    answers = lab.ask("mistakes", folder=True, bases=str(lab.folder / "bases"))
    assert sorted(answers["peer"]) == sorted(MISTAKES)
