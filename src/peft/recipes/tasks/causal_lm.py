"""Causal language models: plain text, prompts with responses, chats. Where there are answers, the loss is on these only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..data import Roles
from ..errors import RecipeError
from ..sources import Row
from .base import IGNORED, Feature, Task

ROWS_AT_ONCE = 2**26
"""Logits held at once in evaluation, as a number of floats: a batch is taken in parts where it has more."""


class CausalLM(Task):
    """Language modelling, and instruction tuning where the rows have answers."""

    name = "causal-lm"
    task_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    roles = Roles(choices=(("messages",), ("prompt", "response"), ("text",)), optional=("id",))
    generates = True
    loss_counts_tokens = True
    metric = "loss"
    greater_is_better = False

    def check(self, row: Row) -> str | None:
        if "messages" not in row:
            return super().check(row)
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            return "messages is no list"
        row["messages"] = messages = [_message(m) for m in messages]
        if any(m is None for m in messages):
            return "a message lacks its role or content"
        if not any(m["role"] == "assistant" for m in messages):
            return "no message is the assistant's"
        return None

    def check_input(self, row: Row) -> str | None:
        if "messages" not in row:
            prompt = row.get("prompt")
            return super().check_input({**row, "prompt": _joined(prompt)} if prompt is not None else row)
        messages = [_message(m) for m in row["messages"]] if isinstance(row["messages"], list) else []
        if not messages or any(m is None for m in messages):
            return "its messages are no list of objects with role and content"
        row["messages"] = messages
        return None

    @torch.no_grad()
    def check_model(self, model: Any) -> None:
        """Refuse a model whose tokens see those after them: encoders have this head too, and would learn to copy."""
        ids = (
            torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device)
            % model.get_input_embeddings().num_embeddings
        )
        was_training = model.training
        one, other = model.eval()(input_ids=ids).logits[:, :3]
        model.train(was_training)
        if not torch.allclose(one, other, rtol=1e-2, atol=1e-2):
            raise RecipeError(
                f"The model is a {model.config.model_type} whose tokens see those that follow, so it cannot learn to write. Choose a "
                "decoder, or set model.config.is_decoder to true."
            )

    # -- features --------------------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row], what: str = "") -> list[Feature]:
        features, cut, silent = [], 0, 0
        for row in rows:
            feature, was_cut = self._encode_one(row)
            cut += was_cut
            if all(n == IGNORED for n in feature["labels"]):
                silent += 1
            features.append(feature)
        self.note_cut(cut, len(rows), what)
        if silent and what:
            self.notes.append(
                f"In {silent:,} of {len(rows):,} {what} rows the whole answer lies beyond the cut: raise data.max_length."
            )
        if what == "training" and self.data.packing:
            packed = list(pack(features, self.max_length, self.tokenizer.pad_token_id or 0))
            self.notes.append(
                f"Packing: {len(features):,} training rows fill {len(packed):,} rows of {self.max_length} tokens."
            )
            return packed
        return features

    def _encode_one(self, row: Row) -> tuple[Feature, bool]:
        text, answers = self._text(row)
        tokens = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not self._templated(row))
        ids, offsets = list(tokens["input_ids"]), tokens["offset_mapping"]
        labels = [
            i if answers is None or any(start <= a < end or (a == b == end) for start, end in answers) else IGNORED
            for i, (a, b) in zip(ids, offsets, strict=True)
        ]
        end = self.tokenizer.eos_token_id
        if end is not None and not self._templated(row):
            ids.append(end)
            labels.append(end)
        was_cut = len(ids) > self.max_length
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}, was_cut

    def _templated(self, row: Row) -> bool:
        has_template = getattr(self.tokenizer, "chat_template", None) is not None
        return "messages" in row or ("prompt" in row and has_template and self.data.prompt_template is None)

    def _messages(self, row: Row) -> list[dict[str, str]]:
        if "messages" in row:
            return row["messages"]
        messages = [{"role": "user", "content": _joined(row["prompt"])}]
        return messages + ([{"role": "assistant", "content": str(row["response"])}] if row.get("response") else [])

    def _text(self, row: Row) -> tuple[str, list[tuple[int, int]] | None]:
        """A row's text and where its answers stand in it; ``None``: everything counts."""
        if not self._templated(row):
            if "prompt" not in row:
                return row["text"], None
            start = self._prompt(row)
            text = start + str(row["response"])
            return text, [(len(start), len(text))]
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise RecipeError(
                "The rows are chats, but the model's tokenizer has no chat template. Use prompt and response columns."
            )
        messages = self._messages(row)
        text = self._render(messages)
        answers = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._render(messages[:i], open_answer=True), self._render(messages[: i + 1])
            if not (text.startswith(before) and text.startswith(after)):
                raise RecipeError(
                    "The chat template changes earlier turns when later ones are added, so that answers cannot be found in the text. "
                    "Use prompt and response columns with data.prompt_template."
                )
            answers.append((len(before), len(after)))
        return text, answers

    def _render(self, messages: list[dict[str, str]], open_answer: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)

    def _prompt(self, row: Row) -> str:
        return (self.data.prompt_template or "{prompt}\n\n").replace("{prompt}", _joined(row["prompt"]))

    # -- outputs ---------------------------------------------------------------------------------------------------

    def step(self, model: Any, batch: dict[str, torch.Tensor], features: Sequence[Feature]) -> list[Any]:
        rows, width = batch["input_ids"].shape
        vocabulary = model.config.get_text_config().vocab_size
        at_once = max(1, ROWS_AT_ONCE // (width * vocabulary))
        results = []
        for start in range(0, rows, at_once):
            part = {k: v[start : start + at_once] for k, v in batch.items()}
            labels = part.pop("labels")[:, 1:].cpu()
            # Methods with virtual tokens give outputs for those too.
            logits = model(**part).logits[:, -width:-1].float().cpu()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
            counted = labels != IGNORED
            right = (logits.argmax(-1) == labels) & counted
            sums = losses.view_as(labels).sum(-1).tolist()
            results += list(zip(sums, counted.sum(-1).tolist(), right.sum(-1).tolist(), strict=True))
        return results

    def score(self, rows: Sequence[Row], features: Sequence[Feature], results: Sequence[Any]) -> dict[str, Any]:
        total, count, right = (sum(r[i] for r in results) for i in range(3))
        if not count:
            raise RecipeError(
                "No token of these rows counts for the loss: their answers lie beyond the cut. Raise data.max_length."
            )
        loss = total / count
        hardest = sorted(range(len(rows)), key=lambda i: -results[i][0] / max(1, results[i][1]))[:10]
        wrong = [
            {
                "text": self._text(rows[i])[0][:400],
                "truth": "",
                "predicted": f"loss {results[i][0] / max(1, results[i][1]):.2f}",
            }
            for i in hardest
        ]
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 50)),
            "token_accuracy": right / count,
            "tokens": count,
            "details": {"wrong": wrong, "wrong_title": "Rows with the highest loss"},
        }

    def row_from_text(self, text: str) -> Row:
        return {"prompt": text}

    def generate(self, model: Any, rows: Sequence[Row], batch_size: int, **options: Any) -> Iterator[dict[str, Any]]:
        """Generated answers.

        Args:
            model: The model.
            rows: With a prompt, messages or a text to go on from.
            batch_size: Prompts at once.
            **options: For transformers' ``generate``.
        """
        side, self.tokenizer.padding_side = self.tokenizer.padding_side, "left"
        try:
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                texts = [self._opening(row) for row in part]
                templated = self._templated(part[0])
                inputs = self.tokenizer(
                    texts,
                    return_tensors="pt",
                    padding=True,
                    truncation=True,
                    max_length=self.max_length,
                    add_special_tokens=not templated,
                ).to(model.device)
                inputs.pop("token_type_ids", None)
                ids = model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **options)
                width = inputs["input_ids"].shape[1]
                answers = self.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
                for row, answer in zip(part, answers, strict=True):
                    yield {**_asked(row), "generated": answer.strip()}
        finally:
            self.tokenizer.padding_side = side

    def _opening(self, row: Row) -> str:
        """The text that an answer follows."""
        if self._templated(row):
            messages = self._messages({k: v for k, v in row.items() if k != "response"})
            if messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            return self._render(messages, open_answer=True)
        return self._prompt(row) if "prompt" in row else row["text"]


def _message(message: Any) -> dict[str, str] | None:
    """A message in the common form; ``from``/``value`` is another that is met."""
    if not isinstance(message, dict):
        return None
    role = message.get("role") or {"human": "user", "gpt": "assistant"}.get(
        message.get("from", ""), message.get("from")
    )
    content = message.get("content", message.get("value"))
    return {"role": role, "content": content} if role and isinstance(content, str) else None


def _joined(prompt: Any) -> str:
    """A prompt of several columns (instruction and input) is joined by empty lines."""
    return "\n\n".join(str(p) for p in prompt.values() if p) if isinstance(prompt, dict) else str(prompt)


def _asked(row: Row) -> dict[str, Any]:
    return {k: _joined(v) if k == "prompt" else v for k, v in row.items() if k in ("prompt", "messages", "text", "id")}


def pack(features: Sequence[Feature], length: int, pad: int) -> Iterator[Feature]:
    """Fill rows of one length with several texts each. Positions start anew with each text, and without an attention mask
    transformers then keeps the texts apart.

    Args:
        features: Token ids and labels, none longer than ``length``.
        length: Of the rows.
        pad: Token that fills what is left of a row; it is a text of its own.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []

    def row() -> Feature:
        left = length - len(ids)
        return {
            "input_ids": ids + [pad] * left, "labels": labels + [IGNORED] * left, "position_ids": positions + list(range(left))
        }  # fmt: skip

    for feature in features:
        if len(ids) + len(feature["input_ids"]) > length:
            yield row()
            ids, labels, positions = [], [], []
        # A text's first token is no answer to the text before it.
        ids = ids + feature["input_ids"]
        labels = [*labels, IGNORED, *feature["labels"][1:]]
        positions = positions + list(range(len(feature["input_ids"])))
    if ids:
        yield row()
