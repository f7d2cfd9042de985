"""From text to text: translation and summarisation, measured by sacreBLEU, chrF and ROUGE."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..data import Roles
from ..errors import need
from ..sources import Row
from .base import IGNORED, Feature, Task


class Seq2Seq(Task):
    """A target text for a source text."""

    name = "seq2seq"
    task_type = "SEQ_2_SEQ_LM"
    auto_class = "AutoModelForSeq2SeqLM"
    roles = Roles(choices=(("source", "target"),), optional=("id",))
    generates = True
    metric = "chrf"

    def encode(self, rows: Sequence[Row], what: str = "") -> list[Feature]:
        if not rows:
            return []
        encoded = self.tokenizer(
            [self.data.prefix + r["source"] for r in rows], truncation=True, max_length=self.max_length
        )
        features = [{k: encoded[k][i] for k in ("input_ids", "attention_mask")} for i in range(len(rows))]
        self.note_cut(sum(bool(e.overflowing) for e in encoded.encodings or ()), len(rows), what)
        if all(r.get("target") for r in rows):
            targets = self.tokenizer(
                text_target=[r["target"] for r in rows], truncation=True, max_length=self.data.max_target_length
            )["input_ids"]
            for feature, target in zip(features, targets, strict=True):
                feature["labels"] = target
        return features

    def step(self, model: Any, batch: dict[str, torch.Tensor], features: Sequence[Feature]) -> list[Any]:
        labels = batch["labels"]
        logits = model(**batch).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        sums = losses.view_as(labels).sum(-1).tolist()
        counts = (labels != IGNORED).sum(-1).tolist()
        texts = self._generate(
            model, batch, max_new_tokens=self.data.max_target_length, num_beams=self.generation.num_beams
        )
        return list(zip(sums, counts, texts, strict=True))

    def _generate(self, model: Any, batch: dict[str, torch.Tensor], **options: Any) -> list[str]:
        ids = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
        return [t.strip() for t in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def score(self, rows: Sequence[Row], features: Sequence[Feature], results: Sequence[Any]) -> dict[str, Any]:
        need("sacrebleu", "BLEU and chrF")
        import sacrebleu

        texts = [r[2] for r in results]
        targets = [r["target"] for r in rows]
        overlap = [rouge(text, target) for text, target in zip(texts, targets, strict=True)]
        worst = sorted(range(len(rows)), key=lambda i: overlap[i]["rougeL"])[:10]
        return {
            "loss": sum(r[0] for r in results) / max(1, sum(r[1] for r in results)),
            "bleu": sacrebleu.corpus_bleu(texts, [targets]).score,
            "chrf": sacrebleu.corpus_chrf(texts, [targets]).score,
            **{name: sum(o[name] for o in overlap) / len(overlap) for name in ("rouge1", "rouge2", "rougeL")},
            "details": {
                "wrong": [{"text": rows[i]["source"][:400], "truth": targets[i], "predicted": texts[i]} for i in worst]
            },
        }

    def row_from_text(self, text: str) -> Row:
        return {"source": text}

    def generate(self, model: Any, rows: Sequence[Row], batch_size: int, **options: Any) -> Iterator[dict[str, Any]]:
        """Generated targets.

        Args:
            model: The model.
            rows: With a source.
            batch_size: Sources at once.
            **options: For transformers' ``generate``.
        """
        for start in range(0, len(rows), batch_size):
            part = [{k: v for k, v in row.items() if k != "target"} for row in rows[start : start + batch_size]]
            batch = {k: v.to(model.device) for k, v in self.collate(self.encode(part)).items()}
            for row, text in zip(part, self._generate(model, batch, **options), strict=True):
                yield {"source": row["source"], "generated": text}


def rouge(text: str, target: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L as F1 (Lin 2004), on lower-case words and numbers, without stemming."""
    a, b = (re.findall(r"\w+", t.lower()) for t in (text, target))
    scores = {}
    for n in (1, 2):
        ours, theirs = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (a, b))
        scores[f"rouge{n}"] = _f1(sum((ours & theirs).values()), sum(ours.values()), sum(theirs.values()))
    row = [0] * (len(b) + 1)
    for word in a:  # longest common subsequence, one row of the table at a time
        before, row = row, [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(row[-1], before[j + 1]))
    scores["rougeL"] = _f1(row[-1], len(a), len(b))
    return scores


def _f1(common: int, found: int, wanted: int) -> float:
    return 2 * common / (found + wanted) if common else 0.0
