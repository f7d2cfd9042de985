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
from benchmarks.report import Ratio
from benchmarks.worker import Subject

WARM = 3


def seconds_of(shape: Shape, name: str, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of a method's steps, or the frozen model's, compiled and eager, in pairs."""
    torch._dynamo.reset()
    eager = Subject.build(shape, name)
    compiled = copy.copy(eager)
    compiled.model = torch.compile(eager.model)
    for _ in range(WARM):
        eager.step(), compiled.step()
    found = [(compiled.step()["step"], eager.step()["step"]) for _ in range(pairs)]
    return [ours for ours, _ in found], [plain for _, plain in found]


def table(shape: Shape, names: list[str], pairs: int) -> str:
    """A Markdown table: compiled over eager with its quartiles, and over the frozen model's compiled step."""
    lines = [f"| {shape.name} | compiled / eager | compiled / frozen model, compiled |", "|---|---:|---:|"]
    bound = 0.0
    for name in [FROZEN, *names]:
        print(f"{shape.name}: {name}", file=sys.stderr, flush=True)
        compiled, eager = seconds_of(shape, name, pairs)
        bound = bound or statistics.median(compiled)
        lines.append(f"| {name} | {Ratio.of(compiled, eager)} | {statistics.median(compiled) / bound:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line names."""
    options = asked("benchmarks.compiled", __doc__, pairs=(15, "how often each step is measured"))
    for shape in options.shapes:
        print(table(shape, options.methods, options.pairs), end="\n\n")


if __name__ == "__main__":
    main()
