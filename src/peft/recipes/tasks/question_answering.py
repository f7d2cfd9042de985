"""Extractive question answering: the answer is a span of the context; long contexts are read in overlapping windows."""

from __future__ import annotations

import contextlib
import json
import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from ..data import Roles, Splits
from ..errors import RecipeError
from ..sources import Row
from .base import Feature, Task

LONGEST_ANSWER = 30
"""Tokens."""
CANDIDATES = 20
"""Starts and ends tried in each window."""


class QuestionAnswering(Task):
    """A span of the context for each question; none, where training rows without an answer say that this can be."""

    name = "question-answering"
    task_type = "QUESTION_ANS"
    auto_class = "AutoModelForQuestionAnswering"
    roles = Roles(choices=(("question", "context", "answers"),), optional=("id",), label="answers")
    metric = "f1"

    def check(self, row: Row) -> str | None:
        for role in ("question", "context"):
            if not isinstance(row[role], str) or not row[role].strip():
                return f"the {role} is empty"
        row["answers"] = answers = _answers(row["answers"], row["context"])
        if answers is None:
            return "the answer is not in the context"
        return None

    def group(self, row: Row) -> Hashable:
        return bool(row["answers"])

    def learn(self, splits: Splits) -> None:
        if not any(row["answers"] for row in splits.train):
            raise RecipeError("No training row has an answer. Is data.columns.answers the right column?")
        self.kind = "with-unanswerable" if any(not row["answers"] for row in splits.train) else "answerable"

    # -- features --------------------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row], what: str = "") -> list[Feature]:
        if not rows:
            return []
        if not self.tokenizer.is_fast:
            raise RecipeError(
                "question-answering needs a fast tokenizer (one with a tokenizer.json); this model has none."
            )
        # A question may fill half of a window; the rest and the overlap are the context's.
        questions = [" ".join(r["question"].split()[: self.max_length // 4]) for r in rows]
        encoded = self.tokenizer(
            questions, [r["context"] for r in rows], truncation="only_second", max_length=self.max_length,
            stride=min(self.data.stride, self.max_length // 4), return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        features = []
        names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in encoded]
        for i, owner in enumerate(encoded["overflow_to_sample_mapping"]):
            inside = [part == 1 for part in encoded.sequence_ids(i)]
            spans = [tuple(s) if own else None for s, own in zip(encoded["offset_mapping"][i], inside, strict=True)]
            feature: Feature = {n: encoded[n][i] for n in names}
            feature |= {"_row": owner, "_spans": spans}
            answers = rows[owner].get("answers")
            if answers is not None:
                start, end = _positions(spans, answers[0]) if answers else (0, 0)
                feature |= {"start_positions": start, "end_positions": end}
            features.append(feature)
        if what and len(features) > len(rows):
            self.notes.append(f"Long contexts: {len(rows):,} {what} rows are read in {len(features):,} windows.")
        return features

    # -- outputs ---------------------------------------------------------------------------------------------------

    def step(self, model: Any, batch: dict[str, torch.Tensor], features: Sequence[Feature]) -> list[Any]:
        asked = {k: v for k, v in batch.items() if not k.endswith("_positions")}
        output = model(**asked)
        width = batch["input_ids"].shape[1]
        start, end = (t[:, -width:].float().cpu().numpy() for t in (output.start_logits, output.end_logits))
        results = []
        for i, feature in enumerate(features):
            length = len(feature["input_ids"])
            part = slice(width - length, width) if self.tokenizer.padding_side == "left" else slice(0, length)
            results.append((start[i, part], end[i, part]))
        return results

    def score(self, rows: Sequence[Row], features: Sequence[Feature], results: Sequence[Any]) -> dict[str, Any]:
        answers = self.decode(rows, features, results)
        exact = [
            max((float(_plain(a["answer"]) == _plain(t)) for t in _texts(r)), default=0.0)
            for r, a in zip(rows, answers, strict=True)
        ]
        overlap = [
            max((f1(a["answer"], t) for t in _texts(r)), default=0.0) for r, a in zip(rows, answers, strict=True)
        ]
        losses = []
        for feature, (start, end) in zip(features, results, strict=True):
            for logits, at in ((start, feature["start_positions"]), (end, feature["end_positions"])):
                losses.append(float(np.logaddexp.reduce(logits) - logits[at]))
        wrong = [
            {
                "text": f"{rows[i]['question']} ⏐ {rows[i]['context'][:300]}",
                "truth": _texts(rows[i])[0],
                "predicted": answers[i]["answer"],
            }
            for i in np.argsort(overlap, kind="stable")
            if overlap[i] < 1
        ]
        return {
            "loss": float(np.mean(losses)),
            "exact_match": float(np.mean(exact)),
            "f1": float(np.mean(overlap)),
            "details": {"wrong": wrong[:20]},
        }

    def decode(self, rows: Sequence[Row], features: Sequence[Feature], results: Sequence[Any]) -> list[dict[str, Any]]:
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(rows)
        nothing = [np.inf] * len(rows)
        for feature, (start, end) in zip(features, results, strict=True):
            owner = feature["_row"]
            nothing[owner] = min(nothing[owner], float(start[0] + end[0]))
            score, span = _best_span(start, end, feature["_spans"])
            if span is not None and score > best[owner][0]:
                best[owner] = (score, rows[owner]["context"][span[0] : span[1]])
        answers = []
        for row, (score, text), none in zip(rows, best, nothing, strict=True):
            if self.kind == "with-unanswerable" and none > score:
                score, text = none, ""
            answers.append({"question": row["question"], "answer": text, "score": round(float(score), 4)})
        return answers

    def row_from_text(self, text: str) -> Row:
        raise RecipeError(
            'A question needs its context: give a JSON object, for example {"question": "Who?", "context": "It was Ann."}.'
        )


def _answers(value: Any, context: str) -> list[tuple[str, int]] | None:
    """Texts and where they start; an empty list: no answer; ``None``: an answer that is not in the context."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if value in (None, "", [], {}):
        return []
    if isinstance(value, dict):
        texts, starts = value.get("text", []), value.get("answer_start")
        texts = [texts] if isinstance(texts, str) else list(texts)
        starts = [starts] if isinstance(starts, int) else list(starts or [None] * len(texts))
    elif isinstance(value, list) and isinstance(value[0], dict):
        texts, starts = [v["text"] for v in value], [v.get("answer_start") for v in value]
    else:
        texts = [value] if isinstance(value, str) else [str(v) for v in value]
        starts = [None] * len(texts)
    found = []
    for text, start in zip(texts, starts, strict=False):
        if start is None or context[start : start + len(text)] != text:
            start = context.find(text)
        if start >= 0 and text:
            found.append((text, start))
    return found if found or not texts else None


def _positions(spans: Sequence[tuple[int, int] | None], answer: tuple[str, int]) -> tuple[int, int]:
    """First and last token of an answer; 0, 0 where this window does not hold it whole."""
    text, start = answer
    end = start + len(text)
    inside = [i for i, span in enumerate(spans) if span is not None and span[0] < end and span[1] > start]
    if not inside or spans[inside[0]][0] > start or spans[inside[-1]][1] < end:  # type: ignore[index]
        return 0, 0
    return inside[0], inside[-1]


def _best_span(
    start: np.ndarray, end: np.ndarray, spans: Sequence[tuple[int, int] | None]
) -> tuple[float, tuple[int, int] | None]:
    best: tuple[float, tuple[int, int] | None] = (-np.inf, None)
    for i in np.argsort(-start)[:CANDIDATES]:
        for j in np.argsort(-end)[:CANDIDATES]:
            first, last = spans[i], spans[j]
            if first is None or last is None or not i <= j < i + LONGEST_ANSWER:
                continue
            score = float(start[i] + end[j])
            if score > best[0]:
                best = score, (first[0], last[1])
    return best


def _texts(row: Row) -> list[str]:
    return [text for text, _ in row["answers"]] or [""]


def _plain(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces: how SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250) compares."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer: str, truth: str) -> float:
    """Overlap of words as F1, as SQuAD counts it."""
    ours, theirs = _plain(answer).split(), _plain(truth).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))
