"""The report of a run or a comparison: one HTML file that needs nothing else, and its pictures as PNG files."""

from __future__ import annotations

import base64
import html
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..core.files import write_atomically
from . import plots
from .errors import RecipeError
from .runs import METRICS_FILE, RECIPE_FILE

COMPARISON_FILE = "comparison.json"
COSTS = (
    ("step_ms", "ms a step", "Median time of a step"),
    ("peak_mb", "MB", "Peak memory of the process"),
    ("bytes", "kB", "Size on disk"),
)

STYLE = """
:root { color-scheme: light; --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; --back: #f8fafc; --accent: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: var(--back); }
main { max-width: 60rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .4rem 0 .2rem; } h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
.sub { color: var(--soft); margin: 0 0 1.2rem; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; margin: 0 0 1rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; }
.numbers div { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .7rem; }
.numbers b { display: block; font-size: 1.3rem; color: var(--accent); font-variant-numeric: tabular-nums; }
.numbers span { color: var(--soft); font-size: .85rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; align-items: start; }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; } figcaption { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; } .n { text-align: right; } td { white-space: nowrap; }
td.text:first-child { min-width: 15rem; } td.text { min-width: 5rem; white-space: normal; overflow-wrap: anywhere; }
tr.best td { background: #eff6ff; font-weight: 600; }
pre { overflow-x: auto; background: var(--back); padding: .7rem; border-radius: .5rem; font-size: .85rem; margin: 0; }
pre { white-space: pre-wrap; }
.failed { color: #b91c1c; }
@media print { body { background: #fff; font-size: 11pt; } main { max-width: none; padding: 0; }
  section { break-inside: avoid; border: 0; padding: .4rem 0; } section.long { break-inside: auto; } .scroll { overflow: visible; } }
"""


class Page:
    """A page that grows section by section.

    Args:
        title: Its heading.
        subtitle: Below it.
    """

    def __init__(self, title: str, subtitle: str) -> None:
        self.title, self.subtitle = title, subtitle
        self.parts: list[str] = []
        self.pictures: dict[str, bytes] = {}

    def section(self, title: str, body: str, long: bool = False) -> None:
        """Add a section."""
        self.parts.append(f"<section{' class=long' if long else ''}><h2>{html.escape(title)}</h2>{body}</section>")

    def picture(self, name: str, png: bytes, caption: str) -> str:
        """A picture, kept as a file too."""
        self.pictures[f"{name}.png"] = png
        data = base64.b64encode(png).decode()
        text = html.escape(caption)
        width = int.from_bytes(png[16:20], "big") * 96 // plots.STYLE["figure.dpi"]  # type: ignore[operator]
        image = f'<img style="max-width: {width}px" src="data:image/png;base64,{data}" alt="{text}">'
        return f"<figure>{image}<figcaption>{text}</figcaption></figure>"

    def render(self) -> str:
        """The page."""
        title = html.escape(self.title)
        viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{viewport}<title>{title}</title>'
            f"<style>{STYLE}</style></head><body><main><h1>{title}</h1>"
            f'<p class="sub">{html.escape(self.subtitle)}</p>{"".join(self.parts)}</main></body></html>\n'
        )

    def write(self, folder: Path) -> Path:
        """Write ``report.html`` and the pictures into a folder."""
        write_atomically(folder, {"report.html": self.render().encode(), **self.pictures})
        return folder / "report.html"


def write_report(folder: Path) -> Path:
    """Write the report of a run or a comparison into its folder.

    Args:
        folder: With ``metrics.json`` or ``comparison.json``.

    Returns:
        The path of the HTML file.

    Raises:
        RecipeError: There is neither.
    """
    if (folder / COMPARISON_FILE).exists():
        return _comparison(json.loads((folder / COMPARISON_FILE).read_text(encoding="utf-8"))).write(folder)
    if (folder / METRICS_FILE).exists():
        report = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        if "tasks" in report:
            raise RecipeError(
                f"{folder} holds several tasks: name one of {', '.join(str(folder / n) for n in report['tasks'])}."
            )
        recipe = (folder / RECIPE_FILE).read_text(encoding="utf-8")
        return _run(report, recipe).write(folder)
    raise RecipeError(f"{str(folder)!r} holds no finished run and no comparison.")


# -- one run -----------------------------------------------------------------------------------------------------------


def _run(report: dict[str, Any], recipe: str) -> Page:
    page = Page(
        f"{report['task']}: {report['method']}", f"{report['model']}, seed {report['seed']}, {report['device']}"
    )
    split = "test" if report["test"] else "validation"
    found = report[split] or {}
    numbers = [(name, _number(value)) for name, value in found.items() if isinstance(value, (int, float))]
    page.section(f"On the {split} rows", _numbers(numbers))
    share = report["trained_parameters"] / report["parameters"]
    cost = [
        ("trained parameters", f"{report['trained_parameters']:,}"),
        ("of all", f"{share:.3%}"),
        ("ms a step", _number(report["step_ms"])),
        ("MB at most", _number(report["peak_mb"])),
        ("kB on disk", f"{report['bytes'] / 1000:,.0f}"),
        ("s of training", _number(report["seconds"])),
    ]
    page.section("Cost", _numbers(cost))
    page.section("Training", f'<div class="pictures">{"".join(_curves(page, report))}</div>')
    details = report.get("details") or {}
    pictures = []
    if details.get("confusion"):
        png = plots.confusion(details["confusion"], details["labels"])
        pictures.append(page.picture("confusion", png, "Confusion matrix: rows are the truth"))
    if details.get("scatter"):
        pictures.append(page.picture("scatter", plots.scatter(details["scatter"]), "True values and predicted ones"))
    if pictures:
        page.section("Where it is right", f'<div class="pictures">{"".join(pictures)}</div>')
    if details.get("table"):
        rows = [
            [r["label"], *(f"{r[k]:.3f}" for k in ("precision", "recall", "f1")), f"{r['rows']:,}"]
            for r in details["table"]
        ]
        page.section("By label", _table(["label", "precision", "recall", "F1", "rows"], rows))
    if details.get("wrong"):
        rows = [[w["text"], w["truth"], w["predicted"]] for w in details["wrong"]]
        usual = "Examples it gets wrong" + (", the surest first" if details.get("confusion") else "")
        title = details.get("wrong_title", usual)
        page.section(title, _table(["text", "truth", "predicted"], rows, text=(0, 1, 2)), long=True)
    page.section("Recipe", f"<pre>{html.escape(recipe)}</pre>")
    return page


def _curves(page: Page, report: dict[str, Any]) -> Iterable[str]:
    history = report["history"]
    losses = {"training": [(e["step"], e["loss"]) for e in history if "loss" in e]}
    if any("eval_loss" in e for e in history):
        losses["validation"] = [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]
    if losses["training"]:
        yield page.picture("loss", plots.curves(losses, "step", "loss"), "Loss")
    key = f"eval_{report['metric']}"
    values = [(e["step"], e[key]) for e in history if key in e]
    if values and report["metric"] != "loss":
        yield page.picture(
            "metric",
            plots.curves({report["metric"]: values}, "step", report["metric"]),
            f"Validation {report['metric']}",
        )


# -- a comparison ------------------------------------------------------------------------------------------------------


def summary(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each method: metric over seeds, and what it cost; the best first, failures last."""
    rows = []
    for method in comparison["methods"]:
        runs = [r for r in comparison["runs"] if r["method"] == method]
        done = [r["report"] for r in runs if r["report"]]
        failed = [r for r in runs if r["error"]]
        row: dict[str, Any] = {
            "method": method,
            "seeds": len(done),
            "failed": len(failed),
            "error": failed[0]["error"] if failed else None,
        }
        if done:
            name = done[0]["metric"]
            values = [(r["test"] or r["validation"])[name] for r in done]
            row |= {
                "metric": name, "value": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "greater_is_better": done[0]["greater_is_better"], "learning_rate": done[0]["learning_rate"],
                "trained_parameters": done[0]["trained_parameters"], "bytes": done[0]["bytes"],
                **{k: statistics.fmean(r[k] for r in done) for k in ("step_ms", "peak_mb", "seconds")},
            }  # fmt: skip
        rows.append(row)
    sign = -1 if next((r["greater_is_better"] for r in rows if r["seeds"]), True) else 1
    return sorted(rows, key=lambda r: (r["seeds"] == 0, sign * r.get("value", 0.0)))


def table_rows(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of a comparison: head and rows."""
    rows = summary(comparison)
    name = next((r["metric"] for r in rows if r["seeds"]), "metric")
    head = [
        "method",
        name,
        "trained parameters",
        "ms a step",
        "MB at most",
        "kB on disk",
        "s of training",
        "learning rate",
        "seeds",
    ]
    body = []
    for r in rows:
        if not r["seeds"]:
            body.append([r["method"], "failed", *[""] * 6, "0"])
            continue
        value = f"{r['value']:.3f}" + (f" ± {r['deviation']:.3f}" if r["seeds"] > 1 else "")
        body.append([
            r["method"], value, f"{r['trained_parameters']:,}", f"{r['step_ms']:.0f}", f"{r['peak_mb']:,.0f}", f"{r['bytes'] / 1000:,.0f}",
            f"{r['seconds']:.0f}", f"{r['learning_rate']:.0e}", str(r["seeds"]),
        ])  # fmt: skip
    return head, body


def _comparison(comparison: dict[str, Any]) -> Page:
    rows = summary(comparison)
    done = [r for r in rows if r["seeds"]]
    page = Page(
        f"{comparison['task']}: {len(rows)} methods",
        f"{comparison['model']}, {comparison['data']}, seeds {comparison['seeds']}",
    )
    head, body = table_rows(comparison)
    page.section("Results on rows held back", _table(head, body, numbers=range(1, len(head)), best=0 if done else None))
    if done:
        name = done[0]["metric"]
        deviations = {r["method"]: r["deviation"] for r in done}
        trade = {r["method"]: (r["trained_parameters"], r["value"], r["deviation"]) for r in done}
        values = {r["method"]: r["value"] for r in done}
        learning = plots.curves(_learning(comparison, name), "step", f"validation {name}")
        against = f"{name} against trained parameters; bars: one standard deviation over seeds"
        pictures = [
            page.picture("tradeoff", plots.against(trade, "trained parameters", name), against),
            page.picture("results", plots.bars(values, name, deviations), f"{name}, best first"),
            page.picture("learning", learning, f"Validation {name} while training, first seed"),
        ]
        for key, unit, caption in COSTS:
            scale = 1000 if key == "bytes" else 1
            png = plots.bars({r["method"]: r[key] / scale for r in done}, unit)
            pictures.append(page.picture(key, png, caption))
        page.section("Pictures", f'<div class="pictures">{"".join(pictures)}</div>', long=True)
        _best_details(page, comparison, done[0]["method"])
    failures = [[r["method"], r["error"]] for r in rows if r["failed"]]
    if failures:
        page.section("Failures", _table(["method", "what it said"], failures, text=(1,)))
    page.section("Recipe", f"<pre>{html.escape(comparison['recipe'])}</pre>")
    return page


def _learning(comparison: dict[str, Any], name: str) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for run in comparison["runs"]:
        if run["report"] and run["method"] not in series:
            series[run["method"]] = [
                (e["step"], e[f"eval_{name}"]) for e in run["report"]["history"] if f"eval_{name}" in e
            ]
    return {method: points for method, points in series.items() if points}


def _best_details(page: Page, comparison: dict[str, Any], method: str) -> None:
    report = next(r["report"] for r in comparison["runs"] if r["method"] == method and r["report"])
    details = report.get("details") or {}
    if details.get("confusion"):
        picture = page.picture(
            "confusion", plots.confusion(details["confusion"], details["labels"]), f"{method}: rows are the truth"
        )
        page.section(f"Where {method} is right", f'<div class="pictures">{picture}</div>')
    if details.get("wrong"):
        rows = [[w["text"], w["truth"], w["predicted"]] for w in details["wrong"][:10]]
        page.section(
            f"Examples that {method} gets wrong", _table(["text", "truth", "predicted"], rows, text=(0,)), long=True
        )


# -- pieces ------------------------------------------------------------------------------------------------------------


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def _numbers(pairs: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in pairs)
    return f'<div class="numbers">{cells}</div>'


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    numbers: Iterable[int] = (),
    text: Iterable[int] = (),
    best: int | None = None,
) -> str:
    kinds = {**dict.fromkeys(numbers, ' class="n"'), **dict.fromkeys(text, ' class="text"')}
    top = "".join(
        f"<th{kinds.get(i, '') if 'n' in kinds.get(i, '') else ''}>{html.escape(h)}</th>" for i, h in enumerate(head)
    )
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(f"<td{kinds.get(i, '')}>{html.escape(_text(cell))}</td>" for i, cell in enumerate(row))
        body += f"<tr{' class=best' if number == best else ''}>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
