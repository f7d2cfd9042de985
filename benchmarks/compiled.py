"""A training step under `torch.compile` next to the same step without it.

    python -m benchmarks.compiled "LoRA r8 all-linear" --only BERT

Both share one model and take turns. A ratio below 1: compiling pays.
"""

from __future__ import annotations

import copy
import statistics
import sys

import torch

from benchmarks.asked import asked
from benchmarks.methods import FROZEN, Shape
from benchmarks.worker import Subject

WARM = 3


def ratios(shape: Shape, name: str, pairs: int) -> tuple[list[float], list[float]]:
    """Pairs of steps of a method, or of the frozen model: compiled over eager, and the seconds of the compiled ones."""
    torch._dynamo.reset()
    eager = Subject.build(shape, name)
    compiled = copy.copy(eager)
    compiled.model = torch.compile(eager.model)
    for _ in range(WARM):
        eager.step(), compiled.step()
    found = [(compiled.step()["step"], eager.step()["step"]) for _ in range(pairs)]
    return [ours / plain for ours, plain in found], [ours for ours, _ in found]


def table(shape: Shape, names: list[str], pairs: int) -> str:
    """A Markdown table: compiled over eager with its quartiles, and over the frozen model's compiled step."""
    lines = [f"| {shape.name} | compiled / eager | compiled / frozen model, compiled |", "|---|---:|---:|"]
    bound = 0.0
    for name in [FROZEN, *names]:
        print(f"{shape.name}: {name}", file=sys.stderr, flush=True)
        to_eager, seconds = ratios(shape, name, pairs)
        bound = bound or statistics.median(seconds)
        low, middle, high = statistics.quantiles(to_eager, n=4)
        lines.append(f"| {name} | {middle:.2f} ({low:.2f}–{high:.2f}) | {statistics.median(seconds) / bound:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line names."""
    options = asked("benchmarks.compiled", __doc__, pairs=(15, "how often each step is measured"))
    for shape in options.shapes:
        print(table(shape, options.methods, options.pairs), end="\n\n")


if __name__ == "__main__":
    main()
