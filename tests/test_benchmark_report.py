"""What the benchmark writes, of rows with and without a bound."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import run
from benchmarks.report import GROWTH, Ratio, Row, write


def test_all_files_are_written_where_some_rows_have_no_bound(tmp_path):
    grows = {"axis": "tokens", "drawn": "step"}
    rows = [
        Row("A shape", "LoRA: step", "s", "frozen model", [2.0, 2.2], [3.0, 3.3], [1.0, 1.1], [1.0, 1.1]),
        Row("Operations", "injection", "s", "", [0.5], [1.0]),
        Row(GROWTH, "32 tokens", "s", "frozen model", [2.0], [3.0], [1.0], [1.0], {**grows, "place": 32}),
        Row(GROWTH, "64 tokens", "s", "frozen model", [4.0], [6.0], [2.0], [2.0], {**grows, "place": 64}),
        Row(GROWTH, "4 loaded", "s", "", [1.0], [3.0], details={"axis": "adapters", "drawn": "load", "place": 4}),
    ]
    files = write(rows, {"rounds": 2}, tmp_path)
    assert {file.name for file in files} == {"bench.md", "bench.json", "bench.png", "growth.png"}
    assert all(file.stat().st_size for file in files)
    found = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert found[1]["ratios"]["ours/peer"]["median"] == 0.5 and found[1]["ratios"]["ours/bound"] is None


def test_a_bound_of_zero_gives_no_ratio():
    assert Ratio.of([3.0], [0.0]) is None
    assert Ratio.of([3.0, 4.0], [0.0, 2.0]).median == 2.0


def test_what_was_measured_is_written_even_if_a_later_section_fails(tmp_path, monkeypatch):
    def fails(plan, sides, say):
        raise RuntimeError("a worker died")

    row = Row("Operations", "save", "s", "", [0.5], [1.0])
    monkeypatch.setitem(run.SECTIONS, "operations", lambda plan, sides, say: [row])
    monkeypatch.setitem(run.SECTIONS, "growth", fails)
    here = ["--ours", sys.executable, "--peer", sys.executable, "--out", str(tmp_path)]
    with pytest.raises(RuntimeError, match="a worker died"):
        run.main(["--only", "operations", "--only", "growth", *here])
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][0]["measure"] == "save"
