"""Training steps of methods in turn with the frozen model's own, in one process: for ratios that differ by hundredths.

    python -m benchmarks.in_turn "prefix 20" "prefix 20, projection" --only BERT --rounds 30

Each step of a method stands between two of the frozen model, and is divided by their mean: what drifts falls out.
"""

from __future__ import annotations

import dataclasses
import sys

from benchmarks.asked import asked
from benchmarks.methods import FROZEN, Shape
from benchmarks.report import Ratio
from benchmarks.worker import Subject

WARM = 3


def table(shape: Shape, names: list[str], rounds: int, longer: int) -> str:
    """A Markdown table: steps over the frozen model's, which is divided by itself in the first row."""
    bound = Subject.build(shape, FROZEN)
    subjects = {FROZEN: bound}
    if longer:
        stretched = dataclasses.replace(shape, tokens=shape.tokens + longer)
        subjects[f"{FROZEN}, {longer} tokens more"] = Subject.build(stretched, FROZEN)
    subjects |= {name: Subject.build(shape, name) for name in names}
    steps: dict[str, list[float]] = {name: [] for name in subjects}
    bounds: dict[str, list[float]] = {name: [] for name in subjects}
    for done in range(-WARM, rounds):
        print(f"{shape.name}: round {done}", file=sys.stderr, flush=True)
        before = bound.step()["step"]
        for name, subject in subjects.items():
            step, after = subject.step()["step"], bound.step()["step"]
            if done >= 0:
                steps[name].append(step)
                bounds[name].append((before + after) / 2)
            before = after
    lines = [f"| {shape.name} | step / the frozen model's |", "|---|---:|"]
    for name in subjects:
        ratio = Ratio.of(steps[name], bounds[name])
        assert ratio is not None
        lines.append(f"| {name} | {ratio.median:.3f} ({ratio.low:.3f}–{ratio.high:.3f}) |")
    return "\n".join(lines)


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
