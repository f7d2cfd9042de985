"""Training steps of methods in turn with the frozen model's own, in one process: for ratios that differ by hundredths.

    python -m benchmarks.in_turn "prefix 20" "prefix 20, projection" --only BERT --rounds 30

Each step of a method stands between two of the frozen model, and is divided by their mean: what drifts falls out.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys

from benchmarks.asked import asked
from benchmarks.methods import FROZEN, Shape
from benchmarks.worker import Subject

WARM = 3


def quartiles(ratios: list[float]) -> str:
    """The median of ratios with their quartiles, for a table."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def table(shape: Shape, names: list[str], rounds: int, longer: int) -> str:
    """A Markdown table: steps over the frozen model's, which is divided by itself in the first row."""
    bound = Subject.build(shape, FROZEN)
    subjects = {FROZEN: bound}
    if longer:
        stretched = dataclasses.replace(shape, tokens=shape.tokens + longer)
        subjects[f"{FROZEN}, {longer} tokens more"] = Subject.build(stretched, FROZEN)
    subjects |= {name: Subject.build(shape, name) for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in subjects}
    for done in range(-WARM, rounds):
        print(f"{shape.name}: round {done}", file=sys.stderr, flush=True)
        before = bound.step()["step"]
        for name, subject in subjects.items():
            step, after = subject.step()["step"], bound.step()["step"]
            if done >= 0:
                ratios[name].append(2 * step / (before + after))
            before = after
    lines = [f"| {shape.name} | step / the frozen model's |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {name} | {quartiles(found)} |" for name, found in ratios.items())])


def main() -> None:
    """Measure what the command line names."""
    options = asked(
        "benchmarks.in_turn",
        __doc__,
        rounds=(30, "how often each step is measured"),
        longer=(0, "measure the frozen model with so many tokens more, too"),
    )
    for shape in options.shapes:
        print(table(shape, options.methods, options.rounds, options.longer), end="\n\n")


if __name__ == "__main__":
    main()
