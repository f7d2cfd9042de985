"""The plan: which measures are taken, in which order, alternating between the sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.methods import (
    BERT,
    DEEP,
    DROPOUT,
    FROZEN,
    FULL,
    INFERENCE,
    LOADED,
    LONG,
    METHODS,
    MIXED,
    MIXED_COUNTS,
    RANKED,
    RANKS,
    REAL,
    SHAPES,
    Method,
    Shape,
)
from benchmarks.pretrained import variable
from benchmarks.report import GROWTH, Row
from benchmarks.sides import Side, WorkerProcess, workers

Say = Callable[[str], None]
MERGED = "forward, merged"
VARIANTS: tuple[dict[str, Any], ...] = ({"dtype": "bfloat16"}, {"checkpointing": True})
BASE_IMPORT = "import torch, transformers"
IMPORTS = ("import peft", "from peft import LoraConfig, PeftModel, get_peft_model")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        shapes: The shapes of the training measures.
        methods: The methods measured on them.
        full: Whether full fine-tuning is measured beside them.
        sections: A part of `SECTIONS`.
        repeats: Rounds of the step and forward times.
        imports: The lines whose import time is measured.
        import_repeats: Fresh processes for each import time.
        operation_repeats: Rounds of the operations.
        mixed_repeats: Rounds of the mixed batches.
        loads: How many adapters are loaded one after the other.
        options: More arguments of `Subject.build`: dtype and checkpointing.
    """

    shapes: Sequence[Shape]
    methods: Sequence[Method]
    full: bool
    sections: Sequence[str]
    repeats: int
    imports: Sequence[str]
    import_repeats: int
    operation_repeats: int
    mixed_repeats: int
    loads: int
    options: dict[str, Any]


def in_order(pair: Sequence[Any], number: int) -> Sequence[Any]:
    """Both sides, the other one first in every second round: A B, B A, A B, … Drift then favours none."""
    return pair if number % 2 == 0 else pair[::-1]


def is_measured(subject: str, side: Side) -> bool:
    """Whether a side has what is to be measured: the peer lacks some methods."""
    return side.name == "ours" or not any(
        method.name == subject and method.ours_only for method in (*METHODS, *INFERENCE)
    )


def training(plan: Plan, sides: Sequence[Side], say: Say) -> Iterator[Row]:
    """Step time, forward time and bytes saved for backward, every subject living in one worker a side."""
    with workers(*sides) as pair:
        for shape in plan.shapes:
            yield from _training_of(shape, [FULL] if plan.full else [], plan.methods, pair, plan, say)


def real(plan: Plan, sides: Sequence[Side], say: Say) -> Iterator[Row]:
    """The training measures on pretrained models, one method at a time, since these models are large."""
    few = replace(plan, repeats=max(1, plan.repeats // 3))
    with workers(*sides) as pair:
        for shape in REAL:
            if variable(shape.package) in sides[0].environment:
                for method in plan.methods:
                    rows = _training_of(shape, [], [method], pair, few, say)
                    yield from (row for row in rows if row.measure.startswith(method.name + ":"))


def growth(plan: Plan, sides: Sequence[Side], say: Say) -> Iterator[Row]:
    """The training measures of LoRA on every linear layer, as the tokens of a row and then the rank grow."""
    few = replace(plan, repeats=max(1, plan.repeats // 3))
    fixed = [method for method in METHODS if method.name == "LoRA r8 all-linear"]
    with workers(*sides) as pair:
        for shape in LONG:
            for row in _training_of(shape, [], fixed, pair, few, say):
                yield from _grown(row, fixed, "tokens of a row", [shape.tokens])
        for row in _training_of(BERT, [], RANKED, pair, few, say):
            yield from _grown(row, RANKED, "rank", RANKS)
        for worker in pair:
            worker.ask("clear")
            worker.ask("open_deep")
        loads = {count: Row(GROWTH, f"load_adapter, {count} loaded", "s") for count in LOADED}
        for number in range(1, LOADED[-1] + 1):
            say(f"load {number} of {LOADED[-1]}")
            for worker in in_order(pair, number):
                seconds = worker.ask("load", number=number)
                # Three loads in a row are one point, since a single one is too short to time well.
                if (row := next((r for n, r in loads.items() if n - 3 < number <= n), None)) is not None:
                    row.add(worker.side.name, seconds)
        for count, row in loads.items():
            yield replace(row, details={"axis": "adapters loaded", "place": count, "drawn": "load_adapter"})


def _grown(row: Row, methods: Sequence[Method], axis: str, places: Sequence[int]) -> Iterator[Row]:
    """The row as a point of the chart of growth, if it is one of the measures drawn there."""
    for method, place in zip(methods, places, strict=True):
        subject, _, measure = row.measure.rpartition(": ")
        if subject == method.name and measure in ("step", "bytes saved"):
            details = {"axis": axis, "place": place, "drawn": measure}
            yield replace(row, section=GROWTH, measure=f"{row.section}, {row.measure}", details=details)


def _training_of(
    shape: Shape, others: Sequence[str], methods: Sequence[Method], pair: Sequence[WorkerProcess], plan: Plan, say: Say
) -> Iterator[Row]:
    measures = {"step": "s", "step with optimizer": "s", "forward": "s", MERGED: "s", "bytes saved": "bytes"}
    everything = [FROZEN, *others, *(method.name for method in methods)]
    name = shape.name + _options_in_words(plan.options)
    rows = {
        (subject, measure): Row(name, f"{subject}: {measure}", unit, FROZEN)
        for subject in everything
        for measure, unit in measures.items()
    }
    for worker in pair:
        worker.ask("clear")
        here = [subject for subject in everything if is_measured(subject, worker.side)]
        for subject in here:
            say(f"{shape.name}: {worker.side.name} builds {subject}")
            worker.ask("build", shape=shape.name, method=subject, **plan.options)
        nodes = {subject: worker.ask("saved", method=subject) for subject in here}
        for subject in here:
            if nodes[subject] != worker.ask("saved", method=subject):
                raise RuntimeError(f"{worker.side.name}: bytes saved by {subject} changed from one step to the next")
            row = rows[subject, "bytes saved"]
            row.add(worker.side.name, sum(nodes[subject].values()), sum(nodes[FROZEN].values()))
            row.details[worker.side.name] = nodes[subject]
    for number in range(plan.repeats):
        say(f"{shape.name}: round {number + 1} of {plan.repeats}")
        for subject in everything[1:]:
            having = [worker for worker in in_order(pair, number) if is_measured(subject, worker.side)]
            for worker in having:
                # The bound anew for each subject: a machine's speed drifts within a round.
                bounds, values = _seconds(worker, FROZEN), _seconds(worker, subject)
                if (merged := worker.ask("merged", method=subject)) is not None:
                    rows[subject, MERGED].add(worker.side.name, merged, bounds["forward"])
                for measure, bound in bounds.items():
                    if len(having) == len(pair):  # what stands at one place of both lists was measured together
                        rows[FROZEN, measure].add(worker.side.name, bound, bound)
                    rows[subject, measure].add(worker.side.name, values[measure], bound)
    yield from (row for row in rows.values() if row.ours or row.peer)


def _options_in_words(options: dict[str, Any]) -> str:
    dtype = options.get("dtype", "float32")
    words = ([] if dtype == "float32" else [dtype]) + ["checkpointed"] * options.get("checkpointing", False)
    return "".join(f", {word}" for word in words)


def variants(plan: Plan, sides: Sequence[Side], say: Say) -> Iterator[Row]:
    """The training measures in half precision, and with gradient checkpointing, which the peer's prompts refuse."""
    few = replace(plan, repeats=max(1, plan.repeats // 3))
    methods = [method for method in plan.methods if method.variants]
    with workers(*sides) as pair:
        for options in VARIANTS:
            for shape in plan.shapes:
                yield from _training_of(shape, [], methods, pair, replace(few, options=options), say)


def _seconds(worker: WorkerProcess, subject: str) -> dict[str, float]:
    return worker.ask("step", method=subject) | {"forward": worker.ask("forward", method=subject)}


def peak(plan: Plan, sides: Sequence[Side], say: Say) -> Iterator[Row]:
    """Peak memory of fresh processes that make two training steps with their optimizer; of some methods in each variant too."""
    few = [method for method in plan.methods if method.variants and not _options_in_words(plan.options)]
    runs = [(plan.options, plan.methods), *((options, few) for options in VARIANTS if few)]

    def measure(shape: Shape, subject: str, options: dict[str, Any], measured: Sequence[Side]) -> dict[str, Any]:
        say(f"{shape.name}{_options_in_words(options)}: peak memory of {subject}")
        with workers(*measured) as pair:
            return {
                worker.side.name: worker.ask("peak", shape=shape.name, method=subject, **options) for worker in pair
            }

    for options, methods in runs:
        for shape in plan.shapes:
            bounds = measure(shape, FROZEN, options, sides)
            for method in methods:
                having = [side for side in sides if is_measured(method.name, side)]
                values = measure(shape, method.name, options, having)
                for key, name in (("process", "peak memory"), ("added", "peak memory above the imports")):
                    row = Row(shape.name + _options_in_words(options), f"{method.name}: {name}", "bytes", FROZEN)
                    for side in having:
                        row.add(side.name, values[side.name][key], bounds[side.name][key])
                    yield row


def imports(plan: Plan, sides: Sequence[Side], say: Say) -> Iterator[Row]:
    """Import times in fresh processes, relative to those of torch and transformers."""
    rows = [Row("Operations", f"`{line}`", "s", f"`{BASE_IMPORT}`") for line in plan.imports]
    timer = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    for number in range(plan.import_repeats):
        say(f"imports: round {number + 1} of {plan.import_repeats}")
        for side in in_order(sides, number):
            bound, *seconds = (float(side.run(timer.format(line))) for line in (BASE_IMPORT, *plan.imports))
            for row, value in zip(rows, seconds, strict=True):
                row.add(side.name, value, bound)
    yield from rows


def operations(plan: Plan, sides: Sequence[Side], say: Say) -> Iterator[Row]:
    """What a user waits for besides training: injection, saving, loading, switching, merging."""
    rows: dict[str, Row] = {}

    def take(measure: str, call: str, pair: Sequence[WorkerProcess], **arguments: Any) -> None:
        row = rows.setdefault(measure, Row("Operations", measure, "s", details={"model": DEEP.name}))
        for worker in pair:
            row.add(worker.side.name, worker.ask(call, **arguments))

    with workers(*sides) as pair:
        for worker in pair:
            worker.ask("open_deep")
        for number in range(plan.operation_repeats):
            say(f"operations: round {number + 1} of {plan.operation_repeats}")
            order = in_order(pair, number)
            for _ in range(3):
                take("injection", "inject", order)
                take("save", "save", order)
            for load in range(1, plan.loads + 1):
                take(_nth_load(load, plan.loads), "load", order, number=load)
                if load in (2, plan.loads):
                    for adapter in (2, 1) * 3:
                        take(f"set_adapter, {load} loaded", "set_adapter", order, number=adapter)
                if load == 2:
                    for _ in range(3):
                        take("merge", "merge", order)
                        take("unmerge", "unmerge", order)
    rows.pop("", None)  # the loads in between
    yield from rows.values()
    second, last = rows["2nd load_adapter"], rows[f"{plan.loads}th load_adapter"]
    yield Row("Operations", last.measure, "s", "own 2nd", last.ours, last.peer, second.ours, second.peer)


def _nth_load(load: int, loads: int) -> str:
    """The row that a load counts for, or none.

    The n-th load is three neighbouring ones, since a single one is too short to time well.
    """
    if load == 1:
        return "1st adapter from a folder"
    names = {"2nd": (2, 4), "10th": (9, 11), f"{loads}th": (loads - 2, loads)}
    return next((f"{name} load_adapter" for name, (first, last) in names.items() if first <= load <= last), "")


def mixed(plan: Plan, sides: Sequence[Side], say: Say) -> Iterator[Row]:
    """Batches whose rows use many adapters, relative to the same batch with one; a side that cannot mix has no value."""
    methods = [method for method in plan.methods if DROPOUT not in method.name]  # it acts in training only
    methods += [row for row in INFERENCE if any(row.name.startswith(method.name + ",") for method in methods)]
    with workers(*sides) as pair:
        for shape in MIXED:
            for method in methods:
                for count in MIXED_COUNTS if method.quick and not shape.new_tokens else (16,):
                    say(f"{shape.name}: {count} adapters of {method.name}")
                    row = Row("Mixed batches", f"{shape.name}: {method.name}, {count} adapters", "s", "one adapter")
                    able = [
                        worker
                        for worker in pair
                        if is_measured(method.name, worker.side)
                        and worker.ask("open_mixed", shape=shape.name, method=method.name, adapters=count)
                    ]
                    for number in range(plan.mixed_repeats):
                        for worker in in_order(able, number):
                            seconds = worker.ask("mixed")
                            row.add(worker.side.name, seconds["mixed"], seconds["single"])
                    yield row


SECTIONS: dict[str, Callable[[Plan, Sequence[Side], Say], Iterator[Row]]] = {
    "training": training,
    "variants": variants,
    "real": real,
    "peak": peak,
    "operations": operations,
    "imports": imports,
    "mixed": mixed,
    "growth": growth,
}


def make_plan(
    only: Sequence[str] = (), quick: bool = False, repeats: int | None = None, options: dict[str, Any] | None = None
) -> Plan:
    """Chooses what to measure.

    Args:
        only: Names of sections, shapes or methods: the others of their kind are left out. A shape is known by the
            beginning of its name, for example `BERT`; a method or a section by its whole name.
        quick: Fewer rounds and the first methods only.
        repeats: Rounds of the step and forward times.
        options: More arguments of `Subject.build`.

    Returns:
        The plan.

    Raises:
        ValueError: A name means nothing, or the number of rounds is not positive.
    """
    sections = [name for name in SECTIONS if name in only]
    shapes = [shape for shape in SHAPES if shape.name.lower().startswith(tuple(name.lower() for name in only))]
    methods = [method for method in METHODS if method.name in only]
    known = {*sections, *(method.name for method in methods)}
    for name in only:
        if name not in known and not any(shape.name.lower().startswith(name.lower()) for shape in shapes):
            names = [*SECTIONS, *(row.name for row in (*SHAPES, *METHODS))]
            raise ValueError(f"--only {name!r} is neither a section, nor a shape, nor a method: {', '.join(names)}")
    if repeats is not None and repeats < 1:
        raise ValueError(f"--repeats must be positive, not {repeats}")
    if not sections:
        sections = ["training", "peak"] if shapes or methods else list(SECTIONS)
        if quick:  # peaks need a process of their own each, and the rest grows with the number of methods
            sections = [name for name in sections if name not in ("variants", "real", "peak", "mixed", "growth")]
    return Plan(
        shapes=shapes or SHAPES,
        methods=methods or [method for method in METHODS if method.quick or not quick],
        full=not quick,
        sections=sections,
        repeats=repeats or (3 if quick else 7),
        imports=IMPORTS[:1] if quick else IMPORTS,
        import_repeats=1 if quick else 5,
        operation_repeats=1 if quick else 3,
        mixed_repeats=3 if quick else 5,
        loads=20 if quick else 60,
        options=options or {},
    )
