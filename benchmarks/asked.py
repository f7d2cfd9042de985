"""The command line of the smaller benchmarks: which methods, on which shapes."""

from __future__ import annotations

import argparse

from benchmarks.methods import METHODS, SHAPES, Shape


def asked(program: str, description: str | None) -> tuple[list[Shape], list[str]]:
    """The shapes and the names of the methods that the command line asks for; all of either by default.

    Args:
        program: Name of the module.
        description: What its help says first.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="rows of the table of methods; all by default")
    parser.add_argument("--only", default="", metavar="SHAPE", help="the beginning of a shape's name")
    args = parser.parse_args()
    known = [method.name for method in METHODS]
    for name in args.methods:
        if name not in known:
            parser.error(f"{name!r} is not among the methods: {', '.join(known)}")
    shapes = [shape for shape in SHAPES if shape.name.lower().startswith(args.only.lower())]
    return shapes, args.methods or known
