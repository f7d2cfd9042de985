"""Several methods under one budget: a run for each method and seed, each in a process of its own, and the report over all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.files import write_atomically
from .errors import RecipeError
from .methods import method_info, methods
from .rates import RATES, learning_rate
from .recipe import Recipe, as_recipe, read_recipe
from .report import COMPARISON_FILE, table_rows, write_report
from .runs import METRICS_FILE, RECIPE_FILE
from .training import check_training

Tell = Callable[[str], None]
SEARCH = (1 / 3, 1.0, 3.0)
"""What a method's learning rate is multiplied by in a search."""


def compare(
    recipe: Any,
    names: Sequence[str],
    *overrides: str,
    seeds: int = 1,
    out: Path | None = None,
    search: bool = False,
    train_only: bool = False,
    tell: Tell = print,
) -> dict[str, Any]:
    """Train with several methods and seeds, and write the report. What is there already is not done again.

    Args:
        recipe: A recipe, as :func:`~peft.finetune` takes it.
        names: Of the methods; when empty, all that are built and work without options.
        *overrides: ``key=value``.
        seeds: Runs of each method: seeds ``seed``, ``seed + 1``, …
        out: Folder of the comparison; ``runs/compare-TASK`` when not given.
        search: Choose each method's learning rate first, by the validation rows of the first seed.
        train_only: Do the runs and write no report: for workflows, in which several of these go on at a time.
        tell: Called with each line for the user.

    Returns:
        What ``comparison.json`` holds.

    Raises:
        RecipeError: An unknown method, or a recipe that cannot be compared. A run that fails does not end the others.
    """
    recipe = as_recipe(recipe, overrides)
    chosen = [method_info(name).name for name in names] or [name for name in methods() if name in RATES]
    with recipe.pointing():
        _check(recipe, search)
    folder = out or Path("runs") / f"compare-{recipe.task}"
    assert recipe.data is not None
    comparison: dict[str, Any] = {
        "task": recipe.task, "model": recipe.model.name, "data": str(recipe.data.train), "methods": chosen,
        "seeds": list(range(recipe.seed, recipe.seed + seeds)), "recipe": recipe.to_yaml(), "runs": [],
        "search": {},
    }  # fmt: skip
    if not train_only:
        _claim(folder, recipe)
    total = len(chosen) * seeds
    for method in chosen:
        rate = None
        if search:
            comparison["search"][method] = tried = _search(recipe, method, folder, tell)
            rate = _best_rate(tried)
        for seed in comparison["seeds"]:
            tell(f"[{len(comparison['runs']) + 1}/{total}] {method}, seed {seed}")
            run = _run(recipe, method, seed, rate, folder / f"{method}-{seed}")
            comparison["runs"].append(run)
            tell(f"    {_outcome(run)}")
            if not train_only:
                write_atomically(folder, {COMPARISON_FILE: json.dumps(comparison, default=float).encode()})
    if not train_only:
        write_report(folder)
    return comparison


def _check(recipe: Recipe, search: bool) -> None:
    """Refuse what no run could do."""
    if recipe.tasks:
        raise RecipeError("A recipe with several tasks cannot be compared: compare one task at a time.")
    data: Any = recipe.data
    if not all(isinstance(s, (str, Path, type(None))) for s in (data.train, data.validation, data.test)):
        raise RecipeError(
            "The runs of a comparison are processes of their own, and rows or functions given in Python do not reach them: name a file, "
            "or module:function."
        )
    if search and not (data.validation or data.validation_size or data.validation_rows):
        raise RecipeError("A search needs validation rows: set data.validation_size.", "data.validation_size")
    check_training(recipe)


def _claim(folder: Path, recipe: Recipe) -> None:
    """Make the folder this comparison's; refuse one that is another's."""
    path = folder / RECIPE_FILE
    same = {"seed", "out"}
    if path.exists() and read_recipe(path).model_dump(exclude=same) != recipe.model_dump(exclude=same):
        raise RecipeError(
            f"{folder} holds a comparison by another recipe. Choose another folder with --out, or remove it."
        )
    write_atomically(folder, {RECIPE_FILE: recipe.to_yaml().encode()})


def _run(recipe: Recipe, method: str, seed: int, rate: float | None, folder: Path) -> dict[str, Any]:
    """One run in a process of its own: its memory is its own, and what it breaks is its own."""
    if not (folder / METRICS_FILE).exists():
        own = method == method_info(recipe.method.name).name
        changes = [f"seed={seed}", f"out={folder}"]
        if not own:  # the recipe's options and rate are those of its own method
            changes += [f"method={{name: {method}}}", "training.learning_rate=null"]
        if rate is not None:
            changes.append(f"training.learning_rate={rate}")
        write_atomically(folder, {"compared.yaml": recipe.to_yaml().encode()})
        code = _start(["train", str(folder / "compared.yaml"), *changes, "--resume", "--no-report"], folder / "log.txt")
        if code in (130, -signal.SIGINT, -signal.SIGTERM):
            raise KeyboardInterrupt("Stopped. The same command goes on from here.")
        if code != 0 or not (folder / METRICS_FILE).exists():
            lines = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
            error = lines[-1].removeprefix("Error: ") if lines else f"ended with code {code}"
            return {"method": method, "seed": seed, "report": None, "error": error}
    report = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    return {"method": method, "seed": seed, "report": report, "error": None}


def _start(arguments: list[str], log: Path) -> int:
    """Run a command of this library in a process of its own.

    Args:
        arguments: As on the command line.
        log: Takes what it prints.

    Returns:
        Its exit status.
    """
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "NO_COLOR": "1", "COLUMNS": "200",
    }  # fmt: skip
    command = [sys.executable, "-m", "peft", *arguments]
    with open(log, "w", encoding="utf-8") as file:
        streams: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        with _sigterm_is_ctrl_c():
            # A group of its own: the terminal would send Ctrl-C to both, and twice means "at once".
            process = subprocess.Popen(command, env=environment, process_group=0, **streams)
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.terminate()  # unlike Ctrl-C nothing lets children ignore it
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.kill()
                raise


@contextlib.contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """Within this context SIGTERM, which clusters send, does what Ctrl-C does; in a thread that may not set it, what it did."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _search(recipe: Recipe, method: str, folder: Path, tell: Tell) -> list[dict[str, Any]]:
    """What a third, one and three times the usual learning rate give on the validation rows of the first seed."""
    own = method == method_info(recipe.method.name).name
    assert recipe.task is not None
    usual = (recipe.training.learning_rate if own else None) or learning_rate(method, recipe.task)
    found = []
    for factor in SEARCH:
        rate = float(f"{usual * factor:.2g}")
        run = _run(recipe, method, recipe.seed, rate, folder / "search" / f"{method}-{rate}")
        report = run["report"]
        if report is None:
            tell(f"    {method} at {rate:.1e}: {_outcome(run)}")
            continue
        value, loss = report["validation"][report["metric"]], report["validation"]["loss"]
        tell(f"    {method} at {rate:.1e}: validation {report['metric']} {value:.4f}")
        found.append({"rate": rate, "value": value, "loss": loss, "greater_is_better": report["greater_is_better"]})
    return found


def _best_rate(tried: Sequence[dict[str, Any]]) -> float | None:
    """The rate with the best metric; of equal ones that with the lower loss; ``None`` where all failed."""
    best = max(tried, key=lambda t: (t["value"] if t["greater_is_better"] else -t["value"], -t["loss"]), default=None)
    return best["rate"] if best is not None else None


def _outcome(run: dict[str, Any]) -> str:
    report = run["report"]
    if report is None:
        return f"failed: {run['error']}"
    value = (report["test"] or report["validation"])[report["metric"]]
    return f"{report['metric']} {value:.4f}, {report['trained_parameters']:,} parameters, {report['seconds']:.0f} s"


def markdown(comparison: dict[str, Any]) -> str:
    """The table of a comparison for a text."""
    head, rows = table_rows(comparison)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
