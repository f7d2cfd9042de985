"""Rows of results: their paired ratios, and the table, the JSON file and the plot made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

GROWTH = "Growth"


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios with their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], bounds: Sequence[float]) -> Ratio | None:
        """The ratios of values to bounds measured next to them; none where one of the two was not measured, or the bound is zero."""
        pairs = zip(values, bounds, strict=True) if values and bounds else ()
        ratios = [value / bound for value, bound in pairs if bound]
        if not ratios:
            return None
        if len(ratios) == 1:
            return cls(ratios[0], ratios[0], ratios[0])
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        return cls(median(ratios), low, high)

    def __str__(self) -> str:
        middle, low, high = (f"{x:.2f}" if x >= 0.1 else f"{x:.2g}" for x in (self.median, self.low, self.high))
        return middle if self.low == self.high else f"{middle} ({low}–{high})"


@dataclass
class Row:
    """One measure on both sides. The lists run in parallel: what stands at one place was measured one after the other.

    Attributes:
        section: The table it belongs to.
        measure: What was measured.
        unit: `"s"` or `"bytes"`.
        bound: What the bound is, or empty where there is none.
        ours: Values of this library.
        peer: Values of the peer.
        ours_bound: The bound on our side.
        peer_bound: The bound on the peer's side.
        details: Anything more that the JSON file should tell.
    """

    section: str
    measure: str
    unit: str
    bound: str = ""
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    ours_bound: list[float] = field(default_factory=list)
    peer_bound: list[float] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, side: str, value: float, bound: float | None = None) -> None:
        """Adds what one side measured in one round."""
        getattr(self, side).append(value)
        if bound is not None:
            getattr(self, f"{side}_bound").append(bound)

    def ratios(self) -> dict[str, Ratio | None]:
        """The three columns of the table."""
        return {
            "peer/bound": Ratio.of(self.peer, self.peer_bound) if self.peer_bound else None,
            "ours/bound": Ratio.of(self.ours, self.ours_bound) if self.ours_bound else None,
            "ours/peer": Ratio.of(self.ours, self.peer),
        }


def markdown(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """Makes the tables, one a section.

    Args:
        rows: The rows of the run.
        settings: What the run was made with; shown below the tables.

    Returns:
        The Markdown text.
    """
    lines = ["Ratios: median (lower–upper quartile) of pairs measured one after the other; less is better.", ""]
    for section in dict.fromkeys(row.section for row in rows):
        shown = [row for row in rows if row.section == section]
        bounds = {row.bound for row in shown}
        lines += [f"### {section}", ""]
        if len(bounds) == 1:
            lines += [f"Bound: {shown[0].bound}.", ""]
        lines += ["| measure | peer/bound | ours/bound | ours/peer |", "|---|---|---|---|"]
        for row in shown:
            cells = [str(ratio) if ratio else "–" for ratio in row.ratios().values()]
            bound = f" (bound: {row.bound})" if row.bound and len(bounds) > 1 else ""
            lines.append(f"| {row.measure}{bound} | {' | '.join(cells)} |")
        lines.append("")
    lines += [", ".join(f"{key} {value}" for key, value in settings.items()), ""]
    return "\n".join(lines)


def write(rows: Sequence[Row], settings: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `bench.json` and `bench.md`, and `bench.png` and `growth.png` where matplotlib is installed.

    Args:
        rows: The rows of the run.
        settings: What the run was made with.
        folder: Where to write.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, data, picture = (folder / f"bench.{ending}" for ending in ("md", "json", "png"))
    chart = folder / "growth.png"
    table.write_text(markdown(rows, settings))
    results = [asdict(row) | {"ratios": {k: asdict(r) if r else None for k, r in row.ratios().items()}} for row in rows]
    data.write_text(json.dumps({"settings": settings, "rows": results}, indent=1, ensure_ascii=False) + "\n")
    pictures = {picture: plot, chart: plot_growth}
    for file in pictures:
        file.unlink(missing_ok=True)
    return [table, data, *(file for file, draw in pictures.items() if draw(rows, file))]


def _pyplot() -> Any:
    """matplotlib's pyplot that writes files, or none where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(rows: Sequence[Row], file: Path) -> bool:
    """Draws both sides against their bound, a panel a section.

    Args:
        rows: The rows of the run.
        file: The picture to write.

    Returns:
        Whether it was drawn: not without matplotlib, nor without rows that have a bound.
    """
    pyplot = _pyplot()
    drawn = [row for row in rows if row.bound and row.section != GROWTH]
    sections = list(dict.fromkeys(row.section for row in drawn))
    if pyplot is None or not sections:
        return False
    counts = [sum(row.section == section for row in drawn) for section in sections]
    figure, axes = pyplot.subplots(
        len(sections),
        figsize=(9, 1.2 * len(sections) + 0.4 * len(drawn)),
        height_ratios=[count + 2 for count in counts],
        squeeze=False,
        layout="constrained",
    )
    for axis, section in zip(axes[:, 0], sections, strict=True):
        shown = [row for row in drawn if row.section == section]
        for offset, column, color in ((0.2, "ours/bound", "tab:blue"), (-0.2, "peer/bound", "tab:gray")):
            ratios = [row.ratios()[column] for row in shown]
            points = [(place, ratio) for place, ratio in enumerate(ratios) if ratio]
            axis.barh(
                [place - offset for place, _ in points],
                [ratio.median for _, ratio in points],
                xerr=list(zip(*[(r.median - r.low, r.high - r.median) for _, r in points], strict=True)) or None,
                height=0.4,
                label=column,
                color=color,
            )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(shown)), [row.measure for row in shown], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(section, fontsize=9)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return True


def plot_growth(rows: Sequence[Row], file: Path) -> bool:
    """Draws how each measure grows, ours and the peer's with the bound: a panel for each measure and each axis.

    Args:
        rows: The rows of the run.
        file: The picture to write.

    Returns:
        Whether it was drawn: not without matplotlib, nor without rows of the section `GROWTH`.
    """
    pyplot = _pyplot()
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.section == GROWTH:
            panels.setdefault((row.details["axis"], row.details["drawn"]), []).append(row)
    if pyplot is None or not panels:
        return False
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False, layout="constrained")
    for panel, ((axis, measure), points) in zip(axes[0], panels.items(), strict=True):
        places = [row.details["place"] for row in points]
        scale, unit = (1e6, "MB") if points[0].unit == "bytes" else (1e-3, "ms")
        for name, column, color in (
            ("frozen model", "ours_bound", "black"),
            ("peer", "peer", "tab:gray"),
            ("ours", "ours", "tab:blue"),
        ):
            measured = [(place, getattr(row, column)) for place, row in zip(places, points, strict=True)]
            shown = [(place, median(values) / scale) for place, values in measured if values]  # loads have no bound
            if shown:
                panel.plot(*zip(*shown, strict=True), "o-", label=name, color=color)
        panel.set(xlabel=axis, ylabel=unit, title=measure, ylim=(0, None))
    axes[0, 0].legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return True
