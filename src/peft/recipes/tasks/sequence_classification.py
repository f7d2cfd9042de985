"""Classes, several labels or a number for a text or a pair of texts."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from ...core.errors import did_you_mean, shorten
from ..data import Roles, Splits
from ..errors import RecipeError
from ..sources import Row
from .base import Feature, Task, mean_loss


class SequenceClassification(Task):
    """A label, a set of labels or a number for each text."""

    name = "sequence-classification"
    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    roles = Roles(choices=(("text", "label"),), optional=("text_pair", "id"), label="label")
    metric = "accuracy"

    # -- rows ------------------------------------------------------------------------------------------------------

    def check(self, row: Row) -> str | None:
        if not isinstance(row["text"], str) or not row["text"].strip():
            return "the text is empty"
        label = row.get("label")
        if label is None or label == "" or (isinstance(label, float) and math.isnan(label)):
            return "the label is missing"
        if label == -1:
            return "the label is -1, as in a test split without labels"
        return None

    def group(self, row: Row) -> Hashable:
        label = row["label"]
        if isinstance(label, dict):
            return tuple(_truth(v) for v in label.values())
        if self.data.kind == "regression" or isinstance(label, float):
            return None
        return tuple(label) if isinstance(label, list) else str(label)

    def learn(self, splits: Splits) -> None:
        self.kind = self.data.kind if self.data.kind != "auto" else _guess_kind([r["label"] for r in splits.train])
        if self.kind == "regression":
            self.labels, self.metric = [], "pearson"
            self.check_labels("all", [*splits.train, *splits.validation, *splits.test])
            return
        if self.kind == "multi-label":
            self.metric = "f1_micro"
        self.labels = [str(n) for n in splits.label_names] if splits.label_names else self._found(splits.pool)
        for split in ("train", "validation", "test"):
            self.check_labels(split, getattr(splits, split))
        if len(self.labels) < 2 and self.kind == "single":
            raise RecipeError(
                f"All {len(splits.train):,} training rows have the label {self.labels[0]!r}; a classifier needs at least two. "
                "Is data.columns.label the right column?"
            )

    def _found(self, rows: Sequence[Row]) -> list[str]:
        found: dict[str, None] = {}
        for row in rows:
            found.update(dict.fromkeys(self._names(row["label"])))
        if all(name.lstrip("-").isdigit() for name in found):
            return sorted(found, key=int)
        return sorted(found)

    def _names(self, label: Any) -> list[str]:
        """A row's labels as written there."""
        if self.kind != "multi-label":
            return [str(label)]
        if isinstance(label, dict):
            return [name for name, value in label.items() if _truth(value)]
        if isinstance(label, str):
            label = (
                json.loads(label) if label.startswith("[") else [p.strip() for p in label.replace(";", ",").split(",")]
            )
        return [str(part) for part in label if str(part)]

    def _numbers(self, label: Any) -> list[int]:
        """A row's labels as numbers. A whole number in the data is an index where the labels have other names."""
        numbers = []
        for name in self._names(label):
            if name in self.labels:
                numbers.append(self.labels.index(name))
            elif name.isdigit() and int(name) < len(self.labels):
                numbers.append(int(name))
            else:
                raise KeyError(name)
        return numbers

    def check_labels(self, split: str, rows: Sequence[Row]) -> None:
        if self.kind == "regression":
            for row in rows:
                _as_number(row["label"])
            return
        unknown: dict[str, int] = {}
        seen: set[int] = set()
        for row in rows:
            try:
                seen.update(self._numbers(row["label"]))
            except KeyError as error:
                unknown[error.args[0]] = unknown.get(error.args[0], 0) + 1
        if unknown:
            name = next(iter(unknown))
            raise RecipeError(
                f"{sum(unknown.values()):,} {split} rows have labels that are not among {shorten(self.labels)}: {shorten(unknown)}"
                f"{did_you_mean(name, self.labels)}. Mend the rows, or name all labels: data.labels=[…]."
            )
        if (
            split == "train"
            and self.kind == "single"
            and (never := [n for i, n in enumerate(self.labels) if i not in seen])
        ):
            if len(seen) < 2:
                raise RecipeError(
                    f"All training rows have one label; none has {shorten(never)}. Is data.columns.label right?"
                )
            self.notes.append(f"No training row has the label {shorten(never)}.")

    def model_options(self) -> dict[str, Any]:
        if self.kind == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        problem = "multi_label_classification" if self.kind == "multi-label" else "single_label_classification"
        return {**super().model_options(), "problem_type": problem}

    # -- features and outputs --------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row], what: str = "") -> list[Feature]:
        if not rows:
            return []
        pairs = [str(r["text_pair"]) for r in rows] if all(r.get("text_pair") is not None for r in rows) else None
        encoded = self.tokenizer([r["text"] for r in rows], pairs, truncation=True, max_length=self.max_length)
        features = [{k: encoded[k][i] for k in encoded} for i in range(len(rows))]
        if encoded.encodings is not None:
            self.note_cut(sum(bool(e.overflowing) for e in encoded.encodings), len(rows), what)
        for feature, row in zip(features, rows, strict=True):
            if row.get("label") is not None:
                feature["targets"] = self._target(row["label"])
        return features

    def _target(self, label: Any) -> Any:
        if self.kind == "regression":
            return _as_number(label)
        numbers = self._numbers(label)
        if self.kind == "single":
            return numbers[0]
        return [float(i in numbers) for i in range(len(self.labels))]

    def step(self, model: Any, batch: dict[str, torch.Tensor], features: Sequence[Feature]) -> list[Any]:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return list(logits.float().cpu().numpy())

    def score(self, rows: Sequence[Row], features: Sequence[Feature], results: Sequence[Any]) -> dict[str, Any]:
        from sklearn import metrics

        logits = np.stack(results)
        truth = np.array([f["targets"] for f in features])
        if self.kind == "regression":
            return _regression(truth, logits[:, 0])
        answers = self.decode(rows, features, results)
        if self.kind == "multi-label":
            guess = logits > 0
            wrong = [i for i in range(len(rows)) if not np.array_equal(guess[i], truth[i] > 0.5)]
            return {
                "loss": torch.nn.functional.binary_cross_entropy_with_logits(
                    torch.tensor(logits), torch.tensor(truth).float()
                ).item(),
                "f1_micro": metrics.f1_score(truth, guess, average="micro", zero_division=0),
                "f1_macro": metrics.f1_score(truth, guess, average="macro", zero_division=0),
                "exact_match": 1 - len(wrong) / len(rows),
                "details": {"wrong": [_wrong(rows[i], self._names(rows[i]["label"]), answers[i]) for i in wrong[:20]]},
            }
        guess = logits.argmax(-1)
        numbers = list(range(len(self.labels)))
        wrong = sorted(np.flatnonzero(guess != truth), key=lambda i: -answers[i]["score"])
        return {
            "loss": mean_loss(torch.tensor(logits), torch.tensor(truth)),
            "accuracy": float((guess == truth).mean()),
            "f1_macro": metrics.f1_score(truth, guess, labels=numbers, average="macro", zero_division=0),
            "mcc": metrics.matthews_corrcoef(truth, guess),
            "details": {
                "labels": self.labels,
                "confusion": metrics.confusion_matrix(truth, guess, labels=numbers).tolist(),
                "table": _table(metrics.classification_report(
                    truth, guess, labels=numbers, target_names=self.labels, output_dict=True, zero_division=0
                )),
                "wrong": [_wrong(rows[i], self.labels[truth[i]], answers[i]) for i in wrong[:20]],
            },
        }  # fmt: skip

    def decode(self, rows: Sequence[Row], features: Sequence[Feature], results: Sequence[Any]) -> list[dict[str, Any]]:
        answers = []
        for row, logits in zip(rows, results, strict=True):
            answer = {"text": row["text"]} | (
                {"text_pair": row["text_pair"]} if row.get("text_pair") is not None else {}
            )
            if self.kind == "regression":
                answers.append({**answer, "value": round(float(logits[0]), 5)})
                continue
            tensor = torch.tensor(logits)
            shares = (tensor.sigmoid() if self.kind == "multi-label" else tensor.softmax(-1)).tolist()
            scores = {name: round(share, 5) for name, share in zip(self.labels, shares, strict=True)}
            if self.kind == "multi-label":
                answers.append(
                    {
                        **answer,
                        "labels": [n for n, s in zip(self.labels, shares, strict=True) if s > 0.5],
                        "scores": scores,
                    }
                )
            else:
                best = max(range(len(shares)), key=shares.__getitem__)
                answers.append(
                    {**answer, "label": self.labels[best], "score": round(shares[best], 5), "scores": scores}
                )
        return answers


def _guess_kind(labels: Sequence[Any]) -> str:
    if all(isinstance(label, (list, dict)) for label in labels):
        return "multi-label"
    try:
        numbers = [float(label) for label in labels]
    except (TypeError, ValueError):
        return "single"
    return "regression" if any(n != int(n) for n in numbers) else "single"


def _as_number(label: Any) -> float:
    try:
        return float(label)
    except (TypeError, ValueError):
        raise RecipeError(f"Regression needs numbers as labels, found {label!r}. Is data.kind right?") from None


def _truth(value: Any) -> bool:
    return str(value).strip().lower() in ("1", "1.0", "true", "yes")


def _regression(truth: np.ndarray, guess: np.ndarray) -> dict[str, Any]:
    from scipy import stats

    varied = len(truth) > 1 and truth.std() > 0 and guess.std() > 0
    return {
        "loss": float(((truth - guess) ** 2).mean()),
        "mae": float(np.abs(truth - guess).mean()),
        "pearson": float(stats.pearsonr(truth, guess).statistic) if varied else 0.0,
        "spearman": float(stats.spearmanr(truth, guess).statistic) if varied else 0.0,
        "details": {"scatter": [[float(a), float(b)] for a, b in zip(truth[:500], guess[:500], strict=True)]},
    }


def _wrong(row: Row, truth: Any, answer: dict[str, Any]) -> dict[str, Any]:
    text = f"{row['text']} ⏐ {row['text_pair']}" if row.get("text_pair") is not None else row["text"]
    return {
        "text": text[:400],
        "truth": truth,
        "predicted": answer.get("label", answer.get("labels")),
        "score": answer.get("score"),
    }


def _table(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each label: precision, recall, F1, rows."""
    return [
        {
            "label": name,
            "precision": v["precision"],
            "recall": v["recall"],
            "f1": v["f1-score"],
            "rows": int(v["support"]),
        }
        for name, v in report.items()
        if isinstance(v, dict) and name not in ("macro avg", "weighted avg", "micro avg")
    ]
