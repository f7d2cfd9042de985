"""Training steps on a GPU, ours, the peer's and the bound's: time, and the peak of the device's memory.

    python -m benchmarks.device --peer .venv-peer/bin/python

Each side runs in a process of its own, one after the other: nothing may run beside it. Prints a table of ratios to the frozen model's own
step, which stands first; `build/device.json` holds what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.methods import BERT, FROZEN, FULL, LLAMA, METHODS, Shape
from benchmarks.sides import Side

LARGE = replace(LLAMA, name="Llama-like 8×576, batch 16×512", batch=16, tokens=512)
SHAPES = (BERT, LARGE)
NAMES = (FROZEN, FULL, *(method.name for method in METHODS))
WARM, STEPS = 4, 15


def measure(shape: Shape, name: str, device: str, dtype: str) -> dict[str, float] | None:
    """Milliseconds of a step and MiB of its peak, or `None` where this side lacks the method."""
    import torch

    from benchmarks.worker import Subject

    try:
        subject = Subject.build(shape, name)
    except AttributeError:
        return None
    subject.model.to(device)
    subject.inputs, subject.probe = subject.inputs.to(device), subject.probe.to(device)
    on_gpu = device == "cuda"

    def step() -> None:
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = subject.loss()
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(WARM):
        step()
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return {"ms": 1e3 * statistics.median(times), "mib": peak / 2**20}


def worker(device: str, dtype: str) -> None:
    """Measure everything on this side."""
    found = [[s.name, name, measure(s, name, device, dtype)] for s in SHAPES for name in NAMES]
    print(json.dumps(found))


def table(ours: list[Any], peer: list[Any]) -> str:
    """Ratios to the frozen model of the same side, by shape."""
    lines = []
    for shape in SHAPES:
        sides = [{name: value for s, name, value in side if s == shape.name} for side in (ours, peer)]
        lines += [
            f"{shape.name}:",
            "",
            "| method | step, peer | step, ours | peak, peer | peak, ours |",
            "|---|" + "---:|" * 4,
        ]
        for name in NAMES[1:]:
            cells = []
            for unit in ("ms", "mib"):
                for side in reversed(sides):
                    value, bound = side[name], side[FROZEN]
                    cells.append(f"{value[unit] / bound[unit]:.2f}" if value and bound[unit] else "–")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=os.environ.get("PEFT_PEER_PYTHON", ".venv-peer/bin/python"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=Path("build/device.json"))
    given = parser.parse_args()
    code = f"from benchmarks.device import worker; worker({given.device!r}, {given.dtype!r})"
    sides = [Side.make("ours", sys.executable, 1), Side.make("peer", given.peer, 1)]
    found = {side.name: json.loads(side.run(code).strip().splitlines()[-1]) for side in sides}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1))
    print(table(found["ours"], found["peer"]))


if __name__ == "__main__":
    main()
