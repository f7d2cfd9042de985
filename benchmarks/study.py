"""What makes deep and soft prompts learn: methods, lengths, starts and learning rates on three small real tasks, under one budget.

    python benchmarks/study.py run --out build/study        # goes on where it was stopped
    python benchmarks/study.py report --out build/study     # study.md and study.png

Each setting trains with each of its learning rates on seed 0; the rate with the best validation metric then trains with further seeds.
Every result is a line of ``results.jsonl``. The main settings come first, so a run that is stopped early has whole rows.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
BUDGET = {"epochs": 3, "batch_size": 8}
TASKS: dict[str, dict[str, Any]] = {
    "imdb": {
        "task": "sequence-classification",
        "data": {
            "train": "packaged:imdb", "train_rows": 2000, "validation_rows": 500, "test_rows": 1000, "max_length": 128,
        },
    },
    "rotten-tomatoes": {
        "task": "sequence-classification",
        "data": {
            "train": "packaged:rotten-tomatoes", "train_rows": 2000, "validation_rows": 500, "test_rows": 1000,
            "max_length": 128, "test_size": 0.2,
        },
    },
    "entities": {"task": "token-classification", "data": {"train": "packaged:ner", "max_length": 96, "test_size": 0.2}},
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A line of the table.

    Attributes:
        name: How the table calls it.
        method: The recipe's `method`.
        rates: Learning rates that are tried.
        main: Whether it comes first.
    """

    name: str
    method: dict[str, Any]
    rates: tuple[float, ...]
    main: bool = True


def _settings() -> Iterator[Setting]:
    yield Setting("full fine-tuning", {"name": "full"}, (3e-5, 1e-4, 3e-4))
    yield Setting("head alone", {"name": "head"}, (3e-3, 1e-2, 3e-2))
    yield Setting("LoRA (r 8)", {"name": "lora"}, (1e-3, 3e-3, 1e-2))
    yield Setting("LoRA (r 8), all linear layers", {"name": "lora", "target_modules": "all-linear"}, (3e-4, 1e-3, 3e-3))
    yield Setting("IA³", {"name": "ia3"}, (3e-3, 1e-2, 3e-2))
    deep, soft = (3e-3, 1e-2, 3e-2, 1e-1), (1e-2, 3e-2, 1e-1)
    starts = (("tokens", {}), ("random", {"prefix_init": "peer"}))
    for tokens in (20, 5, 50, 100):
        for start, options in starts:
            method = {"name": "prefix-tuning", "num_virtual_tokens": tokens, **options}
            yield Setting(f"prefix {tokens}, {start}", method, deep, main=tokens == 20)
    for tokens in (20, 100):
        for start, options in starts:
            method = {"name": "prefix-tuning", "num_virtual_tokens": tokens, "prefix_projection": True, **options}
            yield Setting(f"prefix {tokens}, projection, {start}", method, (1e-4, 3e-4, 1e-3), main=tokens == 20)
    for tokens in (20, 5, 50, 100):
        for start in ("SAMPLE_VOCAB", "RANDOM"):
            method = {"name": "prompt-tuning", "num_virtual_tokens": tokens, "prompt_tuning_init": start}
            words = "vocabulary" if start == "SAMPLE_VOCAB" else "random"
            yield Setting(f"prompt {tokens}, {words}", method, soft, main=tokens == 20)
    yield Setting("P-tuning 20, MLP", {"name": "p-tuning", "num_virtual_tokens": 20}, (3e-4, 1e-3, 3e-3))
    yield Setting("DoRA (r 8)", {"name": "dora"}, (1e-3, 3e-3, 1e-2))
    yield Setting("LoHa (r 8)", {"name": "loha"}, (1e-3, 3e-3, 1e-2))
    yield Setting("LoKr (r 8)", {"name": "lokr"}, (1e-3, 3e-3, 1e-2))
    yield Setting("bottleneck (Pfeiffer)", {"name": "bottleneck"}, (3e-4, 1e-3, 3e-3))


SETTINGS = tuple(sorted(_settings(), key=lambda s: not s.main))


@dataclass(frozen=True)
class Job:
    """One training run."""

    task: str
    setting: str
    rate: float
    seed: int

    @property
    def recipe(self) -> dict[str, Any]:
        method = next(s.method for s in SETTINGS if s.name == self.setting)
        # What is left to write is the adapter at the end: nobody goes on with a run of this length.
        training = BUDGET | {"learning_rate": self.rate, "trainer": {"save_strategy": "no"}}
        return TASKS[self.task] | {
            "model": "packaged:minilm",
            "method": method,
            "training": training,
            "seed": self.seed,
        }


Found = dict[Job, dict[str, Any]]


def train(job: Job, overrides: Sequence[str]) -> dict[str, Any]:
    """Train, and measure on validation and test rows."""
    import torch

    import peft
    from peft.recipes.errors import RecipeError

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = peft.finetune(job.recipe | {"out": folder + "/run"}, *overrides, tell=None).report
        except RecipeError as error:  # such as a loss that is no number
            return {"validation": 0.0, "test": 0.0, "error": str(error)}
    metric = report["metric"]
    return {
        "validation": report["validation"][metric], "validation_loss": report["validation"]["loss"], "test": report["test"][metric],
        "metric": metric, "trained_parameters": report["trained_parameters"], "bytes": report["bytes"], "steps": report["steps"],
        "device": report["device"], "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def best_rate(found: Found, task: str, setting: Setting) -> float | None:
    """The rate with the best validation metric on the first seed; `None` while some are missing."""
    tried = {rate: found.get(Job(task, setting.name, rate, SEEDS[0])) for rate in setting.rates}
    if not all(tried.values()):
        return None
    return max(tried, key=lambda r: (tried[r]["validation"], -tried[r].get("validation_loss", 0.0)))  # type: ignore[index]


def open_jobs(found: Found, tasks: Sequence[str]) -> Iterator[Job]:
    """What is still to do, the most wanted first."""
    for main in (True, False):
        settings = [s for s in SETTINGS if s.main is main]
        searches = (Job(t, s.name, rate, SEEDS[0]) for s in settings for t in tasks for rate in s.rates)
        yield from (job for job in searches if job not in found)
        for seed in SEEDS[1:]:
            for setting in settings:
                for task in tasks:
                    rate = best_rate(found, task, setting)
                    if rate is not None and (job := Job(task, setting.name, rate, seed)) not in found:
                        yield job


def read(folder: Path) -> Found:
    """The results that are there."""
    path = folder / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {Job(**line["job"]): line["result"] for line in map(json.loads, lines)}


def run(folder: Path, tasks: Sequence[str], workers: int, minutes: float, overrides: Sequence[str]) -> None:
    """Do what is to do, several runs at a time, until it is done or the time is up."""
    folder.mkdir(parents=True, exist_ok=True)
    found, end = read(folder), time.monotonic() + 60 * minutes
    running: dict[concurrent.futures.Future[dict[str, Any]], Job] = {}
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
        while True:
            for job in open_jobs(found, tasks):
                if len(running) >= workers or time.monotonic() > end:
                    break
                if job not in running.values():
                    running[pool.submit(train, job, list(overrides))] = job
            left = max(0.0, end - time.monotonic())
            done, _ = concurrent.futures.wait(running, left, return_when=concurrent.futures.FIRST_COMPLETED)
            if not done:
                break  # all is done, or the time is up
            for future in done:
                job = running.pop(future)
                found[job] = future.result()
                file.write(json.dumps({"job": vars(job), "result": found[job]}) + "\n")
                file.flush()
                shown = f"validation {found[job]['validation']:.4f}, test {found[job]['test']:.4f}"
                print(f"{len(found)}: {job.task}, {job.setting}, {job.rate:g}, seed {job.seed}: {shown}", flush=True)
    for process in (pool._processes or {}).values():
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Cell:
    """A setting on a task: test metrics over the seeds, at the best rate."""

    rate: float
    tests: tuple[float, ...]
    parameters: int

    @property
    def mean(self) -> float:
        return statistics.mean(self.tests)

    def __str__(self) -> str:
        spread = f" ± {100 * statistics.stdev(self.tests):.1f}" if len(self.tests) > 1 else ""
        seeds = "" if len(self.tests) == len(SEEDS) else f" ({len(self.tests)} seed{'s' * (len(self.tests) > 1)})"
        return f"{100 * self.mean:.1f}{spread}{seeds} | {self.rate:.0e}".replace("e-0", "e-")


def cell(found: Found, task: str, setting: Setting) -> Cell | None:
    """The cell of a table, or `None` while its search is not finished."""
    rate = best_rate(found, task, setting)
    if rate is None:
        return None
    results = [found[job] for seed in SEEDS if (job := Job(task, setting.name, rate, seed)) in found]
    return Cell(rate, tuple(r["test"] for r in results), results[0].get("trained_parameters", 0))


def table(found: Found) -> str:
    """Test metrics in per cent, by setting and task."""
    heads = [f"{name} | rate" for name in TASKS]
    lines = [f"| setting | trained parameters | {' | '.join(heads)} |", "|---|---:|" + "---:|---:|" * len(TASKS)]
    for setting in SETTINGS:
        cells = [cell(found, task, setting) for task in TASKS]
        if any(cells):
            count = next(c.parameters for c in cells if c)
            lines.append(f"| {setting.name} | {count:,} | {' | '.join(str(c) if c else '– | –' for c in cells)} |")
    return "\n".join(lines)


def search_table(found: Found) -> str:
    """The validation metric of every rate that was tried, in per cent."""
    lines = ["| setting | task | rate: validation |", "|---|---|---|"]
    for setting in SETTINGS:
        for task in TASKS:
            tried = {rate: found.get(Job(task, setting.name, rate, SEEDS[0])) for rate in setting.rates}
            if any(tried.values()):
                shown = [f"{r:g}: {100 * t['validation']:.1f}" for r, t in tried.items() if t]
                lines.append(f"| {setting.name} | {task} | {', '.join(shown)} |")
    return "\n".join(lines)


def plot(found: Found) -> bytes:
    """Test metric against trained parameters, a panel for each task."""
    import matplotlib.pyplot as plt

    from peft.recipes.plots import COLORS, MARKERS, STYLE, as_png

    families = ("full", "head", "LoRA", "IA³", "prefix", "prompt", "P-tuning", "DoRA", "LoHa", "LoKr", "bottleneck")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(TASKS), figsize=(11, 4.2), sharex=True)
        for axis, task in zip(axes, TASKS, strict=True):
            for number, family in enumerate(families):
                cells = [c for s in SETTINGS if s.name.startswith(family) and (c := cell(found, task, s))]
                if cells:
                    style: dict[str, Any] = {
                        "color": COLORS[number % len(COLORS)],
                        "marker": MARKERS[(number + number // len(COLORS)) % len(MARKERS)],
                        "linestyle": "none",
                    }
                    spread = [statistics.stdev(c.tests) if len(c.tests) > 1 else 0 for c in cells]
                    axis.errorbar(
                        [c.parameters for c in cells], [c.mean for c in cells], spread, label=family, capsize=2, **style
                    )
            axis.set(xscale="log", xlabel="trained parameters", title=task)
        axes[0].set_ylabel("accuracy, F1 of entities (test rows)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        return as_png(figure)


def report(folder: Path) -> None:
    """Write the tables and the plot beside the results."""
    found = read(folder)
    text = f"{table(found)}\n\n{search_table(found)}\n"
    (folder / "study.md").write_text(text, encoding="utf-8")
    (folder / "study.png").write_bytes(plot(found))
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--out", type=Path, default=Path("build/study"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=1e4, help="stop after so long")
    parser.add_argument("overrides", nargs="*", help="key=value, as of a recipe")
    given = parser.parse_intermixed_args()
    if given.command == "report":
        report(given.out)
    else:
        run(given.out, given.tasks, given.workers, given.minutes, given.overrides)


if __name__ == "__main__":
    main()
