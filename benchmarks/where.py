"""Where the time of a training step goes, next to the frozen model's own step, by kind of operation.

    python -m benchmarks.where "LoHa r8 all-linear" --only BERT

Both are built as `make bench` builds them. Each runs some steps plainly, for their time, and some under `torch.profiler`, for the shares
of it. One thread, so that no operation waits for another.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.asked import asked
from benchmarks.methods import FROZEN, Shape
from benchmarks.worker import Subject

WARM, TIMED, PROFILED = 3, 15, 5
KINDS = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot"),
    "attention": ("aten::_scaled_dot_product",),
    "activations and norms": (
        "aten::gelu", "aten::silu", "aten::native_layer_norm", "aten::rsqrt", "aten::mean", "aten::pow", "aten::relu", "aten::tanh",
    ),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::index_select", "aten::fill_", "aten::zero_", "aten::repeat"),
    "random numbers": ("aten::random_", "aten::bernoulli_", "aten::uniform_", "aten::native_dropout"),
    "sums": ("aten::sum", "aten::linalg_vector_norm", "aten::norm", "aten::prod"),
    "elementwise": (
        "aten::mul", "aten::add", "aten::sub", "aten::div", "aten::neg", "aten::where", "aten::addcmul", "aten::sqrt", "aten::exp",
        "aten::bitwise", "aten::ge", "aten::lt", "aten::le", "aten::gt", "aten::eq", "aten::__and__", "aten::masked_fill",
    ),
}  # fmt: skip
OTHER, PYTHON = "views, allocation and the rest of torch", "Python and the graph"


def kind_of(operation: str) -> str:
    """The kind that an operation's own time counts for."""
    found = (kind for kind, begins in KINDS.items() if any(operation.startswith(begin) for begin in begins))
    return next(found, OTHER if operation.startswith("aten::") else PYTHON)


def shares(shape: Shape, name: str) -> tuple[Counter[str], Counter[str], float]:
    """Milliseconds and calls of a step by kind of operation, and the median of whole steps.

    Time that no operation accounts for is Python's and the graph's.
    """
    subject = Subject.build(shape, name)
    for _ in range(WARM):
        subject.step()
    whole = 1e3 * statistics.median(subject.step()["step"] for _ in range(TIMED))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(PROFILED):
            subject.loss().backward()
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in seen.key_averages():
        kind = kind_of(event.key)
        if kind != PYTHON:
            spent[kind] += event.self_cpu_time_total / 1e3 / PROFILED
            calls[kind] += round(event.count / PROFILED)
    spent[PYTHON] = max(whole - sum(spent.values()), 0.0)
    return spent, calls, whole


def table(shape: Shape, names: list[str]) -> str:
    """A Markdown table: what each method's step takes more than the frozen model's, in hundredths of that, by kind of operation."""
    bound, bound_calls, whole = shares(shape, FROZEN)
    rows = {kind: [f"{100 * bound[kind] / whole:.1f}"] for kind in (*KINDS, OTHER, PYTHON)}
    steps = ["100"]
    for name in names:
        print(f"{shape.name}: {name}", file=sys.stderr, flush=True)
        spent, calls, step = shares(shape, name)
        for kind, cells in rows.items():
            more = calls[kind] - bound_calls[kind]
            cells.append(f"{100 * (spent[kind] - bound[kind]) / whole:+.1f}" + (f" ({more:+d} calls)" if more else ""))
        steps.append(f"{100 * step / whole:.0f}")
    head = f"| {shape.name} | {FROZEN} | " + " | ".join(names) + " |"
    lines = [head, "|---|" + "---:|" * (len(names) + 1)]
    lines += [f"| {kind} | " + " | ".join(cells) + " |" for kind, cells in rows.items()]
    return "\n".join([*lines, "| whole step | " + " | ".join(steps) + " |"])


def main() -> None:
    """Profile what the command line names."""
    torch.set_num_threads(1)
    options = asked("benchmarks.where", __doc__)
    for shape in options.shapes:
        print(table(shape, options.methods), end="\n\n")


if __name__ == "__main__":
    main()
