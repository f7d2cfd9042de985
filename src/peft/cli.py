"""The command line: ``peft train``, ``peft predict``, … Commands are thin; the work is in :mod:`peft.recipes`."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from typer.core import TyperGroup
except ImportError as error:  # the library itself needs none of these
    raise SystemExit(
        f"The command line needs {error.name}, which is not installed: pip install 'peft[train]'."
    ) from None

if TYPE_CHECKING:
    from .recipes.finetune import Result

# What is raised for a wrong option; typer brings its own copy of click in newer versions.
UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

# Into a file or a pipe tables are as wide as they need to be.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Friendly(TyperGroup):
    """A group whose commands end in one clear line where something is wrong, in a traceback with ``--debug``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take ``--debug`` wherever it stands."""
        ctx.meta["debug"] = "--debug" in args or bool(os.environ.get("PEFT_DEBUG"))
        return super().parse_args(ctx, [a for a in args if a != "--debug"])

    def main(
        self,
        args: Any = None,
        prog_name: str | None = "peft",
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Say in one line what is wrong with a command, in place of a box of four."""
        given = sys.argv[1:] if args is None else list(args)
        alone = not given and standalone_mode  # the help, and its own exit status
        try:
            code = super().main(
                args, prog_name, complete_var, standalone_mode=alone, windows_expand_args=windows_expand_args, **extra
            )
        except UsageError as error:
            if not standalone_mode:
                raise
            said = error.format_message().rstrip(".")
            where = error.ctx.command_path if getattr(error, "ctx", None) is not None else prog_name
            _print_error(f"{said}{'' if said.endswith('?') else '.'} `{where} --help` tells more.")
            code = error.exit_code
        except typer.Abort:
            if not standalone_mode:
                raise
            code = 130
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except (UsageError, typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            message, code = str(error) or "Stopped.", 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `peft … | head` is no error
            raise typer.Exit(0) from None
        except Exception as error:
            if ctx.meta["debug"]:
                raise
            message, code = _explain(error), 1
        if code != 130:
            _print_error(message)
        else:
            err.print(message, markup=False)
        raise typer.Exit(code)


def _print_error(message: str) -> None:
    err.print("[bold red]Error:[/] ", end="")
    err.print(message, markup=False)


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"No space is left on the device for {error.filename or 'the result'}. Free some, or choose another folder."
        )
    if isinstance(error, PermissionError):
        return f"No permission to write {error.filename}. Choose another folder."
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, (ValueError, NotImplementedError, OSError)):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]} (--debug shows where)"


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    from .core.errors import PeftWarning

    if issubclass(category, PeftWarning):
        err.print("[yellow]Note:[/] ", end="")
        err.print(str(message), markup=False)


app = typer.Typer(
    name="peft", cls=Friendly, no_args_is_help=True, rich_markup_mode="markdown", add_completion=False, pretty_exceptions_enable=False,
    help="Fine-tune pretrained models with small adapters: from data to a trained, measured, explained adapter in one command.",
    epilog="Start: `peft init sequence-classification recipe.yaml`, then `peft train recipe.yaml`.",
)  # fmt: skip


def _print_version(asked: bool) -> None:
    if asked:
        from . import __version__

        out.print(__version__)
        raise typer.Exit


@app.callback()
def _peft(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    pass


# The panels that `peft --help` sorts the commands into.
LEARN, USE, LOOK, SHIP = "Train", "Use", "Look", "Take along"

Folder = Annotated[Path, typer.Argument(help="Folder of a run of `peft train`, or of an adapter.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Recipe file, and key=value for keys of it.", show_default=False)
]


def recipe_of(args: list[str] | None, given: dict[str, Any]) -> tuple[Any, list[str]]:
    """The recipe and overrides out of the arguments and options of a command."""
    files = [a for a in args or [] if "=" not in a]
    overrides = [a for a in args or [] if "=" in a]
    if len(files) > 1:
        raise ValueError(
            f"One recipe is expected, got {len(files)}: {', '.join(files)}. Overrides are written key=value."
        )
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    if files:
        return Path(files[0]), options + overrides
    if not given.get("task") and not any(o.startswith("task=") for o in overrides):
        raise ValueError("Name a recipe file (`peft init` writes one), or give --task, --model and --data.")
    return {}, options + overrides


TaskOption = Annotated[str | None, typer.Option("--task", help="sequence-classification, token-classification, …")]
ModelOption = Annotated[str | None, typer.Option("--model", help="Hub id, folder, .gguf file, packaged:minilm …")]
DataOption = Annotated[str | None, typer.Option("--data", help="File, folder, Hub id, packaged:imdb …")]
MethodOption = Annotated[str | None, typer.Option("--method", help="`peft methods` lists them.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows at once.")]
OutOption = Annotated[str | None, typer.Option("--out", help="Folder of the result.")]


@app.command(rich_help_panel=LEARN)
def init(
    task: Annotated[str, typer.Argument(help="The task.")] = "sequence-classification",
    file: Annotated[Path, typer.Argument(help="The file to write; - prints it.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a commented recipe for a task.

    Example: `peft init token-classification ner.yaml`
    """
    from .core.errors import did_you_mean
    from .recipes.recipe import TASKS
    from .recipes.templates import template

    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}{did_you_mean(task, TASKS)}. Tasks are {', '.join(TASKS)}.")
    text = template(task)
    if str(file) == "-":
        print(text, end="")
        return
    if file.exists() and not force:
        raise ValueError(f"{file} exists. Choose another name, or --force to replace it.")
    if not file.parent.is_dir():
        raise ValueError(f"There is no folder {str(file.parent)!r} to write {file.name} into.")
    file.write_text(text, encoding="utf-8")
    out.print(f"{file} is written. Change what you like, then: peft train {file}")


@app.command(rich_help_panel=LEARN)
def train(
    recipe: Overrides = None,
    task: TaskOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    method: MethodOption = None,
    folder: OutOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the same folder.")] = False,
    with_report: Annotated[
        bool,
        typer.Option("--report/--no-report", help="Write report.html and its pictures into the folder at the end."),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result alone.")] = False,
) -> None:
    """Train by a recipe, measure on rows held back, and save.

    Example: `peft train recipe.yaml method=ia3 training.epochs=5`

    Without a file: `peft train --task sequence-classification --model packaged:minilm --data reviews.csv --method lora`
    """
    from .recipes.finetune import finetune

    source, overrides = recipe_of(recipe, {"task": task, "model": model, "data": data, "method": method, "out": folder})
    with _progress_bar(quiet) as advance:
        result = finetune(
            source, *overrides, resume=resume, overwrite=overwrite, tell=None if quiet else tell, advance=advance
        )
    if int(os.environ.get("RANK", "0")) == 0:
        _show_result(result)
        if with_report:
            tell(f"Report: {result.write_report()}")


def tell(line: str) -> None:
    out.print(line, markup=False)


class _progress_bar:
    """A bar on a terminal; nothing in a log file."""

    def __init__(self, quiet: bool) -> None:
        self.shown = out.is_terminal and not quiet

    def __enter__(self) -> Any:
        if not self.shown:
            return None
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(), console=out, transient=True,
        )  # fmt: skip
        self.row: Any = None
        return self._advance

    def _advance(self, step: int, steps: int, loss: float) -> None:
        if self.row is None:
            self.bar.start()
            self.row = self.bar.add_task("", total=steps, loss=loss)
        self.bar.update(self.row, completed=step, loss=loss)

    def __exit__(self, *_: Any) -> None:
        if self.shown:
            self.bar.stop()


def _show_result(result: Result) -> None:
    report = result.report
    if "tasks" in report:
        for name, part in report["tasks"].items():
            _show_metrics(part["test"] or part["validation"] or {}, name)
        for line in report["costs"]:
            out.print(line, markup=False)
    else:
        where = "test" if report["test"] else "validation"
        _show_metrics(result.metrics, where)
        speed = f"{report['step_ms']:.0f} ms a step, " if report["step_ms"] else ""
        size = f"{report['peak_mb']:.0f} MB at most; {report['bytes'] / 1000:,.0f} kB on disk."
        out.print(f"{report['seconds']:.0f} s of training, {speed}{size}")
        _show_answers(report["examples"])
    tell(f'In {result.folder}. To use it: peft predict {result.folder} "TEXT"')


def _show_answers(answers: list[dict[str, Any]]) -> None:
    from .recipes.report import answer_in_words, asked_in_words

    for answer in answers:
        tell(f"  {answer_in_words(answer)}: {asked_in_words(answer)}")


def _show_metrics(metrics: dict[str, Any], title: str) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in metrics.items():
        if isinstance(value, (int, float)):
            table.add_row(name, f"{value:,.0f}" if isinstance(value, int) else f"{value:.4f}")
    out.print(table)


@app.command(rich_help_panel=USE)
def evaluate(
    folder: Folder,
    data: DataOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure on so many rows.")] = None,
    batch_size: BatchSize = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a trained model: on the rows that its run held back, or on other data.

    Example: `peft evaluate runs/sequence-classification-lora --data newer-reviews.csv`
    """
    from .recipes.predict import evaluate_run

    metrics, notes = evaluate_run(folder, data, batch_size, limit)
    if as_json:
        print(json.dumps({k: v for k, v in metrics.items() if k != "details"}, default=float))
        return
    for note in notes:
        tell(note)
    _show_metrics(metrics, str(folder))


@app.command(rich_help_panel=USE)
def predict(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of a run, or of an adapter.", show_default=False)
    ] = None,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts, or JSON objects with columns.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="CSV, JSON lines, …; - reads lines from stdin.")
    ] = None,
    adapters: Annotated[str | None, typer.Option(help="Several runs on one base: name=folder,name=folder.")] = None,
    batch_size: BatchSize = 32,
) -> None:
    """Answer for new inputs: one JSON object a line.

    Example: `peft predict runs/imdb-lora "What a film!"`

    From a file: `peft predict runs/imdb-lora --file new.csv > answers.jsonl`; several adapters at once, on one base model:
    `peft predict --adapters mood=runs/mood,topic=runs/topic "What a film!"`
    """
    from .recipes.multitask import parse_adapters, predict_tasks, task_folders
    from .recipes.predict import predict as answers_of
    from .recipes.runs import load_run

    if adapters is not None:
        given = [*([str(folder)] if folder is not None else []), *(texts or [])]
        _print_lines(predict_tasks(parse_adapters(adapters), _texts(given, file), batch_size))
        return
    if folder is None:
        raise ValueError('Name the folder of a run: peft predict FOLDER "a text".')
    if folders := task_folders(folder):
        _print_lines(predict_tasks(folders, _texts(texts, file), batch_size))
        return
    model, task = load_run(folder)
    _print_lines(answers_of(model, task, _rows(task, texts, file), batch_size))


@app.command(rich_help_panel=USE)
def generate(
    folder: Folder,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts.", show_default=False)] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="CSV, JSON lines, …; - reads lines from stdin.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Length of an answer at most, in tokens.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With --sample.")] = 0,
) -> None:
    """Generate text: one JSON object a line.

    Example: `peft generate runs/chat "Name three rivers." --max-new-tokens 40`
    """
    import torch

    from .recipes.predict import predict as answers_of
    from .recipes.runs import load_run

    if temperature <= 0:
        raise ValueError("--temperature should be above 0; without --sample the likeliest token is taken.")
    if not 0 < top_p <= 1:
        raise ValueError("--top-p should be above 0 and at most 1.")
    model, task = load_run(folder)
    if not task.generates:
        raise ValueError(f"A model for {task.name} generates no text; use `peft predict`.")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
    if sample:
        torch.manual_seed(seed)
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
    _print_lines(answers_of(model, task, _rows(task, prompts, file), **options))


def _rows(task: Any, texts: list[str] | None, file: Path | None) -> list[Any]:
    from .recipes.predict import rows_of_file

    if file is not None and str(file) != "-":
        return rows_of_file(file, task)
    rows = task.rows_from_text(texts or list(_stdin(file)))
    if not rows:
        raise ValueError("There is nothing to answer: give texts, --file, or lines on stdin.")
    return rows


def _texts(given: list[str] | None, file: Path | None) -> list[str]:
    """Plain texts, for several adapters at once."""
    from .recipes.sources import read_file

    if not given and file is not None and str(file) != "-":
        table = read_file(file)
        column = next((c for c in ("text", *table.columns) if c in table.columns), "")
        return [str(row.get(column) or "") for row in table.rows]
    return given or list(_stdin(file))


def _stdin(file: Path | None) -> Iterable[str]:
    if file is None and sys.stdin.isatty():
        return []
    return [line.strip() for line in sys.stdin if line.strip()]


def _print_lines(answers: Iterable[dict[str, Any]]) -> None:
    for answer in answers:
        print(json.dumps(answer, ensure_ascii=False, default=float), flush=True)


@app.command(rich_help_panel=LEARN)
def compare(
    recipe: Overrides = None,
    task: TaskOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    names: Annotated[
        str, typer.Option("--methods", help="Names, with commas between; all that work without options when not given.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 1,
    search: Annotated[
        bool, typer.Option("--search", help="Choose each learning rate on the validation rows first.")
    ] = False,
    train_only: Annotated[bool, typer.Option("--train-only", help="No report: for workflows.")] = False,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder of the comparison.")] = None,
) -> None:
    """Train with several methods and seeds under one budget, and write the report. Started again, it goes on.

    Example: `peft compare recipe.yaml --methods lora,ia3,prefix-tuning,full,head --seeds 3`
    """
    from .recipes.compare import compare as run
    from .recipes.report import table_rows

    source, overrides = recipe_of(recipe, {"task": task, "model": model, "data": data})
    chosen = [n.strip() for n in names.split(",") if n.strip()]
    options: dict[str, Any] = {"seeds": seeds, "out": folder, "search": search, "train_only": train_only}
    comparison = run(source, chosen, *overrides, **options, tell=tell)
    if not train_only:
        print_table(*table_rows(comparison))
        where = folder or Path("runs") / f"compare-{comparison['task']}"
        tell(f"Report: {where / 'report.html'}")
    if not any(r["report"] for r in comparison["runs"]):
        raise ValueError(f"Every run failed. The first said: {comparison['runs'][0]['error']}")


def print_table(head: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*head)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)


from . import cli_look as _further  # noqa: E402, F401 - registers the other commands


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
