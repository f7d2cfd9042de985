"""Pictures for reports, as PNG."""

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

COLORS = (
    "#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d", "#475569", "#b45309", "#4338ca", "#0f766e",
)  # fmt: skip
STYLE: Any = {
    "figure.dpi": 150, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip


def color(index: int) -> str:
    """The colour of a series."""
    return COLORS[index % len(COLORS)]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def curves(series: dict[str, list[tuple[float, float]]], x: str, y: str, log: bool = False) -> bytes:
    """Lines.

    Args:
        series: Points by name.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        log: Logarithmic vertical axis.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.4))
        for i, (name, points) in enumerate(series.items()):
            marker = "o" if len(points) < 15 else None
            axes.plot(
                [p[0] for p in points], [p[1] for p in points], color=color(i), label=name, marker=marker, ms=4, lw=1.6
            )
        axes.set(xlabel=x, ylabel=y)
        if log:
            axes.set_yscale("log")
        if len(series) > 1:
            axes.legend(fontsize=8, ncols=2 if len(series) > 5 else 1)
        return _png(figure)


def confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> bytes:
    """A confusion matrix: rows are the truth."""
    values = np.array(matrix)
    shares = values / np.maximum(values.sum(1, keepdims=True), 1)
    size = min(9.0, 2.6 + 0.45 * len(labels))
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(size, size * 0.9))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(
            range(len(labels)),
            labels,
            rotation=45 if len(labels) > 3 else 0,
            ha="right" if len(labels) > 3 else "center",
        )
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel="predicted", ylabel="true")
        if len(labels) <= 20:
            for (row, column), value in np.ndenumerate(values):
                axes.text(
                    column,
                    row,
                    f"{value:,}",
                    ha="center",
                    va="center",
                    color="white" if shares[row, column] > 0.5 else "black",
                )
        return _png(figure)


def against(points: dict[str, tuple[float, float, float]], x: str, y: str) -> bytes:
    """Points with error bars over a logarithmic axis, each with its name.

    Args:
        points: Horizontal value, vertical value and deviation by name.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4))
        for i, (name, (across, up, deviation)) in enumerate(points.items()):
            axes.errorbar(across, up, yerr=deviation or None, fmt="o", color=color(i), capsize=3, ms=6)
            above = i % 2 == 0  # names of neighbours on either side
            axes.annotate(
                name,
                (across, up),
                textcoords="offset points",
                xytext=(5, 6 if above else -12),
                fontsize=8.5,
                color=color(i),
            )
        axes.set_xscale("log")
        axes.margins(x=0.15, y=0.15)
        axes.set(xlabel=x, ylabel=y)
        return _png(figure)


def bars(values: dict[str, float], x: str, deviations: dict[str, float] | None = None) -> bytes:
    """Horizontal bars with their numbers; on a logarithmic axis where they differ by more than fifty times."""
    with plt.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure, axes = plt.subplots(figsize=(6, 0.7 + 0.36 * len(values)))
        names = list(values)[::-1]
        errors = [(deviations or {}).get(n, 0.0) for n in names]
        axes.barh(names, [values[n] for n in names], xerr=errors if any(errors) else None, color=COLORS[0], alpha=0.85)
        for i, name in enumerate(names):
            number = f"{values[name]:,.0f}" if values[name] >= 100 else f"{values[name]:.4g}"
            axes.text(values[name] + errors[i], i, f"  {number}", va="center", fontsize=8.5)
        if min(values.values()) > 0 and max(values.values()) > 50 * min(values.values()):
            axes.set_xscale("log")
        axes.set(xlabel=x)
        axes.margins(x=0.15)
        return _png(figure)


def scatter(points: Sequence[Sequence[float]]) -> bytes:
    """True values against predicted ones."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4, 3.8))
        across, up = zip(*points, strict=True)
        axes.scatter(across, up, s=10, alpha=0.6, color=COLORS[0])
        ends = [min(*across, *up), max(*across, *up)]
        axes.plot(ends, ends, color="0.6", lw=1)
        axes.set(xlabel="true", ylabel="predicted")
        return _png(figure)
