"""Measures this library and the peer alternately in one run: `python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import pretrained
from benchmarks.measures import SECTIONS, make_plan
from benchmarks.report import Row, markdown, write
from benchmarks.sides import ROOT, Side


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    peer = os.environ.get("PEFT_PEER_PYTHON", str(ROOT / ".venv-peer" / "bin" / "python"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and methods: under three minutes")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a section, shape or method; may be repeated"
    )
    parser.add_argument("--repeats", type=int, help="rounds of step and forward times (7; quick: 3)")
    parser.add_argument("--ours", default=sys.executable, metavar="PYTHON", help="our interpreter (default: this one)")
    parser.add_argument("--peer", default=peer, metavar="PYTHON", help="the peer's (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each worker (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of the results (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        arguments: The command line; `sys.argv` by default.

    Returns:
        The exit status.
    """
    args = parse(arguments)
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {text}", file=sys.stderr, flush=True)

    options = {"dtype": args.dtype, "checkpointing": args.checkpointing}
    try:
        plan = make_plan(args.only, args.quick, args.repeats, options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not Path(args.peer).exists():
        print(f"{args.peer} is missing: make the peer's environment first, or name one with --peer", file=sys.stderr)
        return 2
    if "real" in plan.sections:
        os.environ.update(pretrained.prepare(args.out.resolve() / "models", say))
    # An absolute path, but not a resolved one: a virtual environment's interpreter is a link.
    sides = [Side.make(n, os.path.abspath(p), args.threads) for n, p in (("ours", args.ours), ("peer", args.peer))]
    settings = describe(sides) | {"threads": args.threads, "rounds": plan.repeats, "quick": args.quick} | options
    rows: list[Row] = []
    files: list[Path] = []
    for section in plan.sections:
        rows += SECTIONS[section](plan, sides, say)
        order = list(dict.fromkeys(row.section for row in rows))
        rows.sort(key=lambda row: order.index(row.section))
        files = write(rows, settings, args.out)  # each time: an hour's work is not lost with its last minute
    say("done")
    print(markdown(rows, settings))
    print("Written:", *files)
    return 0


def describe(sides: list[Side]) -> dict[str, Any]:
    """What the run compares, and a warning where the sides differ in more than `peft`."""
    ours, peer = (side.versions() for side in sides)
    for name in ("torch", "transformers"):
        if ours[name] != peer[name]:
            print(f"Warning: {name} is {ours[name]} here and {peer[name]} for the peer", file=sys.stderr)
    return {
        "ours": ours.pop("peft"),
        "peer": peer.pop("peft"),
        **ours,
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    sys.exit(main())
