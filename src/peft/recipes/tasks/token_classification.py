"""A tag for each word: named entities, parts of speech."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from ...core.errors import did_you_mean, shorten
from ..data import Roles, Splits
from ..errors import RecipeError, need
from ..sources import Row
from .base import IGNORED, Feature, Task, mean_loss


class TokenClassification(Task):
    """A tag for each word; a word's tag is read at its first sub-word."""

    name = "token-classification"
    task_type = "TOKEN_CLS"
    auto_class = "AutoModelForTokenClassification"
    roles = Roles(choices=(("tokens", "tags"),), optional=("id",), label="tags")
    metric = "f1"

    def check(self, row: Row) -> str | None:
        for role in ("tokens", "tags"):
            if isinstance(row[role], str):
                row[role] = _listed(row[role])
            if not isinstance(row[role], list) or not row[role]:
                return f"{role} is no list"
        if len(row["tokens"]) != len(row["tags"]):
            return f"{len(row['tokens'])} tokens, {len(row['tags'])} tags"
        return None

    def check_input(self, row: Row) -> str | None:
        if isinstance(row.get("tokens"), str):
            row["tokens"] = _listed(row["tokens"])
        if not isinstance(row.get("tokens"), list) or not row["tokens"]:
            return "it has no tokens"
        return None

    def check_labels(self, split: str, rows: Sequence[Row]) -> None:
        unknown = {str(t) for row in rows for t in row["tags"] if self._number(t) is None}
        if unknown:
            raise RecipeError(
                f"{split} rows have tags that are not among the labels: {shorten(sorted(unknown))}"
                f"{did_you_mean(sorted(unknown)[0], self.labels)}. Mend them, or name all labels: data.labels=[…].",
                f"data.{split}",
            )

    def group(self, row: Row) -> Hashable:
        kinds = {str(tag).rpartition("-")[2] for tag in row["tags"] if str(tag) not in ("O", "0")}
        return bool(kinds)

    def learn(self, splits: Splits) -> None:
        found = {str(tag) for row in splits.pool for tag in row["tags"]}
        if splits.label_names:
            self.labels = [str(n) for n in splits.label_names]
        else:
            entities = {tag[2:] for tag in found if tag[:2] in ("B-", "I-")}
            found |= {f"{p}-{e}" for e in entities for p in "BI"}  # the rarer half of a pair may be missing by chance
            numbers = all(tag.isdigit() for tag in found)
            self.labels = sorted(found, key=int if numbers else lambda tag: (tag != "O", tag[2:], tag))
        if not self._entities:
            self.metric = "accuracy"
        for split in ("train", "validation", "test"):
            self.check_labels(split, getattr(splits, split))
        seen = {self._number(tag) for row in splits.train for tag in row["tags"]}
        if never := [name for i, name in enumerate(self.labels) if i not in seen and name[:2] != "I-"]:
            self.notes.append(f"No training row has the tag {shorten(never)}.")
        if len(self.labels) < 2:
            raise RecipeError(
                f"All words of the training rows have the tag {self.labels[0]!r}; at least two tags are needed."
            )

    @property
    def _entities(self) -> bool:
        return any(label[:2] in ("B-", "I-") for label in self.labels)

    def _number(self, tag: Any) -> int | None:
        name = str(tag)
        if name in self.labels:
            return self.labels.index(name)
        return int(name) if name.isdigit() and int(name) < len(self.labels) else None

    def encode(self, rows: Sequence[Row], what: str = "") -> list[Feature]:
        if not rows:
            return []
        if not self.tokenizer.is_fast:
            raise RecipeError(
                "token-classification needs a fast tokenizer (one with a tokenizer.json); this model has none."
            )
        encoded = self.tokenizer(
            [[str(t) for t in r["tokens"]] for r in rows],
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
        )
        features, cut = [], 0
        for i, row in enumerate(rows):
            feature = {k: encoded[k][i] for k in encoded}
            words, last = encoded.word_ids(i), None
            labels, first = [], []
            for position, word in enumerate(words):
                is_first = word is not None and word != last
                if is_first:
                    first.append(position)
                tag = self._number(row["tags"][word]) if is_first and "tags" in row else None
                labels.append(IGNORED if tag is None else tag)
                last = word
            cut += len(first) < len(row["tokens"])
            feature["_first"] = first
            if "tags" in row:
                feature["labels"] = labels
            features.append(feature)
        self.note_cut(cut, len(rows), what)
        return features

    def step(self, model: Any, batch: dict[str, torch.Tensor], features: Sequence[Feature]) -> list[Any]:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float().cpu()
        width = batch["input_ids"].shape[1]
        logits = logits[:, -width:]  # methods with virtual tokens give outputs for those too
        left = self.tokenizer.padding_side == "left"
        results = []
        for row, feature in zip(logits, features, strict=True):
            shift = width - len(feature["input_ids"]) if left else 0
            results.append(row[[p + shift for p in feature["_first"]]].numpy())
        return results

    def score(self, rows: Sequence[Row], features: Sequence[Feature], results: Sequence[Any]) -> dict[str, Any]:
        truth_ids = [[n for n in f["labels"] if n != IGNORED] for f in features]
        flat = np.concatenate(results)
        answers = np.concatenate([np.array(t) for t in truth_ids])
        found: dict[str, Any] = {
            "loss": mean_loss(torch.tensor(flat), torch.tensor(answers)),
            "accuracy": float((flat.argmax(-1) == answers).mean()),
        }
        truth = [[self.labels[n] for n in ids] for ids in truth_ids]
        guess = [[self.labels[n] for n in r.argmax(-1)] for r in results]
        # Words beyond the cut count as found outside any entity: they are part of the task.
        for row, t, g in zip(rows, truth, guess, strict=True):
            rest = [self.labels[self._number(tag) or 0] for tag in row["tags"][len(t) :]]
            t.extend(rest)
            g.extend(["O" if "O" in self.labels else self.labels[0]] * len(rest))
        wrong = [
            {
                "text": " ".join(map(str, row["tokens"]))[:400],
                "truth": _shown(row["tokens"], t),
                "predicted": _shown(row["tokens"], g),
            }
            for row, t, g in zip(rows, truth, guess, strict=True)
            if t != g
        ]
        found["details"] = {"wrong": wrong[:20]}
        if self._entities:
            found.update(_entity_scores(truth, guess, found["details"]))
        return found

    def decode(self, rows: Sequence[Row], features: Sequence[Feature], results: Sequence[Any]) -> list[dict[str, Any]]:
        answers = []
        for row, logits in zip(rows, results, strict=True):
            tags = [self.labels[n] for n in logits.argmax(-1)]
            text = row.get("text") or " ".join(map(str, row["tokens"]))
            if self._entities:
                answers.append({"text": text, "entities": spans(row["tokens"], tags)})
            else:
                answers.append({"text": text, "tags": [[w, t] for w, t in zip(row["tokens"], tags, strict=False)]})
        return answers

    def row_from_text(self, text: str) -> Row:
        return {"text": text, "tokens": re.findall(r"[@#]?\w+(?:[-'’.]\w+)*|[^\w\s]", text) or [text]}


def _listed(text: str) -> list[Any]:
    if text.startswith("["):
        try:
            return json.loads(text.replace("'", '"'))
        except json.JSONDecodeError:
            pass
    return text.split()


def spans(tokens: Sequence[Any], tags: Sequence[str]) -> list[dict[str, Any]]:
    """Entities from tags: type, text, and the first and last word. An entity may begin with I-, as the commonest reading has it."""
    found: list[dict[str, Any]] = []
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix == "I" and found and found[-1]["end"] == i - 1 and found[-1]["type"] == kind:
            found[-1]["end"] = i
        elif prefix in ("B", "I"):
            found.append({"type": kind, "start": i, "end": i})
    for entity in found:
        entity["text"] = " ".join(map(str, tokens[entity["start"] : entity["end"] + 1]))
    return found


def _shown(tokens: Sequence[Any], tags: Sequence[str]) -> str:
    return ", ".join(f"{e['text']} ({e['type']})" for e in spans(tokens, tags)) or "–"


def _entity_scores(truth: list[list[str]], guess: list[list[str]], details: dict[str, Any]) -> dict[str, float]:
    need("seqeval", "The F1 of entities")
    import warnings

    from seqeval.metrics import classification_report

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of entities that are never predicted; the table shows them
        report = classification_report(truth, guess, output_dict=True, zero_division=0)
    columns = {"precision": "precision", "recall": "recall", "f1": "f1-score"}
    details["table"] = [
        {"label": name, **{ours: float(v[theirs]) for ours, theirs in columns.items()}, "rows": int(v["support"])}
        for name, v in report.items()
        if name not in ("micro avg", "macro avg", "weighted avg")
    ]
    micro = report.get("micro avg", {"precision": 0.0, "recall": 0.0, "f1-score": 0.0})
    return {ours: float(micro[theirs]) for ours, theirs in columns.items()}
