"""The commented recipes that ``peft init`` writes, made from the schema so that they cannot go stale."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from .recipe import SECTIONS, TASKS, Recipe

# For each task: a model, data, and the columns with what they hold.
EXAMPLES: dict[str, dict[str, Any]] = {
    "sequence-classification": {
        "model": "packaged:minilm", "train": "packaged:imdb", "columns": {"text": "text", "label": "label"},
        "data": {"train_rows": 2000, "validation_rows": 500, "test_rows": 1000, "max_length": 128},
        "say": "A label for each text. For pairs add text_pair; for several labels a row let the label column hold lists; numbers with "
        "a fraction make it regression.",
    },
    "token-classification": {
        "model": "packaged:minilm", "train": "packaged:ner", "columns": {"tokens": "tokens", "tags": "tags"}, "data": {"max_length": 128},
        "say": "A tag for each word, in IOB2 (B-person I-person O). Files: JSON lines with two lists, or CoNLL lines.",
    },
    "question-answering": {
        "model": "packaged:minilm", "train": "squad", "columns": {"question": "question", "context": "context", "answers": "answers"},
        "data": {"max_length": 384, "stride": 128},
        "say": "A span of the context for each question. answers: text, a list of texts, or SQuAD's text and answer_start.",
    },
    "causal-lm": {
        "model": "packaged:smollm2", "train": "chats.jsonl", "columns": {"prompt": "prompt", "response": "response"},
        "data": {"max_length": 512},
        "say": "Prompts with responses, chats (column messages) or plain text. The loss is on the answers only.",
    },
    "seq2seq": {
        "model": "t5-small", "train": "pairs.tsv", "columns": {"source": "source", "target": "target"},
        "data": {"prefix": "translate English to German: "},
        "say": "A target text for each source text: translation, summarisation.",
    },
}  # fmt: skip


def template(task: str) -> str:
    """A recipe for a task with every key, those at their defaults as comments.

    Args:
        task: Its name.
    """
    example = EXAMPLES[task]
    active: dict[str, dict[str, Any]] = {
        "model": {"name": example["model"]},
        "method": {"name": "lora"},
        "data": {"train": example["train"], "columns": example["columns"], **example["data"]},
        "training": {"epochs": 3.0, "batch_size": 8},
        "generation": {},
    }
    lines = [
        f"# A recipe for {task}: peft train THIS_FILE",
        *(f"# {line}" for line in textwrap.wrap(example["say"], 110)),
        "# Keys behind a # are at their defaults. On the command line: peft train THIS_FILE training.epochs=5",
        "",
        f"task: {task}  # {', '.join(TASKS)}",
        f"out: runs/{task}-{{method}}  # {Recipe.model_fields['out'].description}",
        "seed: 0",
    ]
    for section, cls in SECTIONS.items():
        if section == "generation" and task not in ("causal-lm", "seq2seq"):
            continue
        lines += ["", f"{section}:"] if active[section] else ["", f"# {section}:"]
        for key, field in cls.model_fields.items():
            said = f"  # {field.description}" if field.description else ""
            if key in active[section]:
                lines.append(f"  {key}: {_flow(active[section][key])}{said}")
                continue
            default = field.get_default(call_default_factory=True)
            shown = "null" if default is None or default is PydanticUndefined else _flow(default)
            lines.append(f"#   {key}: {shown}{said}")
        if section == "method":
            lines.append("#   r: 8  # any field of the method's configuration")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
