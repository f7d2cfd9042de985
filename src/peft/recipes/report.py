"""The report of a run or a comparison: one HTML file that needs nothing else, and its pictures as PNG files."""

from __future__ import annotations

import base64
import html
import json
import re
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
    ("step_ms", "milliseconds", "Time of a step, median"),
    ("peak_mb", "megabytes", "Memory of the process at its peak"),
    ("bytes", "kilobytes", "Size on disk"),
)
# Names of metrics, as people write them.
METRICS = {
    "accuracy": "accuracy", "f1": "F1", "f1_macro": "F1, macro", "f1_micro": "F1, micro", "mcc": "Matthews correlation", "bleu": "BLEU",
    "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "exact_match": "exact match",
    "mae": "mean absolute error",
    "pearson": "Pearson correlation", "spearman": "Spearman correlation", "token_accuracy": "token accuracy",
}  # fmt: skip


class Page:
    """A page that grows section by section.

    Args:
        title: Its heading.
        subtitle: Below it.
        lead: What it comes to, in a sentence or two.
    """

    def __init__(self, title: str, subtitle: str, lead: str = "") -> None:
        self.title, self.subtitle, self.lead = title, subtitle, lead
        self.parts: list[str] = []
        self.pictures: dict[str, bytes] = {}
        self.of = ""
        """Put before the headings and the pictures' names, where a page is of several runs."""

    def section(self, title: str, body: str, long: bool = False) -> None:
        """Add a section; a long one may be cut in print."""
        heading = html.escape(f"{self.of}: {title}" if self.of else title)
        self.parts.append(f"<section{' class=long' if long else ''}><h2>{heading}</h2>{body}</section>")

    def picture(self, name: str, png: bytes, caption: str) -> str:
        """A picture, kept as a file too."""
        self.pictures[f"{self.of}-{name}.png" if self.of else f"{name}.png"] = png
        data = base64.b64encode(png).decode()
        text = html.escape(caption)
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        shown = width * 96 // plots.STYLE["figure.dpi"]
        image = f'<img width="{width}" height="{height}" style="max-width: {shown}px" src="data:image/png;base64,{data}" alt="{text}">'
        return f"<figure><figcaption>{text}</figcaption>{image}</figure>"

    def render(self) -> str:
        """The page."""
        from .. import __version__

        title = html.escape(self.title)
        style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
        viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        lead = f'<p class="lead">{html.escape(self.lead)}</p>' if self.lead else ""
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{viewport}<meta name="color-scheme" content="light dark">'
            f"<title>{title}</title><style>{style}</style></head><body><main><header><h1>{title}</h1>"
            f'<p class="sub">{html.escape(self.subtitle)}</p>{lead}</header>{"".join(self.parts)}'
            f"<footer>Written by peft {__version__}. All numbers are in metrics.json beside this file, the pictures in PNG files.</footer>"
            "</main></body></html>\n"
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
            return _several(report).write(folder)
        page = Page(f"{_title(report['task'])}: {report['method']}", _subtitle(report), _lead(report))
        _run(page, report)
        page.section("Recipe", f"<pre>{html.escape((folder / RECIPE_FILE).read_text(encoding='utf-8'))}</pre>")
        return page.write(folder)
    if not folder.is_dir():
        raise RecipeError(f"There is no folder {str(folder)!r}.")
    raise RecipeError(f"{str(folder)!r} holds no finished run and no comparison.")


# -- one run -----------------------------------------------------------------------------------------------------------


def _title(name: str) -> str:
    name = name.replace("-", " ").replace("causal lm", "causal language modelling")
    return name[:1].upper() + name[1:]


def _subtitle(report: dict[str, Any]) -> str:
    return " · ".join(
        str(p) for p in (report["model"], report.get("data"), f"seed {report['seed']}", report["device"]) if p
    )


def _held_back(report: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The rows that count, and what was measured on them."""
    return ("test", report["test"]) if report["test"] else ("validation", report["validation"] or {})


def _lead(report: dict[str, Any]) -> str:
    """A run in two or three sentences."""
    split, found = _held_back(report)
    rows = report.get("rows", {})
    share = report["trained_parameters"] / report["parameters"]
    on = f" on {rows['train']:,} rows" if "train" in rows else ""
    said = f"{report['method']} trained {report['trained_parameters']:,} of {report['parameters']:,} parameters ({share:.2%}){on}, "
    said += f"{report['epochs'] or 0:.3g} times over."
    if report["metric"] in found:
        seen = f"{rows[split]:,} rows" if split in rows else "rows"
        said += f" On {seen} that it was not trained on it reaches {_metric(report['metric'])} {found[report['metric']]:.3f}."
    confusion = (report.get("details") or {}).get("confusion")
    if confusion and report["metric"] == "accuracy":
        counts = [sum(row) for row in confusion]
        commonest = report["details"]["labels"][counts.index(max(counts))]
        said += f" To answer “{commonest}” each time would reach {max(counts) / sum(counts):.3f}."
    return said


def _run(page: Page, report: dict[str, Any]) -> None:
    """The sections of one run."""
    split, found = _held_back(report)
    first = [report["metric"]] if report["metric"] in found else []
    names = [*first, *(n for n, v in found.items() if isinstance(v, (int, float)) and n not in first)]
    numbers = [(_metric(name), _number(found[name])) for name in names]
    page.section(
        f"On the {split} rows", _numbers(numbers, first=bool(first)) if numbers else "<p>No rows were held back.</p>"
    )
    cost = [
        ("trained parameters", f"{report['trained_parameters']:,}"),
        ("of all parameters", f"{report['trained_parameters'] / report['parameters']:.3%}"),
        ("on disk", _size(report["bytes"])),
        ("training", _duration(report["seconds"])),
        ("a step", f"{report['step_ms']:,.0f} ms" if report["step_ms"] else "–"),
        ("memory at its peak", f"{report['peak_mb']:,.0f} MB"),
    ]
    page.section("What it cost", _numbers(cost))
    if curves := list(_curves(page, report)):
        page.section("Training", f'<div class="pictures">{"".join(curves)}</div>')
    details = report.get("details") or {}
    pieces = []
    if details.get("confusion"):
        png = plots.confusion(details["confusion"], details["labels"])
        pieces.append(page.picture("confusion", png, "Confusion matrix: a row for each true label"))
    if details.get("scatter"):
        pieces.append(page.picture("scatter", plots.scatter(details["scatter"]), "True values and predicted ones"))
    if details.get("table"):
        pieces.append(_labels(details["table"]))
    if pieces:
        page.section("Where it is right", f'<div class="beside">{"".join(pieces)}</div>')
    if report.get("examples"):
        page.section("Examples", _answers(report["examples"]), long=True)
    _wrong(page, details)
    if report.get("notes"):
        page.section("Data", "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in report["notes"]) + "</ul>")


def _curves(page: Page, report: dict[str, Any]) -> Iterable[str]:
    history = report["history"]
    losses = {"training": [(e["step"], e["loss"]) for e in history if "loss" in e]}
    if any("eval_loss" in e for e in history):
        losses["validation"] = [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]
    if losses["training"]:
        yield page.picture("loss", plots.curves(losses, "step", "loss"), "Loss")
    key, name = f"eval_{report['metric']}", _metric(report["metric"])
    values = [(e["step"], e[key]) for e in history if key in e]
    if values and report["metric"] != "loss":
        yield page.picture("metric", plots.curves({name: values}, "step", name), f"Validation: {name}")


def _labels(table: list[dict[str, Any]]) -> str:
    """Precision, recall and F1 of each label, F1 drawn too."""
    rows = [[r["label"], r["precision"], r["recall"], r["f1"], f"{r['rows']:,}"] for r in table]
    body = "".join(
        f'<tr><td class="name">{html.escape(str(label))}</td><td class="n">{precision:.3f}</td><td class="n">{recall:.3f}</td>'
        f'<td class="n">{f1:.3f}<span class="share" style="--share: {100 * f1:.0f}%"></span></td><td class="n">{count}</td></tr>'
        for label, precision, recall, f1, count in rows
    )
    head = '<th>label</th><th class="n">precision</th><th class="n">recall</th><th class="n">F1</th><th class="n">rows</th>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _wrong(page: Page, details: dict[str, Any], whose: str = "it", most: int = 20) -> None:
    if not details.get("wrong"):
        return
    title = details.get(
        "wrong_title", f"Examples {whose} gets wrong" + (", the surest first" if details.get("confusion") else "")
    )
    told = any(w["truth"] for w in details["wrong"])
    rows = []
    for w in details["wrong"][:most]:
        sure = f" ({w['score']:.0%})" if w.get("score") is not None else ""
        rows.append([_cut(w["text"]), *([w["truth"]] if told else []), f"{_text(w['predicted'])}{sure}"])
    head = ["text", "truth", "predicted"] if told else ["text", "measured"]
    page.section(title, _table(head, rows, text=range(len(head)), kind="cards"), long=True)


def _answers(answers: Sequence[dict[str, Any]]) -> str:
    """The recipe's examples with what the model says to them."""
    rows = []
    for answer in answers:
        rows.append([asked_in_words(answer), answer_in_words(answer)])
    return _table(["example", "answer"], rows, text=(0, 1), kind="cards")


def asked_in_words(answer: dict[str, Any]) -> str:
    """What an answer is to, on one line."""
    return next((str(answer[k]) for k in ("text", "prompt", "source", "question", "messages") if k in answer), "")


def answer_in_words(answer: dict[str, Any]) -> str:
    """An answer as ``predict`` gives it, on one line."""
    if "label" in answer:
        return f"{answer['label']} ({answer['score']:.0%})"
    if "labels" in answer:
        return ", ".join(answer["labels"]) or "no label"
    if "entities" in answer:
        return ", ".join(f"{e['text']} ({e['type']})" for e in answer["entities"]) or "no entities"
    if "tags" in answer:
        return " ".join(f"{word}/{tag}" for word, tag in answer["tags"])
    return next((str(answer[k]) for k in ("generated", "answer", "value") if k in answer), "")


# -- several tasks -----------------------------------------------------------------------------------------------------


def _several(report: dict[str, Any]) -> Page:
    """Tasks on one base: a table of all, what they cost together, and the sections of each."""
    parts = report["tasks"]
    first = next(iter(parts.values()))
    page = Page(
        f"{len(parts)} tasks on one base",
        f"{first['model']} · seed {first['seed']} · {first['device']}",
        " ".join(report["costs"]),
    )
    rows = []
    for name, part in parts.items():
        _, found = _held_back(part)
        value = f"{_metric(part['metric'])} {found[part['metric']]:.3f}" if part["metric"] in found else "–"
        rows.append(
            [name, part["task"], part["method"], value, f"{part['trained_parameters']:,}", _size(part["bytes"])]
        )
    head = ["adapter", "task", "method", "on rows held back", "trained parameters", "on disk"]
    page.section("Tasks", _table(head, rows, numbers=(4, 5), kind="wide"))
    for name, part in parts.items():
        page.of = name
        _run(page, part)
    page.of = ""
    return page


# -- a comparison ------------------------------------------------------------------------------------------------------


def summary(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each method: metric over seeds, and what it cost; the best first, failures last."""
    rows = []
    for method in comparison["methods"]:
        runs = [r for r in comparison["runs"] if r["method"] == method]
        done = [r["report"] for r in runs if r["report"]]
        failed = [r for r in runs if r["error"]]
        row: dict[str, Any] = {
            "method": method, "seeds": len(done), "failed": len(failed), "error": failed[0]["error"] if failed else None,
        }  # fmt: skip
        if done:
            name = done[0]["metric"]
            values = [(r["test"] or r["validation"])[name] for r in done]
            row |= {
                "metric": name, "value": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "values": values, "greater_is_better": done[0]["greater_is_better"], "learning_rate": done[0]["learning_rate"],
                "trained_parameters": done[0]["trained_parameters"], "bytes": done[0]["bytes"],
                **{k: statistics.fmean(r[k] or 0.0 for r in done) for k in ("step_ms", "peak_mb", "seconds")},
            }  # fmt: skip
        rows.append(row)
    sign = -1 if next((r["greater_is_better"] for r in rows if r["seeds"]), True) else 1
    return sorted(rows, key=lambda r: (r["seeds"] == 0, sign * r.get("value", 0.0)))


def table_rows(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of a comparison: head and rows."""
    rows = summary(comparison)
    name = next((r["metric"] for r in rows if r["seeds"]), "metric")
    head = [
        "method", _metric(name), "trained parameters", "ms a step", "MB at most", "kB on disk", "s of training", "learning rate", "seeds",
    ]  # fmt: skip
    body = []
    for r in rows:
        if not r["seeds"]:
            body.append([r["method"], "failed" if r["failed"] else "not run yet", *[""] * 6, "0"])
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
    seeds = ", ".join(map(str, comparison["seeds"]))
    page = Page(
        f"{_title(comparison['task'])}: {len(rows)} methods", f"{comparison['model']} · {comparison['data']} · seeds {seeds}",
        _verdict(done) if done else "No method came to an end.",
    )  # fmt: skip
    head, body = table_rows(comparison)
    page.section(
        "Results on rows held back",
        _table(head, body, numbers=range(1, len(head)), best=0 if done else None, kind="wide"),
        long=True,
    )
    if done:
        name = _metric(done[0]["metric"])
        trade = {r["method"]: (r["trained_parameters"], r["value"], r["deviation"]) for r in done}
        against = f"{_title(name)} against trained parameters" + (
            "; bars: one standard deviation" if len(comparison["seeds"]) > 1 else ""
        )
        pictures = [
            page.picture("tradeoff", plots.against(trade, "trained parameters", name, comparison["methods"]), against),
            page.picture(
                "results", plots.dots({r["method"]: r["values"] for r in done}, name), f"{_title(name)}, the best first"
            ),
        ]
        if learning := _learning(comparison, done[0]["metric"]):
            png = plots.curves(learning, "step", name, comparison["methods"])
            pictures.append(page.picture("learning", png, f"{_title(name)} on the validation rows, first seed"))
        for key, unit, caption in COSTS:
            scale = 1000 if key == "bytes" else 1
            png = plots.bars({r["method"]: r[key] / scale for r in done}, unit)
            pictures.append(page.picture(key, png, caption))
        page.section("Pictures", f'<div class="pictures">{"".join(pictures)}</div>', long=True)
        _best_details(page, comparison, done[0]["method"])
    if comparison.get("search"):
        rows_of = [
            [method, f"{t['rate']:.0e}", f"{t['value']:.3f}", f"{t['loss']:.3f}"]
            for method, tried in comparison["search"].items()
            for t in tried
        ]
        name = _metric(next((r["metric"] for r in done), "metric"))
        page.section(
            "Learning rates tried, on the validation rows",
            _table(["method", "rate", name, "loss"], rows_of, numbers=(1, 2, 3)),
        )
    failures = [[r["method"], f"{r['failed']} of {len(comparison['seeds'])}", r["error"]] for r in rows if r["failed"]]
    if failures:
        page.section("Failures", _table(["method", "seeds", "what it said"], failures, text=(2,), kind="cards"))
    page.section("Recipe", f"<pre>{html.escape(comparison['recipe'])}</pre>")
    return page


def _verdict(done: list[dict[str, Any]]) -> str:
    """The best method, and the smallest that does as well within the spread."""
    best, name = done[0], _metric(done[0]["metric"])
    spread = f" ± {best['deviation']:.3f} over {best['seeds']} seeds" if best["seeds"] > 1 else ""
    said = f"Best on rows held back: {best['method']}, {name} {best['value']:.3f}{spread}, "
    said += f"with {best['trained_parameters']:,} trained parameters."
    as_good = [r for r in done if abs(r["value"] - best["value"]) <= max(best["deviation"], r["deviation"])]
    smallest = min(as_good, key=lambda r: r["trained_parameters"])
    if smallest is not best:
        said += f" Within one standard deviation of it, {smallest['method']} is the smallest: {smallest['trained_parameters']:,}."
    if best["seeds"] == 1:
        said += " One seed tells little about small differences."
    return said


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
    pieces = []
    if details.get("confusion"):
        png = plots.confusion(details["confusion"], details["labels"])
        pieces.append(page.picture("confusion", png, f"Confusion matrix of {method}: a row for each true label"))
    if details.get("table"):
        pieces.append(_labels(details["table"]))
    if pieces:
        page.section(f"Where {method} is right", f'<div class="beside">{"".join(pieces)}</div>')
    _wrong(page, details, whose=method, most=10)


# -- pieces ------------------------------------------------------------------------------------------------------------


def _metric(name: str) -> str:
    return METRICS.get(name, name.replace("_", " "))


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def _size(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.1f} min"


def _numbers(pairs: Iterable[tuple[str, str]], first: bool = False) -> str:
    cells = ""
    for i, (name, value) in enumerate(pairs):
        cells += f"<div{' class=main' if first and i == 0 else ''}><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
    return f'<dl class="numbers">{cells}</dl>'


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    numbers: Iterable[int] = (),
    text: Iterable[int] = (),
    best: int | None = None,
    kind: str = "",
) -> str:
    """A table.

    Args:
        head: Names of the columns.
        rows: Cells.
        numbers: Columns of numbers, set to the right.
        text: Columns whose text may break.
        best: Row to mark.
        kind: ``"cards"``: rows become cards on a narrow screen; ``"wide"``: it scrolls there, and its first column stays.
    """
    kinds = {**dict.fromkeys(numbers, "n"), **dict.fromkeys(text, "text")}
    top = "".join(f"<th{' class=n' if kinds.get(i) == 'n' else ''}>{html.escape(h)}</th>" for i, h in enumerate(head))
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(
            f'<td class="{kinds.get(i, "name")}" data-head="{html.escape(head[i])}">{html.escape(_text(cell))}</td>'
            for i, cell in enumerate(row)
        )
        body += f"<tr{' class=best' if number == best else ''}>{cells}</tr>"
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cut(text: str, length: int = 300) -> str:
    """The beginning of a long text, without the line breaks that came with a web page."""
    text = re.sub(r"\s*(<br\s*/?>\s*)+", " ", text)
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " …"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
