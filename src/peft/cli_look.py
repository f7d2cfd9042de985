"""The commands of :mod:`peft.cli` that look at things and take them along: report, inspect, methods, plan, merge, convert, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli import (
    LEARN,
    LOOK,
    SHIP,
    DataOption,
    Folder,
    MethodOption,
    ModelOption,
    Overrides,
    TaskOption,
    app,
    err,
    print_table,
    recipe_of,
    tell,
)


@app.command(rich_help_panel=LOOK)
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run or of a comparison.", show_default=False)],
) -> None:
    """Write the report of a run or a comparison: one HTML file that needs no network, and its pictures.

    Example: `peft report runs/imdb-lora`
    """
    from .recipes.report import write_report

    tell(f"Report: {write_report(folder)}")


@app.command(rich_help_panel=LOOK)
def inspect(
    folder: Folder,
    with_base: Annotated[
        bool, typer.Option("--base/--no-base", help="Load the base model to measure against its weights.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in an adapter's folder, and how much it changes each layer.

    Example: `peft inspect runs/imdb-lora`
    """
    from .recipes.inspecting import inspect_adapter

    found = inspect_adapter(folder, with_base)
    if as_json:
        print(json.dumps(found))
        return
    rows = [[k, str(found[k])] for k in ("method", "task", "base", "version")]
    rows += [["labels", ", ".join(found["labels"])]] if found["labels"] else []
    rows += [["options", ", ".join(f"{k}={v}" for k, v in found["options"].items())]]
    rows += [["parameters", f"{found['parameters']:,} in {found['tensors']} tensors, {', '.join(found['dtypes'])}"]]
    rows += [["size", f"{found['bytes'] / 1000:,.1f} kB"]]
    print_table(["", str(folder)], rows)
    if found["not_finite"]:
        err.print(f"[bold red]Not finite:[/] {', '.join(found['not_finite'])}")
    most = max((layer["share"] or layer["norm"] for layer in found["layers"]), default=1.0) or 1.0
    measured = any(layer["share"] is not None for layer in found["layers"])
    lines = []
    for layer in found["layers"]:
        bar = "█" * round(24 * ((layer["share"] if measured else layer["norm"]) or 0) / most)
        share = [f"{layer['share']:.2%}"] if measured else []
        lines.append([layer["name"], f"{layer['norm']:.3f}", *share, bar])
    head = ["layer", "norm of the change", "of the weight", ""] if measured else ["tensor", "norm", ""]
    print_table(head, lines)
    if found["note"]:
        tell(found["note"])


@app.command("methods", rich_help_panel=LOOK)
def list_methods(
    model: Annotated[str | None, typer.Option("--model", help="Count what each method trains on this model.")] = None,
    task: Annotated[str, typer.Option("--task", help="The task.")] = "sequence-classification",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods: paper, what it supports, learning rate by default, and what each trains on a model.

    Example: `peft methods --model packaged:minilm`
    """
    from .core.errors import did_you_mean
    from .recipes.inspecting import method_table
    from .recipes.rates import learning_rate
    from .recipes.recipe import TASKS, ModelSection

    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}{did_you_mean(task, TASKS)}. Tasks are {', '.join(TASKS)}.")
    found = method_table(ModelSection(name=model) if model else None, task)
    for row in found:
        row["learning_rate"] = learning_rate(row["method"], task)
    if as_json:
        print(json.dumps(found))
        return
    head = ["method", "what it trains", "arXiv", "supports", "rate", *(["parameters", "share"] if model else [])]
    lines = []
    for r in found:
        line = [r["method"], r["what"], r["paper"] or "", ", ".join(r["supports"]), f"{r['learning_rate']:.0e}"]
        if model:
            line += [f"{r['parameters']:,}", f"{r['share']:.3%}"] if r["parameters"] else ["–", ""]
        lines.append(line)
    print_table(head, lines)
    for r in found:
        if r["problem"]:
            tell(f"{r['method']}: {r['problem']}")


@app.command(rich_help_panel=LEARN)
def plan(
    recipe: Overrides = None,
    task: TaskOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    method: MethodOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a run will adapt, train, need and take, after three steps that change nothing.

    Example: `peft plan recipe.yaml method=ia3`
    """
    from .recipes.inspecting import plan as plan_of

    source, overrides = recipe_of(recipe, {"task": task, "model": model, "data": data, "method": method})
    found = plan_of(source, *overrides, tell=(lambda line: None) if as_json else tell)
    if as_json:
        print(json.dumps(found))
        return
    memory = sum(found[k] for k in ("weights", "gradients", "optimizer", "activations"))
    print_table(["plan", f"{found['method']} on {found['device']}"], [
        ["adapted modules", ", ".join(f"{n} × {kind}" for kind, n in found["kinds"].items()) or "none"],
        ["trained parameters", f"{found['trained_parameters']:,} of {found['parameters']:,}"],
        ["learning rate", f"{found['learning_rate']:.1e}"],
        ["memory: weights", _megabytes(found["weights"])],
        ["memory: gradients", _megabytes(found["gradients"])],
        ["memory: optimiser", _megabytes(found["optimizer"])],
        [f"memory: activations (at {found['longest']} tokens, at most)", _megabytes(found["activations"])],
        ["memory together", _megabytes(memory)],
        [f"peak of {'the GPU' if found['device'] == 'cuda' else 'the process'}, as measured", _megabytes(found["process"])],
        ["time of a step", f"{1000 * found['step_seconds']:.0f} ms"],
        ["steps", f"{found['steps']:,}"],
        ["time of the training", f"{found['seconds'] / 60:.1f} minutes"],
    ])  # fmt: skip


def _megabytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MB"


@app.command(rich_help_panel=SHIP)
def merge(
    folder: Folder,
    target: Annotated[Path, typer.Argument(help="Folder for the plain model.", show_default=False)],
) -> None:
    """Add an adapter to its base model's weights: a plain model, that runs without this library.

    Example: `peft merge runs/imdb-lora merged`
    """
    from .recipes.shipping import merge_run

    for line in merge_run(folder, target):
        tell(line)


@app.command(rich_help_panel=SHIP)
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run or an adapter (adapter-hub's too), or a file of LyCORIS.", show_default=False
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Folder for the new adapter.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            help="lora; peft: the same method in this library's files; prefix-tuning or p-tuning-v2: the one as the other."
        ),
    ] = "lora",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the update, with --to lora.")] = 16,
    base: Annotated[str | None, typer.Option(help="The base model, where the source does not name it.")] = None,
) -> None:
    """Write an adapter, or a whole trained model, as LoRA, which every library and server reads; or another library's files as ours.

    Example: `peft convert runs/imdb-loha as-lora --rank 32`

    A file of LyCORIS: `peft convert style.safetensors style --to peft --base runs/base-model`
    """
    from .recipes.converting import convert as lines_of

    for line in lines_of(source, target, to, rank, base):
        tell(line)


@app.command(rich_help_panel=SHIP)
def export(
    folder: Folder,
    target: Annotated[Path, typer.Argument(help="Folder for model.onnx.", show_default=False)],
    int8: Annotated[bool, typer.Option("--int8", help="Write a dynamically quantised model too.")] = False,
) -> None:
    """Write the merged model as ONNX, check it against torch, and print size and speed.

    Example: `peft export runs/imdb-lora onnx --int8`
    """
    from .recipes.shipping import export_onnx

    for line in export_onnx(folder, target, int8):
        tell(line)
