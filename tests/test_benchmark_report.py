"""What the benchmark writes, of rows with and without a bound."""

from __future__ import annotations

import json

from benchmarks.report import GROWTH, Row, write


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
