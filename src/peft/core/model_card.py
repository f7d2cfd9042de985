"""The model card that is written beside an adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def model_card(path: str, configs: Mapping[str, Any], base: Any) -> str:
    """Text of a ``README.md`` for a folder of adapters.

    Args:
        path: Where it goes; a card that is there keeps its text.
        configs: Configuration of each adapter by name.
        base: The base model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from .. import __version__

    if os.path.isfile(path):
        card = ModelCard.load(path)
    else:
        card = ModelCard.from_template(ModelCardData(), template_str=_body(configs, base))
    config = next(iter(configs.values()))
    name = config.base_model_name_or_path
    card.data["library_name"] = "peft"
    # A folder on this machine says nothing to others, and the Hub refuses it.
    if name and not os.path.exists(name):
        card.data["base_model"] = name
    methods = sorted({str(getattr(c.peft_type, "value", c.peft_type)).lower() for c in configs.values()})
    known = list(card.data.get("tags") or [])
    tags = [*methods, "transformers"] if hasattr(base, "config") else methods
    if name and not os.path.exists(name):
        tags = [f"base_model:adapter:{name}", *tags]
    card.data["tags"] = sorted(set(known) | set(tags))
    versions = f"### Framework versions\n\n- PEFT {__version__}"
    if "### Framework versions" not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{versions}\n"
    return str(card)


def _body(configs: Mapping[str, Any], base: Any) -> str:
    lines = ["---", "{{ card_data }}", "---", "", "# Adapter", ""]
    lines.append(f"Adapters for a `{type(base).__name__}`, to be loaded with `peft`:")
    lines.append("")
    for name, config in configs.items():
        method = str(getattr(config.peft_type, "value", config.peft_type))
        task = f", task {getattr(config.task_type, 'value', config.task_type)}" if config.task_type else ""
        lines.append(f"- `{name}`: {method}{task}")
    lines += [
        "",
        "```python",
        "from peft import PeftModel",
        "",
        "model = PeftModel.from_pretrained(base_model, folder)",
        "```",
        "",
    ]
    return "\n".join(lines)
