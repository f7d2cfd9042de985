"""Learning rates where a recipe gives none: a table by method and task. ``python -m peft.recipes.rates`` prints it for docs/recipes.md.

To change a rate: change its cell here, say in ``SOURCES`` where it is from, and put the printed table into the docs; a test compares them.
``peft compare RECIPE --methods … --search`` measures a third, one and three times each rate on your data.
"""

from __future__ import annotations

COLUMNS = ("sequence-classification", "token-classification", "question-answering", "causal-lm", "seq2seq")

RATES: dict[str, tuple[float, float, float, float, float]] = {
    "full": (3e-5, 1e-4, 5e-5, 2e-5, 2e-5),
    "head": (3e-2, 3e-2, 1e-2, 1e-3, 1e-3),
    "lora": (1e-3, 3e-3, 1e-3, 2e-4, 2e-4),
    "rslora": (5e-4, 1e-3, 5e-4, 1e-4, 1e-4),
    "dora": (1e-3, 1e-3, 1e-3, 2e-4, 2e-4),
    "ia3": (1e-2, 3e-2, 1e-2, 3e-3, 3e-3),
    "loha": (3e-3, 1e-2, 3e-3, 2e-4, 2e-4),
    "lokr": (3e-3, 1e-2, 3e-3, 2e-4, 2e-4),
    "bottleneck": (1e-3, 1e-3, 1e-3, 3e-4, 3e-4),
    "prefix-tuning": (3e-2, 3e-2, 3e-2, 1e-2, 1e-2),
    "p-tuning-v2": (3e-2, 3e-2, 3e-2, 1e-2, 1e-2),
    "prompt-tuning": (3e-2, 3e-2, 3e-2, 3e-2, 3e-2),
    "p-tuning": (3e-3, 3e-3, 3e-3, 1e-3, 1e-3),
}
OTHER = (1e-3, 1e-3, 1e-3, 2e-4, 2e-4)
"""For methods that are not in the table."""

MEASURED: dict[str, tuple[str, ...]] = dict.fromkeys(
    (
        "full", "head", "lora", "dora", "ia3", "loha", "lokr", "bottleneck", "prefix-tuning", "prompt-tuning",
        "p-tuning",
    ),
    ("sequence-classification", "token-classification"),
)  # fmt: skip
"""Tasks whose rate was chosen by ``benchmarks/study.py``, among three or four, on MiniLM: IMDB and Rotten Tomatoes, and entities."""

# Where the other cells of a row are from.
SOURCES: dict[str, str] = {
    "full": "the range of [Devlin et al. 2018](https://arxiv.org/abs/1810.04805)",
    "head": "a guess",
    "lora": "GPT-2 in [Hu et al. 2021](https://arxiv.org/abs/2106.09685) for text",
    "rslora": "half of LoRA's or less: its scale is larger; a guess",
    "dora": "as LoRA",
    "ia3": "[Liu et al. 2022](https://arxiv.org/abs/2205.05638), there with Adafactor",
    "loha": "a guess",
    "lokr": "a guess",
    "bottleneck": "within the range of [Houlsby et al. 2019](https://arxiv.org/abs/1902.00751)",
    "prefix-tuning": "a guess",
    "p-tuning-v2": "as prefix tuning, with which it coincides",
    "prompt-tuning": "a guess; [Lester et al. 2021](https://arxiv.org/abs/2104.08691) took 0.3 with Adafactor",
    "p-tuning": "a guess",
}


def learning_rate(method: str, task: str) -> float:
    """The learning rate that a method gets for a task where the recipe gives none."""
    return RATES.get(method.lower().replace("_", "-"), OTHER)[COLUMNS.index(task)]


def markdown() -> str:
    """The table for the docs: measured rates are bold."""
    lines = [f"| method | {' | '.join(COLUMNS)} | the others are from |", "|---|" + "---:|" * len(COLUMNS) + "---|"]
    for method, rates in RATES.items():
        cells = [
            f"**{r:.0e}**" if t in MEASURED.get(method, ()) else f"{r:.0e}" for t, r in zip(COLUMNS, rates, strict=True)
        ]
        lines.append(f"| {method} | {' | '.join(c.replace('e-0', 'e-') for c in cells)} | {SOURCES[method]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
