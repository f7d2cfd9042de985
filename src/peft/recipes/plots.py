"""Pictures for reports, as PNG. Small, so that their letters can be read on a phone; in colours that nobody confuses."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from .errors import need

need("matplotlib", "A report")

import matplotlib  # noqa: E402

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter  # noqa: E402

INK, SOFT = "#1b2430", "#56616f"
# Okabe and Ito's colours, which can be told apart with any kind of colour vision; without their yellow, which white swallows.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", ":")
WIDTH = 4.7
"""Inches of most pictures."""
STYLE: Any = {
    "figure.dpi": 200, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e7ec",
    "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "legend.fontsize": 9,
}  # fmt: skip


def line_style(index: int) -> dict[str, Any]:
    """How a series is drawn: colour, marker and dashes, no two alike among the first twenty-one."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(COLORS) % len(DASHES)],
    }


def as_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def curves(series: dict[str, list[tuple[float, float]]], x: str, y: str, names: Sequence[str] = ()) -> bytes:
    """Lines.

    Args:
        series: Points by name.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        names: All names that other pictures of the page have, in one order, so that each looks the same in all.
    """
    with plt.rc_context(STYLE):
        many = len(series) > 3
        figure, axes = plt.subplots(figsize=(WIDTH, 3.1 + 0.2 * ((len(series) + 2) // 3 if many else 0)))
        for i, (name, points) in enumerate(series.items()):
            style = line_style(names.index(name) if name in names else i)
            if len(points) > 14:
                style["marker"] = None
            axes.plot([p[0] for p in points], [p[1] for p in points], label=name, ms=4, lw=1.6, **style)
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if many:
            figure.legend(loc="outside lower center", ncols=3)
        elif len(series) > 1:
            axes.legend()
        return as_png(figure)


def confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> bytes:
    """A confusion matrix: rows are the truth, shades are shares of a row."""
    values = np.array(matrix)
    shares = values / np.maximum(values.sum(1, keepdims=True), 1)
    size = min(9.0, 2.5 + 0.5 * len(labels))
    slant = len(labels) > 3 or max(map(len, labels)) > 12
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(max(size, 3.4), size * 0.9))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(
            range(len(labels)),
            labels,
            rotation=40 if slant else 0,
            ha="right" if slant else "center",
            rotation_mode="anchor",
        )
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel="predicted", ylabel="true")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if len(labels) <= 20:
            for (row, column), value in np.ndenumerate(values):
                shade = "white" if shares[row, column] > 0.5 else INK
                axes.text(column, row, f"{value:,}", ha="center", va="center", color=shade)
        return as_png(figure)


def against(points: dict[str, tuple[float, float, float]], x: str, y: str, names: Sequence[str] = ()) -> bytes:
    """Points with error bars over a logarithmic axis, each with its name.

    Args:
        points: Horizontal value, vertical value and deviation by name.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        names: As for :func:`curves`.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH * 1.15, 3.7))
        for i, (name, (across, up, deviation)) in enumerate(points.items()):
            style = line_style(names.index(name) if name in names else i) | {"linestyle": "none"}
            axes.errorbar(across, up, yerr=deviation or None, capsize=3, ms=6.5, elinewidth=1.2, **style)
        axes.set_xscale("log")
        axes.margins(x=0.16, y=0.16)
        _log_ticks(axes)
        axes.set(xlabel=f"{x}, logarithmic", ylabel=y)
        _name_points(figure, axes, points)
        return as_png(figure)


def _log_ticks(axes: Any) -> None:
    """Plain numbers on a logarithmic axis: decades, or 1, 2, 5 where it spans few of them."""
    low, high = axes.get_xlim()
    few = np.log10(high / low) < 2.2
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short(value: float, _: Any = None) -> str:
    """``20,000,000`` as ``20 M``."""
    for size, sign in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}"


def _name_points(figure: Any, axes: Any, points: dict[str, tuple[float, float, float]]) -> None:
    """Write each name beside its point, on the side where it covers least of what is there."""
    figure.draw_without_rendering()
    renderer, frame = figure.canvas.get_renderer(), axes.get_window_extent()
    scale = figure.dpi / 72
    spots = [axes.transData.transform((across, up)) for across, up, _ in points.values()]
    taken = [
        matplotlib.transforms.Bbox.from_bounds(a - 5 * scale, b - 5 * scale, 10 * scale, 10 * scale) for a, b in spots
    ]
    sides = [
        (8, 0, "left", "center"), (-8, 0, "right", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top"),
        (6, 8, "left", "bottom"), (6, -8, "left", "top"), (-6, 8, "right", "bottom"), (-6, -8, "right", "top"),
        (0, 21, "center", "bottom"), (0, -21, "center", "top"),
    ]  # fmt: skip
    for name, (across, up, _) in points.items():
        best: tuple[float, Any, Any] | None = None
        for dx, dy, ha, va in sides:
            text = axes.annotate(name, (across, up), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=9)
            box = text.get_window_extent(renderer)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 + 4 or box.y0 < frame.y0 or box.y1 > frame.y1 + 4
            covered = sum(
                max(0.0, min(box.x1, t.x1) - max(box.x0, t.x0)) * max(0.0, min(box.y1, t.y1) - max(box.y0, t.y0))
                for t in taken
            )
            cost = covered + (box.width * box.height if outside else 0.0)
            if best is None or cost < best[0] - 1e-9:
                if best is not None:
                    best[1].remove()
                best = cost, text, box
            else:
                text.remove()
        assert best is not None
        taken.append(best[2])


def dots(values: dict[str, Sequence[float]], x: str) -> bytes:
    """A line for each name: a small dot for each seed, a large one with a bar for mean and standard deviation."""
    with plt.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure, axes = plt.subplots(figsize=(WIDTH, 0.8 + 0.32 * len(values)))
        for row, found in enumerate(reversed(values.values())):
            mean, deviation = np.mean(found), np.std(found, ddof=1) if len(found) > 1 else None
            if len(found) > 1:
                axes.plot(found, [row] * len(found), "o", ms=3.5, color="#9aa5b1", zorder=2)
            axes.errorbar(mean, row, xerr=deviation, fmt="o", ms=7, capsize=3, color=COLORS[0], zorder=3)
            axes.annotate(f"{mean:.3f}", (mean, row), (0, 6), textcoords="offset points", ha="center", fontsize=8.5)
        axes.set_yticks(range(len(values)), list(values)[::-1])
        axes.set_ylim(-0.6, len(values) - 0.3)
        axes.margins(x=0.08)
        axes.set(xlabel=x)
        return as_png(figure)


def bars(values: dict[str, float], x: str) -> bytes:
    """Horizontal bars with their numbers; on a logarithmic axis where they differ by more than fifty times."""
    with plt.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure, axes = plt.subplots(figsize=(WIDTH, 0.8 + 0.32 * len(values)))
        names = list(values)[::-1]
        axes.barh(names, [values[n] for n in names], color=COLORS[0], height=0.62)
        for i, name in enumerate(names):
            number = f"{values[name]:,.0f}" if values[name] >= 100 else f"{values[name]:.3g}"
            axes.annotate(number, (values[name], i), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
        log = min(values.values()) > 0 and max(values.values()) > 50 * min(values.values())
        if log:
            axes.set_xscale("log")
            _log_ticks(axes)
        axes.set(xlabel=f"{x}, logarithmic" if log else x)
        axes.margins(x=0.16)
        return as_png(figure)


def scatter(points: Sequence[Sequence[float]]) -> bytes:
    """True values against predicted ones."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(3.9, 3.7))
        across, up = zip(*points, strict=True)
        axes.scatter(across, up, s=12, alpha=0.6, color=COLORS[0], linewidths=0)
        ends = [min(*across, *up), max(*across, *up)]
        axes.plot(ends, ends, color=SOFT, lw=1)
        axes.annotate(
            "predicted = true",
            (ends[1], ends[1]),
            (-4, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8.5,
        )
        axes.set(xlabel="true", ylabel="predicted")
        return as_png(figure)
